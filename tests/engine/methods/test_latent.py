"""Codes that are learnt with the generator: float64 steps against steps written out with plain autograd."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers.adversaries import NZ, SIZE, DoubleGaussian, TinyGenerator, tiny_networks
from helpers.thread_ranks import on_ranks
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from engine.comparison.image_losses import laplacian_pyramid, pixel_errors, pyramid_errors
from engine.generation.learnt import FittedGaussian, MappedNoise, MappingNetwork
from engine.generation.priors import Noise
from engine.methods.latent import CodeTable, Glann, Glo, Imle
from engine.methods.pools import Pool, pixel_rows, pyramid_rows
from engine.methods.protocols import Method
from engine.methods.row_adam import RowAdam
from engine.support.errors import InputError
from engine.training.ranks import ALONE, Ranks
from pipelines import Batch

N, M, SEED = 5, 12, 21
RATES: dict[str, Any] = {"lr": 1e-2, "betas": (0.4, 0.9)}


def pictures() -> Tensor:
    return torch.rand(M, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(8), dtype=torch.float64) * 2 - 1


def batches(ranks: Ranks = ALONE) -> Iterator[Batch]:
    """Minibatches of `pictures` without end, of which a rank has its share: some images come often, some seldom."""
    random, own = torch.Generator().manual_seed(3), ranks.share(N)
    while True:
        rows = torch.randperm(M, generator=random)[:N]
        yield Batch(pictures()[rows][own], rows[own])


def generator() -> TinyGenerator:
    return tiny_networks(1)[0]


def table(radius: float = 1.0) -> CodeTable:
    return CodeTable(M, NZ, radius=radius, seed=2).double()


with torch.random.fork_rng():
    torch.manual_seed(5)
    _MAPPING = MappingNetwork((3, 6, NZ)).double()


def mapping() -> MappingNetwork:
    return copy.deepcopy(_MAPPING)


def glo(ranks: Ranks = ALONE, **options: Any) -> Glo:
    given = {"code_lr": 0.3, "reconstruction": pixel_errors, **RATES, **options}
    return Glo(generator(), table(), batch_size=N, ranks=ranks, **given)


def imle(ranks: Ranks = ALONE, **options: Any) -> Imle:
    given = {"pool": 9, "pool_every": 3, "rows": pyramid_rows, **RATES, **options}
    return Imle(generator(), DoubleGaussian(NZ), batch_size=N, ranks=ranks, **given)


def glann(ranks: Ranks = ALONE, **options: Any) -> Glann:
    given = {"glo_steps": 3, "pool": 20, "pool_every": 2, **RATES, **options}
    return Glann(glo(ranks), mapping(), DoubleGaussian(3), batch_size=N, **given)


METHODS: dict[str, Any] = {"glo": glo, "imle": imle, "glann": glann}


def all_numbers(method: Method) -> dict[str, Tensor]:
    return {name: kept.clone() for name, kept in method.modules.state_dict().items()}


def test_row_adam_is_an_adam_of_each_row() -> None:
    """Against torch.optim.Adam on every row alone, which steps when that row has a gradient."""
    random = torch.Generator().manual_seed(0)
    start = torch.randn(7, 3, generator=random, dtype=torch.float64)
    codes = torch.nn.Parameter(start.clone())
    ours = RowAdam(codes, 0.1, betas=(0.4, 0.9), eps=1e-3)
    rows = [torch.nn.Parameter(row.clone()) for row in start]
    theirs = [torch.optim.Adam([row], lr=0.1, betas=(0.4, 0.9), eps=1e-3) for row in rows]
    for step in range(8):
        chosen = torch.randperm(6, generator=random)[:3]  # the last row never
        gradient = torch.randn(3, 3, generator=random, dtype=torch.float64)
        skip = step == 4
        ours.take(chosen, gradient / 0 if skip else gradient, torch.tensor(float(skip)))
        if not skip:
            for row, own in zip(chosen.tolist(), gradient, strict=True):
                rows[row].grad = own
                theirs[row].step()
        torch.testing.assert_close(codes.detach(), torch.stack([row.detach() for row in rows]), rtol=1e-12, atol=1e-14)
    assert torch.equal(codes[6], start[6])


def test_row_adam_adds_the_gradients_of_a_row_that_is_there_twice() -> None:
    codes, other = (torch.nn.Parameter(torch.ones(4, 2, dtype=torch.float64)) for _ in range(2))
    gradient = torch.tensor([[1.0, -2.0], [3.0, 0.5], [-0.5, 1.0]], dtype=torch.float64)
    RowAdam(codes, 0.1).take(torch.tensor([2, 0, 2]), gradient, torch.tensor(0.0))
    RowAdam(other, 0.1).take(
        torch.tensor([2, 0]), torch.stack([gradient[0] + gradient[2], gradient[1]]), torch.tensor(0.0)
    )
    torch.testing.assert_close(codes, other, rtol=1e-14, atol=0)


def test_glo_steps_are_those_written_out() -> None:
    method, real = glo(), batches()
    network, codes = generator(), [row.clone().requires_grad_() for row in table().codes.detach()]
    optimizer = torch.optim.Adam(network.parameters(), **RATES)
    own = [torch.optim.Adam([row], lr=0.3, betas=RATES["betas"]) for row in codes]
    expected = batches()
    for _ in range(6):
        found = method.step(real, Noise(SEED))
        images, indices = next(expected)
        drawn = network(torch.stack([codes[index] for index in indices]))
        loss = (drawn - images).square().sum() / N
        torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-12, atol=0)
        assert (float(found["skipped"]), float(found["codes_skipped"])) == (0, 0)
        optimizer.zero_grad()
        for one in own:
            one.zero_grad()
        loss.backward()
        optimizer.step()
        for index in indices:
            own[index].step()
            with torch.no_grad():
                codes[index] /= max(1.0, float(codes[index].norm()))
    theirs = torch.stack([row.detach() for row in codes])
    torch.testing.assert_close(method.table.codes.detach(), theirs, rtol=1e-9, atol=1e-12)
    for ours, weight in zip(method.generator.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours, weight, rtol=1e-9, atol=1e-12)
    norms = theirs.norm(dim=1)
    assert float(norms.max()) <= 1 + 1e-12
    assert int((norms > 1 - 1e-9).sum()) > 2  # the ball was reached


def test_glo_is_sampled_from_the_gaussian_of_its_codes() -> None:
    """Of those learnt so far: what no minibatch has had yet is still where it began."""
    method, real, expected, seen = glo(), batches(), batches(), set()
    for _ in range(9):
        codes = method.table.codes.detach()[sorted(seen) or slice(None)]
        sampler = method.sampler()
        assert isinstance(sampler.prior, FittedGaussian)
        np.testing.assert_allclose(sampler.prior.mean, codes.mean(dim=0), rtol=1e-12, atol=1e-15)
        covariance = np.cov(codes.numpy(), rowvar=False, bias=True)
        np.testing.assert_allclose(sampler.prior.factor @ sampler.prior.factor, covariance, rtol=1e-9, atol=1e-12)
        assert sampler.codes is not None
        assert len(sampler.codes) == M
        method.step(real, Noise(SEED))
        seen |= set(next(expected).indices.tolist())
    whole, fitted = FittedGaussian.of(method.table.codes), method.sampler().prior
    assert seen == set(range(M))
    assert isinstance(fitted, FittedGaussian)
    assert torch.equal(fitted.mean, whole.mean)
    assert torch.equal(fitted.factor, whole.factor)


def test_a_step_that_was_skipped_teaches_no_code() -> None:
    method = glo(reconstruction=lambda drawn, real: pixel_errors(drawn, real) / 0)
    method.step(batches(), Noise(SEED))
    prior = method.sampler().prior
    assert isinstance(prior, FittedGaussian)
    assert torch.equal(prior.mean, FittedGaussian.of(table().codes).mean)


@pytest.mark.parametrize("kind", ["pixels", "pyramid"])
def test_imle_steps_are_those_written_out(kind: str) -> None:
    """Nearest neighbours by scikit-learn, of a pool that the generator of the pool's first step draws in eval mode."""
    rows = {"pixels": pixel_rows, "pyramid": pyramid_rows}[kind]
    method, real, noise = imle(rows=rows), batches(), Noise(SEED)
    network, expected, random = generator(), batches(), torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.Adam(network.parameters(), **RATES)
    seen = set()
    for step in range(7):
        found = method.step(real, noise)
        if step % 3 == 0:
            pool = torch.randn(9, NZ, generator=random).double()
            with torch.no_grad():
                drawn = network.eval()(pool)
            network.train()
        images, _ = next(expected)
        fitted = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(values(drawn, kind))
        distance, index = fitted.kneighbors(values(images, kind))
        seen |= set(index[:, 0].tolist())
        loss = pyramid_errors(network(pool[index[:, 0]]), images).mean()
        torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-10, atol=0)
        np.testing.assert_allclose(float(found["nearest"]), (distance**2).mean(), rtol=1e-10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(seen) > 1
    for ours, weight in zip(method.generator.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours, weight, rtol=1e-9, atol=1e-12)


def values(images: Tensor, kind: str) -> np.ndarray:
    """What is compared, level by level."""
    if kind == "pixels":
        return images.reshape(len(images), -1).numpy()
    levels = laplacian_pyramid(images)
    return np.concatenate([level.reshape(len(level), -1) / np.sqrt(level[0].numel()) for level in levels], axis=1)


def test_glann_learns_glo_first_and_then_noise() -> None:
    method, real, noise = glann(), batches(), Noise(SEED)
    alone, same = glo(), batches()
    for _ in range(3):
        method.step(real, noise)
        alone.step(same, Noise(SEED))
        assert isinstance(method.sampler().prior, FittedGaussian)
    frozen = all_numbers(alone)
    network, random = mapping(), torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-5, **RATES)
    for step in range(5):
        found = method.step(real, noise)
        if step % 2 == 0:
            pool = torch.randn(20, 3, generator=random).double()
            with torch.no_grad():
                drawn = network(pool)
        codes = alone.table.codes.detach()[next(same).indices]
        index = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(drawn.numpy()).kneighbors(codes)[1][:, 0]
        loss = (network(pool[index]) - codes).square().sum() / N
        torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-10, atol=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    prior = method.sampler().prior
    assert isinstance(prior, MappedNoise)
    for ours, weight in zip(method.mapping.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours, weight, rtol=1e-9, atol=1e-12)
    for name, kept in all_numbers(method.glo).items():
        assert torch.equal(kept, frozen[name]), name


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", METHODS)
def test_ranks_take_the_steps_of_one(name: str, size: int) -> None:
    def run(ranks: Ranks = ALONE) -> tuple[list[Tensor], dict[str, Tensor]]:
        method, real, noise = METHODS[name](ranks), batches(ranks), Noise(SEED)
        losses, found = [], {}
        for step in range(7):
            losses.append(method.step(real, noise)["loss"])
            # Adam hides a factor of them.
            weights = {key: weight.grad for key, weight in method.modules.named_parameters() if weight.grad is not None}
            found |= {f"{step}.{key}": gradient.clone() for key, gradient in weights.items()}
        assert found
        return losses, found | all_numbers(method)

    losses, numbers = run()
    for found in on_ranks(size, run):
        torch.testing.assert_close(torch.stack(found[0]), torch.stack(losses), rtol=1e-9, atol=1e-11)
        for key, kept in numbers.items():
            torch.testing.assert_close(found[1][key], kept, rtol=1e-9, atol=1e-11, msg=key)


