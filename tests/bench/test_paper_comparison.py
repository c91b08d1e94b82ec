"""bench.paper --experiment methods: the budget, the orderings that others found, and the page of its rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.runs import command

from bench.commands import RunFailed, Usage
from bench.methods import RUNS, MethodRow
from bench.paper import comparison, orderings
from bench.paper.__main__ import main
from bench.paper.comparison import GAME, NO_GAME, SUPERVISED, group, runs, steps_for, training_flags
from bench.paper.cost import Span
from bench.paper.experiments import SCALES
from bench.paper.orderings import ORDERINGS, Ordering, best_of_groups, holds, page, results_table
from bench.paper.runs import ExperimentPlan
from bench.paper.training import settings_digest
from bench.rows import newest_file, write_json
from engine.configuration.config import Config
from engine.configuration.flags import given_flags
from engine.support.errors import InputError
from engine.train import parser

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"processor": "P", "threads": 1, "commit": "abc", "date": "2026-01-02", "versions": {"torch": "2"}}


def plan_in(folder: Path, scale: str = "digits", **given) -> ExperimentPlan:
    values = {"seeds": (0, 1), "steps": None, "smoke": False, "data": None, "device": "cpu"}
    return ExperimentPlan(scale=SCALES[scale], folder=folder, **{**values, **given})


def row(name: str, seed: int, distance: float, **other) -> MethodRow:
    values = {
        "flags": "--preset digits --method own --seed 5 --steps 9", "summary": "moments", "preset_steps": 300,
        "steps": 30, "minibatch": 64, "seconds": 60.0, "chroma": 1.0, "edge_level": 2.0,
        "kernel_distance": distance / 1000, "frechet_distance": 3.0, "precision": 0.5, "recall": 0.25, "distinct": 700,
        "confident": 0.5, "least_share": 0.04, "cpu_seconds": 100.0, "mebibytes": 900.0, "judge": "the judge",
        "scale": "digits", "budget": 100, "smoke": False, "environment": ENVIRONMENT,
    }  # fmt: skip
    return MethodRow(name=name, seed=seed, **{**values, **other})


def rows_of(**distances: list[float]) -> list[MethodRow]:
    return [row(name.replace("_", "-"), seed, x) for name, found in distances.items() for seed, x in enumerate(found)]


@pytest.mark.parametrize("scale", SCALES)
def test_every_method_is_a_run_of_engine_train(scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "pretrained", lambda name, plan: Path(f"{name}.safetensors"))
    plan = plan_in(tmp_path, scale)
    found = runs(plan)
    everything = {*RUNS["comparing"], *RUNS["critics"], *RUNS["codes"], "mm-gan"}
    assert set(found) - {"improved-gan-labels"} == everything
    assert ("improved-gan-labels" in found) is (scale in ("digits", "cifar10", "fashion"))
    datasets = set()
    for name in found if scale == "digits" else ("gfmn", "gmmn", "glann", "wgan", "mm-gan"):
        arguments = parser().parse_args(training_flags(name, plan, 7, 90))
        config = Config.build(arguments.preset, given_flags(arguments))
        assert (config.training.steps, config.training.seed) == (90, 7)
        datasets.add((config.data.dataset, config.data.image_size))
    assert len(datasets) == 1


def test_rows_are_checked_without_their_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the digest of settings weights count for nothing, and a machine that runs nothing need not have them."""
    monkeypatch.setattr(comparison, "pretrained", lambda name, plan: pytest.fail(f"{name} is pretrained"))
    plan = plan_in(tmp_path, "cifar10")
    kept = {}
    for name, weights in (("gfmn", (Path("vgg19.safetensors"), Path("resnet18.safetensors"))), ("vae", ())):
        flags = training_flags(name, plan, 0, 30, weights)
        kept[name, 0] = row(name, 0, 1.0, scale="cifar10", settings=settings_digest(flags))
    only = plan_in(tmp_path, "cifar10", seeds=(0,), only=("gfmn", "vae"))
    assert not list(comparison.compare(only, 100, [], kept))
    kept["gfmn", 0] = row("gfmn", 0, 1.0, scale="cifar10", settings="another")
    with pytest.raises(InputError, match="other settings"):
        list(comparison.compare(only, 100, [], kept))


