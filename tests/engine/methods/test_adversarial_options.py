"""What surrounds an adversarial step: how often the critic learns, skipped steps, low precision, what is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.adversaries import NZ, DoubleGaussian, TinyCritic, TinyGenerator, real_batches, tiny_networks
from helpers.thread_ranks import on_ranks
from torch import Tensor

from engine.comparison.distances import kernels
from engine.comparison.games import GAMES, Began, Fisher
from engine.comparison.games.penalties import PENALTIES, Penalty
from engine.generation.low_precision import LowPrecision
from engine.generation.priors import Gaussian, Noise
from engine.methods import adversarial
from engine.methods.adversarial import Adversarial, CriticSteps
from engine.methods.everywhere import everywhere
from engine.support.errors import InputError
from pipelines import Batch

N = 4


def made(name: str, penalties: list[Penalty] | None = None, *, outputs: int = 1, **options: Any) -> Adversarial:
    networks = {key: options.pop(key) for key in ("norm", "minibatch_discrimination") if key in options}
    generator, critic = tiny_networks(outputs, **networks)
    return Adversarial(
        generator, critic, DoubleGaussian(NZ), GAMES[name](), penalties or [], batch_size=N, lr=1e-2, **options
    )


def state(method: Adversarial) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in [*method.modules.state_dict().items(), *method.state_dict().items()]}


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (CriticSteps(), [1] * 7),
        (CriticSteps(usual=3), [3] * 7),
        (CriticSteps(usual=2, more=5, warmup=2), [5, 5, 2, 2, 2, 2, 2]),
        (CriticSteps(usual=1, more=4, every=3), [4, 1, 1, 4, 1, 1, 4]),
        (CriticSteps(usual=1, more=4, warmup=2, every=4), [4, 4, 1, 1, 4, 1, 1]),
    ],
    ids=str,
)
def test_the_critic_learns_so_often(steps: CriticSteps, expected: list[int]) -> None:
    """Each time on another real minibatch; a game that reads them takes one more for the generator."""
    for name, more in (("hinge", 0), ("mcgan-mean", 1)):
        method, taken, noise = made(name, outputs=2 if more else 1, critic_steps=steps), itertools.count(), Noise(0)
        batches = ((next(taken), batch)[1] for batch in real_batches(N))
        for count in expected:
            before = next(taken)
            method.step(batches, noise)
            assert next(taken) - before - 1 == count + more
        assert method.capturable is not steps.varies


def test_wgans_own_rhythm() -> None:
    steps = CriticSteps(usual=5, more=100, warmup=25, every=500)
    often = [step for step in range(1200) if steps.before(step) == 100]
    assert often == [*range(25), 500, 1000]
    assert {steps.before(step) for step in range(1200)} == {5, 100}


def test_resumed_it_goes_on_with_its_count() -> None:
    method, noise = made("hinge", critic_steps=CriticSteps(warmup=3, more=2)), Noise(0)
    for _ in range(2):
        method.step(real_batches(N), noise)
    again = made("hinge", critic_steps=CriticSteps(warmup=3, more=2))
    again.load_state_dict(method.state_dict())
    assert again.steps == 2


def test_neither_network_gets_a_gradient_of_the_other_ones_step() -> None:
    method = made("nonsaturating", [PENALTIES["gradient"]()])
    seen: list[str] = []
    for name, weight in method.modules.named_parameters():
        weight.register_hook(lambda gradient, name=name: seen.append(name.split(".")[0]))
    method._critic_step(next(real_batches(N)), Noise(0), last=True)
    assert set(seen) == {"critic"}
    seen.clear()
    method._generator_step(real_batches(N), Noise(0))
    assert set(seen) == {"generator"}
    assert all(weight.requires_grad for weight in method.critic.parameters())


def spoilt(at: int) -> Iterator[Batch]:
    for number, (images, indices) in enumerate(real_batches(N)):
        yield Batch(images * math.nan if number == at else images, indices)


@pytest.mark.parametrize("name", ["fisher", "began"])
def test_a_critic_step_that_is_not_finite_is_as_if_it_had_not_been(name: str) -> None:
    """Weights and what the game keeps stay; the generator's step is taken."""
    method, batches, noise = made(name), spoilt(at=1), Noise(0)
    game = method.game
    assert isinstance(game, Began | Fisher)
    setattr(game, "rate" if name == "began" else "rho", 0.3)
    assert method.step(batches, noise)["critic_skipped"] == 0
    before = state(method)
    scalars = method.step(batches, noise)
    assert (scalars["critic_skipped"], scalars["skipped"]) == (1, 0)
    assert scalars["critic_loss"].isnan()
    after = state(method)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all(key.startswith("generator.") for key in changed)
    third = method.step(batches, noise)
    assert (third["critic_skipped"], third["skipped"]) == (0, 0)
    assert any(key.startswith("game.") and not torch.equal(value, after[key]) for key, value in state(method).items())


