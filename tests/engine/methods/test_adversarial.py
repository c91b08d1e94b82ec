"""Adversarial steps in float64 against steps written out with plain autograd and torch's optimizers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.adversaries import (
    CLASSES,
    NZ,
    SIZE,
    DoubleGaussian,
    TinyCritic,
    TinyGenerator,
    real_batches,
    real_labels,
    tiny_networks,
)
from helpers.thread_ranks import on_ranks
from torch import Tensor, nn

from engine.comparison.distances import kernels
from engine.comparison.games import GAMES, Game
from engine.comparison.games.penalties import PENALTIES, Penalty
from engine.generation.priors import Noise
from engine.methods.adversarial import Adversarial, CriticSteps
from engine.representation.critics import build_critic
from engine.training.ranks import Ranks
from pipelines import Batch

N, SEED = 5, 21
RATES: dict[str, Any] = {"lr": 1e-2, "betas": (0.4, 0.9)}
CRITIC_RATES: dict[str, Any] = {"lr": 2e-2, "betas": (0.3, 0.8)}
Outputs = Callable[[Tensor], Tensor]


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    return (x[:, None] - y[None]).square().sum(dim=2)


def rq(x: Tensor, y: Tensor) -> Tensor:
    return sum((1 + squared_distances(x, y) / (2 * a)) ** -a for a in (0.5, 2.0))


def unbiased(x: Tensor, g: Tensor) -> Tensor:
    off = 1 - torch.eye(len(x), dtype=torch.float64)
    pairs = len(x) * (len(x) - 1)
    return (rq(x, x) * off).sum() / pairs - 2 * rq(x, g).mean() + (rq(g, g) * off).sum() / pairs


def root(x: Tensor, g: Tensor) -> Tensor:
    one_sided = (x.mean(dim=0) - g.mean(dim=0)).clamp(max=0).mean()
    return (rq(x, x).mean() - 2 * rq(x, g).mean() + rq(g, g).mean() + 1e-6).sqrt() + 16 * one_sided


def covariance(x: Tensor, g: Tensor) -> Tensor:
    values = torch.linalg.eigvalsh(x.T @ x / len(x) - g.T @ g / len(g))
    return values.abs().topk(2).values.sum()


def fisher(x: Tensor, g: Tensor) -> Tensor:
    slack = 1 - (x.square().mean() + g.square().mean()) / 2
    return g.mean() - x.mean() + 0.3 / 2 * slack**2  # Λ is 0 in the first step


def of_classes(x: Tensor, g: Tensor) -> Tensor:
    known = F.cross_entropy(x, real_labels()[:N])
    return known + F.softplus(-x.logsumexp(dim=1)).mean() + F.softplus(g.logsumexp(dim=1)).mean()


def logistic(x: Tensor, g: Tensor) -> Tensor:
    return -(torch.sigmoid(x).log().mean() + (1 - torch.sigmoid(g)).log().mean())


def matched(x: Tensor, g: Tensor) -> Tensor:
    return (x.mean(dim=0) - g.mean(dim=0)).square().sum()


KERNEL = kernels.rational_quadratic((0.5, 2.0))
Loss = Callable[[Tensor, Tensor], Tensor]
# Name → the game, the critic's outputs, what the critic minimises, and what the generator minimises.
CASES: dict[str, tuple[Callable[[], Game], int, Loss, Loss]] = {
    "minimax": (GAMES["minimax"], 1, logistic, lambda x, g: (1 - torch.sigmoid(g)).log().mean()),
    "nonsaturating": (GAMES["nonsaturating"], 1, logistic, lambda x, g: -torch.sigmoid(g).log().mean()),
    "boundary-seeking": (GAMES["boundary-seeking"], 1, logistic, lambda x, g: g.square().mean() / 2),
    "least-squares": (
        GAMES["least-squares"],
        1,
        lambda x, g: (x - 1).square().mean() / 2 + g.square().mean() / 2,
        lambda x, g: (g - 1).square().mean() / 2,
    ),
    "hinge": (
        GAMES["hinge"],
        1,
        lambda x, g: (1 - x).clamp(min=0).mean() + (1 + g).clamp(min=0).mean(),
        lambda x, g: -g.mean(),
    ),
    "wasserstein": (GAMES["wasserstein"], 1, lambda x, g: g.mean() - x.mean(), lambda x, g: -g.mean()),
    "began": (GAMES["began"], 1, lambda x, g: x.mean(), lambda x, g: g.mean()),  # k is 0 in the first step
    "fisher": (lambda: GAMES["fisher"](0.3), 1, fisher, lambda x, g: -g.mean()),
    "mcgan-mean": (
        GAMES["mcgan-mean"],
        3,
        lambda x, g: -matched(x, g).sqrt(),
        lambda x, g: matched(x, g).sqrt(),
    ),
    "mcgan-covariance": (
        lambda: GAMES["mcgan-covariance"](2),
        3,
        lambda x, g: -covariance(x, g),
        covariance,
    ),
    "feature-matching": (GAMES["feature-matching"], 1, logistic, matched),
    "classes": (lambda: GAMES["feature-matching"](CLASSES), CLASSES, of_classes, matched),
    "mmd": (lambda: GAMES["mmd"](KERNEL), 3, lambda x, g: -unbiased(x, g), unbiased),
    "root-mmd": (lambda: GAMES["root-mmd"](KERNEL), 3, lambda x, g: -root(x, g), root),
}


def uniform(random: torch.Generator, columns: int) -> Tensor:
    return (torch.rand(N, columns, generator=random) * 2 - 1).double().add(1).div(2)


def jacobian(outputs: Outputs, image: Tensor) -> Tensor:
    """∂outputs/∂image of one image, [F, pixels]."""
    image = image.detach().requires_grad_()
    rows = [torch.autograd.grad(value, image, create_graph=True)[0].flatten() for value in outputs(image[None])[0]]
    return torch.stack(rows)


def moved(images: Tensor, u: Tensor) -> Tensor:
    """Mirrored or not, and shifted by at most a pixel of 8, with the border reflected."""
    found = []
    for image, (mirrored, down, right) in zip(images, u.tolist(), strict=True):
        padded = F.pad(image[None], (1, 1, 1, 1), mode="reflect")[0]
        top, left = 1 - (int(down * 3) - 1), 1 - (int(right * 3) - 1)
        if mirrored < 0.5:
            left = 2 - left
        piece = padded[:, top : top + SIZE, left : left + SIZE]
        found.append(piece.flip(2) if mirrored < 0.5 else piece)
    return torch.stack(found)


def mixed(x: Tensor, g: Tensor, random: torch.Generator) -> Tensor:
    u = uniform(random, 1).view(-1, 1, 1, 1)
    return u * x + (1 - u) * g


def penalised(name: str, loss: Tensor, critic: TinyCritic, x: Tensor, g: Tensor, random: torch.Generator) -> Tensor:
    """The critic's loss with the penalty, from its formula."""
    mean: Callable[[Iterator[Tensor]], Tensor] = lambda terms: torch.stack(list(terms)).mean()  # noqa: E731
    if name == "gradient":
        return loss + 10 * mean((jacobian(critic, one).norm() - 1) ** 2 for one in mixed(x, g, random))
    if name == "r1":
        return loss + 5 * mean(jacobian(critic, one).norm() ** 2 for one in x)
    if name == "consistency":
        return loss + 10 * (critic(x) - critic(moved(x, uniform(random, 3)))).square().sum(dim=1).mean()
    if name == "balanced-consistency":
        first = (critic(x) - critic(moved(x, uniform(random, 3)))).square().sum(dim=1).mean()
        return loss + 10 * (first + (critic(g) - critic(moved(g, uniform(random, 3)))).square().sum(dim=1).mean())
    if name == "activations":
        return loss + critic(x).square().mean()
    if name == "autoencode":
        errors = ((critic.decode(critic(one)) - one).square().mean() for one in (x, g))
        return loss + 8 * sum(errors)
    if name == "witness":
        real, fake = critic(x), critic(g)

        def witness(image: Tensor) -> Tensor:
            phi = critic(image)
            return (rq(real, phi).mean(dim=0) - rq(fake, phi).mean(dim=0))[:, None]

        return loss + mean((jacobian(witness, one).norm() - 1) ** 2 for one in mixed(x, g, random))
    if name == "scaled":  # k(x, x) is 2, and a kernel's slope −½ for each of the two
        return loss / (1 + 10 * mean(2 + 2 * jacobian(critic, one).norm() ** 2 for one in x))
    return loss


