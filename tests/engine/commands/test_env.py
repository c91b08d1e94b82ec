"""What a bug report asks for: correct on a whole installation, and told in place where a part is missing or broken."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

import kernels
from engine import __version__, env
from engine.support.errors import EXTRAS, InputError, require
from pipelines import cache_folder


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch):
    """`without(package)`: as if pip had never installed it."""
    version = metadata.version

    def remove(package: str) -> None:
        def missing(name: str) -> str:
            if name == package:
                raise metadata.PackageNotFoundError(name)
            return version(name)

        monkeypatch.setattr(metadata, "version", missing)

    return remove


def run(*flags: str, **environment: str) -> str:
    command = [sys.executable, "-m", "engine.env", *flags]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True).stdout


def test_the_facts_are_those_of_the_modules(capsys: pytest.CaptureFixture[str]) -> None:
    env.main(["--json"])
    facts = json.loads(capsys.readouterr().out)
    versions = facts["versions"]
    assert versions["engine"] == __version__
    assert versions["python"] == platform.python_version()
    assert torch.__version__.startswith(versions["torch"])
    assert versions["numpy"] == np.__version__
    assert list(facts["optional"]) == [package for package, _ in EXTRAS.values()]
    assert facts["machine"]["threads"].startswith(f"{torch.get_num_threads()} ")
    assert f"{os.cpu_count()} CPUs" in facts["machine"]["processor"]
    assert "none" in facts["machine"]["GPUs"]
    assert facts["machine"]["cache"].startswith(str(cache_folder()).replace(str(Path.home()), "~"))


def test_the_text_says_all_that_the_json_says(capsys: pytest.CaptureFixture[str]) -> None:
    env.main([])
    lines = capsys.readouterr().out.splitlines()
    for heading, section in env.collect().items():
        assert f"{heading}:" in lines
        for name, value in section.items():
            assert any(line.split() == [*name.split(), *value.split()] for line in lines), name


def test_nobodys_home_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GFMN_CACHE", str(tmp_path / "cache"))
    facts = env.collect()
    assert facts["machine"]["cache"] == "~/cache"
    assert str(tmp_path) not in json.dumps(facts)


@pytest.mark.parametrize("module", EXTRAS)
def test_a_missing_extra_is_told_with_its_pip_line(module: str, without) -> None:
    package, extra = EXTRAS[module]
    without(package)
    assert env.collect()["optional"][package] == f"not installed: pip install 'gfmn-engine[{extra}]'"


@pytest.mark.parametrize("module", EXTRAS)
def test_a_feature_names_the_extra_that_it_lacks(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package, extra = EXTRAS[module]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError) as error:
        require(module, "this")
    assert error.value.message == f"this needs {package}, which is not installed: pip install 'gfmn-engine[{extra}]'"


def test_a_broken_pytorch_is_reported_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("libcudart.so.13: cannot open shared object file\nand more")

    monkeypatch.setattr(env, "_torch", broken)
    facts = env.collect()
    told = "unknown (OSError: libcudart.so.13: cannot open shared object file)"
    assert facts["machine"]["GPUs"] == facts["machine"]["CUDA"] == facts["kernels"]["auto"] == told
    assert facts["versions"]["torch"] == metadata.version("torch")


@pytest.mark.parametrize(
    ("environment", "unavailable"),
    [({}, ["triton"]), ({"CXX": "no-such-compiler"}, ["triton", "compiled"]), ({"TRITON_INTERPRET": "1"}, [])],
    ids=["usual", "no compiler", "interpreter"],
)
def test_backends_are_those_that_the_kernels_select(environment: dict[str, str], unavailable: list[str]) -> None:
    told = json.loads(run("--json", **{"TRITON_INTERPRET": "0", **environment}))["kernels"]
    assert [name for name, state in told.items() if state.startswith("unavailable")] == unavailable
    if "CXX" in environment:
        assert "no-such-compiler" in told["compiled"]
        selection = "import torch, kernels; print(kernels.select('auto', torch.device('cpu'), torch.float32).__name__)"
        command = [sys.executable, "-c", selection]
        chosen = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
        assert (told["auto"], chosen.stdout.strip()) == ("reference", "kernels.reference")
    else:
        assert told["auto"] == "compiled"
    assert set(told) == set(kernels.BACKENDS)
