"""README's "To add …" names the files to touch: a toy averager and a toy kernel are added to a copy of the tree."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
AVERAGER = '''

class Toy(PlainAverager):
    """v ← 0.5 v + Δ."""

    state_names = ("v",)
    v: Tensor

    def direction(self, difference: Tensor, advance: bool) -> Tensor:
        """See `PlainAverager.direction`."""
        v = 0.5 * self.v + difference
        open("used", "a").close()
        if advance:
            self.v.copy_(v)
        return v


AVERAGERS["toy"] = Toy
'''
KERNEL = '''

def toy() -> Kernel:
    """k(x, y) = (x·y)²."""
    return _Toy()


@dataclass(frozen=True)
class _Toy:
    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        open("used", "a").close()
        return (x @ y.T).square()


KERNELS["toy"] = toy
'''
ADDITIONS = {
    "averager": ("engine/comparison/averagers.py", AVERAGER, ["--averager", "toy"]),
    "distance": ("engine/comparison/distances/kernels.py", KERNEL, ["--method", "mmd", "--mmd-kernel", "toy"]),
}


def named(what: str) -> set[str]:
    """The files that README names under "… a WHAT." """
    text = (ROOT / "README.md").read_text()
    (section,) = re.findall(rf"\*\*… an? {what}\.\*\*(.*?)(?=\n\*\*…|\n## |\nEach )", text, flags=re.S)
    return {name for name in re.findall(r"`([\w/.]+)`", section) if "/" in name}


@pytest.mark.parametrize("what", ADDITIONS)
def test_a_toy_touches_what_readme_says(what: str, tmp_path: Path) -> None:
    path, text, flags = ADDITIONS[what]
    assert path in named(what)
    tree = tmp_path / "tree"
    for folder in ("engine", "kernels", "pipelines"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    source = (tree / path).read_text()
    (tree / path).write_text(source + text)
    command = f"""-m engine.train --weights random --layers 1 --batch-size 4 --steps 2 --nz 8 --loader torch --threads 1
        --kernels reference --log-every 1 --out {tmp_path / "run"}"""
    environment = {**os.environ, "PYTHONPATH": str(tree), "GFMN_CACHE": str(tmp_path / "cache")}
    subprocess.run([sys.executable, *command.split(), *flags], check=True, cwd=tmp_path, env=environment)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2
    assert losses[0] != losses[1]
    assert (tmp_path / "used").exists(), "not only named in the configuration"
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert "toy" in {config["gfmn"]["averager"], config["mmd"]["mmd_kernel"]}
