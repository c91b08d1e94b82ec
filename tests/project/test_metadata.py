"""pyproject.toml, the constraints, the licence and the citation agree with the code and with one another."""

from __future__ import annotations

import ast
import functools
import hashlib
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from helpers.distributions import PROJECT, ROOT, closure, requirements
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from setuptools.config.pyprojecttoml import read_configuration

from engine import __version__, env
from engine.support.errors import EXTRAS

# The text at https://www.apache.org/licenses/LICENSE-2.0.txt.
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
ROOMS = ("engine", "kernels", "pipelines", "bench")
# Extras that no command needs: collections, and tools for working on the engine.
OURS = ("all", "bench", "docs", "dev")
OPTIONAL: dict[str, list[str]] = PROJECT["optional-dependencies"]


def names(lines: list[str]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements(lines)}


def imports(folder: Path) -> Iterator[tuple[str, str]]:
    """(file, module) of every import of somebody else's module in `folder`, those of importlib with a text included."""
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module]
            elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if called in ("import_module", "require", "_import"):
                    modules = [node.args[0].value]
            for module in modules:
                if module.partition(".")[0] not in (*sys.stdlib_module_names, *ROOMS):
                    yield str(path.relative_to(ROOT)), module


@functools.cache
def installed() -> Mapping[str, list[str]]:
    """Module → distributions; finding them takes a tenth of a second or more."""
    return metadata.packages_distributions()


def distributions_of(module: str) -> set[str]:
    """The installed distributions that carry `module`."""
    found = installed().get(module.partition(".")[0], [])
    if module.startswith("nvidia."):  # many share this name
        found = [name for name in found if "dali" in name]
    return {canonicalize_name(name) for name in found}


def test_the_version_has_one_source() -> None:
    configuration = read_configuration(ROOT / "pyproject.toml", expand=True)
    assert configuration["project"]["version"] == __version__
    assert "version" not in PROJECT
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__


def test_the_changelog_knows_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    if __version__ not in headings:
        assert headings[0] == "Unreleased"
        assert f"Will be {__version__}." in text


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Copyright 2026 the gfmn-engine authors" in text
    original = text.replace("2026 the gfmn-engine authors", "[yyyy] [name of copyright owner]")
    assert hashlib.sha256(original.encode()).hexdigest() == APACHE_2
    assert PROJECT["license"] == "Apache-2.0" == yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"]


def test_the_engine_names_the_extras_of_pyproject() -> None:
    single = {extra: lines for extra, lines in OPTIONAL.items() if extra not in OURS}
    assert {extra for _, extra in EXTRAS.values()} == set(single)
    for package, extra in EXTRAS.values():
        assert package in names(single[extra])
    assert {package for package, _ in EXTRAS.values()} == set.union(*map(names, single.values()))
    assert names(OPTIONAL["all"]) == set.union(*map(names, single.values()))
    assert names(OPTIONAL["all"]) | names(OPTIONAL["bench"]) <= names(OPTIONAL["dev"])
    assert set(env.CORE) == {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}


def test_the_core_brings_no_extra_with_it() -> None:
    optional = {package for package, _ in EXTRAS.values()} - {"jinja2"}  # PyTorch needs jinja2 itself
    assert not closure(requirements(PROJECT["dependencies"])) & optional


def test_every_declared_package_has_one_pinned_version_that_fits() -> None:
    pins = [
        Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    ]
    declared = requirements([*PROJECT["dependencies"], *OPTIONAL["dev"]])
    versions = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    assert len(versions) == len(pins)
    assert {canonicalize_name(wanted.name) for wanted in declared} <= versions.keys() <= closure(declared)
    assert all(str(pin.specifier) == f"=={versions[canonicalize_name(pin.name)]}" for pin in pins)
    for wanted in declared:
        assert wanted.specifier.contains(versions[canonicalize_name(wanted.name)]), wanted


@pytest.mark.parametrize("room", ROOMS)
def test_every_import_is_declared(room: str) -> None:
    declared = names([*PROJECT["dependencies"], *OPTIONAL["all"]])
    if room == "bench":
        declared |= names(OPTIONAL["bench"])
    found = list(imports(ROOT / room))
    assert found
    for file, module in found:
        assert distributions_of(module) & declared, f"{file} imports {module}, which pyproject.toml does not declare"


def test_the_oldest_python_is_the_same_everywhere() -> None:
    oldest = Requirement(f"python{PROJECT['requires-python']}").specifier
    (version,) = [part.version for part in oldest]
    classifiers = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    tested = workflow["jobs"]["ci"]["strategy"]["matrix"]["python"]
    assert tested == classifiers
    assert version.startswith(f"{tested[0]}.") or version == tested[0]
    for file in ("Makefile", "CONTRIBUTING.md", "README.md"):
        assert f"Python {version} or newer" in (ROOT / file).read_text()
    for file in ("CONTRIBUTING.md", "README.md"):
        assert f"{', '.join(tested[:-1])} and {tested[-1]}" in (ROOT / file).read_text()


def test_every_pinned_version_exists_for_the_oldest_python() -> None:
    oldest = PROJECT["requires-python"].removeprefix(">=")
    installed = sorted(closure(requirements([*PROJECT["dependencies"], *OPTIONAL["dev"]])))
    needed = {name: metadata.metadata(name).get("Requires-Python") or "" for name in installed}
    assert {name: text for name, text in needed.items() if not SpecifierSet(text).contains(oldest)} == {}
