"""What Inductor keeps between processes: code for another CPU is not taken, and a folder that cannot be is no fault."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels._dynamo import Kernel

ROOT = Path(__file__).parents[2]
SELECT = "import torch, kernels\nprint(kernels.select('auto', torch.device('cpu'), torch.float32).__name__)\n"
WIDTH = "from kernels._dynamo import vector_options\nprint(vector_options()['cpp.simdlen'])\n"
MOMENTS = """
import torch
from kernels import compiled, reference
assert compiled.works(torch.float32) is None
x = torch.randn(16, 2048, 1, 1, generator=torch.Generator().manual_seed(0))
found = []
for backend in (compiled, reference):
    y, mean, m2 = x.clone(), torch.zeros(2048), torch.zeros(2048)
    backend.relu_moments(y, mean, m2, 0)
    found.append((y, mean, m2))
for one, other in zip(*found):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
"""


def python(text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", text], env=known, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this CPU's vectors are unknown")
def test_the_width_of_vectors_is_a_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is among the options of every compilation, and another one for another width."""
    from kernels import compiled

    asked = []
    monkeypatch.setattr(torch, "compile", lambda *_, options, **__: asked.append(options) or (lambda *_: None))
    compiled.moments._streaming_kernel.cache_clear()
    try:
        compiled.moments._streaming_kernel()
    finally:
        compiled.moments._streaming_kernel.cache_clear()
    Kernel(lambda x: x)._compile(serial=True)
    assert [options["cpp.simdlen"] in (128, 256, 512) for options in asked] == [True, True]
    assert int(python(WIDTH, ATEN_CPU_CAPABILITY="default").stdout) == 0


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="this CPU has no other width")
def test_code_for_wider_vectors_is_not_taken(tmp_path: Path) -> None:
    """It would pass over every second vector of a narrower CPU."""
    for given in ({}, {"ATEN_CPU_CAPABILITY": "avx2"}):
        done = python(MOMENTS, TORCHINDUCTOR_CACHE_DIR=str(tmp_path), **given)
        assert done.returncode == 0, done.stderr


def test_code_that_computes_wrong_numbers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels import compiled

    def skips_half(x: torch.Tensor, mean: torch.Tensor, m2: torch.Tensor, count: int) -> None:
        mean[: len(mean) // 2] = x[:, : len(mean) // 2].relu().mean(dim=(0, 2, 3))

    monkeypatch.setattr(compiled, "relu_moments", skips_half)
    assert compiled.works(torch.float32) == "Inductor's code computes wrong numbers"


def test_a_compiler_that_does_not_start(tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'g++: error while loading shared libraries' >&2\nexit 127\n")
    compiler.chmod(0o755)
    done = python(SELECT, CXX=str(compiler), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert done.stdout.strip() == "kernels.reference", done.stderr
    assert "cannot build Inductor's code" in done.stderr


def test_a_cache_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = python(SELECT, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "file" / "cache"))
    assert done.stdout.strip() == "kernels.reference", done.stderr
    assert "Inductor's cache folder cannot be used" in done.stderr
