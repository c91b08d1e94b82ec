"""Learning rates: a run's own, times a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda passed: 1.0,
    "linear": lambda passed: 1.0 - passed,
    "cosine": lambda passed: (1.0 + math.cos(math.pi * passed)) / 2,
}
"""Share of the rate that is left when this part of the steps after the warm-up has passed."""


@dataclass(frozen=True, kw_only=True)
class RateSchedule:
    """What a step's rate is of the run's: with k steps taken before it, of T, and a warm-up of W,

        k / W  if k < W,  else  f + (1 − f) · decay((k − W) / (T − W)).

    Attributes:
        decay: of `DECAYS`.
        warmup: W; the first of these steps has the rate 0.
        final: f, what is left after the last step.
        steps: T.
    """

    decay: str = "constant"
    warmup: int = 0
    final: float = 0.0
    steps: int = 1

    def share(self, step: int) -> float:
        """Of the run's rate, for the step that comes after `step` steps."""
        if step < self.warmup:
            return step / self.warmup
        passed = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.final + (1 - self.final) * DECAYS[self.decay](min(passed, 1.0))

    @property
    def varies(self) -> bool:
        """Whether not all steps have the same rate."""
        return self.decay != "constant" or self.warmup > 0


CONSTANT = RateSchedule()


class Rates:
    """The rates of a run's optimizers.

    What varies lies in a tensor that the optimizer reads, on its device, and changes in place: the host waits for
    nothing, and the replay of a graph sees the new number. On a CPU it has float64, the precision of Python's.

    Args:
        optimizers: by name; as they were made their rate is the run's own.
        schedule: what a step's rate is of that.

    Attributes:
        full: the run's own by name, in full: an optimizer may keep float32. `scale` changes them.
    """

    def __init__(self, optimizers: Mapping[str, torch.optim.Optimizer], schedule: RateSchedule = CONSTANT):
        self.optimizers, self.schedule = optimizers, schedule
        self.full = {name: float(optimizer.defaults["lr"]) for name, optimizer in optimizers.items()}
        self._given = dict(self.full)
        for optimizer in optimizers.values() if schedule.varies else ():
            for group in optimizer.param_groups:
                if not isinstance(group["lr"], Tensor):
                    group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)

    def of(self, name: str, step: int) -> float:
        """The rate of the optimizer `name` for the step that comes after `step` steps."""
        return self.full[name] * self.schedule.share(step)

    def scale(self, factor: float) -> None:
        """Multiply the rates of all further steps."""
        self.full = {name: rate * factor for name, rate in self.full.items()}

    def give(self, step: int) -> bool:
        """Give every optimizer its rate; whether one is a number of Python's that changed, which no graph sees."""
        changed = False
        for name, optimizer in self.optimizers.items():
            rate = self.of(name, step)
            if self._given.get(name) == rate:
                continue
            self._given[name] = rate
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"], changed = rate, True
        return changed

    def state_dict(self) -> dict[str, Tensor]:
        """The rates in full, float64."""
        return {name: torch.tensor(rate, dtype=torch.float64) for name, rate in self.full.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`; the optimizers get them by the next `give`."""
        self.full = {name: float(state[name]) for name in self.full}
        self._given.clear()
