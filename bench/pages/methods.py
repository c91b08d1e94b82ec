"""The rows of docs/methods.md and docs/games.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.pages.regions import Results, Writer
from bench.rows import table

_HEADINGS = (
    "flags",
    "steps × minibatch",
    "minutes",
    "CPU minutes",
    "read with confidence",
    "shares of the ten digits",
    "variety within a digit",
    "distinct neighbours",
    "colour on ink",
    "kernel distance",
)


def _cell(row: Mapping[str, Any], field: str, shown: str, factor: float = 1.0) -> str:
    """A number as the format `shown` says; a dash where it was not measured."""
    value = row.get(field)
    return "–" if value is None else format(value * factor, shown)


def methods(results: Results) -> str:
    lines = [
        [
            f"`{row['flags']}`" if row["flags"] else "none",
            f"{row['steps']} × {row['minibatch']}",
            f"{row['seconds'] / 60:.1f}",
            _cell(row, "cpu_seconds", ".1f", 1 / 60),
            f"{row['confident']:.1%}",
            f"{row['least_share']:.1%}–{row['largest_share']:.1%}",
            f"{row['least_variety']:.2f}–{row['largest_variety']:.2f}",
            _cell(row, "distinct", ".0f"),
            f"{row['chroma']:.1f}",
            f"{row['kernel_distance'] * 1000:.2f}·10⁻³",
        ]
        for row in results.rows
    ]
    return f"{table(_HEADINGS, lines)}\n\n{results.conditions()}"


TABLES: dict[str, tuple[str, Writer]] = {
    "methods": ("methods_digits", methods),
    "methods-codes": ("codes_digits", methods),
    "methods-imagenet": ("methods_imagenet", methods),
    "methods-critics": ("critics_digits", methods),
}
"""Region → the kind of rows that it shows, and who writes it."""
