"""Every backend against float64 `reference`: the three operations, shape by shape."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
from cases import (
    ACTIVATIONS,
    LAYOUTS,
    TOLERANCE,
    Activations,
    AveragerRun,
    backend,
    device_of,
    dtype_id,
    moments_of,
    shape_cases,
)
from oracle import relative_error

from kernels.rules import RULES

FUSED = ("compiled", "triton")
BACKENDS = ("reference", *FUSED)
SHAPES = {
    "one value": (1, 1, 1, 1),
    "one image": (1, 5, 3, 3),
    "odd": (3, 3, 5, 7),
    "prime": (13, 67, 1, 1),
    "aligned": (4, 16, 4, 4),
    "tail of a block": (5, 65, 1, 1),
    "several blocks": (2, 48, 5, 1),
    "split over images": (67, 6, 2, 2),
    "more images than a tile": (257, 3, 2, 1),
    "several tiles of a program": (67, 131, 8, 8),
}


def check(case: Activations, name: str) -> None:
    found, expected = case.run(backend(name)), case.expected()
    for key, value in expected.items():
        error = relative_error(found[key].cpu(), value)
        assert error <= TOLERANCE[case.dtype][key in ("mean", "m2")], f"{key}: {error:.1e} for {case}"


@pytest.mark.parametrize(("shape", "dtype", "name"), shape_cases(SHAPES, BACKENDS, "several tiles of a program"))
def test_shapes(shape: str, dtype: torch.dtype, name: str) -> None:
    for layout in LAYOUTS:
        check(Activations(SHAPES[shape], dtype, layout, device=device_of(name)), name)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_activations_with_bias_and_shortcut(layout: str, activation: str, name: str) -> None:
    for bias, residual in ((True, False), (False, True), (True, True)):
        case = Activations(
            (35, 6, 3, 2), layout=layout, activation=activation, bias=bias, residual=residual, device=device_of(name)
        )
        check(case, name)


@pytest.mark.parametrize("name", BACKENDS)
def test_running_moments_are_merged(name: str) -> None:
    for shape in ((1, 5, 3, 3), (5, 5, 3, 3), (40, 5, 3, 3)):
        check(Activations(shape, residual=True, count=11, device=device_of(name)), name)


@pytest.mark.parametrize("name", BACKENDS)
def test_float64_buffers_for_any_activations(name: str) -> None:
    """As a whole dataset's moments are merged: nothing but the activations themselves is in their own dtype."""
    for count in (0, 50):
        case = Activations((40, 6, 2, 2), torch.bfloat16, count=count, accumulation=torch.float64, scale=0.1, offset=9)
        case.device = device_of(name)
        found, expected = case.run(backend(name)), case.expected()
        assert relative_error(found["mean"].cpu(), expected["mean"]) <= 1e-13
        assert relative_error(found["m2"].cpu(), expected["m2"]) <= 1e-12


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
def test_moments_are_of_the_values_as_stored(dtype: torch.dtype, name: str) -> None:
    """A low dtype costs the activations precision, not the moments: sums around a pilot in float32."""
    case = Activations((67, 6, 2, 2), dtype, device=device_of(name), offset=5, scale=0.3)
    found = case.run(backend(name))
    mean, m2 = moments_of(found["y"].cpu())
    assert relative_error(found["mean"].cpu(), mean) <= 1e-6
    assert relative_error(found["m2"].cpu(), m2) <= 2e-6


@pytest.mark.parametrize("name", FUSED)
def test_every_number_of_images_from_1_to_257(name: str) -> None:
    few = (*range(1, 20), 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 127, 128, 129, 191, 192, 193, 255, 256, 257)
    for images in range(1, 258) if name == "compiled" else few:
        check(Activations((images, 3, 2, 2), device=device_of(name)), name)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize(
    ("chunks", "dtype", "tolerance"),
    [
        ((64,), torch.float32, 1e-5),
        ((1, 63), torch.float32, 1e-5),
        # A running mean near 1e3 in float32 is itself only known to 3e-5.
        ((20, 3, 41), torch.float32, 1e-3),
        ((20, 3, 41), torch.float64, 1e-5),
    ],
    ids=["one chunk", "two chunks", "float32 buffers", "float64 buffers"],
)
def test_deviation_far_smaller_than_the_mean(
    chunks: tuple[int, ...], dtype: torch.dtype, tolerance: float, name: str
) -> None:
    """Mean 1e3, deviation 1e-2, float32: raw sums would have no digit right, float32 means of tiles two."""
    kernels, device = backend(name), device_of(name)
    x = (1e3 + 1e-2 * torch.randn(64, 3, 4, 4)).to(device, memory_format=torch.channels_last)
    mean, m2 = torch.empty(48, device=device, dtype=dtype), torch.empty(48, device=device, dtype=dtype)
    count = 0
    for part in x.split(chunks):
        kernels.relu_moments(part, mean, m2, count)
        count += len(part)
    expected_mean, expected_m2 = moments_of(x.cpu())
    assert relative_error(mean.cpu(), expected_mean) <= 1e-7
    assert relative_error(m2.cpu(), expected_m2) <= tolerance
    if tolerance > 1e-5:
        return

    run = AveragerRun("ama", features=48, count=64, advances=(False,))
    run.inputs |= {"mean0": mean.cpu().float(), "m20": m2.cpu().float()}
    found = run.run(kernels, device=device)
    grad = torch.zeros_like(x)
    kernels.relu_moments_backward(grad, x, found["a0"], found["b0"])
    run.inputs |= {"mean0": expected_mean, "m20": expected_m2}
    exact = run.run(backend("reference"), torch.float64)
    rows = x.cpu().permute(0, 2, 3, 1).flatten(1).double()
    error = relative_error(grad.cpu().permute(0, 2, 3, 1).flatten(1), exact["a0"] + exact["b0"] * rows)
    assert error <= 3e-4