@pytest.mark.parametrize(
    ("penalty", "low"), [("none", True), ("consistency", True), ("r1", False), ("gradient", False)]
)
def test_low_precision_is_the_critics_where_no_penalty_forbids_it(penalty: str, low: bool) -> None:
    generator, critic = TinyGenerator(), TinyCritic(1)
    method = Adversarial(
        generator, critic, Gaussian(NZ), GAMES["hinge"](), [PENALTIES[penalty]()], batch_size=N, lr=1e-3,
        amp_dtype=torch.bfloat16,
    )  # fmt: skip
    dtypes: dict[str, set[torch.dtype]] = {"critic": set(), "generator": set()}
    for name, layer in (("critic", critic.first), ("generator", generator.layers[0])):
        layer.register_forward_hook(lambda module, given, result, name=name: dtypes[name].add(result.dtype))
    scalars = method.step(real_batches(N), Noise(0))
    assert dtypes == {"critic": {torch.bfloat16 if low else torch.float32}, "generator": {torch.bfloat16}}
    assert all(value.dtype in (torch.float32, torch.float64) for value in scalars.values())


def test_weights_in_low_precision_are_copied_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """And every step begins with those that the last one left."""

    def trained() -> tuple[dict[str, Tensor], int]:
        networks = tiny_networks(1)
        method = Adversarial(
            networks[0].float(), networks[1].float(), Gaussian(NZ), GAMES["hinge"](), batch_size=N, lr=1e-2,
            critic_steps=CriticSteps(usual=3), amp_dtype=torch.bfloat16,
        )  # fmt: skip
        assert method.low is not None
        copied, copy = itertools.count(), method.low.copy_weights
        monkeypatch.setattr(method.low, "copy_weights", lambda: (next(copied), copy()))
        batches, noise = real_batches(N), Noise(0)
        for _ in range(2):
            method.step(batches, noise)
        return method.modules.state_dict(), next(copied)

    found, times = trained()
    assert times == 2
    images = LowPrecision.images
    monkeypatch.setattr(LowPrecision, "images", lambda self, z, *, recompute, copied: images(self, z))
    expected, often = trained()
    assert often == 2 + 2 * 4
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize(("penalty", "passes"), [("none", 2 * N), ("r1", 2 * N), ("gradient", 3 * N)])
def test_images_pass_the_critic_once_but_for_mixtures(penalty: str, passes: int) -> None:
    method, seen = made("nonsaturating", [PENALTIES[penalty]()]), []
    method.critic.register_forward_hook(lambda module, given, result: seen.append(len(result)))
    method._critic_step(next(real_batches(N)), Noise(0), last=True)
    assert sum(seen) == passes


