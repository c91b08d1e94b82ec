"""The tables of docs/performance.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.pages.regions import Results, Row, Writer
from bench.rows import table

GIB = 2**30
# Multiplications and additions of VGG19's and ResNet18's convolutions, 64 images of 32×32, forward and input gradient.
CONVOLUTION_GFLOP = 234.4
# Flags that were called otherwise when the rows were measured.
_RENAMED = {"--checkpoint-generator": "--recompute-generator", "--checkpoint stages": "--recompute stages"}
_MINIBATCHES = (64, 4096)
_LEAN = "ours --amp --chunk-size 64 --recompute-generator"
_STAGES = "ours --amp --recompute stages"
_CAPACITIES = ("naive, frozen, autocast", "ours --amp", _STAGES, _LEAN)


def _called_today(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows with their variants' flags under today's names."""
    renamed: list[Row] = []
    for row in rows:
        variant = row.get("variant", "")
        for old, new in _RENAMED.items():
            variant = variant.replace(old, new)
        renamed.append({**row, "variant": variant})
    return renamed


def _size(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"


def throughput(results: Results) -> str:
    headings = ("variant", "dtype", "p20, s", "p50", "p80", "images/s", "gradient error")
    lines = [
        [
            row["variant"],
            row["dtype"],
            *(f"{row[key]:.3f}" for key in ("p20", "p50", "p80")),
            f"{row['images_per_second']:.0f}",
            "" if row["gradient_error"] != row["gradient_error"] else f"{row['gradient_error']:.1e}",
        ]
        for row in results.rows
    ]
    return f"{table(headings, lines)}\n\n{results.conditions()}"


def _medians(rows: Sequence[Row]) -> Mapping[tuple[str, str], float]:
    return {(row["variant"], row["dtype"]): row["p50"] for row in rows}


def aims(results: Results) -> str:
    """How many times faster than the naive variants a step is, was to be, and could be: finding, aim and floor."""
    seconds = _medians(results.rows)
    floor = {
        dtype: seconds["convolution floor", dtype] + seconds["generator alone", dtype] for dtype in ("bf16", "float32")
    }
    compared = (
        ("naive / ours --amp", ("naive", "float32"), "bf16", 4.5),
        ("naive, frozen, compiled / ours --amp", ("naive, frozen, compiled", "float32"), "bf16", 2.2),
        (
            "naive, frozen, compiled, autocast / ours --amp",
            ("naive, frozen, compiled, autocast", "bf16"),
            "bf16",
            1.35,
        ),
        ("naive, frozen, compiled / ours", ("naive, frozen, compiled", "float32"), "float32", 1.4),
    )
    lines, reached, possible = [], 0, 0
    for name, slow, dtype, aim in compared:
        found, best = seconds[slow] / seconds["ours", dtype], seconds[slow] / floor[dtype]
        reached, possible = reached + (found >= aim), possible + (best >= aim)
        lines.append([name, f"{found:.2f}", f"{aim:g}", f"{best:.2f}", _yes(found >= aim)])
    for name, dtype, most in (("ours --amp", "bf16", 1.10), ("ours", "float32", None)):
        found = seconds["ours", dtype] / floor[dtype]
        wanted, answer = ("", "") if most is None else (f"at most {most:g}", _yes(found <= most))
        lines.append([f"{name} / (convolution floor + generator)", f"{found:.2f}", wanted, "1.00", answer])
    return (
        f"{table(('ratio of medians', 'measured', 'aimed', 'at the floor', 'reached'), lines)}\n\n"
        f"Ratios to naive variants that reach their aims: {reached} of {len(compared)}. The floor itself would reach "
        f"{possible} of them."
    )


def parts(results: Results) -> str:
    """Where a step goes, and how fast the convolutions run."""
    seconds = _medians(results.rows)
    lines, rates = [], []
    for dtype in ("bf16", "float32"):
        step, floor, generator = (
            seconds[variant, dtype] for variant in ("ours", "convolution floor", "generator alone")
        )
        shares = (floor / step, generator / step, 1 - (floor + generator) / step)
        lines.append([dtype, f"{step:.3f}", *(f"{share:.0%}" for share in shares)])
        rates.append(f"{CONVOLUTION_GFLOP / floor:.0f} GFLOP/s in {dtype}")
    headings = ("dtype", "step, s", "convolutions", "generator, its backward and Adam", "everything else")
    return (
        f"{table(headings, lines)}\n\nThe convolutions are {CONVOLUTION_GFLOP:.0f} GFLOP a step, so they run at "
        f"{' and '.join(rates)}."
    )


def _memory_rows(rows: Sequence[Row]) -> list[Row]:
    return [row for row in _called_today(rows) if "minibatch" in row and "budget" not in row]


def memory(results: Results) -> str:
    """A selection: every variant at two minibatches, and what one more image costs it."""
    rows = _memory_rows(results.rows)
    peaks = {(row["variant"], row["minibatch"]): row for row in rows}
    others = [row for row in _called_today(results.rows) if "minibatch" not in row and "saved" not in row]
    slopes = {row["variant"]: row for row in others}
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        cells = []
        for minibatch in _MINIBATCHES:
            row = peaks[variant, minibatch]
            known = row["measured"] is not None
            cells.append(f"{_size(row['measured'])}" if known else f"{_size(row['modelled'])} (modelled)")
        slope = slopes[variant]
        cells.append(f"{(slope['measured'] or slope['modelled']) / 1024:,.0f} KiB")
        lines.append([variant, *cells])
    headings = ("variant", *(f"minibatch {minibatch:,}" for minibatch in _MINIBATCHES), "one more image")
    pairs = [row["modelled"] / row["measured"] for row in rows if row["measured"] is not None]
    sentence = (
        f"The file has {len(rows)} rows, minibatches {min(row['minibatch'] for row in rows):,} to "
        f"{max(row['minibatch'] for row in rows):,}. Where both are known ({len(pairs)} times), the model's peak is "
        f"{min(pairs):.3f} to {max(pairs):.3f} times the measured one."
    )
    return f"{table(headings, lines)}\n\n{sentence}\n\n{results.conditions()}"


def memory_aims(results: Results) -> str:
    peaks = {(row["variant"], row["minibatch"]): row["measured"] for row in _memory_rows(results.rows)}
    naive = peaks["naive", 64]
    lean, largest = peaks[_LEAN, 4096], peaks[_LEAN, 16384]
    shares = [(variant, naive / peaks[variant, 64], aim) for variant, aim in (("ours --amp", 5.0), (_STAGES, 7.0))]
    lines = [
        [f"{variant}, minibatch 64", f"1/{share:.1f} of naive", f"1/{aim:g}", _yes(share >= aim)]
        for variant, share, aim in shares
    ]
    lines.append([f"{_LEAN}, minibatch 4,096", _size(lean), "1.50 GiB", _yes(lean <= 1.5 * GIB)])
    lines.append([f"{_LEAN}, minibatch 16,384", _size(largest), "none", ""])
    return table(("peak", "measured", "aimed", "reached"), lines)


def _yes(reached: bool) -> str:
    return "yes" if reached else "no"


def saved(results: Results) -> str:
    """What autograd keeps of the extractor."""
    lines = [
        [
            f"{row['extractor']} at {row['image_size']}",
            row["dtype"],
            f"{row['saved'] / 1024:,.0f}",
            f"{row['saved'] / row['floor']:.3f}",
        ]
        for row in results.rows
        if "saved" in row
    ]
    return table(("saved for backward", "dtype", "KiB an image", "/ its taps"), lines)


def capacity(results: Results) -> str:
    """The largest minibatches of the best naive variant and of ours."""
    rows = [row for row in _called_today(results.rows) if "budget" in row and row["variant"] in _CAPACITIES]
    budgets = sorted({row["budget"] for row in rows})
    found: dict[tuple[str, str], dict[int, int]] = {}
    for row in rows:
        what = f"{row['extractor']} at {row['image_size']}, {row['generator']}"
        found.setdefault((what, row["variant"]), {})[row["budget"]] = row["minibatch"]
    lines = [[*names, *(f"{sizes[budget]:,}" for budget in budgets)] for names, sizes in found.items()]
    return table(("largest minibatch, modelled", "variant", *(f"{budget / GIB:g} GiB" for budget in budgets)), lines)


def scale(results: Results) -> str:
    rows = results.rows
    per_image = [row["p50"] / row["minibatch"] for row in rows]
    headings = (
        "minibatch",
        "step p20, s",
        "p50",
        "p80",
        "ms/image",
        "/ one chunk",
        f"/ minibatch {rows[1]['minibatch']}",
    )
    lines = [
        [
            f"{row['minibatch']:,}",
            *(f"{row[key]:.2f}" for key in ("p20", "p50", "p80")),
            f"{1e3 * own:.2f}",
            f"{own / per_image[0]:.2f}",
            f"{own / per_image[1]:.2f}",
        ]
        for row, own in zip(rows, per_image, strict=True)
    ]
    return f"{table(headings, lines)}\n\n{results.conditions()}"


def data(results: Results) -> str:
    """Loaders and the statistics pass."""
    headings = ("what", "way", "images/s, median (p20–p80)", "CPU µs/image", "time / first row's")
    lines = [
        [
            f"{row['op']}, {row['shape']}",
            row["path"],
            f"{row['images_per_second_p50']:,.0f} "
            f"({row['images_per_second_p20']:,.0f}–{row['images_per_second_p80']:,.0f})",
            f"{row['cpu_us_per_image']:,.1f}",
            f"{row['relative_time']:.3f}",
        ]
        for row in results.rows
    ]
    return f"{table(headings, lines)}\n\n{results.conditions('nvidia-dali-cuda130')}"


def data_aims(results: Results) -> str:
    rows = {(row["op"], row["path"]): row for row in results.rows}
    pillow = rows["JPEG folder", "torchvision DataLoader, PIL, 2 workers"]
    dali = rows["JPEG folder", "ImageLoader, dali"]
    arrays = rows["arrays in memory", "ImageLoader, in order"]["images_per_second_p50"]
    added = next(row["relative_time"] for row in results.rows if row["path"] == "compute_target")
    faster = dali["images_per_second_p50"] / pillow["images_per_second_p50"]
    cheaper = dali["cpu_us_per_image"] / pillow["cpu_us_per_image"]
    lines = [
        ["JPEG folder: images/s, DALI / PIL", f"{faster:.2f}", "at least 1.5", _yes(faster >= 1.5)],
        ["JPEG folder: CPU time, DALI / PIL", f"{cheaper:.2f}", "at most 0.6", _yes(cheaper <= 0.6)],
        ["arrays in memory, in order: images/s", f"{arrays:,.0f}", "at least 250,000", _yes(arrays >= 250_000)],
        ["statistics pass / extractor alone: time", f"{added:.3f}", "at most 1.08", _yes(added <= 1.08)],
    ]
    return table(("ratio or rate", "measured", "aimed", "reached"), lines)


TABLES: Mapping[str, tuple[str, Writer]] = {
    "throughput": ("throughput_cpu", throughput),
    "throughput-aims": ("throughput_cpu", aims),
    "throughput-parts": ("throughput_cpu", parts),
    "memory": ("memory_cpu", memory),
    "memory-aims": ("memory_cpu", memory_aims),
    "memory-saved": ("memory_cpu", saved),
    "memory-capacity": ("memory_cpu", capacity),
    "scale": ("scale_cpu", scale),
    "data": ("data_cpu", data),
    "data-aims": ("data_cpu", data_aims),
}
