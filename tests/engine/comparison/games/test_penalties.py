"""Penalties against the same written out image by image in float64: values, and gradients of parameters and images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.kernel_pairs import PAIRS
from helpers.plays import Stream, TwoLayers, WithDecoder, images, play_of
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from engine.comparison.distances.kernels import KERNELS
from engine.comparison.games.penalties import PENALTIES, Penalty, Play
from engine.comparison.games.penalties.of_outputs import flipped_and_shifted
from engine.support.errors import InputError

COUNT = 5
KERNEL = "rational-quadratic-linear"  # of the penalties that need one; all are tried below
SMOOTH = [name for name in PAIRS if name != "energy"]


def made(name: str, kernel: str = KERNEL, **settings: float | bool) -> Penalty:
    return PENALTIES[name](*([PAIRS[kernel][0]] if name in ("scaled", "witness") else []), **settings)


# The oracles: one image at a time, derivatives by hand, so that autograd differentiates them once where it
# differentiates a penalty twice.


def phi(critic: TwoLayers, image: Tensor) -> Tensor:
    return critic.w2 @ torch.tanh(critic.w1 @ image.flatten() + critic.b1) + critic.b2


def jacobian(critic: TwoLayers, image: Tensor) -> Tensor:
    """∂φ/∂image [F, pixels] = W2 diag(1 − tanh²) W1."""
    slopes = 1 - torch.tanh(critic.w1 @ image.flatten() + critic.b1).square()
    return critic.w2 @ torch.diag(slopes) @ critic.w1


def mixture(play: Play, number: int, uniform: Tensor) -> Tensor:
    return uniform[number, 0] * play.real[number] + (1 - uniform[number, 0]) * play.fake[number]


def gradient_by_hand(critic: TwoLayers, play: Play, number: int, drawn: list[Tensor]) -> Tensor:
    return 10 * (torch.linalg.matrix_norm(jacobian(critic, mixture(play, number, drawn[0]))) - 1) ** 2


def r1_by_hand(critic: TwoLayers, play: Play, number: int, drawn: list[Tensor]) -> Tensor:
    return 10 / 2 * sum(entry**2 for entry in jacobian(critic, play.real[number]).flatten())


def moved_by_hand(image: Tensor, uniform: Tensor) -> Tensor:
    """Mirrored, then cut out of a larger image that reflection made."""
    size = image.shape[-1]
    most = size // 8
    if uniform[0] < 0.5:
        image = image.flip(-1)
    larger = torch.nn.functional.pad(image[None], [most] * 4, mode="reflect")[0]
    down, right = (math.floor(number * (2 * most + 1)) - most for number in uniform[1:].tolist())
    return larger[:, most - down : most - down + size, most - right : most - right + size]


def consistency_by_hand(critic: TwoLayers, play: Play, number: int, drawn: list[Tensor]) -> Tensor:
    moved = moved_by_hand(play.real[number], drawn[0][number])
    return 10 * (phi(critic, play.real[number]) - phi(critic, moved)).square().sum()


def balanced_by_hand(critic: TwoLayers, play: Play, number: int, drawn: list[Tensor]) -> Tensor:
    moved = moved_by_hand(play.fake[number], drawn[1][number])
    added = 10 * (phi(critic, play.fake[number]) - phi(critic, moved)).square().sum()
    return consistency_by_hand(critic, play, number, drawn) + added


def witness_by_hand(critic: TwoLayers, play: Play, number: int, drawn: list[Tensor], kernel: str = KERNEL) -> Tensor:
    """∇f(x̂) = Jᵀ ∂/∂a (mean_j k(φ(x_j), a) − mean_j k(φ(G_j), a)) at a = φ(x̂)."""
    pair = PAIRS[kernel][1]
    image = mixture(play, number, drawn[0])

    def witness(a: Tensor) -> Tensor:
        towards, away = (
            torch.stack([pair(phi(critic, one), a) for one in them]).mean() for them in (play.real, play.fake)
        )
        return towards - away

    slope = torch.func.grad(witness)(phi(critic, image))
    return (torch.linalg.vector_norm(jacobian(critic, image).T @ slope) - 1) ** 2


def scaled_by_hand(critic: TwoLayers, play: Play, number: int, drawn: list[Tensor], kernel: str = KERNEL) -> Tensor:
    """k(x, x) + Σ_i ∂²k/∂y_i∂z_i by its definition, as a kernel of two images."""

    def of_images(y: Tensor, z: Tensor) -> Tensor:
        return PAIRS[kernel][1](phi(critic, y), phi(critic, z))

    image = play.real[number].flatten()
    mixed = torch.func.jacrev(torch.func.jacrev(of_images, 0), 1)(image, image)
    return of_images(image, image) + mixed.trace()


def activations_by_hand(critic: TwoLayers, play: Play, number: int, drawn: list[Tensor]) -> Tensor:
    return phi(critic, play.real[number]).square().mean()


def autoencode_by_hand(critic: WithDecoder, play: Play, number: int, drawn: list[Tensor]) -> Tensor:
    errors = [
        (image - torch.tanh(critic.decoder.weight @ phi(critic, image)).view_as(image)).square().mean()
        for image in (play.real[number], play.fake[number])
    ]
    return 8 * (errors[0] + errors[1])


BY_HAND: dict[str, Callable[..., Tensor]] = {
    "gradient": gradient_by_hand,
    "r1": r1_by_hand,
    "consistency": consistency_by_hand,
    "balanced-consistency": balanced_by_hand,
    "witness": witness_by_hand,
    "scaled": scaled_by_hand,
    "activations": activations_by_hand,
    "autoencode": autoencode_by_hand,
}
WITHOUT_TERMS = {"none", "clip"}


def critic_for(name: str, outputs: int, size: int = 2) -> TwoLayers:
    torch.manual_seed(3)
    return (WithDecoder if name == "autoencode" else TwoLayers)(size, outputs)


def check(name: str, critic: TwoLayers, penalty: Penalty, size: int, by_hand: Callable[..., Tensor]) -> None:
    """Values, and gradients of everything with a random upstream one, to 1e-10."""
    real, fake = images(COUNT, size, 1), images(COUNT, size, 2)
    play = play_of(critic, real, fake)
    found = penalty.terms(play)
    assert isinstance(play.uniform, Stream)
    expected = torch.stack([by_hand(critic, play, number, play.uniform.drawn) for number in range(COUNT)])
    assert found.shape == (COUNT,)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn(COUNT, dtype=torch.float64)
    inputs = [*critic.parameters(), real, fake]
    gradients = [
        torch.autograd.grad(value, inputs, upstream, allow_unused=True, materialize_grads=True, retain_graph=True)
        for value in (found, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-11)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients[1])


def test_every_penalty_has_an_oracle() -> None:
    assert set(PENALTIES) == set(BY_HAND) | WITHOUT_TERMS


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("name", BY_HAND)
def test_terms_and_gradients_are_those_written_out(name: str, outputs: int) -> None:
    size = 9 if "consistency" in name else 2  # shifts need 8 pixels
    check(name, critic_for(name, outputs, size), made(name), size, BY_HAND[name])


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_witness_of_every_kernel(kernel: str) -> None:
    critic = critic_for("witness", 2)
    check("witness", critic, made("witness", kernel), 2, lambda *them: witness_by_hand(*them, kernel=kernel))


@pytest.mark.parametrize("values", [True, False], ids=["values", "gradients alone"])
@pytest.mark.parametrize("kernel", SMOOTH)
def test_the_scale_of_every_kernel_that_has_one(kernel: str, values: bool) -> None:
    def by_hand(critic: TwoLayers, play: Play, number: int, drawn: list[Tensor]) -> Tensor:
        found = scaled_by_hand(critic, play, number, drawn, kernel)
        own = phi(critic, play.real[number])
        return found if values else found - PAIRS[kernel][1](own, own)

    check("scaled", critic_for("scaled", 2), made("scaled", kernel, values=values), 2, by_hand)


@pytest.mark.parametrize("name", [name for name in BY_HAND if made(name).double_backward])
def test_double_backward_is_finite_differences(name: str) -> None:
    critic, penalty = critic_for(name, 2), made(name)
    names = [key for key, _ in critic.named_parameters()]

    def terms(real: Tensor, fake: Tensor, *parameters: Tensor) -> Tensor:
        def bound(these: Tensor) -> Tensor:
            return functional_call(critic, dict(zip(names, parameters, strict=True)), (these,))

        return penalty.terms(Play(bound, real, fake, bound(real), bound(fake), Stream(2)))

    inputs = (
        images(2, 2, 1),
        images(2, 2, 2),
        *(parameter.detach().requires_grad_() for parameter in critic.parameters()),
    )
    assert torch.autograd.gradcheck(terms, inputs)


def test_images_without_a_gradient_are_enough() -> None:
    """As a training step has them."""
    critic = critic_for("r1", 2)
    real, fake = images(COUNT, 2, 1), images(COUNT, 2, 2)
    for name in ("gradient", "r1", "witness", "scaled"):
        found, expected = (
            made(name).terms(play_of(critic, *them)) for them in ((real.detach(), fake.detach()), (real, fake))
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(found.sum(), critic.w1), torch.autograd.grad(expected.sum(), critic.w1), rtol=0, atol=0
        )
    assert real.grad is None


@pytest.mark.parametrize("shares", [(4, 1), (2, 3), (1, 3, 1)], ids=str)
@pytest.mark.parametrize("name", BY_HAND)
def test_ranks_add_up_to_one(name: str, shares: tuple[int, ...]) -> None:
    critic, penalty = critic_for(name, 2, 8), made(name)
    real, fake = images(COUNT, 8, 1), images(COUNT, 8, 2)
    expected = penalty.terms(play_of(critic, real, fake))
    starts = [sum(shares[:rank]) for rank in range(len(shares))]
    parts = [
        penalty.terms(play_of(critic, real, fake, slice(start, start + share)))
        for start, share in zip(starts, shares, strict=True)
    ]
    joined = torch.cat(parts)
    torch.testing.assert_close(joined, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(COUNT, dtype=torch.float64)
    of_ranks, of_one = (torch.autograd.grad(terms, critic.w1, upstream) for terms in (joined, expected))
    torch.testing.assert_close(of_ranks, of_one, rtol=1e-10, atol=1e-12)


class _Gathered(torch.autograd.Function):
    """As rows of other ranks come: with a gradient that can't be differentiated again."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return rows.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clone()


