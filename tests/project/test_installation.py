"""The wheel works from any folder; with only the core installed it trains, and says what else needs an extra."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers.distributions import ROOT, Run

from engine import __version__
from engine.support.errors import EXTRAS

TRAIN = ("-m", "engine.train", "--weights", "random", "--layers", "2", "--batch-size", "16", "--threads", "1")
TRAIN += ("--device", "cpu", "--no-fused-ama")


@pytest.fixture(scope="module")
def trained(core_only: Run) -> subprocess.CompletedProcess[str]:
    """Ten steps on the digits with nothing but the core, in the folder `run`."""
    return core_only(*TRAIN, "--steps", "10", "--log-every", "1", "--out", "run")


def assert_one_line(answer: subprocess.CompletedProcess[str], feature: str, package: str, extra: str) -> None:
    line = f"error: {feature} needs {package}, which is not installed: pip install 'gfmn-engine[{extra}]'"
    assert (answer.returncode, answer.stderr.splitlines()) == (2, [line])


def test_the_wheel_holds_what_it_needs(wheel: Path) -> None:
    for file in ("engine/py.typed", "kernels/py.typed", "pipelines/py.typed", "engine/reporting/templates/report.html"):
        assert (wheel / file).read_bytes() == (ROOT / file).read_bytes()
    (info,) = wheel.glob("*.dist-info")
    assert info.name == f"gfmn_engine-{__version__}.dist-info"
    for file in ("LICENSE", "NOTICE"):
        assert (info / "licenses" / file).read_bytes() == (ROOT / file).read_bytes()
    assert "License-Expression: Apache-2.0\n" in (info / "METADATA").read_text()
    modules = {
        path.relative_to(ROOT) for room in ("engine", "kernels", "pipelines") for path in (ROOT / room).rglob("*.py")
    }
    assert modules <= {path.relative_to(wheel) for path in wheel.rglob("*.py")}


def test_the_core_alone_trains_ten_steps(trained: subprocess.CompletedProcess[str], elsewhere: Path) -> None:
    assert trained.returncode == 0, trained.stderr
    entries = [json.loads(line) for line in (elsewhere / "run/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == list(range(1, 11))
    assert all(math.isfinite(entry["loss"]) for entry in entries)
    assert (elsewhere / "run/generator.safetensors").is_file()
    assert (elsewhere / "run/samples.png").is_file()


def test_what_the_core_leaves_out_is_said_once(trained: subprocess.CompletedProcess[str], elsewhere: Path) -> None:
    assert not (elsewhere / "run/tensorboard").exists()
    assert not (elsewhere / "run/loss.png").exists()
    told = [line for line in trained.stderr.splitlines() if "not installed" in line]
    assert told == [
        "NVIDIA DALI is not installed: images come through the torch loader (pip install 'gfmn-engine[dali]')",
        "TensorBoard is not installed: no event files (pip install 'gfmn-engine[tensorboard]')",
        "matplotlib is not installed: no loss.png (pip install 'gfmn-engine[plots]')",
    ]
    assert "loss:" not in trained.stderr


def test_the_core_alone_samples(trained: subprocess.CompletedProcess[str], core_only: Run, elsewhere: Path) -> None:
    answer = core_only("-m", "engine.sample", "--run", "run", "--count", "5", "--out", "samples.npy")
    assert answer.returncode == 0, answer.stderr
    samples = np.load(elsewhere / "samples.npy")
    assert (samples.dtype, samples.shape) == (np.uint8, (5, 32, 32, 3))
    assert samples.std() > 0


def test_the_core_alone_describes_itself(core_only: Run) -> None:
    facts = json.loads(core_only("-m", "engine.env", "--json").stdout)
    missing = {package: f"not installed: pip install 'gfmn-engine[{extra}]'" for package, extra in EXTRAS.values()}
    del missing["jinja2"]  # PyTorch needs it itself
    assert missing.items() <= facts["optional"].items()
    assert "not installed" not in facts["versions"].values()
    assert facts["kernels"]["reference"] == "available"


def test_evaluation_names_its_extra(trained: subprocess.CompletedProcess[str], core_only: Run, elsewhere: Path) -> None:
    answer = core_only("-m", "engine.evaluate", "--run", "run")
    assert_one_line(answer, "evaluation", "torch-fidelity", "eval")
    answer = core_only(*TRAIN, "--steps", "10", "--evaluate-every", "5", "--out", "evaluated")
    assert_one_line(answer, "evaluation", "torch-fidelity", "eval")
    assert not (elsewhere / "evaluated").exists()


def test_the_report_names_its_extra(trained: subprocess.CompletedProcess[str], core_only: Run) -> None:
    # PyTorch brings jinja2 along, so it is taken away by hand.
    script = "import runpy, sys\nsys.modules['jinja2'] = None\nrunpy.run_module('engine.report', run_name='__main__')"
    assert_one_line(core_only("-c", script, "--run", "run"), "the report", "jinja2", "report")


def test_help_needs_the_core_only(core_only: Run) -> None:
    script = """
import importlib
for command in ("train", "precompute", "pretrain", "sample", "evaluate", "report", "env"):
    try:
        importlib.import_module(f"engine.{command}").main(["--help"])
    except SystemExit as stop:
        assert not stop.code, command
"""
    answer = core_only("-c", script)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout.count("usage: python -m engine.") == 7


def test_the_wheel_trains_and_reports_from_any_folder(wheel: Path, with_everything: Run, elsewhere: Path) -> None:
    where = with_everything("-c", "import engine, kernels, pipelines; print(engine.__file__)")
    assert where.stdout.strip() == str(wheel / "engine/__init__.py")
    answer = with_everything(*TRAIN, "--steps", "2", "--out", "complete")
    assert answer.returncode == 0, answer.stderr
    assert (elsewhere / "complete/loss.png").is_file()
    assert list((elsewhere / "complete/tensorboard").glob("events.*"))
    answer = with_everything("-m", "engine.report", "--run", "complete")
    assert answer.returncode == 0, answer.stderr
    assert "complete" in (elsewhere / "complete/report.html").read_text()