@pytest.mark.parametrize("after", [0, 2, 4])
@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_goes_on_in_the_same_bits(name: str, after: int) -> None:
    """Between two pools, and in both phases of GLANN."""
    whole, real, noise = METHODS[name](), batches(), Noise(SEED)
    for step in range(6):
        if step == after:
            modules = {key: kept.clone() for key, kept in whole.modules.state_dict().items()}
            state = {key: kept.clone() for key, kept in whole.state_dict().items()}
            optimizers = {
                key: {**one.state_dict(), "state": {k: dict_clone(v) for k, v in one.state_dict()["state"].items()}}
                for key, one in whole.optimizers.items()
            }
            place = noise.state_dict()
        whole.step(real, noise)
    resumed, again, other = METHODS[name](), batches(), Noise(0)
    for _ in range(after):
        next(again)
    resumed.modules.load_state_dict(modules)
    resumed.load_state_dict(state)
    for key, one in resumed.optimizers.items():
        one.load_state_dict(optimizers[key])
    other.load_state_dict(place)
    for _ in range(after, 6):
        resumed.step(again, other)
    for key, kept in all_numbers(whole).items():
        assert torch.equal(kept, all_numbers(resumed)[key]), key


def dict_clone(entries: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in entries.items()}


REFUSED: dict[str, tuple[str, Any]] = {
    "codes of another data set": ("codes", lambda: glo(images=M + 1)),
    "codes of another length": (
        "codes",
        lambda: Glo(generator(), CodeTable(M, NZ + 1).double(), batch_size=N, **RATES),
    ),
    "no ball": ("radius", lambda: table(0.0)),
    "a small pool": ("pool", lambda: imle(pool=N - 1)),
    "a small pool of noise": ("pool", lambda: glann(pool=N - 1)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused(case: str) -> None:
    argument, make = REFUSED[case]
    with pytest.raises(InputError) as error:
        make()
    assert error.value.argument == argument


def test_a_state_of_another_pool_is_refused() -> None:
    method = imle()
    method.step(batches(), Noise(SEED))
    with pytest.raises(ValueError, match="9"):
        imle(pool=10).load_state_dict(method.state_dict())


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    method = glo(reconstruction=lambda drawn, real: (drawn - real).square().sum(dim=(1, 2, 3)) / 0)
    before = all_numbers(method)
    found = method.step(batches(), Noise(SEED))
    assert (float(found["skipped"]), float(found["codes_skipped"])) == (1, 1)
    for key in ("generator.layers.0.weight", "codes.codes"):
        assert torch.equal(all_numbers(method)[key], before[key])


def test_pool_is_compared_whole_by_several_ranks() -> None:
    """Every rank knows the nearest of all, whichever rank drew it, and of one network: rank 0's running statistics."""
    real = pictures()

    def nearest(ranks: Ranks = ALONE) -> tuple[Tensor, Tensor]:
        network = generator()
        network.get_submodule("layers.2").running_mean += ranks.rank  # as where BatchNorm is local
        pool = Pool(
            network,
            DoubleGaussian(NZ),
            size=31,
            every=1,
            rows=pixel_rows,
            batch=4,
            at_least=1,
            ranks=ranks,
        )
        pool.begin(Noise(SEED))
        return pool.nearest(pixel_rows(real))

    z, squares = nearest()
    noise = torch.randn(31, NZ, generator=torch.Generator().manual_seed(SEED)).double()
    with torch.no_grad():
        drawn = generator().eval()(noise).flatten(1)
    distance, index = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(drawn).kneighbors(real.flatten(1))
    assert torch.equal(z, noise[index[:, 0]])
    np.testing.assert_allclose(squares, distance[:, 0] ** 2, rtol=1e-10)
    for found in on_ranks(3, nearest):
        assert torch.equal(found[0], z)
