"""On a machine with a GPU, a test sees it only if it is marked so, or belongs to the kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
# PyTorch says that there is a device. What the tests see of it is written down: they have no other way to tell.
_PRETENDED = """
import torch

torch.cuda.is_available = lambda: True
"""
_SEEING = """
import os
import subprocess
import sys

import pytest
import torch


def seen():
    told = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"
    child = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True).stdout.strip()
    return torch.cuda.is_available(), child


@pytest.fixture(scope="module", params=[0, 1])
def of_the_module(request):
    return seen()


@pytest.fixture(scope="module", params=[0, 1])
def of_the_marked(request):
    return seen()


def test_plain(of_the_module):
    assert of_the_module == seen() == {plain}


@pytest.mark.{mark}
def test_marked(of_the_marked):
    assert of_the_marked == seen() == (True, "0")
"""


@pytest.mark.parametrize("folder", ["engine", "kernels"])
def test_who_sees_a_gpu(folder: str, tmp_path: Path) -> None:
    plain = (True, "0") if folder == "kernels" else (False, "")
    room = tmp_path / folder
    room.mkdir()
    (tmp_path / "pretended.py").write_text(_PRETENDED)
    # The project's own, as it stands; the folder that it knows is the one beside it.
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (room / "test_seeing.py").write_text(_SEEING.replace("{plain}", repr(plain)).replace("{mark}", "requires_gpu"))
    options = ["-p", "pretended", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-c", os.devnull, "-q"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(TESTS), str(TESTS.parent)])
    command = [sys.executable, "-m", "pytest", *options, str(room)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout, done.stdout
