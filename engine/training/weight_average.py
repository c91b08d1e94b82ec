"""Moving averages of a generator's weights, one of which is sampled from."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

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


class WeightAverages:
    """Averages of one generator's weights with several decays, taken at once; none is possible.

    Args:
        generator: whose weights are averaged.
        decays: each in (0, 1), no two alike.
        sampled: the one of them that is sampled from; by default the first.
    """

    def __init__(self, generator: Generator, decays: Sequence[float], sampled: float | None = None):
        self.averages = {decay: WeightAverage(generator, decay) for decay in decays}
        self.sampled = decays[0] if sampled is None and decays else sampled

    @property
    def generator(self) -> Generator | None:
        """The average that is sampled from; None if there is none."""
        return None if self.sampled is None else self.averages[self.sampled].generator

    @property
    def updates(self) -> int:
        """How often weights were taken in."""
        return max((average.updates for average in self.averages.values()), default=0)

    def take_in(self, generator: Generator) -> None:
        """`WeightAverage.take_in` of all."""
        for average in self.averages.values():
            average.take_in(generator)

    def count(self) -> None:
        """Count what `take_in` took, in Python."""
        for average in self.averages.values():
            average.updates += 1

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Of a checkpoint: "ema" where there is one, as version 0.1 has it; "ema.0.99", "ema.0.999", … for several."""
        return {self._part(decay): average.state_dict() for decay, average in self.averages.items()}

    def load_parts(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The inverse of `parts`, which may have others besides; KeyError if one is missing."""
        for decay, average in self.averages.items():
            average.load_state_dict(parts[self._part(decay)])

    def _part(self, decay: float) -> str:
        return "ema" if len(self.averages) == 1 else f"ema.{decay}"
