"""What the trainer knows of a method: the trainer owns time, a method owns gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from engine.generation.priors import Noise
from engine.generation.sampling import Sampler
from pipelines import Batch

SQUARED = "_squared"
SKIPPED = "skipped"


class Method(Protocol):
    """Who learns what from whom in one training step.

    Attributes:
        modules: everything with weights, by name ("generator", …): saved, moved, and averaged where that is asked for.
        optimizers: by the name of the module that they train.
        reads: what a step wants of the data set: "nothing", or minibatches of real "images".
        capturable: whether all steps do the same on the device, and take equally many minibatches of real images, so
            that a CUDA graph of one of them does them all. False for a method whose critic learns longer in some
            steps than in others, say.
    """

    modules: nn.ModuleDict
    optimizers: dict[str, torch.optim.Optimizer]
    reads: Literal["nothing", "images"]
    capturable: bool

    def step(self, batches: Iterator[Batch] | None, noise: Noise) -> Mapping[str, Tensor]:
        """One training step.

        `batches` is None for a method that reads nothing. For one that reads images every `next(batches)` is this
        rank's share of the next minibatch of real images: `ranks.share(batch_size)` of its rows, always that many, as
        float32 [n, 3, H, W] in [-1, 1] on the device (and their indices, int64 [n] on the CPU, which a step that may be
        captured has no use for). A step may ask several times. What it got it must not change in place, nor look at
        in a later step: others may lie there then.

        Returns scalars on the device for the log, "loss" among them. Never waits for the device. The root of a scalar
        whose name ends in `SQUARED` is logged, under the name without it.
        `SKIPPED` is 1 where a gradient was not finite and the step left weights as they were, else 0: the trainer
        counts such steps. A method that returns none has none. Of another network that learns, both carry its name,
        as in "critic_loss" and "critic_skipped"; its loss is watched as well.

        A step that may be captured in a CUDA graph has fixed shapes, takes its random numbers from `noise`, and changes
        what it keeps in place: a replay repeats what the device did, with the numbers that Python had at the capture.
        """
        ...

    def sampler(self) -> Sampler:
        """How images are drawn from what has been learnt so far."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What the next step depends on besides modules and optimizers."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`; ValueError if the state is another method's."""
        ...
