"""The averagers' rules that the fused kernels of every backend know: the one table of what they keep and minimise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Form = Literal["direction", "squares", "mean squares"]


@dataclass(frozen=True)
class Rule:
    """One way from the difference Δ of a minibatch to the direction v; the maths is `direction` of every backend.

    Attributes:
        state: names of the tensors [2, D] that the rule reads and changes, of the operator's `v`, `m` and `u`.
        loss: form of the loss, see `kernels.matching_loss`.
    """

    state: tuple[str, ...]
    loss: Form

    @property
    def counts(self) -> bool:
        """Whether steps are counted; a rule without state has none to count."""
        return bool(self.state)


RULES = {
    "ama": Rule(("v", "m", "u"), "direction"),
    "ama_uncorrected": Rule(("v", "m", "u"), "direction"),
    "ma": Rule(("v",), "direction"),
    "ma_moments": Rule(("v",), "mean squares"),
    "none": Rule((), "squares"),
}