@pytest.mark.parametrize(("names", "expected"), [(["clip"], [2]), (["none"], [2]), (["clip", "consistency"], [2, 1])])
def test_only_terms_are_joined(names: list[str], expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two ranks: both outputs together, and the terms where there are any."""
    monkeypatch.setattr(
        adversarial, "everywhere", lambda rows, ranks: (joined.append(rows), everywhere(rows, ranks))[1]
    )
    joined: list[Tensor] = []

    def work(ranks: Any) -> None:
        method = made("hinge", [PENALTIES[name]() for name in names], ranks=ranks)
        method._critic_step(next(real_batches(N, ranks)), Noise(0), last=True)

    on_ranks(2, work)
    assert sorted(rows.dim() for rows in joined) == sorted(2 * expected)


def test_eigenvectors_that_are_not_found_are_a_step_that_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """LAPACK gives up on finite matrices as well; the loss, which is NaN, says where."""
    method, batches, noise = made("mcgan-covariance", outputs=16), real_batches(N), Noise(0)

    def gives_up(matrix: Tensor) -> None:
        raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")

    before = state(method)
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", gives_up)
        scalars = method.step(batches, noise)
    assert scalars["critic_loss"].isnan()
    assert (scalars["critic_skipped"], scalars["skipped"]) == (1, 1)
    after = state(method)
    weights = [key for key, _ in method.modules.named_parameters()]
    assert all(torch.equal(before[key], after[key]) for key in weights)
    assert method.step(batches, noise)["critic_loss"].isfinite()


@pytest.mark.parametrize("options", [{"norm": "batch"}, {"minibatch_discrimination": True}], ids=str)
def test_a_critic_that_mixes_images_has_no_derivative_of_each(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="mixes the images of a minibatch, and R1 needs") as error:
        made("hinge", [PENALTIES["r1"]()], **options)
    assert error.value.argument == "critic"
    made("hinge", [PENALTIES["consistency"]()], **options)


def test_a_critic_has_as_many_outputs_as_the_game_takes() -> None:
    with pytest.raises(InputError, match="gives 3 outputs, and the game takes 1") as error:
        made("hinge", outputs=3)
    assert error.value.argument == "critic"
    made("mcgan-mean", outputs=3)


def test_a_minibatch_that_is_compared_is_one_process() -> None:
    def work(ranks: Any) -> InputError:
        with pytest.raises(InputError, match="needs the whole minibatch in one process") as error:
            made("hinge", minibatch_discrimination=True, ranks=ranks)
        return error.value

    assert [error.argument for error in on_ranks(2, work)] == ["minibatch_discrimination"] * 2


def test_classes_need_labels() -> None:
    generator, critic = tiny_networks(3)
    with pytest.raises(InputError, match="labels"):
        Adversarial(generator, critic, DoubleGaussian(NZ), GAMES["feature-matching"](3), batch_size=N, lr=1e-3)


@pytest.mark.parametrize(
    ("optimizer", "of_critic", "decays"),
    [
        ("adamw", None, {"generator": 0.3, "critic": 0.3}),
        ("adamw", "adam", {"generator": 0.3, "critic": 0.0}),
        ("adam", "adamw", {"generator": 0.0, "critic": 0.3}),
    ],
)
def test_weight_decay_is_that_of_networks_with_adamw(
    optimizer: str, of_critic: str | None, decays: dict[str, float]
) -> None:
    method = made("hinge", optimizer=optimizer, weight_decay=0.3, critic_optimizer=of_critic)
    assert {name: one.param_groups[0]["weight_decay"] for name, one in method.optimizers.items()} == decays


def test_the_log_tells_what_is_added_from_what_divides() -> None:
    kernel = kernels.gaussian((1.0,))
    penalties = [PENALTIES["scaled"](kernel), PENALTIES["activations"]()]

    def scalars(penalties: list[Penalty]) -> Any:
        game = GAMES["mmd"](kernel)
        method = Adversarial(*tiny_networks(2), DoubleGaussian(NZ), game, penalties, batch_size=N, lr=1e-2)
        return method.step(real_batches(N), Noise(0))

    found, without = scalars(penalties), scalars(penalties[1:])
    torch.testing.assert_close(found["penalty"], without["penalty"])
    assert "scale" not in without
    assert float(found["scale"]) > 0


def test_uniform_numbers_are_one_stream() -> None:
    """Every rank has its rows of what one process draws, in [0, 1)."""

    def work(ranks: Any) -> Tensor:
        method = made("hinge", ranks=ranks)
        noise = Noise(3)
        return torch.cat([method._uniform_rows(noise, columns) for columns in (1, 3)], dim=1)

    (whole,) = on_ranks(1, work)
    random = torch.Generator().manual_seed(3)
    expected = torch.cat([torch.rand(N, columns, generator=random) for columns in (1, 3)], dim=1)
    torch.testing.assert_close(whole, expected.double(), rtol=0, atol=1e-7)
    assert torch.equal(torch.cat(on_ranks(3, work)), whole)