@pytest.mark.parametrize("name", BY_HAND)
def test_outputs_of_ranks_are_differentiated_once(name: str) -> None:
    critic = critic_for(name, 2)
    play = play_of(critic, images(COUNT, 2, 1), images(COUNT, 2, 2))
    gathered = replace(
        play,
        phi_real=_Gathered.apply(play.phi_real),
        phi_fake=_Gathered.apply(play.phi_fake),
        uniform=Stream(COUNT),
    )
    found, expected = (
        torch.autograd.grad(made(name).terms(one).sum(), critic.w1, retain_graph=True)[0] for one in (gathered, play)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in BY_HAND if made(name).at_real])
def test_the_pass_that_there_was_is_not_made_again(name: str) -> None:
    critic = critic_for(name, 2)
    play = play_of(critic, images(COUNT, 2, 1), images(COUNT, 2, 2))
    leaf = play.real.detach().requires_grad_()
    kept = replace(play, critic=pytest.fail, passed=(leaf, critic(leaf)))
    found, expected = (made(name).terms(one) for one in (kept, play))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(COUNT, dtype=torch.float64)
    of_kept, of_another = (
        torch.autograd.grad(terms, list(critic.parameters()), upstream, allow_unused=True, materialize_grads=True)
        for terms in (found, expected)
    )
    torch.testing.assert_close(of_kept, of_another, rtol=1e-12, atol=1e-12)


