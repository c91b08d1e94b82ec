"""Steps of autoencoders in float64 against steps written out with plain autograd and torch's optimizers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.adversaries import NZ, PIXELS, DoubleGaussian, TinyGenerator, real_batches
from helpers.thread_ranks import on_ranks
from torch import Tensor, nn

from engine.comparison.image_losses import pixel_errors, pyramid_errors
from engine.generation.learnt import FittedGaussian, MappedNoise, MappingNetwork
from engine.generation.priors import Ball, Gaussian, Noise, Uniform
from engine.methods.autoencoding import Autoencoding, CodeMatching, coordinate_variance
from engine.representation.encoders import CodeCritic, Encoder
from engine.support.errors import InputError
from engine.training.ranks import Ranks

N, SEED, WEIGHT = 5, 21, 3.0
RATES: dict[str, Any] = {"lr": 1e-2, "betas": (0.4, 0.9)}
BANDWIDTHS = (0.5, 2.0)
_ONE_AT_A_TIME = threading.Lock()


class Networks(nn.Module):
    """All that a method may have, the same at every call."""

    def __init__(self, divergence: str) -> None:
        super().__init__()
        outputs = 2 * NZ if divergence == "kl" else NZ
        with _ONE_AT_A_TIME:  # ranks may be threads
            torch.manual_seed(4)
            self.generator = TinyGenerator()
            layers = [nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(PIXELS, outputs)]
            self.encoder = Encoder(
                nn.Sequential(*layers), NZ, gaussian=divergence == "kl", bounded=divergence in ("none", "matching")
            )
            self.code_critic = CodeCritic(NZ, width=6, depth=2)
            self.mapping = MappingNetwork((3, 5, NZ))
        self.double()


def method(divergence: str, **options: Any) -> tuple[Networks, Any]:
    own = Networks(divergence)
    matching = divergence == "matching"
    made = Autoencoding(
        own.generator,
        own.encoder,
        DoubleGaussian(NZ),
        "none" if matching else divergence,
        weight=WEIGHT,
        code_critic=own.code_critic if divergence == "gan" else None,
        batch_size=N,
        **{**RATES, **options},
    )
    if not matching:
        return own, made
    return own, CodeMatching(made, own.mapping, Uniform(3), autoencoder_steps=1, bandwidths=BANDWIDTHS, lr=0.02)


class DoubleUniform(Uniform):
    """Uniform z in float64; variance 1/3."""

    def sample(self, count: int, random: torch.Generator) -> Tensor:
        return super().sample(count, random).double()


def squares(x: Tensor, y: Tensor) -> Tensor:
    return (x[:, None] - y[None]).square().sum(dim=2)


def mmd(x: Tensor, y: Tensor, kernel: Callable[[Tensor], Tensor], unbiased: bool) -> Tensor:
    def within(z: Tensor) -> Tensor:
        matrix, count = kernel(squares(z, z)), len(z)
        if not unbiased:
            return matrix.mean()
        return (matrix.sum() - matrix.diagonal().sum()) / (count * (count - 1))

    return within(x) + within(y) - 2 * kernel(squares(x, y)).mean()


def imq(d: Tensor, variance: float = 1.0) -> Tensor:
    own = 2 * NZ * variance
    return sum(own * s / (own * s + d) for s in (0.1, 0.2, 0.5, 1, 2, 5, 10))


def written_out(divergence: str, errors: Callable[[Tensor, Tensor], Tensor]) -> tuple[Networks, float]:
    """The networks after one step, and its loss."""
    own = Networks(divergence)
    random, real = torch.Generator().manual_seed(SEED), next(real_batches(N)).images
    adam = torch.optim.Adam([*own.generator.parameters(), *own.encoder.parameters()], **RATES)
    outputs = own.encoder.network(real)
    noise = torch.randn(N, NZ, generator=random).double() if divergence != "none" else None
    if divergence == "none":
        codes = outputs.tanh()
    elif divergence == "kl":
        assert noise is not None
        mean, log_variance = outputs[:, :NZ], outputs[:, NZ:]
        codes = mean + torch.exp(log_variance).sqrt() * noise
    else:
        codes = outputs
    loss = errors(own.generator(codes), real).mean()
    if divergence == "kl":
        law, normal = torch.distributions.Normal(mean, (log_variance / 2).exp()), torch.distributions.Normal(0.0, 1.0)
        loss = loss + WEIGHT * torch.distributions.kl_divergence(law, normal).sum() / N
    elif divergence == "mmd":
        assert noise is not None
        loss = loss + WEIGHT * mmd(codes, noise, imq, unbiased=True)
    elif divergence == "gan":
        of_critic = torch.optim.Adam(own.code_critic.parameters(), lr=RATES["lr"] / 2, betas=RATES["betas"])
        real_score, fake_score = own.code_critic(noise), own.code_critic(codes.detach())
        (F.softplus(-real_score).mean() + F.softplus(fake_score).mean()).backward()
        of_critic.step()
        loss = loss + WEIGHT * F.softplus(-own.code_critic(codes)).mean()
    loss.backward()
    adam.step()
    return own, loss.item()


def difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def sums(drawn: Tensor, real: Tensor) -> Tensor:
    return ((drawn - real) ** 2).sum(dim=(1, 2, 3))


@pytest.mark.parametrize("divergence", ["none", "kl", "mmd", "gan"])
def test_one_step_is_the_one_written_out(divergence: str) -> None:
    own, autoencoding = method(divergence)
    scalars = autoencoding.step(real_batches(N), Noise(SEED))
    expected, loss = written_out(divergence, sums)
    assert scalars["loss"].item() == pytest.approx(loss, rel=1e-10)
    for (name, ours), theirs in zip(own.named_parameters(), expected.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        # WAE-GAN's critic takes gradients of the second loss, too, which its own step had none of.
        if theirs.grad is not None and not name.startswith("code_critic"):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10, msg=name)
    assert difference(own, expected) < 1e-7
    before = Networks(divergence)
    for name, network in autoencoding.modules.items():
        assert difference(network, before.get_submodule(name)) > 1e-3
    assert scalars["skipped"] == 0


def test_kernels_of_codes_have_the_width_of_the_prior() -> None:
    own = Networks("mmd")
    prior = DoubleUniform(NZ)
    made = Autoencoding(own.generator, own.encoder, prior, "mmd", weight=WEIGHT, batch_size=N, **RATES)
    found = made.step(real_batches(N), Noise(SEED))
    expected, real = Networks("mmd"), next(real_batches(N)).images
    codes, z = expected.encoder.network(real), prior.sample(N, torch.Generator().manual_seed(SEED))
    distance = mmd(codes, z, lambda d: imq(d, 1 / 3), unbiased=True)
    loss = sums(expected.generator(codes), real).mean() + WEIGHT * distance
    assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-10)


def test_images_are_compared_as_asked_for() -> None:
    own, autoencoding = method("none", reconstruction=pyramid_errors)
    autoencoding.step(real_batches(N), Noise(SEED))
    expected, _ = written_out("none", pyramid_errors)
    assert difference(own, expected) < 1e-7 < difference(own, written_out("none", pixel_errors)[0])


def test_codes_are_matched_by_a_network_while_the_others_stay() -> None:
    own, matching = method("matching")
    batches, noise = real_batches(N), Noise(SEED)
    matching.step(batches, noise)
    assert difference(own.mapping, Networks("matching").mapping) == 0
    frozen = {name: value.clone() for name, value in own.state_dict().items()}
    found = [matching.step(batches, noise)["loss"].item() for _ in range(2)]
    images, random = real_batches(N), torch.Generator().manual_seed(SEED)
    next(images)
    mapping = Networks("matching").mapping
    adam = torch.optim.Adam(mapping.parameters(), lr=0.02, betas=(0.5, 0.999))
    for loss in found:
        with torch.no_grad():
            codes = own.encoder.eval()(next(images).images)
        z = (torch.rand(N, 3, generator=random) * 2 - 1).double()
        unit = squares(codes, codes).sum() / (N * (N - 1))
        kernel = lambda d, unit=unit: sum(torch.exp(-d / (2 * s**2 * unit)) for s in BANDWIDTHS)  # noqa: E731
        expected = (mmd(mapping(z), codes, kernel, unbiased=False) + 1e-6).sqrt()
        adam.zero_grad()
        expected.backward()
        adam.step()
        assert loss == pytest.approx(expected.item(), rel=1e-9)
    assert difference(own.mapping, mapping) < 1e-7
    changed = {name for name, value in own.state_dict().items() if not torch.equal(value, frozen[name])}
    assert changed
    assert all(name.startswith("mapping.") for name in changed)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("divergence", ["none", "kl", "mmd", "gan", "matching"])
def test_ranks_take_the_steps_of_one_process(divergence: str, size: int) -> None:
    """With uneven shares, BatchNorm and what the method keeps."""

    def work(ranks: Ranks) -> dict[str, Tensor]:
        _, autoencoding = method(divergence, ranks=ranks)
        batches, noise = real_batches(N, ranks), Noise(SEED)
        found = [autoencoding.step(batches, noise) for _ in range(3)]
        scalars = {f"{step}.{name}": value for step, each in enumerate(found) for name, value in each.items()}
        state = {f"state.{name}": value.clone() for name, value in autoencoding.state_dict().items()}
        weights = autoencoding.modules.named_parameters()
        # Adam hides a factor of them.
        state |= {f"gradient.{name}": weight.grad.clone() for name, weight in weights if weight.grad is not None}
        return scalars | state | {name: value.clone() for name, value in autoencoding.modules.state_dict().items()}

    (expected,) = on_ranks(1, work)
    for found in on_ranks(size, work):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            close = 1e-9 if value.dtype == torch.float64 else 1e-6
            torch.testing.assert_close(found[name], value, rtol=close, atol=close, msg=name)


def test_an_autoencoder_draws_from_a_gaussian_of_its_last_codes() -> None:
    own, autoencoding = method("none")
    assert autoencoding.sampler().prior.name == "gaussian"
    batches, codes = real_batches(N), []
    for _ in range(2):
        images = next(batches).images
        own.encoder.network[0].momentum = 0.0
        with torch.no_grad():
            codes.append(own.encoder(images))
        autoencoding.step(iter([type("Batch", (), {"images": images})]), Noise(SEED))
    prior = autoencoding.sampler().prior
    rows = torch.cat(codes)
    assert isinstance(prior, FittedGaussian)
    torch.testing.assert_close(prior.mean, rows.mean(dim=0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(prior.factor @ prior.factor, torch.cov(rows.T, correction=0), rtol=1e-4, atol=1e-6)


def test_what_draws_codes_changes_with_the_phase() -> None:
    _, matching = method("matching")
    for name in ("gaussian", "fitted"):
        assert matching.sampler().prior.name == name
        matching.step(real_batches(N), Noise(SEED))
        if name == "gaussian":
            assert matching.sampler().prior.name == "fitted"
    prior = matching.sampler().prior
    assert isinstance(prior, MappedNoise)
    assert (prior.noise, prior.nz) == (Uniform(3), NZ)


@pytest.mark.parametrize(("prior", "variance"), [(Gaussian(4), 1), (Uniform(4), 1 / 3), (Ball(4, 2.0), 4 / 6)])
def test_variance_of_a_coordinate(prior: Any, variance: float) -> None:
    assert coordinate_variance(prior) == pytest.approx(variance)
    assert prior.draw(200_000, 0).var().item() == pytest.approx(variance, rel=0.01)


@pytest.mark.parametrize(
    ("divergence", "encoder", "prior", "argument"),
    [
        ("ks", "none", Gaussian(NZ), "divergence"),
        ("kl", "none", Gaussian(NZ), "divergence"),
        ("mmd", "kl", Gaussian(NZ), "divergence"),
        ("gan", "none", Gaussian(NZ), "divergence"),
        ("kl", "kl", Uniform(NZ), "prior"),
        ("mmd", "none", FittedGaussian(torch.zeros(NZ), torch.eye(NZ)), "prior"),
    ],
)
def test_what_makes_no_sense_is_refused(divergence: str, encoder: str, prior: Any, argument: str) -> None:
    own = Networks(encoder)
    with pytest.raises(InputError) as refused:
        Autoencoding(own.generator, own.encoder, prior, divergence, batch_size=N, lr=1e-3)
    assert refused.value.argument == argument


def test_a_gaussian_of_codes_has_no_bounds() -> None:
    with pytest.raises(InputError, match="bounded"):
        Encoder(nn.Identity(), 2, gaussian=True, bounded=True)
