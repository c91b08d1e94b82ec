"""The rows of docs/methods.md and docs/games.md."""

from __future__ import annotations

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


def methods(results: Results) -> str:
    lines = [
        [
            f"`{row['flags']}`" if row["flags"] else "none",
            f"{row['steps']} × {row['minibatch']}",
            f"{row['seconds'] / 60:.1f}",
            f"{row['cpu_seconds'] / 60:.1f}",
            f"{row['confident']:.1%}",
            f"{row['least_share']:.1%}–{row['largest_share']:.1%}",
            f"{row['least_variety']:.2f}–{row['largest_variety']:.2f}",
            f"{row['distinct']}",
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
