"""The row of docs/photographs.md."""

from __future__ import annotations

from bench.pages.regions import Results, Writer
from bench.rows import table


def photographs(results: Results) -> str:
    headings = ("flags", "pictures", "pixels", "matched features", "steps", "whole command, minutes")
    keys = ("flags", "pictures", "image_size", "extractor", "steps")
    lines = [[*(row[key] or "none" for key in keys), f"{row['seconds'] / 60:.1f}"] for row in results.rows]
    return f"{table(headings, lines)}\n\n{results.conditions('nvidia-dali-cuda130')}"


TABLES: dict[str, tuple[str, Writer]] = {"photographs": ("photographs", photographs)}
"""Region → the kind of rows that it shows, and who writes it."""
