"""Whether the distance that is matched and the judges that are held out part: the one falls while the others rise.

Then the generator learns what only the matched network sees. All is read off the lines of `metrics.jsonl`, so a resumed
run and a report find what training found.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WINDOW = 5
"""Evaluations that decide."""
IN_ORDER = 9
"""Of the 10 pairs of `WINDOW` evaluations, how many have to be in order. Of numbers without a trend, 5 of the 120
orders have so many: 4%, and 0.2% for a fall and a rise that have nothing to do with each other."""
MATCHED = ("difference_norm", "loss")
"""What is taken for the matched distance, the first that is logged. A loss with AMA is a product with a direction that
still grows, and no distance; ‖Δ‖ is."""


@dataclass(frozen=True)
class Judgement:
    """One evaluation, beside what was matched meanwhile.

    Attributes:
        step: after which it was.
        matched: the matched distance, averaged over the lines logged since the evaluation before; None without any.
        networks: what each network found, as in `metrics.jsonl`, the first one first.
    """

    step: int
    matched: float | None
    networks: list[dict[str, Any]]

    @property
    def held_out(self) -> dict[str, float | None]:
        """The kernel distance by each network that is not matched."""
        kept = (found for found in self.networks if not found.get("is_matched"))
        return {str(found.get("network")): _number(found.get("kernel_distance")) for found in kept}


class Judgements:
    """The evaluations of a run, line by line of its log.

    Args:
        entries: the lines so far.

    Attributes:
        found: the evaluations among them.
        matched: which of `MATCHED` is averaged.
        parted: the steps of evaluations at which the matched distance and the judges part.
    """

    def __init__(self, entries: Iterable[Mapping[str, Any]] = ()):
        self.found: list[Judgement] = []
        self.matched = MATCHED[-1]
        self.parted: list[int] = []
        self._since: list[float] = []
        for entry in entries:
            self.add(entry)

    def add(self, entry: Mapping[str, Any]) -> str | None:
        """One more line; returns a warning if they part at its evaluation and did not at the one before."""
        self.matched = next((name for name in MATCHED if name in entry), self.matched)
        if (value := _number(entry.get(self.matched))) is not None:
            self._since.append(value)
        evaluation = entry.get("evaluation")
        if not isinstance(evaluation, dict):
            return None
        mean = math.fsum(self._since) / len(self._since) if self._since else None
        before = self.found[-1].step if self.found else None
        self._since = []
        self.found.append(Judgement(entry["step"], mean, judged(evaluation)))
        if not parts(self.found[-WINDOW:]):
            return None
        known = bool(self.parted) and self.parted[-1] == before
        self.parted.append(entry["step"])
        return None if known else self._warning()

    def _warning(self) -> str:
        names = ", ".join(self.found[-1].held_out)
        what = "‖Δ‖" if self.matched == MATCHED[0] else "the loss"
        return (
            f"over the last {WINDOW} evaluations {what} falls and the kernel distance by {names} rises: the samples "
            "come closer to the real images by the matched network only"
        )


def judged(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each network found in one evaluation of `metrics.jsonl`: the first one, and those that are its "others"."""
    others = evaluation.get("others")
    first = {key: value for key, value in evaluation.items() if key != "others"}
    return [first, *(other for other in (others if isinstance(others, list) else []) if isinstance(other, dict))]


def parts(last: Sequence[Judgement]) -> bool:
    """Whether over these `WINDOW` evaluations the matched distance falls, and every held-out network's rises.

    With fewer evaluations, other networks in one of them, or a number that is missing, they do not.
    """
    networks = last[-1].held_out.keys() if last else ()
    if len(last) < WINDOW or not networks or any(one.held_out.keys() != networks for one in last):
        return False
    matched = [one.matched for one in last]
    return falls(matched) and all(rises([one.held_out[name] for one in last]) for name in networks)


def rises(values: Sequence[float | None]) -> bool:
    """Whether in at least `IN_ORDER` pairs of `values` the later one is larger (Kendall's τ ≥ 0.8 of five)."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return False
    return sum(earlier < later for earlier, later in itertools.combinations(known, 2)) >= IN_ORDER


def falls(values: Sequence[float | None]) -> bool:
    """Whether `values` with the other sign rise."""
    return rises([None if value is None else -value for value in values])


def _number(value: object) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None  # type: ignore[arg-type]
