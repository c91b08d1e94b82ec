"""Steps of denoising feature matching and of learned moments, in float64 against steps written out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.adversaries import (
    HIDDEN,
    NZ,
    DoubleGaussian,
    TinyCritic,
    TinyGenerator,
    drawn_from,
    real_batches,
    tiny_networks,
)
from helpers.thread_ranks import on_ranks
from torch import Tensor, nn

from engine.comparison.games.penalties import PENALTIES
from engine.generation.priors import Gaussian, Noise
from engine.methods.adversarial import Adversarial, CriticSteps
from engine.methods.denoising import DenoisingFeatureMatching
from engine.methods.learned_moments import LearnedMoments, MomentSchedule
from engine.representation.critics import build_critic
from engine.representation.critics.denoiser import Denoiser
from engine.support.errors import InputError
from engine.training.ranks import Ranks
from pipelines import Batch

N, SEED, STEPS = 5, 21, 3
RATES: dict[str, Any] = {"lr": 1e-2, "betas": (0.4, 0.9)}
CRITIC_RATES: dict[str, Any] = {"lr": 2e-2, "betas": (0.3, 0.8)}
GIVEN: dict[str, Any] = {
    "batch_size": N,
    **RATES,
    "critic_lr": CRITIC_RATES["lr"],
    "critic_betas": CRITIC_RATES["betas"],
}
SIGMA, ADVERSARIAL, DENOISING, DENOISER_LR = 0.7, 0.4, 1.5, 3e-2
PENALTY, SCALE = 0.6, 0.3
SCHEDULE = MomentSchedule(every=2, steps=2, images=8)  # two minibatches of 5


def tiny_denoiser() -> Denoiser:
    with drawn_from(6):
        return Denoiser(HIDDEN, width=4, layers=3).double()


def dfm(norm: str = "none", **options: Any) -> DenoisingFeatureMatching:
    generator, critic = tiny_networks(1, norm=norm)
    weights = {"adversarial": ADVERSARIAL, "denoising": DENOISING, "deviation": SIGMA, "denoiser_lr": DENOISER_LR}
    return DenoisingFeatureMatching(
        generator, critic, tiny_denoiser(), DoubleGaussian(NZ), **{**GIVEN, **weights, **options}
    )


def molm(norm: str = "none", **options: Any) -> LearnedMoments:
    generator, critic = tiny_networks(1, norm=norm)
    given = {**GIVEN, "penalty": PENALTY, "scale": SCALE, **options}
    return LearnedMoments(generator, critic, DoubleGaussian(NZ), SCHEDULE, **given)


METHODS: dict[str, Callable[..., Adversarial]] = {"dfm": dfm, "molm": molm}


def drawn(random: torch.Generator, columns: int) -> Tensor:
    return torch.randn(N, columns, generator=random).double()


def logistic(critic: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    return -(torch.sigmoid(critic(x)).log().mean() + (1 - torch.sigmoid(critic(g))).log().mean())


class WrittenDenoiser:
    """r of three layers with BatchNorm of momentum 0.1, from its parameters."""

    def __init__(self, denoiser: Denoiser):
        self.weights = {name: weight.detach().clone().requires_grad_() for name, weight in denoiser.named_parameters()}
        self.running = [(torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)) for _ in range(2)]

    def __call__(self, h: Tensor, *, training: bool) -> Tensor:
        first, norm, norm_bias, second, norm2, norm2_bias, last, last_bias = self.weights.values()
        for layer, (weight, scale, shift) in enumerate(((first, norm, norm_bias), (second, norm2, norm2_bias))):
            h = h @ weight.T
            mean, variance = self.running[layer]
            if training:
                self.running[layer] = (
                    0.9 * mean + 0.1 * h.detach().mean(dim=0),
                    0.9 * variance + 0.1 * h.detach().var(dim=0),
                )
                mean, variance = h.mean(dim=0), h.var(dim=0, correction=0)
            h = ((h - mean) / (variance + 1e-5).sqrt() * scale + shift).clamp(min=0)
        return h @ last.T + last_bias


def written_dfm() -> list[nn.Module | WrittenDenoiser]:
    generator, critic = tiny_networks(1)
    denoise = WrittenDenoiser(tiny_denoiser())
    random, batches = torch.Generator().manual_seed(SEED), real_batches(N)
    of_generator = torch.optim.Adam(generator.parameters(), **RATES)
    of_critic = torch.optim.Adam(critic.parameters(), **CRITIC_RATES)
    of_denoiser = torch.optim.Adam(denoise.weights.values(), **{**RATES, "lr": DENOISER_LR})
    for _ in range(STEPS):
        for _ in range(2):
            x, g = next(batches).images, generator(drawn(random, NZ)).detach()
            of_critic.zero_grad()
            logistic(critic, x, g).backward()
            of_critic.step()
        g = generator(drawn(random, NZ))
        h = critic.features(g)
        target = denoise(h, training=False).detach()
        loss = -ADVERSARIAL * torch.sigmoid(critic(g)).log().mean()
        loss = loss + DENOISING * (h - target).square().sum(dim=1).mean() / HIDDEN
        of_generator.zero_grad()
        loss.backward()
        of_generator.step()
        h = critic.features(next(batches).images).detach()
        noisy = h + SIGMA * drawn(random, HIDDEN)
        of_denoiser.zero_grad()
        ((h - denoise(noisy, training=True)).square().sum() / (N * HIDDEN)).backward()
        of_denoiser.step()
    critic.zero_grad()
    return [generator, critic, denoise]


def own_gradients(critic: TinyCritic, images: Tensor) -> Tensor:
    """∇_w D of each image, without the last bias and the decoder, [n, K]."""
    weights = [critic.last.weight, critic.first.weight, critic.first.bias]
    rows = []
    for image in images:
        parts = torch.autograd.grad(critic(image[None]).squeeze(), weights, create_graph=True)
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def phi(critic: TinyCritic, images: Tensor) -> Tensor:
    hidden = torch.tanh(images.flatten(1) @ critic.first.weight.T + critic.first.bias)
    return torch.cat([own_gradients(critic, images), SCALE * images.flatten(1), SCALE * hidden], dim=1)


def written_molm() -> list[nn.Module | WrittenDenoiser]:
    generator, critic = tiny_networks(1)
    random, batches = torch.Generator().manual_seed(SEED), real_batches(N)
    of_generator = torch.optim.Adam(generator.parameters(), **RATES)
    of_critic = torch.optim.Adam([w for n, w in critic.named_parameters() if "decoder" not in n], **CRITIC_RATES)
    for step in range(STEPS):
        if step % 2 == 0:
            for _ in range(2):
                x, g = next(batches).images, generator(drawn(random, NZ)).detach()
                squared = own_gradients(critic, x).mean(dim=0).square().sum()
                of_critic.zero_grad()
                (logistic(critic, x, g) + PENALTY * (squared - 1) ** 2).backward()
                of_critic.step()
            real = phi(critic, torch.cat([next(batches).images for _ in range(2)])).mean(dim=0).detach()
        of_generator.zero_grad()
        off = phi(critic, generator(drawn(random, NZ))).mean(dim=0) - real
        (off.square().sum() / 2).backward()
        of_generator.step()
    return [generator, critic]


@pytest.mark.parametrize(("name", "written"), [("dfm", written_dfm), ("molm", written_molm)])
def test_steps_are_those_written_out(name: str, written: Callable[[], list[Any]]) -> None:
    method = METHODS[name](**({"critic_steps": CriticSteps(usual=2)} if name == "dfm" else {}))
    before = copy.deepcopy(method.modules)
    batches, noise = real_batches(N), Noise(SEED)
    for _ in range(STEPS):
        scalars = method.step(batches, noise)
    assert scalars["skipped"] == 0
    expected = written()
    assert len(method.modules) == len(expected)
    for (key, module), own in zip(method.modules.items(), expected, strict=True):
        theirs = own.weights if isinstance(own, WrittenDenoiser) else dict(own.named_parameters())
        start = dict(before[key].named_parameters())
        moved = 0.0
        for weight, (entry, found) in zip(theirs.values(), module.named_parameters(), strict=True):
            if key == "generator":  # what it was last moved by
                torch.testing.assert_close(found.grad, weight.grad, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(found.detach(), weight.detach(), rtol=0, atol=2e-7, msg=f"{key}.{entry}")
            moved = max(moved, float((found - start[entry]).detach().abs().max()))
        assert moved > 1e-3
        if isinstance(own, WrittenDenoiser):
            for norm, (mean, variance) in zip((module.layers[2], module.layers[7]), own.running, strict=True):
                torch.testing.assert_close(norm.running_mean, mean, rtol=1e-7, atol=1e-7)
                torch.testing.assert_close(norm.running_var, variance, rtol=1e-7, atol=1e-7)


def test_losses_that_are_logged() -> None:
    """Against the first step's, written out."""
    batches, noise, random = real_batches(N), Noise(SEED), torch.Generator().manual_seed(SEED)
    (generator, critic), x = tiny_networks(1), next(real_batches(N)).images
    g = generator(drawn(random, NZ)).detach()
    penalty = PENALTY * (own_gradients(critic, x).mean(dim=0).square().sum() - 1) ** 2
    expected = logistic(critic, x, g) + penalty
    method = molm()
    method.schedule = MomentSchedule(every=2, steps=1, images=1)
    first, second = method.step(batches, noise), method.step(batches, noise)
    torch.testing.assert_close(first["critic_loss"], expected.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(first["penalty"], penalty.detach(), rtol=1e-10, atol=1e-10)
    assert second["critic_loss"] == first["critic_loss"]
    assert "critic_skipped" in first
    assert "critic_skipped" not in second
    found = dfm().step(real_batches(N), Noise(SEED))
    assert {"loss", "critic_loss", "denoiser_loss", "denoiser_skipped"} <= found.keys()


RANKED = {
    "dfm": ("dfm", {"penalties": [PENALTIES["r1"]()]}),
    "dfm-batch": ("dfm", {"norm": "batch"}),
    "molm": ("molm", {"critic_optimizer": "rmsprop"}),
}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", RANKED)
def test_ranks_take_the_steps_of_one_process(name: str, size: int) -> None:
    made, options = RANKED[name]

    def work(ranks: Ranks) -> dict[str, Tensor]:
        method = METHODS[made](ranks=ranks, **options)
        batches, noise = real_batches(N, ranks), Noise(SEED)
        for _ in range(STEPS):
            scalars = method.step(batches, noise)
        state = {f"state.{key}": value.clone() for key, value in method.state_dict().items()}
        return {**scalars, **state, **{key: value.clone() for key, value in method.modules.state_dict().items()}}

    (expected,) = on_ranks(1, work)
    for found in on_ranks(size, work):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9, msg=key)