def test_groups() -> None:
    assert [group(name) for name in ("gfmn", "glann", "wae-mmd", "wae-gan", "began", "improved-gan-labels")] == [
        NO_GAME, NO_GAME, NO_GAME, GAME, GAME, SUPERVISED,
    ]  # fmt: skip


def test_first_stages_keep_their_share(tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    # A sixth and two thirds, as in the presets.
    for name, flag, steps in (("glann", "--glo-steps", "50"), ("gmmn-ae", "--autoencoder-steps", "200")):
        flags = training_flags(name, plan, 0, 300)
        assert flags[flags.index(flag) + 1] == steps
    assert "--glo-steps" not in training_flags("glo", plan, 0, 300)


def test_averages_of_weights_keep_their_share(tmp_path: Path) -> None:
    """Where they forget the beginning in a preset's steps, they forget it in fewer."""

    def decay(name: str, steps: int, scale: str = "digits") -> str | None:
        flags = training_flags(name, plan_in(tmp_path, scale), 0, steps, weights=())
        return flags[flags.index("--generator-ema") + 1] if "--generator-ema" in flags else None

    of_preset = Config.build("dcgan", {}).training
    assert (of_preset.generator_ema, of_preset.steps) == (0.995, 1500)
    short = decay("dcgan", 300)
    assert short is not None
    assert float(short) ** 300 == pytest.approx(0.995**1500, rel=0.01)
    assert decay("dcgan", 1500) is None
    assert decay("gfmn", 300, "cifar10") is None  # which has none


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[Span]]]:
    """Nothing is trained: a step costs a quarter of a second, and one of a second stage three quarters. Steps of the
    runs, and those that would be timed."""
    found: list[tuple[int, list[Span]]] = []

    def seconds_per_step(flags: list[str], spans: list[Span], threads: int | None) -> list[float]:
        found.append((int(flags[flags.index("--steps") + 1]), spans))
        return [0.25, 0.75][: len(spans)]

    monkeypatch.setattr(comparison, "seconds_per_step", seconds_per_step)
    monkeypatch.setattr(comparison, "pretrained", lambda name, plan: Path(f"{name}.safetensors"))
    return found


