"""bench.methods and bench.method_steps: rows of other runs are kept, and mistakes are one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.judging import digits, write_weights
from helpers.runs import command

from bench import method_steps, methods
from bench.commands import Ended, Usage
from bench.methods import MethodRow
from bench.rows import newest_file, write_json
from engine.configuration.config import Config
from engine.configuration.flags import given_flags
from engine.evaluation.judges import EvaluationNetwork, evaluation_network
from engine.support.errors import InputError
from engine.train import parser


def row(name: str, seconds: float, date: str) -> MethodRow:
    return MethodRow(
        name=name, flags="", summary="", steps=1, minibatch=2, seconds=seconds, confident=0.5, least_share=0.1,
        largest_share=0.1, least_variety=1.0, largest_variety=1.0, chroma=0.0, kernel_distance=0.0,
        environment={"date": date},
    )  # fmt: skip


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run takes 7 seconds, on another day."""
    monkeypatch.setattr(methods, "pretrain", lambda: None)
    monkeypatch.setattr(methods, "run", lambda name, *_: row(name, 7.0, "2026-02-02"))


def shown(path: Path) -> list[tuple[str, float, str]]:
    return [(entry["name"], entry["seconds"], entry["environment"]["date"]) for entry in json.loads(path.read_text())]


@pytest.mark.usefixtures("ran")
def test_only_keeps_the_rows_of_the_others(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    write_json(file, [row(name, 1.0, "2026-01-01") for name in ("gfmn", "mmd", "frechet", "no longer there")])
    methods.main(["--only", "frechet", "drifting", "--docs", str(tmp_path), "--json", str(file)])
    assert shown(file) == [
        ("gfmn", 1.0, "2026-01-01"),
        ("mmd", 1.0, "2026-01-01"),
        ("frechet", 7.0, "2026-02-02"),
        ("drifting", 7.0, "2026-02-02"),
    ]


@pytest.mark.usefixtures("ran")
def test_only_begins_with_the_newest_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "ROOT", tmp_path)
    results = tmp_path / "bench/results"
    for day, seconds in (("2026-01-01", 1.0), ("2026-01-03", 3.0)):
        write_json(results / f"methods_digits_{day}.json", [row("mmd", seconds, day)])
    monkeypatch.setattr(methods.time, "strftime", lambda _: "2026-01-04")
    methods.main(["--only", "gmmn", "--docs", str(tmp_path)])
    assert shown(results / "methods_digits_2026-01-04.json") == [
        ("mmd", 3.0, "2026-01-03"),
        ("gmmn", 7.0, "2026-02-02"),
    ]
    assert newest_file(results, "methods_digits") == results / "methods_digits_2026-01-04.json"
    assert newest_file(results, "methods") is None


@pytest.mark.usefixtures("ran")
def test_an_interrupted_command_leaves_the_rows_that_it_did_not_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def run(name: str, *_: object) -> MethodRow:
        made.append(name)
        if len(made) == 3:
            raise KeyboardInterrupt
        return row(name, 7.0, "2026-02-02")

    monkeypatch.setattr(methods, "run", run)
    file = tmp_path / "rows.json"
    names = list(methods.RUNS["comparing"])
    write_json(file, [row(name, 1.0, "2026-01-01") for name in names])
    with pytest.raises(KeyboardInterrupt):
        methods.main(["--docs", str(tmp_path), "--json", str(file)])
    assert shown(file) == [(name, 7.0, "2026-02-02") for name in names[:2]] + [
        (name, 1.0, "2026-01-01") for name in names[2:]
    ]


def test_every_seed_s_network_is_pretrained_before(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def run_module(module: str, flags: list[str], *, shown: bool) -> Ended:
        assert module == "engine.train"
        trained.append(Config.build("digits", given_flags(parser().parse_args(flags))))
        return Ended(Usage(1.0, 1.0, 1.0), 2 if trained[-1].training.seed == 4 else 0, "")

    monkeypatch.setattr(methods, "run_module", run_module)
    methods.pretrain((0, 2))
    assert [(config.training.seed, config.networks.weights) for config in trained] == [
        (n, ("pretrain",)) for n in (0, 2)
    ]
    with pytest.raises(InputError, match=r"engine\.train failed: see above"):
        methods.pretrain((4,))


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"thing": 1}]')
    with pytest.raises(InputError, match="holds no rows of methods"):
        methods.rows_before(tmp_path / "rows.json", None, methods.RUNS["comparing"])