def skipping(batches: Iterator[Batch], count: int) -> Iterator[Batch]:
    for _ in range(count):
        next(batches)
    return batches


@pytest.mark.parametrize(("name", "read"), [("dfm", 6), ("molm", 8)])
def test_resumed_is_uninterrupted_bit_for_bit(name: str, read: int) -> None:
    """Stopped after three steps, in the middle of what one moment network serves."""
    whole, noise, batches = METHODS[name](), Noise(SEED), real_batches(N)
    for _ in range(3):
        whole.step(batches, noise)
    kept = copy.deepcopy(
        (
            whole.modules.state_dict(),
            {key: optimizer.state_dict() for key, optimizer in whole.optimizers.items()},
            whole.state_dict(),
            noise.state_dict(),
        )
    )
    again, noise_again = METHODS[name](), Noise(0)
    again.modules.load_state_dict(kept[0])
    for key, optimizer in again.optimizers.items():
        optimizer.load_state_dict(kept[1][key])
    again.load_state_dict(kept[2])
    noise_again.load_state_dict(kept[3])
    rest = skipping(real_batches(N), read)
    for _ in range(3):
        expected, found = whole.step(batches, noise), again.step(rest, noise_again)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    for key, value in whole.modules.state_dict().items():
        assert torch.equal(again.modules.state_dict()[key], value), key
    for key, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_another_method_s_state_is_refused() -> None:
    with pytest.raises(KeyError, match="moments"):
        molm().load_state_dict(dfm().state_dict())


