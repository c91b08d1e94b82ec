"""The rows of docs/methods.md and docs/games.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.pages.regions import Results, Writer
from bench.rows import newest_file, table

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


_KINDS = {
    "methods": "methods_digits",
    "methods-codes": "codes_digits",
    "methods-imagenet": "methods_imagenet",
    "methods-critics": "critics_digits",
}
_RESULTS = Path(__file__).parents[1] / "results"
TABLES: dict[str, tuple[str, Writer]] = {
    region: (kind, methods) for region, kind in _KINDS.items() if newest_file(_RESULTS, kind) is not None
}
"""Region → the kind of rows that it shows, and who writes it; those that were measured."""
