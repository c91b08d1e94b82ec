"""The matched distance beside what the evaluating networks found: charts, a table, and a warning where they part."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from engine.reporting.charts import Chart, line_chart, number
from engine.reporting.numbers import Entries, distance_name, is_number
from engine.training.held_out import IN_ORDER, WINDOW, Judgement, Judgements

_DISTANCES = ("kernel_distance", "frechet_distance")
_MATCHED = {"difference_norm": "‖Δ‖, matched", "loss": "loss, matched"}


@dataclass(frozen=True)
class Comparison:
    """All judges of a run side by side.

    Attributes:
        warning: one sentence if the matched distance ever fell while every held-out judge's rose; else "".
        rule: what falling and rising mean there.
        charts: of the matched distance, and of every judge's kernel distance.
        columns, rows: of a table with one row for each evaluation.
    """

    warning: str
    rule: str
    charts: list[Chart]
    columns: list[str]
    rows: list[list[str]]


def judges_compared(metrics: Entries) -> Comparison | None:
    """The judges of the last evaluation; None for a single one that never parted from the matched distance."""
    judgements = Judgements(metrics)
    found = judgements.found
    if not found or (len(found[-1].networks) < 2 and not judgements.parted):
        return None
    networks = {_label(network): network for network in found[-1].networks}
    matched = _MATCHED[judgements.matched]
    lines = {matched: [(one.step, one.matched) for one in found]}
    columns, cells = ["step", matched], [[number(one.step), _shown(one.matched)] for one in found]
    for label, network in networks.items():
        for distance in _DISTANCES:
            title = f"{distance_name(distance, bool(network.get('is_inception')))}, {label}"
            if network.get("is_matched"):
                title += " (matched)"
            columns.append(title)
            values = [_of(one, label).get(distance) for one in found]
            for row, value in zip(cells, values, strict=True):
                row.append(_shown(value))
            if distance == _DISTANCES[0]:
                lines[title] = [(one.step, value) for one, value in zip(found, values, strict=True)]
    charts = [
        line_chart(title[0].upper() + title[1:], {"": [(step, value) for step, value in line if is_number(value)]})
        for title, line in lines.items()
    ]
    drawn = [chart for chart in charts if chart is not None] if len(found) > 1 else []
    return Comparison(_warning(judgements), _rule(judgements.matched), drawn, columns, cells)


def _label(network: dict[str, Any]) -> str:
    return str(network.get("network", "unknown"))


def _of(judgement: Judgement, label: str) -> dict[str, Any]:
    """What the network of this name found; empty if it was not asked."""
    return next((network for network in judgement.networks if _label(network) == label), {})


def _shown(value: object) -> str:
    return f"{value:#.4g}" if is_number(value) else "–"


def _warning(judgements: Judgements) -> str:
    if not judgements.parted:
        return ""
    order = {one.step: index for index, one in enumerate(judgements.found)}
    # Evaluations that follow one another have the same difference to their place in the list.
    runs = itertools.groupby(enumerate(judgements.parted), lambda pair: order[pair[1]] - pair[0])
    spans = [[step for _, step in run] for _, run in runs]
    when = ", ".join(
        number(span[0]) if len(span) == 1 else f"{number(span[0])} to {number(span[-1])}" for span in spans
    )
    several = "s" * (len(judgements.parted) > 1)
    last = ", the last one" + " among them" * bool(several)
    return (
        "The samples came closer to the real images by what was matched, and farther from them by every network that "
        f"was not matched: at the evaluation{several} of step{several} {when}"
        f"{last if judgements.parted[-1] == judgements.found[-1].step else ''}."
    )


def _rule(matched: str) -> str:
    name = "‖Δ‖, the distance of the moments to the target," if matched == "difference_norm" else "the training loss"
    pairs = WINDOW * (WINDOW - 1) // 2
    return (
        f"What is matched is {name} averaged over the lines logged since the evaluation before. A warning needs "
        f"{WINDOW} evaluations in a row: of their {pairs} pairs, at least {IN_ORDER} with the matched distance smaller "
        "in the later one, and by every judge that is not matched at least as many with the kernel distance larger."
    )
