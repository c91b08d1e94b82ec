"""The tables of docs/kernels.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.pages.regions import Results, Row, Writer
from bench.rows import table

_LEAST = "ReLU in place and one read, torch.compile"


def _range(values: Sequence[float], form: str = "{:.0f}") -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low.rstrip('%')}–{high}"


def audit(results: Results) -> str:
    """A line for every kernel and target, ranges over its variants."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in results.rows:
        groups.setdefault((row["kernel"].removesuffix("_kernel"), row["target"]), []).append(row)
    headings = (
        "kernel", "target", "variants", "registers", "spilled, bytes", "stack, bytes", "occupancy",
        "widest load, bytes", "widest store, bytes",
    )  # fmt: skip
    lines = [
        [
            kernel,
            target,
            len(rows),
            *(_range([row[key] for row in rows]) for key in ("registers", "spilled", "stack")),
            _range([row["occupancy"] for row in rows], "{:.0%}"),
            *(_range([row[key] for row in rows]) for key in ("widest_load", "widest_store")),
        ]
        for (kernel, target), rows in groups.items()
    ]
    bad = sum(bool(row["violations"]) for row in results.rows)
    return (
        f"{table(headings, lines)}\n\n{len(results.rows)} variants, {bad} violations.\n\n{results.conditions('triton')}"
    )


def traffic(results: Results) -> str:
    """Bytes moved by every operation, and in all."""
    columns = ("ours", "partial", "floor", "eager", "compiled")
    total = {"op": "all", **{key: sum(row[key] for row in results.rows) for key in columns}}
    headings = ("operation", "ours, MB", "partial sums", "floor", "ours / floor", "plain PyTorch", "torch.compile")
    lines = [
        [
            row["op"],
            f"{row['ours'] / 1e6:.1f}",
            f"{row['partial'] / 1e6:.2f}",
            f"{row['floor'] / 1e6:.1f}",
            f"{row['ours'] / row['floor']:.4f}",
            *(f"{row[key] / 1e6:.1f} ({row[key] / row['floor']:.1f}×)" for key in ("eager", "compiled")),
        ]
        for row in (*results.rows, total)
    ]
    return f"{table(headings, lines)}\n\n{results.conditions('triton')}"


def times(results: Results) -> str:
    """Taps without a shortcut and the averager: ours, and how many times longer others take."""
    medians: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in results.rows:
        key = (row["op"], row["dtype"], row["shape"])
        name = "ours" if row["backend"] == "gfmn, compiled" else row["backend"]
        medians.setdefault(key, {})[name] = row["p50"]
    lines = []
    for (op, dtype, shape), found in medians.items():
        if "shortcut" in shape or op.startswith("pairwise"):
            continue
        what = f"{int(shape):,} features" if shape.isdecimal() else shape.split("×", 1)[1]
        least = f"{found['ours'] / found[_LEAST]:.2f}" if _LEAST in found else ""
        others = (
            f"{found[name] / found['ours']:.1f}" if name in found else "" for name in ("plain PyTorch", "torch.compile")
        )
        lines.append([op, dtype, what, f"{found['ours']:,.0f}", *others, least])
    headings = (
        "operation", "dtype", "tap", "ours, µs", "plain PyTorch / ours", "torch.compile / ours",
        "ours / ReLU in place and one read",
    )  # fmt: skip
    lines.sort(key=lambda line: (not line[0].startswith("relu"), line[1], line[0]))
    return f"{table(headings, lines)}\n\n{results.conditions('triton')}"


def pairs(results: Results) -> str:
    """Every operation on pairs of rows: time and memory of ours, and how many times as much plain PyTorch takes."""
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in results.rows:
        found.setdefault((row["op"], row["dtype"], row["shape"]), {})[row["backend"]] = row
    headings = ("operation", "dtype", "pairs", "features", "ours, ms", "plain / ours", "ours, MiB", "plain, MiB")
    lines = []
    for (op, dtype, shape), backends in found.items():
        plain = backends.pop("plain PyTorch")
        (ours,) = backends.values()
        count, others, features = map(int, shape.split("×"))
        times = (f"{ours['p50'] / 1e3:.1f}", f"{plain['p50'] / ours['p50']:.1f}")
        memory = (f"{row['peak_memory'] / 2**20:.0f}" for row in (ours, plain))
        lines.append([op, dtype, f"{count:,}×{others:,}", features, *times, *memory])
    return f"{table(headings, lines)}\n\n{results.conditions('triton')}"


def step(results: Results) -> str:
    """Whole steps and the criterion's share of them."""
    headings = ("dtype", "kernels", "step p20, s", "p50", "p80", "criterion, s", "share")
    lines = [
        [
            row["dtype"],
            "auto (`compiled`)" if row["backend"] == "auto" else row["backend"],
            *(f"{row[key]:.2f}" for key in ("p20", "p50", "p80")),
            f"{row['criterion_p50']:.3f}",
            f"{row['share']:.1%}",
        ]
        for row in results.rows
    ]
    return f"{table(headings, lines)}\n\n{results.conditions()}"


TABLES: Mapping[str, tuple[str, Writer]] = {
    "kernels-audit": ("kernels_audit", audit),
    "kernels-bytes": ("kernels_bytes", traffic),
    "kernels-times": ("kernels_times_cpu", times),
    "kernels-pairs": ("kernels_pairs_cpu", pairs),
    "kernels-step": ("kernels_step_cpu", step),
}
