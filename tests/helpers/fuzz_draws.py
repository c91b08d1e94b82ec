"""Random settings, command lines and damage to files. What is drawn depends on the `random.Random` alone."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin

from engine.configuration.groups import GROUPS, group_of
from engine.configuration.methods import METHODS
from engine.configuration.options import Range, alternatives, type_hints

# What may take minutes or a gigabyte without being a mistake is not drawn, nor what compiles or starts another decoder.
QUICK = {
    "batch_size": (2, 3, 4, 8, 1_000_000),
    "chunk_size": (1, 2, "auto"),
    "image_size": (8, 16, 32, 33, 64, 4096),
    "steps": (1, 2, 3),
    "layers": (1, 2),
    "nz": (1, 4, 8),
    "extractor": ("vgg-small", "dcgan-encoder", "vgg-small+vgg-small"),
    "weights": (("random",), ("pretrain",)),
    "loader": ("torch",),
    "kernels": ("reference", "triton"),
    "fused_ama": (False,),
    "mmd_images": (2, 3, 100),
    "evaluate_samples": (2, 8, 9),
    "evaluate_extractor": ("vgg-small",),
    "evaluate_with": (("vgg-small",), ("vgg-small", "dcgan-encoder"), ("vgg-small", "vgg-small")),
    "memory_budget": ("1GiB", "1KB", "400 MB"),
    "taps": ("*", "features.0", "x*,features*"),
    "threads": (1, 2),
    "profile": (1,),
}
WORDS = ("", "0", "-1", "1", "1.5", "-1e-3", "1e999", "nan", "inf", "9" * 30, "auto", "none", "x", "~", ".", "/", "a b")
ODD_WORDS = ("\udcff", "é\n", "-", "--", "=", "%s", "a" * 300, "/dev/null", "no/such/thing", "\x1b[31m")
JUNK: tuple[Any, ...] = (None, True, 0, -1, 1.5, 10**30, -(2**63), float("nan"), float("inf"), [], [1], ["x"], [None])
ODD_JUNK: tuple[Any, ...] = ({}, {"a": 1}, [[]], "", "\0", "\ud800", "x" * 5000, [""], ["\ud800"], 2**63 - 1, -0.0)


def settings(draw: random.Random, junk: tuple[Any, ...], tame: float) -> dict[str, Any]:
    """Some settings with values of all kinds; about `tame` of them are values that they may have."""
    method = draw.choice(("gfmn", "mmd"))
    groups = [group for group in GROUPS.values() if tame < 1 or method in getattr(group, "methods", METHODS)]
    names = [entry.name for group in groups for entry in dataclasses.fields(group) if entry.name != "method"]
    chosen = draw.sample(names, draw.choice((0, 1, 2, 3, 5, 8)))
    return {"method": method} | {
        name: valid(draw, name) if draw.random() < tame else wild(draw, name, junk) for name in chosen
    }


def _declared(name: str) -> tuple[Any, dataclasses.Field[Any]]:
    group = group_of(name)
    entry = next(entry for entry in dataclasses.fields(group) if entry.name == name)
    return alternatives(type_hints(group)[name])[0], entry


def valid(draw: random.Random, name: str) -> Any:
    """A value that the setting `name` may have, as its declaration says."""
    kind, entry = _declared(name)
    if name in QUICK:
        return draw.choice(QUICK[name])
    if entry.metadata["choices"]:
        return draw.choice(entry.metadata["choices"])
    if kind is bool:
        return draw.random() < 0.5
    several = get_origin(kind) is tuple
    base = get_args(kind)[0] if several else kind
    if base is str:
        return entry.default
    least, most = _bounds(entry.metadata["range"], base)
    values = [draw.choice((least, most, entry.default, _between(draw, least, most, base))) for _ in range(2)]
    return (values[0], _between(draw, least, most, base)) if several else values[0]


def _between(draw: random.Random, least: float, most: float, base: type) -> float:
    return draw.randint(int(least), min(int(most), int(least) + 9)) if base is int else draw.uniform(least, most)


def _bounds(allowed: Range | None, base: type) -> tuple[float, float]:
    """The smallest and the largest number that a setting may have."""
    allowed = allowed or Range()
    step = 1 if base is int else 1e-6
    least = allowed.at_least if allowed.above is None else allowed.above + step
    most = allowed.at_most if allowed.below is None else allowed.below - step
    return (0 if least is None else least), (2**31 - 1 if most is None else most)


def wild(draw: random.Random, name: str, junk: tuple[Any, ...]) -> Any:
    """A value beyond a limit, or one of any type."""
    kind, entry = _declared(name)
    if kind in (int, float) and draw.random() < 0.5:
        least, most = _bounds(entry.metadata["range"], kind)
        return draw.choice((least - 1, most + 1, most * 10))
    return draw.choice(junk)


def as_flags(draw: random.Random, values: dict[str, Any]) -> list[str]:
    """Settings as words of a command line."""
    words: list[str] = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool) and _declared(name)[0] is bool:
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, tuple | list):
            words += [flag, *map(str, value)]
        else:
            words += [f"{flag}={value}"] if draw.random() < 0.3 else [flag, str(value)]
    return words


def as_file(draw: random.Random, values: dict[str, Any], config: dict[str, Any]) -> bytes:
    """A config.json with these settings in place of its own, sometimes of another form."""
    for group, entries in config.items():
        if isinstance(entries, dict):
            config[group] = entries | {name: value for name, value in values.items() if name in entries}
    if draw.random() < 0.2:
        key = draw.choice(sorted(config))
        config[draw.choice((key, "more"))] = draw.choice((*JUNK, *ODD_JUNK))
    text = json.dumps(config).encode()
    return damaged(draw, text) if draw.random() < 0.2 else text


Flags = dict[str, tuple[str, ...]]
Damage = Callable[[random.Random, Path, Path], object]


def flags_of(draw: random.Random, known: Flags) -> list[str]:
    """Some of a command's `known` flags (name → values that are right; none for a switch), right and wrong."""
    words = []
    for name in draw.sample(sorted(known), min(draw.choice((0, 1, 1, 2, 3)), len(known))):
        right = known[name]
        words.append(name)
        if right:
            words.append(draw.choice(right) if draw.random() < 0.7 else draw.choice((*WORDS, *ODD_WORDS)))
    if draw.random() < 0.05:
        words.insert(draw.randint(0, len(words)), draw.choice((*WORDS, *ODD_WORDS)))
    return words


