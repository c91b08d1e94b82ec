"""What is Triton's own: tiles and splits, specialisation, and a real device where there is one."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from cases import Activations, AveragerRun, backend, device_of
from oracle import relative_error

from kernels import reference
from kernels import triton as kernels_triton
from kernels.rules import RULES
from kernels.triton import launching
from kernels.triton.launching import TILE_ELEMENTS, WIDE_TILE_ELEMENTS, tiling

PROCESSORS = 132


class TestTiling:
    @pytest.mark.parametrize("rows", [1, 15, 16, 63, 64, 257])
    @pytest.mark.parametrize("features", [1, 75, 2048, 8192, 16384, 65536, 262144])
    def test_covers_every_row_once(self, features: int, rows: int) -> None:
        for wide, elements in ((False, TILE_ELEMENTS), (True, WIDE_TILE_ELEMENTS)):
            plan = tiling(rows, features, PROCESSORS, wide)
            assert plan.block_n * plan.block_f == elements
            starts = [split * plan.rows_per_split for split in range(plan.splits)]
            assert [start for start in starts if start < rows] == starts, "no split is empty"
            assert plan.splits * plan.rows_per_split >= rows

    @pytest.mark.parametrize(
        ("features", "block_f", "splits"),
        [(262144, 256, 1), (65536, 128, 1), (32768, 64, 1), (8192, 64, 1), (4096, 64, 2), (2048, 64, 4), (64, 64, 4)],
    )
    def test_small_taps_are_split_and_large_ones_are_not(self, features: int, block_f: int, splits: int) -> None:
        plan = tiling(64, features, PROCESSORS)
        assert (plan.block_f, plan.splits) == (block_f, splits)

    def test_programs_fill_at_least_half_of_the_device(self) -> None:
        for features in (4096, 8192, 16384, 32768, 65536, 131072):
            plan = tiling(64, features, PROCESSORS)
            assert -(-features // plan.block_f) * plan.splits >= PROCESSORS / 2


@pytest.mark.parametrize("accumulation", [torch.float32, torch.float64], ids=["float32 sums", "float64 sums"])
@pytest.mark.parametrize("block_f", [64, 128, 256])
def test_every_block_width(block_f: int, accumulation: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is too slow for taps that would choose the wider blocks by themselves."""
    monkeypatch.setattr(launching, "BLOCKS_F", (block_f,))
    tiling.cache_clear()
    try:
        case = Activations((70, 100, 2, 2), residual=True, device=device_of("triton"))
        case = dataclasses.replace(case, accumulation=accumulation)
        found, expected = case.run(kernels_triton), case.expected()
    finally:
        tiling.cache_clear()
    for key, value in expected.items():
        assert relative_error(found[key].cpu(), value) <= 1e-6, key


_COUNT_SPECIALISATIONS = """
from bench.kernels.audit import specialisation
from bench.kernels.workloads import Recorder
import torch
from kernels import triton as kernels_triton
for aligned in (True, False):
    with Recorder() as recorder:
        for rows in (1, 2, 16, 61, 64):
            for channels in (16, 32, 48) if aligned else (5, 7, 11):
                for layout in (torch.channels_last, torch.contiguous_format):
                    x = torch.zeros(rows, channels, 2, 2).to(memory_format=layout)
                    mean, bias = torch.zeros(4 * channels), torch.zeros(channels)
                    for count in (0, 1, 16, 17):
                        kernels_triton.relu_moments(x, mean, mean.clone(), count, bias, torch.zeros_like(x))
                    kernels_triton.relu_moments_backward(x, x.clone(), mean, mean.clone())
    for name in ("relu_moments_kernel", "merge_splits_kernel", "relu_moments_backward_kernel"):
        print(name, len({specialisation(call) for call in recorder.calls if call.kernel.__name__ == name}))
with Recorder() as recorder:
    for rows in (1, 16, 63, 300):
        for features in (1, 5, 16, 33, 512):
            x = torch.zeros(rows, features)
            for y in (None, torch.zeros(70, features)):
                for parameters in ((1.0,), (1.0, 2.0)):
                    kernels_triton.pairwise_sums(x, y, "imq", parameters, y is not None)
for name in ("pairwise_sums_kernel", "weighted_rows_kernel"):
    print(name, len({specialisation(call) for call in recorder.calls if call.kernel.__name__ == name}))
"""


def test_no_size_is_a_constant() -> None:
    """Images, channels, counts, layouts, rows: one compiled kernel, two where sums are split over the images."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _COUNT_SPECIALISATIONS], capture_output=True, text=True, check=True, env=environment
    )
    expected = ["relu_moments_kernel 2", "merge_splits_kernel 1", "relu_moments_backward_kernel 1"]
    assert done.stdout.splitlines() == [*expected * 2, "pairwise_sums_kernel 1", "weighted_rows_kernel 1"]


@pytest.mark.requires_gpu
class TestOnADevice:
    def test_training_sizes(self) -> None:
        for shape in ((64, 64, 32, 32), (64, 512, 4, 4), (64, 512, 2, 2), (61, 67, 3, 3)):
            case = Activations(shape, torch.bfloat16, residual=True, device="cuda")
            found, expected = case.run(backend("triton")), case.expected()
            for key, value in expected.items():
                assert relative_error(found[key].cpu(), value) <= 1e-2, key

    def test_the_host_never_waits(self) -> None:
        run, case = AveragerRun("ama", features=5000), Activations((64, 16, 2, 2), device="cuda")
        run.run(kernels_triton, device="cuda")
        own = {key: value.cuda() for key, value in case.inputs.items()}
        state = {key: value.cuda() for key, value in run.inputs.items()}
        step = torch.zeros((), dtype=torch.int64, device="cuda")
        wide_mean, wide_m2 = own["mean"].double(), own["m2"].double()
        torch.cuda.set_sync_debug_mode("error")
        try:
            kernels_triton.relu_moments(own["x"], own["mean"], own["m2"], 0)
            kernels_triton.relu_moments_backward(own["grad"], own["x"], own["a"], own["b"])
            kernels_triton.dataset_moments(own["x"], wide_mean, wide_m2, 0, own["bias"], own["residual"])
            kernels_triton.pairwise_sums(own["x"].flatten(1), None, "imq", (1.0, 2.0), False)
            kernels_triton.nearest(own["x"].flatten(1), own["grad"].flatten(1))
            kernels_triton.averager_step(
                state["mean0"], state["m20"], 7, state["target_mean0"], state["target_variance0"],
                state["v"], state["m"], state["u"], step,
                rule="ama", rate=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, correction=1, advance=True,
            )  # fmt: skip
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert step.item() == 1

    def test_no_temporary_of_activation_size(self) -> None:
        x = torch.randn(64, 64, 32, 32, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        mean, m2 = torch.empty(65536, device="cuda"), torch.empty(65536, device="cuda")
        kernels_triton.relu_moments(x, mean, m2, 0)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kernels_triton.relu_moments(x, mean, m2, 0)
        assert torch.cuda.max_memory_allocated() - before < x.numel() / 4

    def test_the_averager_against_the_oracle(self) -> None:
        for rule in RULES:
            eps = 0.1 if rule == "ama_uncorrected" else 1e-8
            run = AveragerRun(rule, weight=True, features=100_003, eps=eps)
            found, expected = run.run(kernels_triton, device="cuda"), run.run(reference, torch.float64)
            for key, value in expected.items():
                assert relative_error(found[key].cpu(), value) <= 1e-5, key
