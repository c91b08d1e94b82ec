"""The moving average of a generator's weights that is sampled from."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from engine.generation.networks import Generator

_COUNT, _PREFIX = "n_averaged", "module."


class WeightAverage:
    """ema ← decay · ema + (1 − decay) · weights, from the first weights on; BatchNorm's statistics as well.

    Does what `torch.optim.swa_utils.AveragedModel` does, bit for bit and with the same state, but nothing waits for the
    device: the count of updates is Python's. Whole numbers (of BatchNorm's batches) are copied.

    Args:
        generator: whose weights are averaged.
        decay: in (0, 1).

    Attributes:
        updates: how often weights were taken in.
    """

    def __init__(self, generator: Generator, decay: float):
        self.generator, self.decay, self.updates = copy.deepcopy(generator), decay, 0
        own = list(self.generator.state_dict(keep_vars=True).values())
        self._floats = [tensor.detach() for tensor in own if tensor.is_floating_point()]
        self._counts = [tensor for tensor in own if not tensor.is_floating_point()]

    def update(self, generator: Generator) -> None:
        """Take the weights of `generator` in, and count it; they must be on the same device."""
        self.take_in(generator)
        self.updates += 1

    @torch.no_grad()
    def take_in(self, generator: Generator) -> None:
        """`update` without the count: what the device does, which is all of it that the replay of a graph repeats.

        The first one copies, so it must not be what a graph captures.
        """
        new = [tensor.detach() for tensor in generator.state_dict(keep_vars=True).values()]
        floats = [tensor for tensor in new if tensor.is_floating_point()]
        if self.updates == 0:
            torch._foreach_copy_(self._floats, floats)
        else:
            torch._foreach_lerp_(self._floats, floats, 1 - self.decay)
        torch._foreach_copy_(self._counts, [tensor for tensor in new if not tensor.is_floating_point()])

    def state_dict(self) -> dict[str, Tensor]:
        """The average and how often it was updated, under `AveragedModel`'s names."""
        weights = {_PREFIX + name: tensor for name, tensor in self.generator.state_dict().items()}
        return {_COUNT: torch.tensor(self.updates), **weights}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        self.updates = int(state[_COUNT])
        weights = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items() if name != _COUNT}
        self.generator.load_state_dict(weights)
