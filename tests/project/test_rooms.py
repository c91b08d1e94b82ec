"""The folders as docs/design.md draws them: which may import which, where flags may stand, how long a file may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for room in ("engine", "kernels", "pipelines", "bench") for path in (ROOT / room).rglob("*.py"))

FRONT_DOORS = {"train", "precompute", "pretrain", "sample", "evaluate", "report", "env"}
# What every room may know.
COMMON = {"support", "kernels", "pipelines"}
# Modules of training that know nobody: every long loop has to stop, to tell how far it is, and to share its work.
LEAVES = {"training.ranks", "training.stopping", "training.progress", "training.precision"}
# Room → the other rooms that it may import. The longest name that fits a module is its room.
ARROWS: dict[str, set[str]] = {
    "support": set(),
    "training.ranks": {"training.arriving", "training.lifeline", "training.rendezvous"},
    "training.arriving": set(),
    "training.lifeline": set(),
    "training.rendezvous": set(),
    "training.stopping": set(),
    "training.progress": set(),
    "training.precision": set(),
    "representation": {"training.ranks"},
    # It trains a network, so it knows how training stops and saves, and what decodes an autoencoder's codes.
    "representation.pretraining": {"representation", "generation", "training.checkpoint", *LEAVES},
    "comparison.distances": set(),
    "comparison.games": {"comparison.distances"},
    "comparison": {"comparison.distances", "representation", "training.ranks"},
    "comparison.reference": {"comparison", "comparison.distances", "representation", *LEAVES},
    "generation": set(),
    "methods": {
        "generation",
        "representation",
        "comparison",
        "comparison.distances",
        "comparison.games",
        "training.ranks",
    },
    "evaluation": {"generation", "representation", "comparison.distances"},
    "reporting": {"evaluation", "generation", "representation", "training", "configuration"},
    "training.checkpoint": set(),
    "training": {"methods.protocols", "generation", "evaluation", "training.checkpoint", *LEAVES},
}


def modules() -> Iterator[tuple[str, Path]]:
    for path in SOURCES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        yield name.removesuffix(".__init__"), path


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Every import of ours in a file, wherever it stands: (module or name in it, line)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def room_of(module: str) -> str | None:
    """The longest room of `ARROWS` that a module of the engine lies in; None for the front doors and configuration."""
    top, *parts = module.split(".")
    if top != "engine":
        return None
    candidates = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((room for room in candidates if room in ARROWS), None)


def breaches(name: str, path: Path) -> list[str]:
    own = room_of(name) if name.startswith("engine") else None
    found = []
    for target, line in imported(path):
        top = target.split(".")[0]
        where = f"{path.relative_to(ROOT)}:{line}"
        if name.startswith("kernels") and top in ("engine", "pipelines", "bench"):
            found.append(f"{where}: kernels know nobody, and this imports {target}")
        if name.startswith("pipelines") and top in ("engine", "kernels", "bench"):
            found.append(f"{where}: pipelines know nobody, and this imports {target}")
        if top == "bench" and not name.startswith("bench"):
            found.append(f"{where}: only benchmarks know benchmarks, and this imports {target}")
        if top != "engine" or own is None:
            continue
        room = room_of(target)
        allowed = ARROWS[own] | COMMON | {own}
        fits = any(f"engine.{one}." in f"{target}." for one in allowed if target.startswith(f"engine.{one}"))
        if room not in allowed and not fits:
            found.append(f"{where}: {own} may not import {target}")
    return found


def test_import_arrows() -> None:
    found = [line for name, path in modules() for line in breaches(name, path)]
    assert not found, "\n".join(found)


def test_a_breach_is_named(tmp_path: Path) -> None:
    """The check can fail: each of these lines is one, wherever it stands."""
    path = ROOT / "engine" / "generation" / "breach.py"
    lines = [
        "from engine.comparison.averagers import AMA",
        "def f():\n    import engine.training.trainer",
        "from engine import configuration",
    ]
    for text in lines:
        tree = tmp_path / "breach.py"
        tree.write_text(text)
        found = [target for target, _ in imported(tree) if room_of(target) not in ARROWS["generation"] | {"generation"}]
        assert found, text
    assert room_of("engine.comparison.distances.kernels") == "comparison.distances"
    assert room_of("engine.training.ranks.Ranks") == "training.ranks"
    assert room_of("engine.generation.breach") == "generation"
    assert not path.exists()


FLAG = re.compile(r"(?<![\w-])--(?:no-)?[a-z][a-z0-9]*(?:-[a-z0-9]+)*")


def test_flags_stand_in_configuration_and_front_doors_alone() -> None:
    found = []
    for name, path in modules():
        parts = name.split(".")
        if parts[0] == "bench" or parts[:2] == ["engine", "configuration"]:
            continue
        if parts[0] == "engine" and len(parts) == 2 and parts[1] in FRONT_DOORS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found += [f"{path.relative_to(ROOT)}:{node.lineno}: {flag}" for flag in FLAG.findall(node.value)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("text", "flags"), [("use --chunk-size 4", ["--chunk-size"]), ("a -- b, x--y", [])])
def test_what_counts_as_a_flag(text: str, flags: list[str]) -> None:
    assert FLAG.findall(text) == flags


def test_no_file_over_400_lines() -> None:
    files = [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name: count for name, count in long.items() if count > 400} == {}


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_importing_the_engine_imports_no_torch() -> None:
    code = "import sys, engine; print('torch' in sys.modules, engine.__version__, 'AMA' in dir(engine))"
    assert python(code).split() == ["False", __import__("engine").__version__, "True"]


def test_importing_the_engine_is_quick() -> None:
    code = "import time; a = time.perf_counter(); import engine; print(time.perf_counter() - a)"
    assert min(float(python(code)) for _ in range(3)) < 0.05


def test_public_names() -> None:
    import engine
    from engine.comparison.averagers import AMA
    from engine.representation.build import build_extractor

    assert engine.AMA is AMA
    assert engine.build_extractor is build_extractor
    assert all(getattr(engine, name) is not None for name in engine.__all__)
    with pytest.raises(AttributeError, match="'nothing'"):
        engine.nothing  # noqa: B018