def test_penalties_at_real_images() -> None:
    assert {name for name in PENALTIES if made(name).at_real} == {"r1", "scaled"}


@pytest.mark.parametrize("name", [name for name in PENALTIES if name not in {"scaled", *WITHOUT_TERMS}])
def test_terms_are_added_as_their_mean(name: str) -> None:
    loss, terms = torch.tensor(2.0, dtype=torch.float64), torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    assert made(name).applied(loss, terms) == 5
    assert PENALTIES["none"]().applied(loss, terms) == 2
    assert made("scaled", weight=7.0).applied(loss, terms) == 2 / 22


@pytest.mark.parametrize("name", [name for name in BY_HAND if name != "scaled"])
def test_a_weight_multiplies_the_terms(name: str) -> None:
    critic = critic_for(name, 2)
    one, three = (
        made(name, weight=weight).terms(play_of(critic, images(COUNT, 2, 1), images(COUNT, 2, 2)))
        for weight in (1.0, 3.0)
    )
    torch.testing.assert_close(three, 3 * one)


@pytest.mark.parametrize("name", BY_HAND)
def test_no_gradient_is_infinite_where_the_critic_is_flat(name: str) -> None:
    critic = critic_for(name, 2)
    with torch.no_grad():
        critic.w2.zero_()
    terms = made(name).terms(play_of(critic, images(COUNT, 2, 1), images(COUNT, 2, 2)))
    gradients = torch.autograd.grad(terms.sum(), list(critic.parameters()), allow_unused=True, materialize_grads=True)
    assert all(gradient.isfinite().all() for gradient in (terms, *gradients))


