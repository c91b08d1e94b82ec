"""A wheel of this tree, and a Python that has only the core of its dependencies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers.distributions import PROJECT, ROOT, Run, closure, link, requirements


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that `pip install .` would build, unpacked. Built from a copy: setuptools leaves files behind."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for package in ("engine", "kernels", "pipelines", "bench"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / file, source)
    build = "import sys\nfrom setuptools import build_meta\nbuild_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(built)], cwd=source, capture_output=True, text=True, check=True)
    (file,) = built.glob("*.whl")
    unpacked = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(unpacked)
    return unpacked


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to work in, far from the source tree."""
    return tmp_path_factory.mktemp("elsewhere")


def _runner(folder: Path, path: list[Path], *options: str) -> Run:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "GFMN_CACHE": str(folder / "cache")}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *options, *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    return run


@pytest.fixture(scope="session")
def with_everything(wheel: Path, elsewhere: Path) -> Run:
    """`run("-m", "engine.train", ...)` with the wheel in place of the source tree."""
    return _runner(elsewhere, [wheel])


@pytest.fixture(scope="session")
def core_only(wheel: Path, elsewhere: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same where pip has installed the wheel's dependencies and no extra."""
    site = tmp_path_factory.mktemp("site-packages")
    link(closure(requirements(PROJECT["dependencies"])), site)
    return _runner(elsewhere, [wheel, site], "-S")
