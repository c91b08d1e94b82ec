"""The examples run from any folder and show what they say they show."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from engine.generation.saved import load_sampler

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NOTEBOOK: dict[str, Any] = json.loads((EXAMPLES / "demo.ipynb").read_text())
# All cells in one namespace, as a notebook's server runs them.
RUN_CELLS = """
import json, sys
cells = json.load(open(sys.argv[1]))["cells"]
names = {"__name__": "__main__"}
for cell in cells:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
"""
FEW_STEPS = "--steps 6 --batch-size 8 --weights random --layers 2 --log-every 1 --loader torch --no-fused-ama"
NUMBER = r"(\d[\d.]*(?:e[-+]\d+)?)"


def run(folder: Path, *argv: str, **environment: str) -> str:
    """What Python prints when it runs in `folder`, with a cache of its own, and succeeds."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    own = {"PYTHONPATH": path, "GFMN_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, *argv], cwd=folder, env={**os.environ, **own, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    """The numbers of the one line that `pattern` fits, # standing for each."""
    (found,) = re.findall(re.escape(pattern).replace(r"\#", NUMBER), text)
    return [float(number) for number in (found if isinstance(found, tuple) else (found,))]


def test_the_ring_is_drawn_after_few_steps_too(tmp_path: Path) -> None:
    printed = run(tmp_path, "-W", "error", str(EXAMPLES / "ring.py"), "here.png", "--steps", "8")
    assert all(f"{name}: MMD² from " in printed for name in ("MMD", "moments"))
    with Image.open(tmp_path / "here.png") as picture:
        assert picture.width == 2 * picture.height


@pytest.mark.slow
def test_both_ways_find_the_ring(tmp_path: Path) -> None:
    printed = run(tmp_path, "-W", "error", str(EXAMPLES / "ring.py"), "here.png", "--steps", "400")
    for name in ("MMD", "moments"):
        first, last = numbers(f"{name}: MMD² from # to #", printed)
        assert last < first / 5
        (listed,) = re.findall(rf"^{name}: .*points in each spot \[(.+)\] of 2000$", printed, re.MULTILINE)
        points = [int(count) for count in listed.split(", ")]
        assert len(points) == 8
        assert min(points) > 100
        assert sum(points) <= 2000
    with Image.open(tmp_path / "here.png") as picture:
        colours = picture.convert("RGB").getcolors(1 << 16)
    assert colours is not None
    assert len(colours) > 2, "points were drawn"


def test_an_objective_of_ones_own_has_autograds_gradient(tmp_path: Path) -> None:
    printed = run(tmp_path, "-W", "error", str(EXAMPLES / "own_objective.py"), "--steps", "15")
    (error,) = numbers("gradient: differs from autograd's by #", printed)
    assert error <= 1e-6
    first, last, steps = numbers("loss: # at step 1, # at step #", printed)
    assert steps == 15
    assert last < 0.7 * first


def test_an_extractor_of_ones_own_trains_a_generator(tmp_path: Path) -> None:
    printed = run(tmp_path, "-W", "error", str(EXAMPLES / "own_extractor.py"), "here.png", "--steps", "15")
    assert "taps: mine.relu (16, 16, 16), mine.relu_1 (16, 16, 16), mine.relu_2 (32, 8, 8)" in printed
    assert numbers("target: Moments(count=#, num_features=#)", printed) == [1797, 2 * 16**3 + 32 * 8**2]
    first, last, steps = numbers("loss: # at step 1, # at step #", printed)
    assert steps == 15
    assert last < 0.7 * first
    with Image.open(tmp_path / "here.png") as picture:
        assert picture.size == (8 * 34 + 2, 8 * 34 + 2)


def test_the_notebook_runs(tmp_path: Path) -> None:
    run(tmp_path, "-c", RUN_CELLS, str(EXAMPLES / "demo.ipynb"), DEMO_SETTINGS=FEW_STEPS)
    (folder,) = (tmp_path / "runs").iterdir()
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 7))
    with Image.open(folder / "samples.png") as samples:
        assert samples.size == (8 * 34 + 2, 8 * 34 + 2)
    # The rows of the interpolation start and end at images of the generator that was saved.
    with Image.open(folder / "interpolation.png") as opened:
        paths = torch.frombuffer(bytearray(opened.tobytes()), dtype=torch.uint8).view(opened.height, opened.width, 3)
    sampler = load_sampler(folder / "generator.safetensors")
    ends = sampler.draw_pixels(16, 7).int()
    for row in range(8):
        for column, end in ((0, ends[row]), (11, ends[8 + row])):
            cell = paths[2 + 34 * row : 34 * (row + 1), 2 + 34 * column : 34 * (column + 1)].permute(2, 0, 1)
            assert (cell.int() - end).abs().max() <= 1


def test_the_notebook_is_stripped_of_outputs() -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    identifiers = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(identifiers)) == len(identifiers)
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None), cell["id"]


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")))
def test_every_example_has_its_line_and_its_test(name: str) -> None:
    assert (EXAMPLES / "README.md").read_text().count(f"[{name}]({name})") == 1
    assert f'EXAMPLES / "{name}"' in Path(__file__).read_text()