@pytest.mark.parametrize("name", BY_HAND)
def test_terms_are_float32_at_least(name: str) -> None:
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32)):
        critic = critic_for(name, 2).to(dtype)
        real, fake = (images(COUNT, 2, seed).detach().to(dtype) for seed in (1, 2))
        assert made(name).terms(play_of(critic, real, fake)).dtype == expected


@pytest.mark.parametrize("name", sorted(WITHOUT_TERMS))
def test_without_terms_the_loss_stays(name: str) -> None:
    critic = critic_for(name, 1)
    penalty = PENALTIES[name]()
    terms = penalty.terms(play_of(critic, images(COUNT, 2, 1), images(COUNT, 2, 2)))
    assert torch.equal(terms, torch.zeros(COUNT))
    assert not penalty.has_terms
    loss = torch.tensor(3.0)
    assert penalty.applied(loss, terms) is loss


def test_clip_is_clamp() -> None:
    critic = critic_for("autoencode", 3)
    before = {name: parameter.detach().clone() for name, parameter in critic.named_parameters()}
    for name in set(PENALTIES) - {"clip"}:
        made(name).project_(critic)
    assert all(torch.equal(before[name], parameter) for name, parameter in critic.named_parameters())
    PENALTIES["clip"](limit=0.1).project_(critic)
    for name, parameter in critic.named_parameters():
        expected = before[name] if name.startswith("decoder") else before[name].clamp(-0.1, 0.1)
        assert torch.equal(parameter, expected), name
        assert parameter.requires_grad
    assert before["w2"].abs().max() > 0.1


def test_all_shifts_are_drawn_and_none_is_larger() -> None:
    size, count = 17, 400
    image = torch.arange(size * size, dtype=torch.float64).view(1, 1, size, size).expand(count, 3, size, size)
    uniform = torch.rand(count, 3, generator=torch.Generator().manual_seed(0))
    moved = flipped_and_shifted(image, uniform)
    seen = set()
    for number in range(count):
        torch.testing.assert_close(moved[number], moved_by_hand(image[number], uniform[number].double()))
        seen.add((bool(uniform[number, 0] < 0.5), float(moved[number, 0, 8, 8])))
    assert len(seen) == 2 * 5 * 5  # s = 2
    rounded, largest = torch.ones(1, 3), torch.full((1, 3), 0.99)
    assert torch.equal(flipped_and_shifted(image[:1], rounded), flipped_and_shifted(image[:1], largest))


def test_small_images_are_only_mirrored() -> None:
    image, uniform = images(6, 4), torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
    expected = torch.where((uniform[:, 0] < 0.5)[:, None, None, None], image.flip(-1), image)
    assert torch.equal(flipped_and_shifted(image, uniform), expected)
    assert 0 < (uniform[:, 0] < 0.5).sum() < 6


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", [name for name in PENALTIES if name != "none"])
def test_weights_that_are_not_positive_are_refused(name: str, value: float) -> None:
    argument = "limit" if name == "clip" else "weight"
    with pytest.raises(InputError) as error:
        made(name, **{argument: value})
    assert error.value.argument == argument


def test_a_scale_without_a_form_is_refused() -> None:
    for kernel in (KERNELS["energy"](), lambda x, y: x @ y.T):
        with pytest.raises(InputError, match="second derivative") as error:
            PENALTIES["scaled"](kernel)
        assert error.value.argument == "kernel"


def test_autoencoding_without_a_decoder_is_refused() -> None:
    with pytest.raises(InputError, match="autoencoder") as error:
        made("autoencode").terms(play_of(critic_for("r1", 1), images(2), images(2)))
    assert error.value.argument == "critic"


def test_plays_that_do_not_fit_are_refused() -> None:
    critic: nn.Module = critic_for("r1", 1)
    with pytest.raises(InputError) as error:
        play_of(critic, images(3), images(2))
    assert error.value.argument == "fake"
    real, fake = images(3), images(3)
    with pytest.raises(InputError) as error:
        Play(critic, real[:1], fake[:1], critic(real), critic(fake), Stream(3))
    assert error.value.argument == "own"