def made(name: str, penalty: str) -> Penalty:
    options = {"kernel": KERNEL} if penalty in ("witness", "scaled") else {}
    return PENALTIES[penalty](**options)


def written_out(name: str, penalty: str) -> tuple[TinyGenerator, TinyCritic]:
    """Both networks after a step of the critic and one of the generator, with the gradients of these steps."""
    _, outputs, of_critic, of_generator = CASES[name]
    generator, critic = tiny_networks(outputs)
    random, batches = torch.Generator().manual_seed(SEED), real_batches(N)
    of_weights = torch.optim.Adam(critic.parameters(), **CRITIC_RATES)
    x, z = next(batches).images, torch.randn(N, NZ, generator=random).double()
    g = generator(z).detach()
    penalised(penalty, of_critic(critic(x), critic(g)), critic, x, g, random).backward()
    of_weights.step()
    if penalty == "clip":
        for key, weight in critic.named_parameters():
            if not key.startswith("decoder"):
                weight.data.clamp_(-0.01, 0.01)
    critic.requires_grad_(False)
    g = generator(torch.randn(N, NZ, generator=random).double())
    score = critic.features if name in ("feature-matching", "classes") else critic
    x = next(batches).images if name.startswith(("mcgan", "feature", "classes", "mmd", "root")) else x
    of_weights = torch.optim.Adam(generator.parameters(), **RATES)
    of_generator(score(x), score(g)).backward()
    of_weights.step()
    return generator, critic