def test_a_step_s_cost_is_kept(measured: list[tuple[int, list[Span]]], tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    assert comparison.step_cost("gfmn", plan) == pytest.approx(0.25)
    assert comparison.step_cost("gfmn", plan) == pytest.approx(0.25)
    assert measured == [(900, [Span(5, 20)])]
    assert (steps_for(100, 0.25), steps_for(100, 0.26), steps_for(1, 5)) == (400, 380, 10)
    file = next((tmp_path / "methods-digits/costs").glob("gfmn.json"))
    kept = json.loads(file.read_text())
    for other in ({"settings": "another"}, {"device": "cuda"}, {"flags": kept["flags"][:-1]}):
        file.write_text(json.dumps({**kept, **other}))
        with pytest.raises(InputError, match="was run with other flags"):
            comparison.step_cost("gfmn", plan)


@pytest.mark.parametrize(
    ("scale", "name", "span"),
    [
        ("digits", "sngan", Span(5, 20)),
        ("digits", "imle", Span(5, 20)),  # two pools of ten steps
        ("cifar10", "imle", Span(5, 20)),
        ("cifar10", "wgan", Span(25, 500)),  # 25 steps of 100 critic steps, and every 500th after them
        ("cifar10", "molm", Span(5, 100)),  # a moment network every 100 steps
    ],
)
def test_steps_that_are_unlike_others_count_in_their_share(
    scale: str, name: str, span: Span, measured: list[tuple[int, list[Span]]], tmp_path: Path
) -> None:
    comparison.step_cost(name, plan_in(tmp_path, scale))
    assert measured[0][1] == [span]


def test_every_stage_counts_in_its_share(measured: list[tuple[int, list[Span]]], tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    # A sixth and two thirds of the presets' steps; glann's second stage has a pool every 14 steps.
    assert comparison.step_cost("glann", plan) == pytest.approx((15 * 0.25 + 75 * 0.75) / 90)
    assert comparison.step_cost("gmmn-ae", plan) == pytest.approx((60 * 0.25 + 30 * 0.75) / 90)
    assert measured == [(90, [Span(5, 10), Span(5, 70)]), (90, [Span(5, 55), Span(5, 25)])]
    of_halves = plan_in(tmp_path, "fashion")
    assert comparison.step_cost("glann", of_halves) == pytest.approx((0.25 + 0.75) / 2)


@pytest.fixture
def pretrained() -> list[list[int]]:
    """Seeds whose networks were pretrained, a command each."""
    return []


@pytest.fixture
def trained(pretrained: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Nothing is trained or judged; the flags of what would be."""
    found: list[list[str]] = []

    def train(flags: list[str], folder: Path, threads: int | None) -> Usage:
        found.append(list(flags))
        if "frechet" in flags:
            raise RunFailed("the loss is nan")
        folder.mkdir(parents=True, exist_ok=True)
        return Usage(60.0, 100.0, 900.0)

    def judged(name: str, flags: list[str], *_, seed: int, budget: int, smoke: bool, settings: str, **__) -> MethodRow:
        steps = int(flags[flags.index("--steps") + 1])
        given = {"flags": " ".join(flags), "budget": budget, "smoke": smoke, "settings": settings, "steps": steps}
        return row(name, seed, 1.0, **given)

    monkeypatch.setattr(comparison, "train", train)
    monkeypatch.setattr(comparison, "judged", judged)
    monkeypatch.setattr(comparison, "pretrain", lambda seeds: pretrained.append(list(seeds)))
    monkeypatch.setattr(comparison, "draw", lambda *_: None)
    monkeypatch.setattr(comparison, "step_cost", lambda name, plan: {"vae": 0.5, "gfmn": 0.25}.get(name, 1.0))

    class Settings:
        class data:
            image_size = 32

    monkeypatch.setattr(comparison.Config, "load", lambda _: Settings)
    monkeypatch.setattr(comparison, "evaluation_network", lambda *_, **__: type("Network", (), {"label": "judge"}))
    return found


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_rows_are_merged_and_finished_runs_stay(
    jobs: str,
    trained: list[list[str]],
    pretrained: list[list[int]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "rows.json"
    argv = ["--experiment", "methods", "--device", "cpu", "--runs", str(tmp_path), "--json", str(file), "--jobs", jobs]
    main([*argv, "--seeds", "1", "--only", "vae"])
    main([*argv, "--seeds", "2", "--only", "gfmn", "vae"])
    shown = [(entry["name"], entry["seed"]) for entry in json.loads(file.read_text())]
    assert shown == [("gfmn", 0), ("gfmn", 1), ("vae", 0), ("vae", 1)]
    assert len(trained) == 4
    assert pretrained == [[], [0, 1]]  # vae matches no network, and gfmn another one with each seed
    steps = {flags[flags.index("--method") + 1] if "--method" in flags else "gfmn": flags for flags in trained}
    assert {name: flags[flags.index("--steps") + 1] for name, flags in steps.items()} == {"gfmn": "400", "vae": "200"}
    code, text = command(main, [*argv, "--budget", "50", "--only", "vae"], capsys)
    assert (code, len(text.splitlines())) == (2, 1)
    assert "rows of digits and 100 seconds; give another file" in text
    entries = json.loads(file.read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{**entries[0], "device": "cuda"}, *entries[1:]]))
    code, text = command(main, [*argv, "--json", str(other), "--only", "vae"], capsys)
    assert (code, len(text.splitlines())) == (2, 1)
    assert f"--json: {other} has rows of --device cuda; give that, or another file" in text
    code, text = command(main, [*argv[:-4], "--budget", "50", "--only", "vae"], capsys)
    assert "was run with other flags" in text


def test_seeds_are_shared_by_machines(
    trained: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs that have rows are not run again, and their steps are those of other seeds, whatever a step costs there."""
    file = tmp_path / "rows.json"
    argv = ["--experiment", "methods", "--device", "cpu", "--json", str(file), "--only", "vae", "--runs"]
    main([*argv, str(tmp_path / "one"), "--seeds", "1"])
    monkeypatch.setattr(comparison, "step_cost", lambda *_: 5.0)
    main([*argv, str(tmp_path / "other"), "--seeds", "3"])
    assert [flags[flags.index("--seed") + 1] for flags in trained] == ["0", "1", "2"]
    assert {entry["steps"] for entry in json.loads(file.read_text())} == {200}
    before = file.read_text()
    main([*argv, str(tmp_path / "third"), "--seeds", "3"])
    assert len(trained) == 3
    assert file.read_text() == before
    entries = json.loads(before)
    for other in ({"settings": "another"}, {"steps": 190}):
        file.write_text(json.dumps([{**entries[0], **other}, *entries[1:]]))
        code, text = command(main, [*argv, str(tmp_path / "third"), "--seeds", "4"], capsys)
        assert (code, len(text.splitlines())) == (2, 1)
        assert "--json: its row of vae, seed" in text
        assert len(trained) == 3


def test_a_method_that_fails_is_named_at_the_end(
    trained: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    argv = ["--experiment", "methods", "--device", "cpu", "--runs", str(tmp_path), "--json", str(file), "--seeds", "1"]
    code, text = command(main, [*argv, "--only", "gfmn", "frechet", "vae"], capsys)
    assert code == 2
    assert "1 failed, the others are done: frechet, seed 0: the loss is nan" in text
    assert [entry["name"] for entry in json.loads(file.read_text())] == ["gfmn", "vae"]


def test_rows_that_another_command_wrote_meanwhile_are_kept(
    trained: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.json"
    argv = ["--experiment", "methods", "--device", "cpu", "--json", str(file), "--seeds", "1", "--runs"]
    judged = comparison.judged

    def meanwhile(name: str, *given, **more) -> MethodRow:
        if name == "vae":
            monkeypatch.setattr(comparison, "judged", judged)
            main([*argv, str(tmp_path / "other"), "--only", "gfmn"])
        return judged(name, *given, **more)

    monkeypatch.setattr(comparison, "judged", meanwhile)
    main([*argv, str(tmp_path / "own"), "--only", "vae", "ae"])
    assert [entry["name"] for entry in json.loads(file.read_text())] == ["gfmn", "ae", "vae"]


@pytest.mark.parametrize(
    ("distances", "word"),
    [
        ({"glann": [1.0, 1.1, 0.9], "glo": [2.0, 2.1, 1.9]}, "agrees"),
        ({"glann": [2.0, 2.1, 1.9], "glo": [1.0, 1.1, 0.9]}, "disagrees"),
        ({"glann": [1.0, 3.0, 2.0], "glo": [2.0, 2.4, 2.8]}, "undecided"),
        ({"glann": [1.0], "glo": [2.0]}, "undecided"),
    ],
)
def test_orderings_need_more_than_the_seeds_spread(distances: dict[str, list[float]], word: str) -> None:
    sentence = holds(rows_of(**distances), Ordering("glann", "glo", "the source"))
    assert sentence is not None
    assert sentence.startswith(f"glann before glo (the source): **{word}** (glann ")
    assert holds(rows_of(glann=[1.0, 2.0]), Ordering("glann", "glo", "the source")) is None


def test_orderings_are_of_methods_that_run_and_have_sources(tmp_path: Path) -> None:
    names = set(runs(plan_in(tmp_path)))
    assert {name for entry in ORDERINGS for name in (entry.better, entry.worse)} <= names
    everywhere = {(entry.better, entry.worse) for entry in ORDERINGS if "MNIST" in entry.source}
    assert everywhere == {
        *(("glann", worse) for worse in ("glo", "mm-gan", "vae")),
        *(("wgan", worse) for worse in ("dcgan", "glo", "lsgan", "mm-gan", "vae")),
        *(("wgan-gp", worse) for worse in ("glo", "vae")),
        *((better, "vae") for better in ("began", "dcgan", "lsgan", "mm-gan")),
        ("dcgan", "mm-gan"),
    }


def test_the_page_is_its_rows() -> None:
    rows = rows_of(
        gfmn=[1.0, 1.2], glann=[3.0, 3.1], glo=[2.0, 2.1], vae=[9.0, 9.2], sngan=[4.0, 4.1], wgan_gp=[4.0, 4.2]
    )
    text = page([rows])
    names = list(comparison.runs_of(SCALES["digits"]))
    assert f"**12 of {3 * len(names)} runs so far.** No run of gfmn-ema, mmd, frechet, " in text
    everything = [row(name, seed, 1.0) for name in names for seed in range(3)]
    assert not any(word in page([everything]) for word in ("so far", "No run of"))
    assert "so far.** No run of mmd. 100 seconds" in page([[entry for entry in everything if entry.name != "mmd"]])
    held, rest = text.split("### Orderings that don't hold here")
    lost, left = rest.split("### Orderings that these runs leave open")
    assert "glann before vae" in held
    assert "gfmn before sngan" in held
    assert "glann before glo" in lost
    assert "sngan before wgan-gp" in left
    assert "dfm" not in left
    assert "| VAE | vae | 50.0 ± 0.0 | 9.100 ± 0.141 | 3.000 ± 0.000 |" in left
    assert "| MM GAN |" not in left
    assert "![Samples of every method, seed 0](comparison.png)" in text
    settings = "| gfmn | no adversarial training | `--preset digits --method own` | moments | 30 × 64 | 10% |"
    assert f"{settings} 50.0 ± 0.0 | 4.000 ± 0.000 | 1.100 ± 0.141 |" in text
    assert "100 seconds of training for each method, seeds 0, 1; distances, precision and recall by the judge." in text
    assert best_of_groups(rows) == [
        "no adversarial training, 4 methods: gfmn is closest (1.100 ± 0.141), then glo (2.050 ± 0.071)",
        "adversarial, 2 methods: sngan is closest (4.050 ± 0.071), then wgan-gp (4.100 ± 0.141)",
        "of the groups' closest, gfmn (no adversarial training) is closest (1.100 ± 0.141), then sngan (adversarial) "
        "(4.050 ± 0.071)",
    ]
    assert "There are 7 orderings here, not corrected for their number." in text
    without = [row("gfmn", 0, 1.0, confident=None)]
    assert "| read |" not in results_table(without)
    assert "| – | 900.0 | 1 |" in results_table([row("gfmn", 0, 1.0, cpu_seconds=None), row("vae", 0, 1.0)])


def test_the_committed_page_is_what_the_committed_rows_say() -> None:
    file = newest_file(ROOT / "bench/results", "comparison_digits")
    results = [] if file is None else [comparison.read_rows(file)]
    assert (ROOT / "docs/comparison.md").read_text() == page(results)


def test_a_document_needs_sound_rows_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, document = tmp_path / "rows.json", tmp_path / "page.md"
    write_json(file, rows_of(gfmn=[1.0]))
    code, text = command(main, ["--document", str(document), str(file)], capsys)
    assert code == 2
    assert "comparison.png does not exist; draw it with --figure" in text
    (tmp_path / orderings.FIGURE).touch()
    main(["--document", str(document), str(file)])
    assert document.read_text() == page([comparison.read_rows(file)])
    write_json(file, [row("gfmn", 0, 1.0, smoke=True)])
    code, text = command(main, ["--document", str(document), str(file)], capsys)
    assert "comes from a --smoke run" in text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--experiment", "methods", "--only", "mdd"], "--only: mdd is none of the methods (gfmn, "),
        (["--experiment", "methods", "--steps", "5"], "--steps: the --budget says"),
        (["--experiment", "layers", "--budget", "5"], "--budget: only --experiment methods has one"),
        (["--experiment", "layers", "--jobs", "0"], "--jobs: must be at least 1"),
        (["--experiment", "averaging", "--only", "AMA, 32"], "--only: AMA, 32 is no setting, nor a part of one"),
    ],
)
def test_bad_input_is_one_line(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = command(main, argv, capsys)
    assert (code, len(text.splitlines())) == (2, 1)
    assert said in text
