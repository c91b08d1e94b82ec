"""The tables of docs/methods.md and docs/games.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.pages.performance import GIB
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


def pictures(results: Results) -> str:
    """What each run drew."""
    lines = [
        [f"`{row['name']}`", f"![Digits drawn by {row['name']}](methods/{row['name']}.png)"] for row in results.rows
    ]
    return table(("run", "its first samples"), lines)


def steps(results: Results) -> str:
    """Seconds a step, beside gfmn's."""
    lines = [
        [row["name"], *(f"{row[key]:.2f}" for key in ("p20", "p50", "p80")), f"{row['relative']:.2f}"]
        for row in results.rows
    ]
    one = results.rows[0]
    return (
        f"{table(('method', 'step p20, s', 'p50', 'p80', '/ gfmn'), lines)}\n\n"
        f"{one['extractor']} at {one['image_size']}×{one['image_size']}, minibatch {one['minibatch']}, chunks of "
        f"{one['chunk']}.\n\n{results.conditions()}"
    )


def memory(results: Results) -> str:
    """What the allocator holds, what the model says, and what the whole process takes."""
    lines = [
        [
            row["variant"],
            f"{row['measured'] / GIB:.2f}",
            f"{row['modelled'] / row['measured']:.3f}",
            f"{(row['resident'] - row['baseline']) / GIB:.2f}",
        ]
        for row in results.rows
    ]
    headings = ("method", "peak of the allocator, GiB", "modelled / measured", "resident above the baseline, GiB")
    one = results.rows[0]
    return (
        f"{table(headings, lines)}\n\n{one['extractor']} at {one['image_size']}×{one['image_size']} in {one['dtype']}, "
        f"minibatch {one['minibatch']:,}.\n\n{results.conditions()}"
    )


def critics(results: Results) -> str:
    """Steps of two models, ours beside torch-mimicry's."""
    lines = [
        [
            row["model"],
            row["variant"],
            row["dtype"],
            *(f"{row[key]:.2f}" for key in ("p20", "p50", "p80")),
            f"{row['images_per_second']:.0f}",
            f"{row['speedup']:.2f}",
        ]
        for row in results.rows
    ]
    headings = ("model", "implementation", "dtype", "step p20, s", "p50", "p80", "images/s", "times torch-mimicry's")
    return f"{table(headings, lines)}\n\n{results.conditions()}"


TABLES: Mapping[str, tuple[str, Writer]] = {
    "methods": ("methods_digits", methods),
    "methods-imagenet": ("methods_imagenet", methods),
    "methods-critics": ("critics_digits", methods),
    "methods-critics-pictures": ("critics_digits", pictures),
    "methods-codes": ("codes_digits", methods),
    "methods-codes-pictures": ("codes_digits", pictures),
    "methods-steps": ("method_steps_cpu", steps),
    "methods-memory": ("memory_methods_cpu", memory),
    "critics-steps": ("critics_cpu", critics),
}
