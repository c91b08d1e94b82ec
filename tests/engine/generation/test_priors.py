"""Laws of z against SciPy and NumPy, and in the file of a generator."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy import spatial, stats
from torch import Tensor

from engine.generation.learnt import FittedGaussian, MappedNoise, MappingNetwork
from engine.generation.networks import Generator, build_generator
from engine.generation.priors import Ball, Gaussian, Prior, Uniform, draw_batches, interpolate, make_prior
from engine.generation.sampling import Sampler
from engine.generation.saved import load_sampler, save_sampler
from engine.support.errors import InputError
from engine.support.files import read_tensors, save_safetensors
from engine.support.pixels import to_uint8

NZ = 5


def codes(count: int = 300, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, NZ, generator=random) @ torch.randn(NZ, NZ, generator=random) + 2


def network() -> MappingNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return MappingNetwork((3, 16, 8, NZ))


PRIORS: dict[str, Prior] = {
    "gaussian": Gaussian(NZ),
    "uniform": Uniform(NZ),
    "ball": Ball(NZ, 1.5),
    "fitted": FittedGaussian.of(codes()),
    "mapped": MappedNoise(network()),
    "mapped uniform": MappedNoise(network(), Uniform(3)),
    "mapped ball": MappedNoise(network(), Ball(3, 2.5)),
}


@pytest.fixture(scope="module")
def generator() -> Generator:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return build_generator("dcgan", image_size=32, nz=NZ)


@pytest.mark.parametrize("nz", [1, 2, 7])
def test_ball_is_uniform(nz: int) -> None:
    """(‖z‖/r)^nz is uniform in [0, 1] then, and the direction is uniform on the sphere."""
    z = Ball(nz, 2.5).draw(20_000, 1).double().numpy()
    norms = np.linalg.norm(z, axis=1)
    assert stats.kstest((norms / 2.5) ** nz, "uniform").pvalue > 1e-3
    # One coordinate of a uniform direction: (1 + t) / 2 has a Beta((nz−1)/2, (nz−1)/2) law.
    if nz > 1:
        shape = (nz - 1) / 2
        assert stats.kstest((1 + z[:, 0] / norms) / 2, stats.beta(shape, shape).cdf).pvalue > 1e-3


@pytest.mark.parametrize("radius", [0.0, -1.0, math.inf, math.nan])
def test_a_ball_has_a_positive_radius(radius: float) -> None:
    with pytest.raises(InputError) as error:
        Ball(NZ, radius)
    assert error.value.argument == "radius"


def test_fitted_gaussian_has_the_moments_of_the_codes() -> None:
    fitted = FittedGaussian.of(codes())
    expected = codes().double().numpy()
    np.testing.assert_allclose(fitted.mean, expected.mean(axis=0), rtol=1e-12)
    covariance = np.cov(expected.T, bias=True)
    np.testing.assert_allclose(fitted.factor @ fitted.factor, covariance, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(fitted.factor, fitted.factor.T, rtol=1e-12, atol=1e-13)
    drawn = fitted.draw(200_000, 2).double().numpy()
    deviation = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(drawn.mean(axis=0), expected.mean(axis=0), atol=5 * deviation.max() / 200_000**0.5)
    scale = np.outer(deviation, deviation)
    np.testing.assert_allclose(np.cov(drawn.T, bias=True) / scale, covariance / scale, atol=0.02)


def test_fewer_codes_than_dimensions_are_fitted_as_well() -> None:
    """Then Σ has no inverse, and samples stay in the plane of the codes."""
    two = codes(2)
    drawn = FittedGaussian.of(two).draw(50, 0).double()
    along = (two[1] - two[0]).double()
    off = (drawn - two[0]) - torch.outer((drawn - two[0]) @ along / along.dot(along), along)
    assert float(off.abs().max()) < 1e-5


def test_mapped_noise_is_the_network_of_noise() -> None:
    expected = network().double()
    e = torch.randn(40, 3, generator=torch.Generator().manual_seed(9))
    x = e.double().numpy()
    for index, layer in enumerate(expected.layers):
        x = (np.maximum(x, 0) if index else x) @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
    np.testing.assert_allclose(MappedNoise(network()).draw(40, 9), x.astype(np.float32), rtol=1e-6)


def test_a_network_that_learns_on_does_not_change_the_prior() -> None:
    mapping = network()
    prior = MappedNoise(mapping)
    before = prior.draw(4, 0)
    with torch.no_grad():
        mapping.layers[0].weight.zero_()
    assert torch.equal(prior.draw(4, 0), before)
    assert mapping.layers[0].weight.requires_grad


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("count", [1, 17, 47])
def test_batches_are_the_rows_of_one_tensor(name: str, count: int) -> None:
    prior = PRIORS[name]
    drawn = prior.draw(count, 7)
    assert (drawn.shape, drawn.dtype) == ((count, NZ), torch.float32)
    assert torch.equal(torch.cat(list(draw_batches(prior, count, 7, 16))), drawn)


@pytest.mark.parametrize("name", PRIORS)
def test_paths_lead_from_one_likely_z_to_another(name: str) -> None:
    prior = PRIORS[name]
    ends = prior.draw_ends(6, 3)
    path = prior.between(ends[:3], ends[3:], 5).view(3, 5, NZ)
    torch.testing.assert_close(path[:, [0, -1]], torch.stack([prior.draw(6, 3)[:3], prior.draw(6, 3)[3:]], dim=1))
    steps = (path[:, 1:] - path[:, :-1]).norm(dim=2)
    assert float(steps.max()) < float((path[:, 0] - path[:, -1]).norm(dim=1).max())
    if name == "ball":
        assert float(path.norm(dim=2).max()) <= 1.5
    if name == "uniform":
        assert float(path.abs().max()) <= 1


def test_a_path_is_an_arc_or_a_line_where_there_is_none() -> None:
    start, end = np.eye(2, dtype=np.float32)
    arc = interpolate(torch.tensor(start)[None], torch.tensor(end)[None], 7)
    np.testing.assert_allclose(arc.numpy(), spatial.geometric_slerp(start, end, np.linspace(0, 1, 7)), atol=1e-6)
    ends = torch.tensor([[1.0], [-2.0]]), torch.tensor([[-1.0], [-4.0]])  # opposite, and the same way
    expected = torch.tensor([[1.0, 0.5, 0.0, -0.5, -1.0], [-2.0, -2.5, -3.0, -3.5, -4.0]])
    torch.testing.assert_close(interpolate(*ends, 5).view(2, 5), expected)


@pytest.mark.parametrize("name", PRIORS)
def test_a_file_of_a_generator_brings_its_prior(name: str, generator: Generator, tmp_path: Path) -> None:
    path = tmp_path / "generator.safetensors"
    sampler = Sampler(PRIORS[name], generator)
    save_sampler(path, sampler, 3)
    found = load_sampler(path)
    assert (found.prior.name, found.step) == (sampler.prior.name, 3)
    assert torch.equal(found.prior.draw(20, 1), sampler.prior.draw(20, 1))
    assert torch.equal(to_uint8(found.draw_paths(2, 4, 1)), to_uint8(sampler.draw_paths(2, 4, 1)))


def test_files_of_plain_priors_are_as_they_were(generator: Generator, tmp_path: Path) -> None:
    """No tensor or word more: files of earlier versions are read, and earlier versions read these."""
    for prior, word in ((Gaussian(NZ), None), (Uniform(NZ), "uniform")):
        path = tmp_path / "generator.safetensors"
        save_sampler(path, Sampler(prior, generator), 1)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            assert set(file.keys()) == set(generator.state_dict())
        assert metadata.get("prior") == word
        assert "prior_noise" not in metadata


DAMAGED = {
    "no numbers": ("fitted", lambda state: {}),
    "another nz": ("fitted", lambda state: {"mean": state["mean"][1:], "factor": state["factor"][1:, 1:]}),
    "a factor that is no square": ("fitted", lambda state: {**state, "factor": state["factor"][1:]}),
    "not finite": ("fitted", lambda state: {**state, "mean": state["mean"] / 0}),
    "integers": ("fitted", lambda state: {**state, "mean": state["mean"].long()}),
    "one too many": ("fitted", lambda state: {**state, "more": state["mean"]}),
    "no layers": ("mapped", lambda state: {}),
    "a layer less": ("mapped", lambda state: {name: value for name, value in state.items() if "1." not in name}),
    "layers that don't fit": (
        "mapped",
        lambda state: {name: value[:-1] if "0." in name else value for name, value in state.items()},
    ),
    "no radius": ("ball", lambda state: {}),
    "a negative radius": ("ball", lambda state: {"radius": -state["radius"]}),
    "two radii": ("ball", lambda state: {"radius": state["radius"].repeat(2)}),
    "two radii of noise": ("mapped ball", lambda state: {**state, "noise.radius": state["noise.radius"].repeat(2)}),
    "noise with numbers that its law has not": ("mapped", lambda state: {**state, "noise.radius": torch.ones(())}),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_prior_is_refused(case: str, generator: Generator, tmp_path: Path) -> None:
    name, change = DAMAGED[case]
    path = tmp_path / "generator.safetensors"
    save_sampler(path, Sampler(PRIORS[name], generator), 1)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    del metadata["crc32"]
    prior = {key.removeprefix("prior."): value for key, value in tensors.items() if key.startswith("prior.")}
    others = {key: value for key, value in tensors.items() if not key.startswith("prior.")}
    changed = {f"prior.{key}": value.clone() for key, value in change(prior).items()}
    save_file({**others, **changed}, path, metadata)
    with pytest.raises(InputError) as error:
        load_sampler(path)
    assert error.value.argument == str(path) or str(path) in str(error.value)


def test_mapped_noise_of_an_older_file_has_the_usual_radius(generator: Generator, tmp_path: Path) -> None:
    """It has none of its own there."""
    path, prior = tmp_path / "generator.safetensors", MappedNoise(network(), Ball(3))
    save_sampler(path, Sampler(prior, generator), 1)
    tensors, metadata = read_tensors(path)
    assert tensors.pop("prior.noise.radius") == 1
    save_safetensors(path, tensors, metadata)
    assert torch.equal(load_sampler(path).prior.draw(20, 1), prior.draw(20, 1))


@pytest.mark.parametrize(
    ("noise", "said"), [(Gaussian(4), "4 dimensions"), (PRIORS["fitted"], "fitted"), (PRIORS["mapped"], "mapped")]
)
def test_noise_that_a_network_does_not_take(noise: Prior, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        MappedNoise(network(), noise)
    assert error.value.argument == "noise"


def test_a_prior_by_name_needs_nothing_but_nz() -> None:
    assert make_prior("ball", NZ).draw(3, 0).norm(dim=1).max() <= 1
    with pytest.raises(InputError, match="fitted"):
        make_prior("fitted", NZ)
