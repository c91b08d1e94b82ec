"""Adversarial training: a generator and a critic that learn from each other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from engine.comparison.games import Game
from engine.comparison.games.penalties import PENALTY, SCALE, Penalty, Play
from engine.generation.batch_norm import share_batches
from engine.generation.low_precision import LowPrecision
from engine.generation.networks import Generator, run_generator
from engine.generation.priors import Noise, Prior, Uniform
from engine.generation.sampling import Sampler
from engine.methods.everywhere import everywhere
from engine.methods.gradient_step import GradientStep, part_of
from engine.methods.protocols import SKIPPED
from engine.representation.critics import Critic
from engine.support.errors import InputError
from engine.training.ranks import ALONE, Ranks
from pipelines import Batch

_GAME, _STEPS = "game.", "steps"


@dataclass(frozen=True, kw_only=True)
class CriticSteps:
    """How many steps the critic takes before a step of the generator.

    Attributes:
        usual: in most of them.
        more: in each of the first `warmup` steps of the generator, and in every one whose number is a multiple of
            `every` (from 0; None for none). Arjovsky et al. 2017 have 100 in the first 25 and in every 500th.
    """

    usual: int = 1
    more: int = 100
    warmup: int = 0
    every: int | None = None

    def before(self, step: int) -> int:
        """Before the generator's step `step`, from 0."""
        return self.more if step < self.warmup or (self.every is not None and step % self.every == 0) else self.usual

    @property
    def varies(self) -> bool:
        """Whether they aren't always as many: then no step can be replayed for another."""
        return self.warmup > 0 or self.every is not None


ONE_EACH = CriticSteps()


def is_capturable(game: Game, critic_steps: CriticSteps) -> bool:
    """Whether every step of an adversarial method does the same on the device, and none waits for it."""
    return not (critic_steps.varies or game.of_host)