def test_a_gradient_that_is_not_finite_changes_no_network() -> None:
    method = dfm()
    nowhere = next(real_batches(N))
    method.step(iter([nowhere, nowhere]), Noise(SEED))
    before = copy.deepcopy(method.denoiser.state_dict())
    broken = Batch(nowhere.images * float("nan"), nowhere.indices)
    scalars = method.step(iter([nowhere, broken]), Noise(SEED))
    assert (scalars["skipped"], scalars["critic_skipped"], scalars["denoiser_skipped"]) == (0, 0, 1)
    assert all(torch.equal(before[name], kept) for name, kept in method.denoiser.state_dict().items())


def one_low_step(name: str, amp: torch.dtype | None) -> tuple[Adversarial, dict[str, Tensor]]:
    """A method of float32 networks after a step, and the gradients of its networks."""
    torch.manual_seed(0)
    generator, critic = TinyGenerator(), TinyCritic(1)
    options = {**GIVEN, "amp_dtype": amp}
    if name == "dfm":
        denoiser = Denoiser(HIDDEN, 4, 2)
        method: Adversarial = DenoisingFeatureMatching(generator, critic, denoiser, Gaussian(NZ), **options)
    else:
        method = LearnedMoments(generator, critic, Gaussian(NZ), SCHEDULE, penalty=1.0, scale=1.0, **options)
    for update in (method.generator_step, method.critic_step):
        if update.scaler.is_enabled():  # its usual scale is more than float16 has, and halved by steps that are skipped
            update.scaler.load_state_dict({**update.scaler.state_dict(), "scale": 64.0})
    batches = (Batch(batch.images.float(), batch.indices) for batch in real_batches(N))
    scalars = method.step(batches, Noise(SEED))
    assert not any(value for key, value in scalars.items() if key.endswith("skipped"))
    weights = method.modules.named_parameters()
    return method, {key: weight.grad.clone() for key, weight in weights if weight.grad is not None}


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", METHODS)
def test_low_precision(name: str, amp: torch.dtype) -> None:
    """Gradients are float32's, but for rounding; the moment network stays in its own precision."""
    method, found = one_low_step(name, amp)
    assert method.scored.low is (amp if name == "dfm" else None)
    _, expected = one_low_step(name, None)
    assert found.keys() == expected.keys()
    for network in ("generator.", "critic."):
        low, full = (torch.cat([grad.flatten() for key, grad in all_.items() if key.startswith(network)])
                     for all_ in (found, expected))  # fmt: skip
        assert float((low - full).norm()) < 0.05 * float(full.norm()), network


