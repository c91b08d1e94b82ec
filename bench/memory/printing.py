"""The tables and the plot of bench.memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.memory.rows import GIB, CapacityRow, MemoryRow
from bench.rows import save_figure, table


def capacity_table(rows: Sequence[CapacityRow]) -> str:
    """The largest minibatches: a line for each problem and variant, a column for each budget."""
    budgets = list(dict.fromkeys(row.budget for row in rows))
    lines: dict[tuple[str, str], list[CapacityRow]] = {}
    for row in rows:
        problem = f"{row.extractor} at {row.image_size}, {row.generator}"
        lines.setdefault((problem, row.variant), []).append(row)
    return table(
        ("largest minibatch (modelled)", "variant", *(f"{budget / GIB:g} GiB" for budget in budgets)),
        [[*names, *(row.minibatch for row in found)] for names, found in lines.items()],
    )


def plot(path: Path, rows: Sequence[MemoryRow]) -> None:
    """Draw peak against minibatch: lines are modelled, dots measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(row.variant for row in rows):
        points = [row for row in rows if row.variant == name]
        (line,) = axes.plot([row.minibatch for row in points], [row.modelled / GIB for row in points], label=name)
        measured = [(row.minibatch, row.measured / GIB) for row in points if row.measured is not None]
        if measured:
            axes.plot(*zip(*measured, strict=True), "o", color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("minibatch, images")
    axes.set_ylabel("peak beyond the weights, GiB (lines: modelled, dots: measured)")
    axes.set_title(f"{rows[0].extractor} at {rows[0].image_size}×{rows[0].image_size}, {rows[0].generator} generator")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save_figure(path, figure, dpi=150)
