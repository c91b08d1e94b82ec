"""`watch` of every backend: counts steps, and keeps the first whose loss was not finite."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from cases import MODULES, backend, device_of, dtype_id
from torch._subclasses import FakeTensorMode

import kernels

NEVER = torch.iinfo(torch.int64).max
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST = {dtype: torch.finfo(dtype).max for dtype in DTYPES}


def arguments(loss: float, dtype: torch.dtype, step: int, first_bad: int, device: str) -> list[torch.Tensor]:
    return [
        torch.tensor(loss, dtype=dtype, device=device),
        torch.tensor(step, device=device),
        torch.tensor(first_bad, device=device),
    ]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("start", [0, 7, 2**40])
def test_the_first_bad_step_is_kept(start: int, dtype: torch.dtype, name: str) -> None:
    largest = LARGEST[dtype]
    losses = [0.0, -1.5, largest, -largest, -math.inf, 2.0, math.nan, math.inf]
    loss, step, first_bad = arguments(0.0, dtype, start, NEVER, device_of(name))
    for taken, value in enumerate(losses, start=1):
        assert backend(name).watch(loss.fill_(value), step, first_bad) is None
        assert int(step) == start + taken
        assert int(first_bad) == (NEVER if taken < 5 else start + 5)
        assert math.isnan(value) or float(loss) == value, "only read"


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_number_that_is_none_counts(value: float, name: str) -> None:
    for dtype in DTYPES:
        # From a step before the one that was bad so far, as after going back to an older checkpoint.
        loss, step, first_bad = arguments(value, dtype, 3, 100, device_of(name))
        backend(name).watch(loss, step, first_bad)
        assert (int(step), int(first_bad)) == (4, 4)


@pytest.mark.parametrize("name", MODULES)
def test_opcheck(name: str) -> None:
    backend(name)
    values = arguments(math.nan, torch.float32, 3, NEVER, device_of(name))
    results = torch.library.opcheck(getattr(torch.ops.gfmn.watch, name), tuple(values))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors_pass_through(device: str, name: str) -> None:
    with FakeTensorMode():
        values = [torch.empty((), dtype=dtype, device=device) for dtype in (torch.float32, torch.int64, torch.int64)]
        assert backend(name).watch(*values) is None


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(
    ("argument", "position", "value"),
    [
        ("loss", 0, torch.zeros(1)),
        ("loss", 0, torch.zeros((), dtype=torch.int64)),
        ("step", 1, torch.zeros(())),
        ("step", 1, torch.zeros(1, dtype=torch.int64)),
        ("first_bad", 2, torch.zeros((), dtype=torch.int32)),
    ],
)
def test_a_bad_argument_is_named(argument: str, position: int, value: torch.Tensor, name: str) -> None:
    values = arguments(math.nan, torch.float32, 3, NEVER, "cpu")
    values[position] = value
    before = [tensor.clone() for tensor in values]
    with pytest.raises(ValueError, match=f"^{argument}: "):
        backend(name).watch(*values)
    assert all(torch.equal(old, new) for old, new in zip(before[1:], values[1:], strict=True)), "nothing was changed"


def test_signatures_and_dispatch() -> None:
    assert inspect.getdoc(kernels.watch)
    for name in MODULES:
        assert inspect.signature(backend(name).watch) == inspect.signature(kernels.watch)
    loss, step, first_bad = arguments(math.inf, torch.float32, 0, NEVER, "cpu")
    kernels.watch(loss, step, first_bad)
    assert (int(step), int(first_bad)) == (1, 1)
