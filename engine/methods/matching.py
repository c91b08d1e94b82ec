"""Matching: a generator learns to draw images whose features are like those of the real ones. No critic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from engine.generation.batch_norm import share_batches
from engine.generation.low_precision import LowPrecision
from engine.generation.networks import Generator, run_generator
from engine.generation.priors import Noise, Prior
from engine.generation.sampling import Sampler
from engine.methods.gradient_step import GradientStep
from engine.methods.protocols import SKIPPED
from engine.representation.protocols import Objective
from engine.training.ranks import ALONE, Ranks
from pipelines import Batch


class Matching:
    """z → generator → images → objective → ∂L/∂θ → optimizer (`engine.methods.protocols.Method`).

    With `MomentMatching` as the objective this is GFMN (dos Santos et al. 2019, algorithm 1); with `OnFeatures` the
    loss is any differentiable distance of features.

    Args:
        generator: on the device, in training mode.
        prior: the law of z.
        objective: the loss of generated images.
        batch_size: N, over all ranks.
        lr, betas, optimizer, weight_decay, clip_grad: of the generator; see `GradientStep`.
        amp_dtype: low precision of the generator's arithmetic, None for its own.
        recompute_generator: compute the generator's activations again in backward instead of keeping them.
        batch_statistics: see `Sampler`.
        ranks: the processes that share the minibatch.
        global_batches: whether BatchNorm's batches are those of all ranks, or each its own.
    """

    reads: Literal["nothing", "images"] = "nothing"
    capturable = True

    def __init__(
        self,
        generator: Generator,
        prior: Prior,
        objective: Objective,
        *,
        batch_size: int,
        lr: float,
        betas: tuple[float, float] = (0.5, 0.999),
        optimizer: str = "adam",
        weight_decay: float | None = None,
        clip_grad: float | None = None,
        amp_dtype: torch.dtype | None = None,
        recompute_generator: bool = False,
        batch_statistics: bool = False,
        ranks: Ranks = ALONE,
        global_batches: bool = True,
    ):
        self.generator, self.prior, self.objective = generator, prior, objective
        self.batch_size, self.amp_dtype = batch_size, amp_dtype
        self.recompute_generator, self.batch_statistics = recompute_generator, batch_statistics
        self.modules, self.ranks = nn.ModuleDict({"generator": generator}), ranks
        if ranks.size > 1 and global_batches:
            share_batches(generator, ranks)
        self.device = next(generator.parameters()).device
        self.low = None if amp_dtype is None else LowPrecision(generator, amp_dtype)
        self.gradient_step = GradientStep(
            generator,
            lr=lr,
            betas=betas,
            optimizer=optimizer,
            weight_decay=weight_decay,
            clip_grad=clip_grad,
            scaled=amp_dtype is torch.float16,
            ranks=ranks,
        )
        self.optimizers: dict[str, torch.optim.Optimizer] = {"generator": self.gradient_step.optimizer}

    def step(self, batches: Iterator[Batch] | None, noise: Noise) -> Mapping[str, Tensor]:
        """See `Method.step`."""
        z = noise.draw(self.prior, self.batch_size)
        if self.ranks.size > 1:  # one stream, of which each rank has its rows
            z = z[self.ranks.share(self.batch_size)]
        recompute = self.recompute_generator
        if self.low is None:
            images = run_generator(self.generator, z, recompute=recompute)
        else:
            images = self.low.images(z, recompute=recompute)
        loss = self.objective(images)
        skipped = self.gradient_step.take(loss, None if self.low is None else self.low.collect_gradients)
        return {"loss": loss.detach(), **self.objective.scalars(), SKIPPED: skipped}

    def sampler(self) -> Sampler:
        """See `Method.sampler`."""
        return Sampler(self.prior, self.generator, self.batch_statistics)

    def state_dict(self) -> dict[str, Tensor]:
        """The objective's state, and the loss scaling's where there is one."""
        return {**self.objective.state_dict(), **self.gradient_step.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.objective.load_state_dict(self.gradient_step.load_state_dict(state))
