"""Losses that became NaN or infinite, and steps skipped for such a gradient: of every network, found on the device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import ModuleType

import torch
from torch import Tensor

from engine.methods.protocols import SKIPPED
from engine.training.skipped import SkippedSteps

GENERATOR = "generator"
_NEVER = torch.iinfo(torch.int64).max


class Divergence:
    """Watches the scalars "loss" and `SKIPPED` of the generator, and those of other networks: "critic_loss", ….

    A network that took no step has no `SKIPPED`, and then its loss is not looked at.

    All that changes in a step changes in place, and the host waits for nothing, so that a CUDA graph can hold it.

    Args:
        networks: all that have an optimizer.
        device: of the steps.
        most_skipped: see `SkippedSteps`.
        kernels: the backend that watches losses.

    Attributes:
        skipped: steps that were skipped, by network.
        steps, first_bad: the device's own counts of steps, and the first whose loss was not finite; by network.
    """

    def __init__(self, networks: Iterable[str], device: torch.device, most_skipped: int, kernels: ModuleType):
        self.kernels = kernels
        names = sorted(networks, key=lambda name: name == GENERATOR)  # which learns after the others
        self.skipped = {name: SkippedSteps(device, most_skipped) for name in names}
        self.steps = {name: torch.tensor(0, device=device) for name in names}
        self.first_bad = {name: torch.tensor(_NEVER, device=device) for name in names}

    @torch.no_grad()
    def take_in(self, scalars: dict[str, Tensor]) -> None:
        """One more step; takes what was skipped out of `scalars`."""
        for name in self.skipped:
            prefix = _prefix(name)
            if (skipped := scalars.pop(prefix + SKIPPED, None)) is None:  # it took no step
                self.steps[name].add_(1)
                continue
            self.skipped[name].take_in(skipped)
            if (loss := scalars.get(f"{prefix}loss")) is not None:
                self.kernels.watch(loss, self.steps[name], self.first_bad[name])

    def found(self, step: int) -> tuple[str, str, int] | None:
        """The network that diverged first, what of it, and when; None if none did. Waits for the device.

        Args:
            step: the last that was taken.
        """
        first = {name: int(bad) for name, bad in self.first_bad.items()}
        name = min(first, key=lambda name: first[name])
        alone = len(first) == 1
        if first[name] != _NEVER:
            return name, "the loss" if alone else possessive(name, "loss"), first[name]
        for name, skipped in self.skipped.items():
            if count := skipped.too_many():
                whose = "the gradient" if alone else possessive(name, "gradient")
                return name, f"{whose}, {count} times in a row,", step
        return None

    def totals(self) -> dict[str, int]:
        """Of networks that skipped steps, how many, for the log: "skipped_steps", "critic_skipped_steps", …."""
        counts = {f"{_prefix(name)}{SKIPPED}_steps": int(skipped.total) for name, skipped in self.skipped.items()}
        return {name: count for name, count in counts.items() if count}

    def state_dict(self) -> dict[str, Tensor]:
        """The counts that the next step depends on."""
        return {
            _prefix(name, ".") + key: count
            for name, skipped in self.skipped.items()
            for key, count in skipped.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor], step: int) -> None:
        """The inverse of `state_dict` after `step` steps; an empty one, of older versions, has no counts."""
        for name, skipped in self.skipped.items():
            own = {key: state[_prefix(name, ".") + key] for key in skipped.state_dict()} if state else {}
            skipped.load_state_dict(own or skipped.state_dict())
            self.steps[name].fill_(step)


def possessive(network: str, part: str) -> str:
    """Such as "the critic's loss" and "the codes' gradient"; the codes of the codes are "the codes"."""
    if part == network:
        return f"the {network}"
    return f"the {network}' {part}" if network.endswith("s") else f"the {network}'s {part}"


def _prefix(name: str, mark: str = "_") -> str:
    return "" if name == GENERATOR else name + mark