class _InPrecision:
    """A critic whose layers compute in a low precision (None for their own), and whose results are in its weights'."""

    def __init__(self, critic: Critic, low: torch.dtype | None):
        self.critic, self.low = critic, low
        weight = next(critic.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        decode = getattr(critic, "decode", None)
        if decode is not None:
            self.decode = partial(self._run, decode)
        outputs = getattr(critic, "outputs", None)  # of features
        if outputs is not None:
            self.outputs = partial(self._run, outputs)

    def __call__(self, images: Tensor) -> Tensor:
        """Outputs [n, F]."""
        return self._run(self.critic, images)

    def features(self, images: Tensor) -> Tensor:
        """The last hidden layer [n, h]."""
        return self._run(self.critic.features, images)

    def _run(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.low is None:
            return function(x)
        with torch.autocast(self.device.type, self.low):
            found = function(x)
        return found.to(self.dtype)


class Adversarial:
    """Steps of the critic, each on another real minibatch, then one of the generator (`engine.methods.protocols`).

    The critic minimises the game's `critic_loss` with what the penalties make of it, on real images and on generated
    ones that are taken as they are; the generator minimises `generator_loss`, through a critic that is taken as it is.

    Ranks have equal weights and each its share of images. Critic outputs travel (`everywhere`), so every rank knows the
    losses of the whole minibatch, and gradients are added.

    Args:
        generator, critic: on one device, in training mode.
        prior: the law of z.
        game: what they want.
        penalties: applied to the critic's loss one after the other, then to its weights.
        batch_size: N, of real and of generated images, over all ranks.
        critic_steps: for each step of the generator.
        lr, betas, optimizer, weight_decay, clip_grad: of the generator; see `GradientStep`. The decay is that of every
            network which has AdamW.
        critic_lr, critic_betas, critic_optimizer: of the critic; None for the generator's.
        amp_dtype: low precision of both networks' arithmetic, None for their own. A critic whose penalty is
            differentiated twice keeps its own.
        recompute_generator: compute the generator's activations again in backward instead of keeping them.
        batch_statistics: see `Sampler`.
        ranks: the processes that share the minibatch.
        global_batches: whether the generator's BatchNorm has the batches of all ranks, or each its own.
        labels: class numbers of all real images, int64, for a game that reads them.

    Attributes:
        capturable: see `Method`.

    Raises:
        InputError: "critic", if it has another number of outputs than the game takes, or if images of a minibatch see
            each other in it, and a penalty or several ranks forbid that;
            "labels", if the game reads labels and there are none.
    """

    reads: Literal["nothing", "images"] = "images"
    differentiates_twice = False
    """Whether a step differentiates the critic's derivatives, whatever the penalties do."""

    def __init__(
        self,
        generator: Generator,
        critic: Critic,
        prior: Prior,
        game: Game,
        penalties: Sequence[Penalty] = (),
        *,
        batch_size: int,
        critic_steps: CriticSteps = ONE_EACH,
        lr: float,
        betas: tuple[float, float] = (0.5, 0.999),
        optimizer: str = "adam",
        weight_decay: float | None = None,
        clip_grad: float | None = None,
        critic_lr: float | None = None,
        critic_betas: tuple[float, float] | None = None,
        critic_optimizer: str | None = None,
        amp_dtype: torch.dtype | None = None,
        recompute_generator: bool = False,
        batch_statistics: bool = False,
        ranks: Ranks = ALONE,
        global_batches: bool = True,
        labels: Tensor | None = None,
    ):
        self.generator, self.critic, self.prior = generator, critic, prior
        self.penalties, self.batch_size, self.critic_steps = list(penalties), batch_size, critic_steps
        self.recompute_generator, self.batch_statistics, self.ranks = recompute_generator, batch_statistics, ranks
        self.modules = nn.ModuleDict({"generator": generator, "critic": critic})
        _check_critic(critic, game, self.penalties, ranks)
        if ranks.size > 1:
            share_batches(critic, ranks)
            if global_batches:
                share_batches(generator, ranks)
        self.share = ranks.share(batch_size)
        weight = next(critic.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.game = game.to(self.device) if isinstance(game, nn.Module) else game
        if game.reads_labels and labels is None:
            raise InputError("labels", "the game has classes, and the real images have none")
        self.labels = labels.to(self.device) if labels is not None and game.reads_labels else None
        self.capturable = is_capturable(game, critic_steps)
        self.at_real = any(penalty.at_real for penalty in penalties)
        self.low = None if amp_dtype is None else LowPrecision(generator, amp_dtype)
        twice = self.differentiates_twice or any(penalty.double_backward for penalty in penalties)
        self.scored = _InPrecision(critic, None if twice else amp_dtype)
        self.generator_step = GradientStep(
            generator,
            lr=lr,
            betas=betas,
            optimizer=optimizer,
            weight_decay=weight_decay if optimizer == "adamw" else None,
            clip_grad=clip_grad,
            scaled=amp_dtype is torch.float16,
            ranks=ranks,
        )
        of_critic = optimizer if critic_optimizer is None else critic_optimizer
        self.critic_step = GradientStep(
            critic,
            lr=lr if critic_lr is None else critic_lr,
            betas=betas if critic_betas is None else critic_betas,
            optimizer=of_critic,
            weight_decay=weight_decay if of_critic == "adamw" else None,
            scaled=self.scored.low is torch.float16,
            ranks=ranks,
        )
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "generator": self.generator_step.optimizer,
            "critic": self.critic_step.optimizer,
        }
        self.steps = 0
        self._uniform: dict[int, Uniform] = {}

    def step(self, batches: Iterator[Batch] | None, noise: Noise) -> Mapping[str, Tensor]:
        """See `Method.step`. The critic's scalars are means over its steps, the game's figures those of its last one.

        Args:
            batches: an iterator of real minibatches, of this rank's share.
        """
        assert batches is not None
        count = self.critic_steps.before(self.steps)
        self._copy_weights()
        found = [self._critic_step(next(batches), noise, last=number == count - 1) for number in range(count)]
        loss, skipped = self._generator_step(batches, noise)
        if self.critic_steps.varies:  # else nothing depends on it
            self.steps += 1
        return {"loss": loss, **found[-1], **_means(found), SKIPPED: skipped}

    def _critic_step(self, batch: Batch, noise: Noise, *, last: bool) -> Mapping[str, Tensor]:
        real = batch.images.to(self.dtype)
        with torch.no_grad():
            fake = self._draw(noise)
        outputs, passed = self._both(real, fake)
        labels = () if self.labels is None else (self._labels(batch.indices),)
        loss = self.game.critic_loss(*outputs, *labels)
        found: dict[str, Tensor] = {}
        if last:
            of_real, of_fake = (rows.detach() for rows in outputs)
            found.update(self.game.figures(of_real, of_fake, loss.detach()))
        uniform = partial(self._uniform_rows, noise)
        play = Play(self.scored, real, fake, *outputs, uniform=uniform, own=self.share, passed=passed)
        for penalty in self.penalties:
            if penalty.has_terms:
                terms = everywhere(penalty.terms(play), self.ranks)
                loss = penalty.applied(loss, terms)
                found[penalty.figure] = terms.detach().mean() + found.get(penalty.figure, 0.0)
        skipped = self.critic_step.take(loss / self.ranks.size)
        for penalty in self.penalties:
            penalty.project_(self.critic)
        self._update_game(skipped, *(rows.detach() for rows in outputs))
        return {**found, "critic_loss": loss.detach(), f"critic_{SKIPPED}": skipped}

    def _generator_step(self, batches: Iterator[Batch], noise: Noise) -> tuple[Tensor, Tensor]:
        """The loss, and whether the step was skipped."""
        score = self.scored.features if self.game.on_features else self.scored
        with as_it_is(self.critic):
            fake = everywhere(score(self._draw(noise)), self.ranks)
            real = fake.detach()
            if self.game.reads_real:
                with torch.no_grad(), self._still():
                    real = everywhere(score(next(batches).images.to(self.dtype)), self.ranks)
            loss = self.game.generator_loss(real, fake)
            skipped = self._take_generator(loss / self.ranks.size)
        return loss.detach(), skipped

    def _take_generator(self, loss: Tensor) -> Tensor:
        """The generator's step from this rank's part of a loss; 1 if it was skipped."""
        return self.generator_step.take(loss, None if self.low is None else self.low.collect_gradients)

    def _copy_weights(self) -> None:
        """What a step begins with: the generator's weights in low precision, which all its draws have."""
        if self.low is not None:
            self.low.copy_weights()

    def _draw(self, noise: Noise) -> Tensor:
        """This rank's share of the next generated images, in the critic's dtype."""
        z = noise.draw(self.prior, self.batch_size)[self.share]
        if self.low is None:
            return run_generator(self.generator, z, recompute=self.recompute_generator).to(self.dtype)
        return self.low.images(z, recompute=self.recompute_generator, copied=True).to(self.dtype)

    def _both(self, real: Tensor, fake: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
        """The critic's outputs for real and for generated images of all ranks, [N, F] each; and `Play.passed`."""
        passed = None
        if self.at_real:  # in a pass of their own: its derivative is not to go through the generated images
            leaf = real.detach().requires_grad_()
            of_real = self.scored(leaf)
            with self._still():
                of_fake = self.scored(fake)
            passed = leaf, of_real
        elif self.critic.per_image:
            of_real, of_fake = self.scored(torch.cat([real, fake])).split(len(real))
        else:
            of_real = self.scored(real)
            with self._still():
                of_fake = self.scored(fake)
        if self.ranks.size > 1:
            of_real, of_fake = everywhere(torch.cat([of_real, of_fake], dim=1), self.ranks).chunk(2, dim=1)
        return (of_real, of_fake), passed

    @contextlib.contextmanager
    def _still(self) -> Iterator[None]:
        """Inside, a second pass has the power iterations of the first, so that one critic scores both. BatchNorm, which
        takes each minibatch's own statistics, stays as it is."""
        self.critic.train(self.critic.has_batchnorm)
        try:
            yield
        finally:
            self.critic.train()

    def _labels(self, indices: Tensor) -> Tensor:
        """Class numbers of these real images on all ranks, [N]."""
        assert self.labels is not None
        labels, _ = self.ranks.gather(self.labels[indices.to(self.device)])
        return labels

    def _uniform_rows(self, noise: Noise, columns: int) -> Tensor:
        """This rank's rows of the next numbers [N, columns], uniform in [0, 1)."""
        prior = self._uniform.setdefault(columns, Uniform(columns))  # one object: `DrawnAhead` knows it by that
        return (noise.draw(prior, self.batch_size)[self.share].to(self.dtype) + 1) / 2

    @torch.no_grad()
    def _update_game(self, skipped: Tensor, real: Tensor, fake: Tensor) -> None:
        """What the game keeps stays as it was after a step that was skipped, as weights do."""
        before = [kept.clone() for kept in self.game.state_dict().values()]
        self.game.update_(real, fake)
        for old, kept in zip(before, self.game.state_dict().values(), strict=True):
            kept.copy_(torch.where(skipped > 0, old, kept))

    def sampler(self) -> Sampler:
        """See `Method.sampler`."""
        return Sampler(self.prior, self.generator, self.batch_statistics)

    def state_dict(self) -> dict[str, Tensor]:
        """The game's state, the loss scalings', and the generator's steps where the critic's number depends on them."""
        state = {_GAME + name: kept for name, kept in self.game.state_dict().items()}
        for network, update in self._updates().items():
            state |= {f"{network}.{name}": kept for name, kept in update.state_dict().items()}
        return {**state, _STEPS: torch.tensor(self.steps)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`; ValueError if the state is another method's."""
        self.steps = int(state[_STEPS])
        self.game.load_state_dict(part_of(state, _GAME))
        for network, update in self._updates().items():
            update.load_state_dict(part_of(state, f"{network}."))

    def _updates(self) -> dict[str, GradientStep]:
        return {"generator": self.generator_step, "critic": self.critic_step}


def _check_critic(critic: Critic, game: Game, penalties: Sequence[Penalty], ranks: Ranks) -> None:
    if game.outputs not in (None, critic.spec.outputs):
        raise InputError("critic", f"gives {critic.spec.outputs} outputs, and the game takes {game.outputs}")
    twice = next((type(penalty).__name__ for penalty in penalties if penalty.double_backward), None)
    if twice is not None and not critic.per_image:
        raise InputError("critic", f"mixes the images of a minibatch, and {twice} needs each one's own derivative")
    if critic.discrimination is not None and ranks.size > 1:
        raise InputError(
            "minibatch_discrimination", "needs the whole minibatch in one process; leave it out, or start one process"
        )


@contextlib.contextmanager
def as_it_is(module: nn.Module) -> Iterator[None]:
    """Inside, no gradient of the module's weights is computed."""
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    for weight in trained:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)


def _means(found: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Over the critic's steps; a skipped one is enough for 1."""
    names = [name for name in ("critic_loss", PENALTY, SCALE) if name in found[0]]
    means = {name: torch.stack([one[name] for one in found]).mean() for name in names}
    skipped = torch.stack([one[f"critic_{SKIPPED}"] for one in found]).amax()
    return {**means, f"critic_{SKIPPED}": skipped}
