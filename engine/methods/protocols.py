"""What the trainer knows of a method: the trainer owns time, a method owns gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from engine.generation.priors import Noise
from engine.generation.sampling import Sampler

SQUARED = "_squared"
SKIPPED = "skipped"


class Method(Protocol):
    """Who learns what from whom in one training step.

    Attributes:
        modules: everything with weights, by name ("generator", …): saved, moved, and averaged where that is asked for.
        optimizers: by the name of the module that they train.
        reads: what a step wants of the data loader: "nothing", or a batch of real "images".
    """

    modules: nn.ModuleDict
    optimizers: dict[str, torch.optim.Optimizer]
    reads: Literal["nothing", "images"]

    def step(self, batch: Any, noise: Noise) -> Mapping[str, Tensor]:
        """One training step; `batch` is None for a method that reads nothing.

        Returns scalars on the device for the log, "loss" among them. Never waits for the device. The root of a scalar
        whose name ends in `SQUARED` is logged, under the name without it.
        `SKIPPED` is 1 where a gradient was not finite and the step left weights as they were, else 0: the trainer
        counts such steps. A method that returns none has none.

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