@pytest.mark.parametrize("name", BACKENDS)
def test_chunks_merge_into_the_moments_of_all_images(name: str) -> None:
    kernels, device = backend(name), device_of(name)
    whole = Activations((64, 5, 3, 3), residual=True, offset=3)
    expected = whole.expected()
    for sizes in ((1, 63), (30, 33, 1), (16,) * 4):
        mean, m2 = torch.full((45,), float("nan"), device=device), torch.full((45,), float("nan"), device=device)
        count = 0
        pairs = zip(whole.inputs["x"].split(sizes), whole.inputs["residual"].split(sizes), strict=True)
        for x, residual in pairs:
            chunk = x.to(device).clone(memory_format=torch.channels_last)
            kernels.relu_moments(chunk, mean, m2, count, None, residual.to(device))
            count += len(x)
        assert relative_error(mean.cpu(), expected["mean"]) <= 1e-6
        assert relative_error(m2.cpu(), expected["m2"]) <= 1e-6


@pytest.mark.parametrize("name", FUSED)
def test_the_same_bits_every_time(name: str) -> None:
    case = Activations((67, 6, 2, 2), bias=True, residual=True, device=device_of(name))
    first, second = case.run(backend(name)), case.run(backend(name))
    assert all(torch.equal(first[key], second[key]) for key in first)
    averager = AveragerRun("ama", weight=True)
    one, two = (averager.run(backend(name), device=device_of(name)) for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", ["reference", "triton"])  # Inductor's buffers are beyond the poison
@pytest.mark.parametrize("count", [0, 9])
def test_uninitialised_memory_is_never_read(count: int, name: str, poisoned_memory: None) -> None:
    for shape in ((67, 6, 2, 2), (3, 67, 1, 1)):
        found = Activations(shape, count=count, bias=True, residual=True, device=device_of(name)).run(backend(name))
        assert all(value.isfinite().all() for value in found.values())
    found = AveragerRun("ama", weight=True).run(backend(name), device=device_of(name))
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's, in the interpreter
@pytest.mark.parametrize(
    ("activation", "value"),
    [("relu", "nan"), ("relu6", "nan"), ("none", "nan"), ("relu", "inf"), ("none", "inf"), ("none", "-inf")],
)
def test_what_is_not_finite_reaches_the_loss(activation: str, value: str, name: str) -> None:
    kernels, device = backend(name), device_of(name)
    for image, count in ((0, 0), (39, 0), (17, 4)):
        case = Activations((40, 3, 2, 2), activation=activation, residual=True, count=count, device=device)
        case.inputs["x"][image, 1, 0, 1] = float(value)
        found = case.run(kernels)
        where = torch.zeros(12, dtype=torch.bool)
        where[1 * 3 + 1] = True  # position (0, 1), channel 1 of 3, in channels_last order
        assert torch.equal(~found["mean"].cpu().isfinite(), where)
        assert torch.equal(~found["m2"].cpu().isfinite(), where)
        for rule in ("ama", "none"):
            run = AveragerRun(rule, features=12, count=40 + count, advances=(True,))
            run.inputs |= {"mean0": found["mean"].cpu(), "m20": found["m2"].cpu()}
            sums = run.run(kernels, device=device)["sums0"]
            assert not sums[:2].isfinite().any()


_READ_ONLY = """
import ctypes, importlib, mmap, resource, sys
import torch

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
kernels = importlib.import_module("kernels." + sys.argv[1])
values = torch.arange(-40, 44, dtype=torch.float32)
memory = mmap.mmap(-1, values.nbytes)
memory.write(values.numpy().tobytes())
x = torch.frombuffer(memory, dtype=torch.float32).view(7, 3, 2, 2)
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(x.data_ptr()), values.nbytes, mmap.PROT_READ) == 0
mean, m2 = torch.empty(12), torch.empty(12)
kernels.relu_moments(x, mean, m2, 0, None, None, "none")
assert torch.allclose(mean, values.view(7, 12).mean(0))
print("only read", flush=True)
bias, residual = torch.zeros(3), torch.zeros(7, 3, 2, 2)
arguments = {"bias": (bias, None, "none"), "shortcut": (None, residual, "none"), "relu": (None, None, "relu")}
kernels.relu_moments(x, mean, m2, 0, *arguments[sys.argv[2]])
"""


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("change", ["bias", "shortcut", "relu"])
def test_nothing_is_written_where_nothing_changes(change: str, name: str) -> None:
    """In memory that the process may not write to; what does change something then ends it."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", _READ_ONLY, name, change]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.split("\n") == ["only read", ""], done.stderr
    assert done.returncode == -signal.SIGSEGV


@pytest.mark.parametrize("name", FUSED)
def test_no_temporary_of_activation_size(name: str) -> None:
    """All that a pass allocates is per feature; an activation has 128 times as many values."""
    kernels, device = backend(name), device_of(name)
    for residual in (False, True):
        case = Activations((128, 16, 2, 2), residual=residual, device=device)
        own = {key: value.to(device).clone(memory_format=torch.preserve_format) for key, value in case.inputs.items()}
        own |= {f"wide_{key}": own[key].double() for key in ("mean", "m2")}
        shortcut = own["residual"] if residual else None
        activation_bytes = own["x"].numel() * 4

        def forward(own=own, shortcut=shortcut) -> None:
            kernels.relu_moments(own["x"], own["mean"], own["m2"], 0, None, shortcut)

        def backward(own=own) -> None:
            kernels.relu_moments_backward(own["grad"], own["x"], own["a"], own["b"])

        def of_a_dataset(own=own, shortcut=shortcut) -> None:
            kernels.dataset_moments(own["x"], own["wide_mean"], own["wide_m2"], 0, own["bias"], shortcut)

        for step in (forward, backward, of_a_dataset):
            step()
            with torch.profiler.profile(profile_memory=True) as profile:
                step()
            events = profile.profiler.kineto_results.events()
            sizes = [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]
            assert sum(sizes) <= activation_bytes / 4, sizes


class TestAverager:
    @pytest.mark.parametrize("name", BACKENDS)
    @pytest.mark.parametrize("weight", [False, True], ids=["plain", "weighted"])
    @pytest.mark.parametrize("rule", RULES)
    def test_rules(self, rule: str, weight: bool, name: str) -> None:
        eps = 0.1 if rule == "ama_uncorrected" else 1e-8  # large enough that it matters what it is added to
        for correction in (0, 1):
            run = AveragerRun(rule, weight, correction=correction, eps=eps)
            found, expected = (
                run.run(backend(name), device=device_of(name)),
                run.run(backend("reference"), torch.float64),
            )
            for key, value in expected.items():
                assert relative_error(found[key].cpu(), value) <= 1e-6, key

    @pytest.mark.parametrize("name", BACKENDS)
    @pytest.mark.parametrize("features", [13, 1024, 1025])
    def test_numbers_of_features(self, features: int, name: str) -> None:
        run = AveragerRun("ama", features=features)
        found, expected = run.run(backend(name), device=device_of(name)), run.run(backend("reference"), torch.float64)
        for key, value in expected.items():
            # Sums are of terms of both signs.
            scale = value.abs().max().clamp(min=1) if key.startswith("sums") else 1
            assert relative_error(found[key].cpu() / scale, value / scale) <= 5e-6, key

    @pytest.mark.parametrize("name", BACKENDS)
    @pytest.mark.parametrize("steps", [0, 1, 999, 10**6])
    def test_bias_corrections(self, steps: int, name: str) -> None:
        """1 − 0.999 in float32 would be off by 1.3e-5, and with it the first direction by half of that."""
        run = AveragerRun("ama", features=97, rate=1.0, steps=steps, advances=(True,))
        run.inputs["v"].zero_()
        found, expected = run.run(backend(name), device=device_of(name)), run.run(backend("reference"), torch.float64)
        assert found["step"] == steps + 1
        assert relative_error(found["v"].cpu(), expected["v"]) <= 5e-7

    @pytest.mark.filterwarnings("ignore:invalid value encountered")
    @pytest.mark.parametrize("name", BACKENDS)
    def test_no_epsilon(self, name: str) -> None:
        """0/0 in the lanes beyond the last feature must not reach the sums."""
        found = AveragerRun("ama", features=1025, eps=0.0).run(backend(name), device=device_of(name))
        assert all(value.isfinite().all() for value in found.values())