@pytest.mark.parametrize("other", [{"name": "ae"}, {"seed": 2}], ids=["of codes", "of bench.paper"])
def test_rows_of_other_runs_are_not_lost(other: dict[str, Any], tmp_path: Path) -> None:
    rows = [row(name, 1.0, "2026-01-01") for name in ("mmd", "gfmn")]
    write_json(tmp_path / "rows.json", [rows[0], replace(rows[1], **other)])
    with pytest.raises(InputError, match="holds rows of other runs"):
        methods.rows_before(tmp_path / "rows.json", None, methods.RUNS["comparing"])


@pytest.mark.parametrize(
    ("main", "flags", "message"),
    [
        (methods.main, "--only imagenet-gfmn", "--only: imagenet-gfmn is none of the runs of --runs comparing (gfmn,"),
        (methods.main, "--runs imagenet --only mmd", "--only: mmd is none of the runs of --runs imagenet"),
        (methods.main, "--steps 3", "--steps: give --docs and --json as well"),
        (methods.main, "--steps 3 --json rows.json", "--steps: give --docs and --json as well"),
        (method_steps.main, "--repetitions 0", "--repetitions: must be at least 1"),
        (method_steps.main, "--chunk-size 256", "--chunk-size: must be from 1 to 255"),
    ],
)
def test_mistakes_are_one_line(main, flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = command(main, flags.split(), capsys)
    assert code == 2
    assert message in text
    assert len(text.splitlines()) == 1


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> EvaluationNetwork:
    weights = write_weights(tmp_path_factory.mktemp("judge") / "weights.safetensors")
    return evaluation_network("vgg-small", weights=weights, image_size=32)


def measured(samples: torch.Tensor, real: torch.Tensor, network: EvaluationNetwork) -> dict[str, float]:
    return methods.measure(samples, real, network, ("kid", "prc"), torch.device("cpu"), digits=True)


def test_real_images_as_samples(network: EvaluationNetwork) -> None:
    # Of different brightness: a network with random weights hardly tells digits apart, and the judge's distances round.
    real = (digits(0, 60) * torch.linspace(0.7, 1, 60).view(-1, 1, 1, 1)).to(torch.uint8)
    real[7] = real[3]
    found = measured(real, real, network)
    assert (found["chroma"], found["edge_level"]) == (0, 0)
    assert found["distinct"] == len(real.flatten(1).unique(dim=0)) == 59
    assert (found["precision"], found["recall"]) == (1, 1)
    assert found["confident"] > 0.9
    assert measured(real[:1].expand(60, -1, -1, -1), real, network)["distinct"] == 1


def test_a_tint_and_a_frame_are_measured(network: EvaluationNetwork) -> None:
    real = digits(0, 60)
    tinted = real.clone()
    tinted[:, 0] = tinted[:, 0] // 2
    level = real.max() - real.max() // 2
    assert 0 < measured(tinted, real, network)["chroma"] <= level
    framed = real.clone()
    framed[..., 0] = 200
    assert measured(framed, real, network)["edge_level"] == pytest.approx(200 * 32 / 124)  # 4 · 31 places


def test_blocks_change_nothing(network: EvaluationNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (37, 3, 32, 32), generator=random, dtype=torch.uint8)
    samples = torch.randint(0, 256, (41, 3, 32, 32), generator=random, dtype=torch.uint8)
    samples[::2, 1] //= 3
    whole = measured(samples, real, network)
    monkeypatch.setattr(methods, "_BLOCK", 7)
    assert measured(samples, real, network) == pytest.approx(whole)
    nearest = torch.cdist(samples.flatten(1).double(), real.flatten(1).double()).argmin(1)
    assert whole["distinct"] == len(set(nearest.tolist()))


def test_steps_are_beside_gfmns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--extractor vgg-small --batch-size 4 --chunk-size 2 --repetitions 2 --device cpu --only"
    name = "frechet, 1,797 real images"
    method_steps.main([*flags.split(), name, "--json", str(tmp_path / "rows.json")])
    first, second = json.loads((tmp_path / "rows.json").read_text())
    assert (first["name"], second["name"]) == ("gfmn", name)
    assert first["relative"] == 1
    assert second["relative"] > 0
    assert f"| {name} | {second['p20']:.3f} | {second['p50']:.3f} |" in capsys.readouterr().out