def damaged(draw: random.Random, data: bytes) -> bytes:
    """Bytes cut off, changed here and there, or replaced."""
    kind = draw.choice(("empty", "cut", "bytes", "bytes", "head", "head", "longer", "random", "zeros"))
    if kind == "empty" or not data:
        return b""
    if kind == "cut":
        return data[: draw.randrange(len(data))]
    if kind == "longer":
        return data + draw.randbytes(draw.randint(1, 99))
    if kind == "random":
        return draw.randbytes(draw.choice((8, len(data) % 100_000)))
    if kind == "zeros":
        return bytes(len(data))
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 16))):
        # Small numbers, letters and quotes are what headers and settings are written in.
        byte = draw.choice((draw.randrange(256), draw.choice(b'0123456789-"{}[],:eEtTnN')))
        changed[draw.randrange(min(len(data), 600) if kind == "head" else len(data))] = byte
    return bytes(changed)


def damage(draw: random.Random, path: Path, other: Path) -> str:
    """Do something to the file or folder at `path`, perhaps with that at `other`; returns what."""
    kind = draw.choice((*_DAMAGE, "bytes"))
    meets = kind in ("swapped", "copied")
    if (kind in ("bytes", "copied") and not path.is_file()) or (meets and not other.is_file()):
        kind, meets = "removed", False
    with_other = f" with {other.name}" if meets else ""
    _DAMAGE[kind](draw, path, other)
    return f"{path.parent.name}/{path.name} {kind}{with_other}"


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _swap(draw: random.Random, path: Path, other: Path) -> None:
    if other not in (path, *path.parents) and path not in other.parents:
        aside = path.with_name("aside")
        path.rename(aside)
        other.rename(path)
        aside.rename(other)


def _instead(make: Callable[[Path], object]) -> Damage:
    def replace(draw: random.Random, path: Path, other: Path) -> None:
        _remove(path)
        make(path)

    return replace


def _link(draw: random.Random, path: Path, other: Path) -> None:
    moved = path.with_name(f"{path.name} moved")
    path.rename(moved)
    path.symlink_to(moved.name)


_DAMAGE: dict[str, Damage] = {
    "bytes": lambda draw, path, other: path.write_bytes(damaged(draw, path.read_bytes())),
    "removed": lambda draw, path, other: _remove(path),
    "swapped": _swap,
    "copied": lambda draw, path, other: path.write_bytes(other.read_bytes()),
    "a link": _link,
    "a folder": _instead(Path.mkdir),
    "a full folder": _instead(lambda path: (path / "x").mkdir(parents=True)),
    "a file": _instead(lambda path: path.write_bytes(b"precious")),
    "a pointer nowhere": _instead(lambda path: path.symlink_to("nowhere")),
    "a circle": _instead(lambda path: path.symlink_to(path.name)),
    "a full disk": _instead(lambda path: path.symlink_to("/dev/full")),
    "nothing": _instead(lambda path: path.symlink_to("/dev/null")),
    "forbidden": lambda draw, path, other: path.chmod(draw.choice((0o000, 0o000, 0o200, 0o400, 0o444, 0o555, 0o600))),
}