@pytest.mark.parametrize("name", METHODS)
def test_weight_decay_is_that_of_all_networks(name: str) -> None:
    optimizers = METHODS[name](optimizer="adamw", weight_decay=0.3).optimizers
    assert len(optimizers) >= 2
    assert {one.param_groups[0]["weight_decay"] for one in optimizers.values()} == {0.3}


def test_capture() -> None:
    assert dfm().capturable
    assert not dfm(critic_steps=CriticSteps(warmup=2)).capturable
    assert not molm().capturable


def test_refusals() -> None:
    generator, _ = tiny_networks(1)
    prior = DoubleGaussian(NZ)

    def denoised(critic: Any, **options: Any) -> DenoisingFeatureMatching:
        return DenoisingFeatureMatching(generator, critic, tiny_denoiser(), prior, **{**GIVEN, **options})

    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: denoised(tiny_networks(2)[1]), "critic"),
        (lambda: denoised(build_critic("autoencoder", image_size=32)), "critic"),
        (lambda: dfm(norm="batch", penalties=[PENALTIES["gradient"]()]), "critic"),
        (lambda: molm(norm="batch"), "critic"),
        *(
            (lambda bad=bad: LearnedMoments(generator, tiny_networks(1)[1], prior, bad, penalty=1, scale=1, **GIVEN), n)
            for n in ("every", "steps", "images")
            for bad in [MomentSchedule(**{**vars(SCHEDULE), n: 0})]
        ),
    ]
    for call, argument in cases:
        with pytest.raises(InputError) as error:
            call()
        assert error.value.argument == argument
        assert "\n" not in str(error.value)
