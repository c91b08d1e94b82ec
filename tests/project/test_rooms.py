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
BACKENDS = {"reference", "compiled", "triton"}
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


def imported(name: str, text: str) -> Iterator[tuple[str, int]]:
    """Every import of ours in a module, wherever it stands: (module or name in it, line)."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: imports are absolute here"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def room_of(module: str) -> str | None:
    """The longest room of `ARROWS` that a module of the engine lies in; None for the front doors and configuration."""
    top, *parts = module.split(".")
    if top != "engine":
        return None
    candidates = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((room for room in candidates if room in ARROWS), None)


def backend_of(module: str) -> str | None:
    """The backend of the kernels that a module belongs to, if it belongs to one."""
    top, *parts = module.split(".")
    return parts[0] if top == "kernels" and parts and parts[0] in BACKENDS else None


def breaches(name: str, text: str) -> list[str]:
    """What a module of this name and text imports and may not."""
    own = room_of(name) if name.startswith("engine") else None
    found = []
    for target, line in imported(name, text):
        top = target.split(".")[0]
        where = f"{name}:{line}"
        if backend_of(name) and backend_of(target) not in (None, backend_of(name)):
            found.append(f"{where}: backends don't know each other, and this imports {target}")
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
    found = [line for name, path in modules() for line in breaches(name, path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("engine.generation.breach", "from engine.comparison.averagers import AMA"),
        ("engine.generation.breach", "def f():\n    import engine.training.trainer"),
        ("engine.generation.breach", "from engine import configuration"),
        ("engine.generation.breach", "from bench.rows import table"),
        ("engine.methods.breach", "from engine.training.trainer import Trainer"),
        ("kernels.breach", "from engine.support import errors"),
        ("kernels.triton.breach", "from kernels.compiled import moments"),
        ("kernels.reference", "import kernels.compiled.moments"),
        ("pipelines.breach", "import kernels"),
    ],
)
def test_a_breach_is_named(name: str, text: str) -> None:
    """The check can fail: each of these lines is one, wherever it stands."""
    (found,) = breaches(name, text)
    assert found.startswith(f"{name}:")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("engine.generation.fine", "from engine.support.errors import InputError\nimport kernels, pipelines"),
        ("engine.methods.fine", "from engine.comparison.distances.moments import Moments"),
        ("kernels.triton.fine", "from kernels.layout import feature_rows\nfrom kernels.triton import moments"),
        ("bench.fine", "from bench.rows import table\nfrom engine.training.trainer import Trainer"),
    ],
)
def test_what_is_allowed_is_not_named(name: str, text: str) -> None:
    assert not breaches(name, text)


def test_the_longest_name_is_the_room() -> None:
    assert room_of("engine.comparison.distances.kernels") == "comparison.distances"
    assert room_of("engine.training.ranks.Ranks") == "training.ranks"
    assert room_of("engine.generation.breach") == "generation"


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
