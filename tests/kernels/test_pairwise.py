"""Sums over all pairs of rows, against autograd in float64 of kernels written out with differences, pair by pair."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from cases import MODULES, backend, device_of, dtype_id
from oracle import relative_error
from torch import Tensor
from torch._subclasses import FakeTensorMode

import kernels
from bench.rows import peak_memory
from kernels import plain
from kernels.layout import accumulation_dtype
from kernels.profiles import PROFILES

Matrix = Callable[[Tensor, Tensor], Tensor]


def squares(x: Tensor, y: Tensor) -> Tensor:
    return (x[:, None] - y[None, :]).square().sum(dim=2)


def lengths(x: Tensor, y: Tensor) -> Tensor:
    """‖x_i − y_j‖, with gradient 0 where it is 0."""
    t = squares(x, y)
    return torch.where(t > 0, torch.where(t > 0, t, 1).sqrt(), 0)


# Name → parameters, and k(x, y) [n, m] of float64 rows, as the documentation has it.
KERNELS: dict[str, tuple[tuple[float, ...], Matrix]] = {
    "gaussian": ((1.5, 3.0, 7.0), lambda x, y: sum(torch.exp(-squares(x, y) / (2 * s * s)) for s in (1.5, 3.0, 7.0))),
    "rational-quadratic": ((0.2, 1.0, 5.0), lambda x, y: sum((1 + squares(x, y) / (2 * a)) ** -a for a in (0.2, 1, 5))),
    "imq": ((0.5, 4.0), lambda x, y: sum(c / (c + squares(x, y)) for c in (0.5, 4.0))),
    "energy": ((), lambda x, y: -lengths(x, y)),
    "linear": ((), lambda x, y: x @ y.T),
    "polynomial": ((3,), lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3),
}
# (n, m, F): a single pair, single rows, one feature, primes, whole tiles of Triton, tails of all of them.
SHAPES = {
    "one pair": (1, 1, 1),
    "one row": (1, 5, 4),
    "one column": (5, 1, 3),
    "one feature": (7, 11, 1),
    "prime": (13, 7, 5),
    "whole tiles": (64, 128, 32),
    "tails of tiles": (67, 97, 35),
}
# Relative errors of sums and of gradients; G is a difference of sums, and so a digit worse.
TOLERANCE = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-6, 3e-5), torch.bfloat16: (1e-6, 3e-5)}
FUSED = ("compiled", "triton")


def draw(count: int, features: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(count, features, dtype=torch.float64) + 0.5).to(dtype)


def expected(x: Tensor, y: Tensor | None, kernel: Matrix, diagonal: bool) -> tuple[Tensor, Tensor]:
    """S and G by autograd; the rows that play y's part are held fixed."""
    leaf = x.double().clone().requires_grad_()
    matrix = kernel(leaf, x.double() if y is None else y.double())
    if not diagonal:
        matrix = matrix * (1 - torch.eye(len(x), dtype=torch.float64))
    sums = matrix.sum(dim=1)
    return sums.detach(), torch.autograd.grad(sums.sum(), leaf)[0]


def check(name: str, kernel: str, x: Tensor, y: Tensor | None, diagonal: bool = True) -> None:
    parameters, matrix = KERNELS[kernel]
    device = device_of(name)
    on_device = None if y is None else y.to(device)
    sums, gradient = backend(name).pairwise_sums(x.to(device), on_device, kernel, parameters, diagonal)
    right = expected(x, y, matrix, diagonal)
    assert sums.dtype == torch.float64
    assert gradient.dtype == accumulation_dtype(x.dtype)
    for what, found, value, tolerance in zip("SG", (sums, gradient), right, TOLERANCE[x.dtype], strict=True):
        scale = max(float(value.norm()), 1e-6)  # all of G may be 0, of one row with itself
        error = float((found.cpu().double() - value).norm()) / scale
        assert error <= tolerance, f"{what} of {kernel}, {list(x.shape)}, {diagonal}: {error:.1e}"