def method(
    game: Game, outputs: int, penalties: list[Penalty], *, networks: dict[str, Any] | None = None, **options: Any
) -> Adversarial:
    generator, critic = tiny_networks(outputs, **(networks or {}))
    rates = {**RATES, "critic_lr": CRITIC_RATES["lr"], "critic_betas": CRITIC_RATES["betas"]}
    return Adversarial(
        generator,
        critic,
        DoubleGaussian(NZ),
        game,
        penalties,
        batch_size=N,
        labels=real_labels(),
        **{**rates, **options},
    )


def difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("name", CASES)
def test_one_step_is_the_one_written_out(name: str, penalty: str) -> None:
    game, outputs, *_ = CASES[name]
    adversarial = method(game(), outputs, [made(name, penalty)])
    scalars = adversarial.step(real_batches(N), Noise(SEED))
    generator, critic = written_out(name, penalty)
    for network, before, expected in zip(
        (adversarial.generator, adversarial.critic), tiny_networks(outputs), (generator, critic), strict=True
    ):
        for found, own in zip(network.parameters(), expected.parameters(), strict=True):
            assert (found.grad is None) == (own.grad is None)
            if own.grad is not None:
                torch.testing.assert_close(found.grad, own.grad, rtol=1e-10, atol=1e-10)
        assert difference(network, expected) < 1e-7, "Adam divides small gradients, and their rounding, by themselves"
        assert difference(expected, before) > 1e-3
    assert scalars["skipped"] == scalars["critic_skipped"] == 0


RANKED: dict[str, tuple[str, list[str]]] = {
    "nonsaturating": ("nonsaturating", ["none"]),
    "wgan-gp": ("wasserstein", ["gradient"]),
    "mmd-witness": ("mmd", ["witness", "activations"]),
    "mmd-scaled": ("mmd", ["scaled"]),
    "root-mmd": ("root-mmd", ["clip", "autoencode"]),
    "fisher": ("fisher", ["none"]),
    "began": ("began", ["balanced-consistency"]),
    "classes": ("classes", ["consistency", "r1"]),
    "batch-norm": ("nonsaturating", ["none"]),
    "covariance": ("mcgan-covariance", ["clip"]),
}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", RANKED)
def test_ranks_take_the_steps_of_one_process(name: str, size: int) -> None:
    """With uneven shares, and with what the game keeps."""
    game, penalties = RANKED[name]
    networks = {"norm": "batch"} if name == "batch-norm" else {}

    def work(ranks: Ranks) -> dict[str, Tensor]:
        adversarial = method(
            CASES[game][0](), CASES[game][1], [made(game, penalty) for penalty in penalties], networks=networks,
            ranks=ranks, critic_steps=CriticSteps(usual=2), critic_optimizer="rmsprop",
        )  # fmt: skip
        batches, noise = real_batches(N, ranks), Noise(SEED)
        for _ in range(3):
            scalars = adversarial.step(batches, noise)
        found = {**scalars, **{f"state.{key}": value.clone() for key, value in adversarial.state_dict().items()}}
        return found | {key: value.clone() for key, value in adversarial.modules.state_dict().items()}

    (expected,) = on_ranks(1, work)
    for found in on_ranks(size, work):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9, msg=key)


def test_one_critic_scores_real_and_generated_images() -> None:
    """With spectral norms, where a pass in training moves the power iteration: outputs and u, v of one joint pass."""
    critic = build_critic("dcgan", image_size=32, outputs=3, norm="spectral").double()
    twin = copy.deepcopy(critic)
    method = Adversarial(
        tiny_networks(1)[0], critic, DoubleGaussian(NZ), GAMES["mmd"](kernel=KERNEL), [PENALTIES["r1"]()],
        batch_size=N, **RATES,
    )  # fmt: skip
    real, fake = torch.randn(2, N, 3, 32, 32, dtype=torch.float64)
    (of_real, of_fake), _ = method._both(real, fake)
    expected = twin(torch.cat([real, fake]))
    torch.testing.assert_close(torch.cat([of_real, of_fake]), expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(critic.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert critic.training


def test_one_critic_scores_both_in_the_generator_s_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """With spectral norms: the generated images move the power iteration, the real ones find it as it is then."""
    critic = build_critic("dcgan", image_size=32, outputs=3, norm="spectral").double()
    twin, game = copy.deepcopy(critic), GAMES["mmd"](kernel=KERNEL)
    method = Adversarial(tiny_networks(1)[0], critic, DoubleGaussian(NZ), game, batch_size=N, **RATES)
    real, fake = torch.randn(2, N, 3, 32, 32, dtype=torch.float64)
    monkeypatch.setattr(method, "_draw", lambda noise: fake.clone().requires_grad_())
    loss, _ = method._generator_step(iter([Batch(real, torch.arange(N))]), Noise(SEED))
    of_fake = twin(fake)
    torch.testing.assert_close(loss, game.generator_loss(twin.eval()(real), of_fake), rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(critic.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert critic.training
