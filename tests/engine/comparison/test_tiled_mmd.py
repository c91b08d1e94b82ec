"""MMD² in tiles against the plain one: values, gradients, and that there is no second derivative."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from oracle import relative_error
from torch import Tensor

from engine.comparison.distances import MMD, kernels
from engine.comparison.distances.tiled import TILED_PAIRS, TiledMMD, bound_mmd, profile_of
from engine.configuration.config import Config
from engine.configuration.objectives import blank_reference, make_objective
from engine.representation.build import build_extractor
from engine.support.errors import InputError
from kernels import compiled, reference


def gradient(value: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(3 * value, x)[0]


@pytest.mark.parametrize("unbiased", [False, True], ids=["biased", "unbiased"])
@pytest.mark.parametrize("name", [name for name, make in kernels.KERNELS.items() if profile_of(make()) is not None])
def test_equals_the_plain_one(name: str, unbiased: bool) -> None:
    kernel = kernels.KERNELS[name]()
    y = torch.randn(41, 7, dtype=torch.float64) + 0.5
    x = torch.randn(23, 7, dtype=torch.float64, requires_grad=True)
    ours, plain = TiledMMD(y, kernel, unbiased), MMD(y, kernel, unbiased)
    assert float((ours(x) - plain(x)).detach().abs()) <= 1e-10
    assert relative_error(gradient(ours(x), x), gradient(plain(x), x)) <= 1e-10
    with torch.no_grad():
        assert float((ours(x) - plain(x)).detach().abs()) <= 1e-10


def test_half_precision_is_float32_inside() -> None:
    y, x = torch.randn(41, 7).bfloat16(), torch.randn(23, 7).bfloat16().requires_grad_()
    ours, plain = TiledMMD(y, kernels.imq()), MMD(y, kernels.imq())
    assert ours(x).dtype == torch.float32
    assert float((ours(x) - plain(x)).detach().abs()) <= 1e-5
    found = gradient(ours(x), x)
    assert found.dtype == torch.bfloat16
    assert relative_error(found, gradient(plain(x), x)) <= 1e-2


def test_there_is_no_second_derivative() -> None:
    x = torch.randn(5, 3, requires_grad=True)
    value = TiledMMD(torch.randn(6, 3), kernels.energy())(x)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(value, x, create_graph=True)


def test_large_sets_are_tiled_where_that_can_be() -> None:
    y = torch.randn(100, 3)
    rows = 1000
    assert rows * (rows + 100) >= TILED_PAIRS > 900 * 1000
    assert isinstance(bound_mmd(y, kernels.imq(), rows), TiledMMD)
    assert isinstance(bound_mmd(y, kernels.imq(), 900), MMD)
    assert isinstance(bound_mmd(y, kernels.gaussian(range(1, 10)), rows), MMD)
    assert isinstance(bound_mmd(y, kernels.rational_quadratic_linear(), rows), MMD)
    assert bound_mmd(y, kernels.imq(), rows, unbiased=True).unbiased


def test_the_backend_that_is_asked_for_computes() -> None:
    asked: list[torch.dtype] = []

    def counted(x: Tensor, *arguments: object) -> object:
        asked.append(x.dtype)
        return reference.pairwise_sums(x, *arguments)

    y, x = torch.randn(41, 7), torch.randn(1200, 7, requires_grad=True)
    found = bound_mmd(y, kernels.imq(), len(x), kernels=SimpleNamespace(pairwise_sums=counted))
    value = found(x)
    assert asked == [torch.float32, torch.float32]
    assert value.item() == pytest.approx(MMD(y, kernels.imq())(x).item(), rel=1e-4)
    with pytest.raises(ValueError, match="kernels: 'nothing' is not one of"):
        TiledMMD(y, kernels.imq(), kernels="nothing")


@pytest.mark.parametrize(("backend", "kind"), [("compiled", TiledMMD), ("reference", MMD)])
def test_the_configured_backend(backend: str, kind: type) -> None:
    """Plain PyTorch has no tiles: its blocks are less than the whole matrix that the reference kernels make."""
    given = {"method": "mmd", "image_size": 8, "layers": 1, "batch_size": 1100, "mmd_images": 9, "pool": "mean"}
    config = Config.build("digits", {**given, "kernels": backend})
    extractor = build_extractor("vgg-small", image_size=8, layers=1)
    known = blank_reference(config, extractor, torch.rand)
    objective = make_objective(config, extractor, known, None)
    (distance,) = objective.discrepancy.distances
    assert type(distance) is kind
    if kind is TiledMMD:
        assert distance.kernels is compiled
        with pytest.raises(InputError, match="the triton backend cannot run here") as error:
            make_objective(config.replaced({"kernels": "triton"}), extractor, known, None, kernels="triton")
        assert error.value.argument == "kernels"


def test_what_it_refuses() -> None:
    y = torch.randn(6, 3)
    many = kernels.gaussian(range(1, 10))
    assert profile_of(many) is None
    assert profile_of(lambda x, y: x @ y.T) is None
    for argument, call in {
        "kernel": lambda: TiledMMD(y, many),
        "y": lambda: TiledMMD(y[:1], kernels.imq(), unbiased=True),
        "x": lambda: TiledMMD(y, kernels.imq())(torch.randn(5, 4)),
    }.items():
        with pytest.raises(InputError) as error:
            call()
        assert error.value.argument == argument