def test_the_table_is_complete() -> None:
    assert KERNELS.keys() == PROFILES.keys()


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=dtype_id)
@pytest.mark.parametrize("kernel", KERNELS)
def test_two_sets(kernel: str, dtype: torch.dtype, name: str) -> None:
    for n, m, features in SHAPES.values():
        check(name, kernel, draw(n, features, dtype), draw(m, features, dtype) - 0.3)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("kernel", KERNELS)
def test_one_set_with_itself(kernel: str, dtype: torch.dtype, name: str) -> None:
    for n, _, features in SHAPES.values():
        for diagonal in (True, False):
            check(name, kernel, draw(n, features, dtype), None, diagonal)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("itself", [False, True], ids=["two sets", "one set"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_nan_reaches_the_sums(kernel: str, itself: bool, name: str) -> None:
    """Those of its row, and of all where rows are centred first; it is neither a distance of 0 nor left out."""
    parameters, _ = KERNELS[kernel]
    device = device_of(name)
    x, y = draw(6, 5, torch.float32).to(device), None if itself else draw(7, 5, torch.float32).to(device)
    x[2, 1] = torch.nan
    sums, gradient = backend(name).pairwise_sums(x, y, kernel, parameters)
    everywhere = PROFILES[kernel].radial or itself
    expected = torch.ones_like(sums, dtype=torch.bool) if everywhere else torch.arange(6, device=device) == 2
    assert torch.equal(sums.isnan(), expected)
    if kernel != "linear" or itself:  # whose gradient is the sum of the other set
        assert torch.equal(gradient.isnan().any(dim=1), expected)


class TestTiles:
    """Several tiles of everything, which the shapes above are too small for."""

    @pytest.fixture(autouse=True)
    def small_tiles(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys.modules["kernels.compiled.pairwise"], "TILE", 16)
        backend("triton")
        ours = sys.modules["kernels.triton.pairwise"]
        monkeypatch.setattr(ours, "STRIP_ROWS", 64)
        monkeypatch.setattr(ours, "SCRATCH", 64 * 128)

    @pytest.mark.parametrize("name", FUSED)
    @pytest.mark.parametrize("kernel", ["gaussian", "energy", "polynomial"])
    def test_sums(self, kernel: str, name: str) -> None:
        check(name, kernel, draw(131, 35), draw(197, 35))
        for diagonal in (True, False):
            check(name, kernel, draw(131, 35), None, diagonal)

    @pytest.mark.parametrize("processors", [1, 132])
    def test_triton_splits_columns(self, processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys.modules["kernels.triton.launching"], "processors", lambda device: processors)
        check("triton", "imq", draw(20, 9), draw(333, 9))

    @pytest.mark.parametrize("name", FUSED)
    def test_nearest(self, name: str) -> None:
        x, y = draw(70, 5).to(device_of(name)), draw(300, 5).to(device_of(name))
        index, squared = backend(name).nearest(x, y)
        assert torch.equal(index.cpu(), squares(x.cpu(), y.cpu()).argmin(dim=1))
        assert relative_error(squared.cpu(), squares(x.cpu(), y.cpu()).min(dim=1).values) <= 1e-14


@pytest.mark.parametrize("name", MODULES)
def test_values_alone_are_the_same(name: str) -> None:
    for kernel in ("gaussian", "linear", "polynomial"):
        parameters, _ = KERNELS[kernel]
        for y in (draw(40, 6), None):
            x = draw(30, 6).to(device_of(name))
            other = None if y is None else y.to(x.device)
            both = backend(name).pairwise_sums(x, other, kernel, parameters)
            sums, gradient = backend(name).pairwise_sums(x, other, kernel, parameters, True, False)
            assert relative_error(sums, both[0]) <= 1e-15
            assert gradient.shape == (0, 6)


@pytest.mark.parametrize("name", MODULES)
def test_any_strides_and_nothing_is_changed(name: str) -> None:
    x, y = draw(14, 24)[::2, ::3], draw(8, 22).T
    before = x.clone(), y.clone()
    for kernel in KERNELS:
        check(name, kernel, x, y)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


@pytest.mark.parametrize("name", MODULES)
def test_far_from_the_origin(name: str) -> None:
    """Raw ‖x‖² + ‖y‖² − 2 x·y would have no digit left: 1e8 beside distances of 30."""
    offset = 1e4 * torch.ones(16)
    x, y = (draw(20, 16).float() + offset for _ in range(2))
    check(name, "gaussian", x, y)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
def test_duplicates_have_no_pull(dtype: torch.dtype, name: str) -> None:
    """The energy kernel's gradient is 0 between equal rows, wherever they are found; rounding would make it a unit."""
    x = draw(33, 20, dtype).to(device_of(name))
    rows = x[:1].expand(5, -1).contiguous()
    sums, gradient = backend(name).pairwise_sums(rows, rows.clone(), "energy")
    assert not sums.any()
    assert not gradient.any()
    repeated = torch.cat((x, x))
    check(name, "energy", repeated.cpu(), x.cpu())
    check(name, "energy", repeated.cpu(), None, False)


@pytest.mark.parametrize("name", MODULES)
def test_repeated_calls_give_the_same_bits(name: str) -> None:
    x, y = draw(150, 70, torch.float32).to(device_of(name)), draw(170, 70, torch.float32).to(device_of(name))
    for other in (y, None):
        first, second = (backend(name).pairwise_sums(x, other, "gaussian", (9.0, 12.0, 20.0)) for _ in range(2))
        assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("name", MODULES)
def test_uninitialised_memory_is_not_read(name: str, poisoned_memory: None) -> None:
    for kernel in KERNELS:
        check(name, kernel, draw(67, 35), draw(97, 35))
        check(name, kernel, draw(67, 35), None, False)
    x, y = draw(7, 3).to(device_of(name)), draw(70, 3).to(device_of(name))
    assert backend(name).nearest(x, y)[1].isfinite().all()


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_id)
def test_nearest(dtype: torch.dtype, name: str) -> None:
    for n, m, features in SHAPES.values():
        x, y = draw(n, features, dtype), draw(m, features, dtype)
        y[m // 2] = y[0]  # of equal ones the first
        index, squared = (found.cpu() for found in backend(name).nearest(x.to(device_of(name)), y.to(device_of(name))))
        right = squares(x.double(), y.double())
        assert (index.dtype, squared.dtype) == (torch.int64, accumulation_dtype(dtype))
        found = right.gather(1, index[:, None])[:, 0]
        assert torch.allclose(found, right.min(dim=1).values, rtol=1e-4, atol=1e-4), "no farther than the nearest"
        assert torch.allclose(squared.double(), found, rtol=1e-5, atol=0), "all digits, although rows are far from 0"
        if m > 1:
            assert not (index == m // 2).any()


def test_autocast_does_not_reach_the_products() -> None:
    x, y = draw(40, 64, torch.float32), draw(50, 64, torch.float32)
    for name in ("reference", "compiled"):
        exact = backend(name).pairwise_sums(x, y, "gaussian", (8.0, 9.0, 12.0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = backend(name).pairwise_sums(x, y, "gaussian", (8.0, 9.0, 12.0))
        assert all(torch.equal(one, two) for one, two in zip(found, exact, strict=True))


@pytest.mark.parametrize("name", MODULES)
def test_operators(name: str) -> None:
    x, y = draw(9, 4, torch.float32).to(device_of(name)), draw(7, 4, torch.float32).to(device_of(name))
    backend(name)
    for args in ((x, y, "imq", [0.5, 2.0]), (x, None, "energy", [], False), (x, y, "linear", [], True, False)):
        results = torch.library.opcheck(getattr(torch.ops.gfmn.pairwise_sums, name), args)
        assert set(results.values()) == {"SUCCESS"}
    assert set(torch.library.opcheck(getattr(torch.ops.gfmn.nearest, name), (x, y)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors_pass_through(device: str, name: str) -> None:
    kernels = backend(name)
    with FakeTensorMode():
        x, y = torch.empty(9, 4, device=device, dtype=torch.bfloat16), torch.empty(7, 4, device=device).bfloat16()
        sums, gradient = kernels.pairwise_sums(x, y, "gaussian", (1.0,))
        index, squared = kernels.nearest(x, y)
        assert kernels.pairwise_sums(x, None, "energy", (), True, False)[1].shape == (0, 4)
    assert (sums.shape, sums.dtype) == ((9,), torch.float64)
    assert (gradient.shape, gradient.dtype) == ((9, 4), torch.float32)
    assert (index.shape, index.dtype, squared.shape, squared.dtype) == ((9,), torch.int64, (9,), torch.float32)
    assert {t.device.type for t in (sums, gradient, index, squared)} == {device}


X, Y = torch.zeros(4, 3), torch.zeros(5, 3)
BAD_ARGUMENTS = {
    "x, shape": (X[0], Y, "energy"),
    "x, no rows": (X[:0], Y, "energy"),
    "x, dtype": (X.long(), Y, "energy"),
    "x, with a graph": (torch.zeros(4, 3, requires_grad=True), Y, "energy"),
    "y, features": (X, Y[:, :2], "energy"),
    "y, dtype": (X, Y.double(), "energy"),
    "y, no rows": (X, Y[:0], "energy"),
    "kernel": (X, Y, "laplace"),
    "parameters, none": (X, Y, "gaussian", ()),
    "parameters, too many": (X, Y, "imq", (1.0,) * 9),
    "parameters, not taken": (X, Y, "energy", (1.0,)),
    "parameters, negative": (X, Y, "gaussian", (1.0, -1.0)),
    "parameters, NaN": (X, Y, "gaussian", (float("nan"),)),
    "parameters, broken": (X, Y, "polynomial", (2.5,)),
    "diagonal": (X, Y, "energy", (), False),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("what", BAD_ARGUMENTS)
def test_a_bad_argument_is_named(what: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{what.split(',')[0]}: "):
        backend(name).pairwise_sums(*BAD_ARGUMENTS[what])
    if what[0] in "xy":
        with pytest.raises(ValueError, match=f"^{what.split(',')[0]}: "):
            backend(name).nearest(*BAD_ARGUMENTS[what][:2])


def test_the_fastest_backend_is_chosen() -> None:
    x, y = draw(20, 5), draw(30, 5)
    chosen = kernels.select("auto", torch.device("cpu"), torch.float64)
    for found, right in (
        (kernels.pairwise_sums(x, y, "imq", (0.5, 2.0)), chosen.pairwise_sums(x, y, "imq", (0.5, 2.0))),
        (kernels.nearest(x, y), chosen.nearest(x, y)),
    ):
        assert all(torch.equal(one, two) for one, two in zip(found, right, strict=True))


def test_no_matrix_of_pairs_is_held() -> None:
    """Tiles of their real size, with threads: two buffers of 4 MiB, where the matrix has 30 MB."""
    x, y = draw(3000, 4, torch.float32), draw(2500, 4, torch.float32)
    parameters, matrix = KERNELS["gaussian"]
    sums, gradient = backend("compiled").pairwise_sums(x, y, "gaussian", parameters)
    for rows in (slice(0, 50), slice(2950, 3000)):
        right = expected(x[rows], y, matrix, True)
        assert relative_error(sums[rows], right[0]) <= 1e-6
        assert relative_error(gradient[rows], right[1]) <= 3e-5
    for other in (y, None):
        held = peak_memory(
            lambda other=other: backend("compiled").pairwise_sums(x, other, "gaussian", parameters), "cpu"
        )
        assert 2 * 2**20 < held < 10 * 2**20


def test_long_sets_are_summed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "_BLOCK", 8)
    check("compiled", "linear", draw(11, 3), draw(7, 3))
    check("compiled", "linear", draw(11, 3), None, False)
    x, y = draw(11, 3), draw(7, 3)
    index = torch.arange(11) % 7
    right = squares(x, y).gather(1, index[:, None])[:, 0]
    assert relative_error(plain.squared_differences(x, y, index), right) <= 1e-15
