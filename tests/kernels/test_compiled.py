"""What torch.compile must not do in the `compiled` backend: compile a shape again, or lose its threads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import Activations, AveragerRun
from torch._dynamo.utils import counters

from kernels import compiled
from kernels.compiled.averaging import step_kernel
from kernels.compiled.moments import backward_kernel, moments_kernel
from kernels.compiled.pairwise import profile_kernel

# Below and above the grain that decides on threads; sizes that coincide with each other; one image; many images.
SMALL = ((64, 64, 1, 1), (2, 2, 1, 1), (1, 5, 3, 3), (7, 3, 5, 5), (33, 2, 2, 2), (2000, 3, 1, 1))
LARGE = ((16, 64, 8, 8), (64, 512, 2, 2), (256, 256, 1, 1), (1, 128, 16, 16), (1025, 16, 4, 4))


@pytest.fixture
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    for kernel in (moments_kernel, backward_kernel, step_kernel, profile_kernel):
        monkeypatch.setattr(kernel, "variants", {})


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("shapes", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_one_compilation_for_all_shapes(
    nothing_compiled, residual: bool, shapes: tuple[tuple[int, int, int, int], ...]
) -> None:
    before = graphs()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in shapes:
            for count in (0, 3):
                Activations(shape, residual=residual, count=count).run(compiled)
    assert graphs() - before == 2, "one graph of relu_moments and one of its backward"


def test_slices_of_one_buffer_compile_nothing_again(nothing_compiled) -> None:
    """As the engine calls it: every tap's moments are a slice of one buffer, at another offset, in any order."""
    before = graphs()
    mean, m2 = torch.empty(600), torch.empty(600)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for start, stop in ((75, 171), (0, 75), (171, 600)):
            x = torch.randn(4, stop - start, 1, 1)
            compiled.relu_moments(x, mean[start:stop], m2[start:stop], 0)
    assert graphs() - before == 1


def test_the_averager_compiles_once_for_all_numbers_of_features(nothing_compiled) -> None:
    before = graphs()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for features, count in ((75, 5), (2048, 64), (4001, 2048)):
            AveragerRun("ama", features=features, count=count, advances=(True, True)).run(compiled)
    assert graphs() - before == 1


def test_pairs_compile_once_for_all_sizes_and_parameters(nothing_compiled) -> None:
    """Square tiles or not, in any order; a single row or column is not worth a kernel."""
    before = graphs()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, columns, features, scale in ((64, 64, 5, 1.0), (7, 5, 3, 2.0), (3, 100, 64, 2.0), (20, 20, 20, 3.0)):
            for y in (torch.randn(columns, features), None):
                compiled.pairwise_sums(torch.randn(rows, features), y, "imq", (scale, 4.0))
        compiled.pairwise_sums(torch.randn(1, 5), torch.randn(9, 5), "imq", (1.0, 4.0))
        compiled.pairwise_sums(torch.randn(9, 5), torch.randn(1, 5), "imq", (1.0, 4.0))
    assert graphs() - before == 1


_TIME_ONE_START = """
import time, torch
from torch._dynamo.utils import counters
from kernels import compiled
begun = time.perf_counter()
assert compiled.works(torch.bfloat16) is None
counts = counters["inductor"]
print(time.perf_counter() - begun, counts["fxgraph_cache_hit"], counts["fxgraph_cache_miss"])
"""


@pytest.mark.slow
def test_the_second_run_finds_everything_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    runs = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", _TIME_ONE_START], capture_output=True, text=True, check=True)
        runs.append([float(value) for value in done.stdout.split()])
    (first, _, misses), (second, hits, no_misses) = runs
    assert misses >= 1
    assert hits >= 1
    assert no_misses == 0
    assert second < first
