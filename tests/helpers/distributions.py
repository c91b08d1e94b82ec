"""What pyproject.toml declares, and folders in which only a part of the installed packages can be imported."""

from __future__ import annotations

import subprocess
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
Run = Callable[..., subprocess.CompletedProcess[str]]


def requirements(lines: Iterable[str]) -> list[Requirement]:
    """Those of `lines` that hold on this machine; an extra of ours ("gfmn-engine[timm]") is what it stands for."""
    found = []
    for requirement in map(Requirement, lines):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if requirement.name == PROJECT["name"]:
            for extra in sorted(requirement.extras):
                found += requirements(PROJECT["optional-dependencies"][extra])
        else:
            found.append(requirement)
    return found


def closure(wanted: Iterable[Requirement]) -> set[str]:
    """Names of the installed distributions that pip installs for `wanted`, theirs and so on included."""
    found: dict[str, set[str]] = {}
    todo = list(wanted)
    while todo:
        requirement = todo.pop()
        name, extras = canonicalize_name(requirement.name), {"", *requirement.extras}
        new = extras - found.setdefault(name, set())
        found[name] |= extras
        for extra in new:
            for needed in map(Requirement, metadata.requires(name) or ()):
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    todo.append(needed)
    return set(found)


def link(names: set[str], folder: Path) -> None:
    """Fill `folder` with links, so that it is a site-packages that holds the distributions `names` and no others."""
    owners: dict[PurePath, set[str]] = defaultdict(set)
    files: dict[str, list[metadata.PackagePath]] = {}
    for distribution in metadata.distributions():
        name = canonicalize_name(distribution.name)
        files[name] = [path for path in distribution.files or () if ".." not in path.parts]
        for path in files[name]:
            for part in (path, *path.parents):
                owners[PurePath(part)].add(name)
    for name in names:
        for path in files[name]:
            # The outermost folder that is this distribution's alone; deeper where several share one ("nvidia").
            shared = [PurePath(part) for part in (path, *path.parents)][:-1]
            alone = next((part for part in reversed(shared) if owners[part] == {name}), None)
            if alone is not None and not (folder / alone).is_symlink():
                (folder / alone).parent.mkdir(parents=True, exist_ok=True)
                (folder / alone).symlink_to(Path(path.locate()).parents[len(path.parts) - 1] / alone)
