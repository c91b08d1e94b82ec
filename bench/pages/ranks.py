"""The tables of several ranks in docs/performance.md."""

from __future__ import annotations

from collections.abc import Mapping

from bench.pages.regions import Results, Row, Writer
from bench.rows import table

_NOT_MEASURED = "Not measured yet."
_MOST_TIMES, _MOST_ALONE = 1.15, 0.01


def _yes(reached: bool) -> str:
    return "yes" if reached else "no"


def _having(results: Results, key: str) -> Results:
    return Results([row for row in results.rows if key in row], results.source)


def equality(results: Results) -> str:
    """Every method on every number of ranks, and the largest difference of all."""
    found = _having(results, "gradient")
    lines, worst = [], 0.0
    for row in found.rows:
        state = row.get("state")
        worst = max(worst, row["gradient"], row["loss"], state or 0.0)
        values = (row["gradient"], row["loss"], state, row["trained"])
        cells = ["" if value is None else f"{value:.1e}" for value in values]
        lines.append([f"{row['method']} {row['averager']}".strip(), row["ranks"], *cells])
    steps = found.rows[0]["steps"]
    headings = ("method", "ranks", "gradient", "loss", "averager", f"generator, {steps} steps")
    return (
        f"{table(headings, lines)}\n\nIn one step the largest difference is {worst:.1e}; the minibatch is of "
        f"{found.rows[0]['minibatch']} images.\n\n{found.conditions()}"
    )


def traffic(results: Results) -> str:
    """Bytes of every kind of collective, counted and by the formula."""
    rows = _having(results, "counted").rows
    lines = [[row["ranks"], row["what"], row["calls"], f"{row['counted']:,}", f"{row['formula']:,}"] for row in rows]
    same = sum(row["counted"] == row["formula"] for row in rows)
    return (
        f"{table(('ranks', 'what', 'collectives', 'bytes, counted', 'by the formula'), lines)}\n\n"
        f"{same} of {len(rows)} are what the formula says."
    )


def times(results: Results) -> str:
    """Steps of both jobs, and the two ratios that are wanted."""
    found = _having(results, "seconds")
    alone = _having(results, "call_seconds").rows
    if not found.rows or not alone:
        return _NOT_MEASURED
    lines = [
        [
            row["ranks"],
            row["threads"],
            *(f"{row[key]:.3f}" for key in ("p20", "p50", "p80")),
            f"{min(row['seconds']):.3f}–{max(row['seconds']):.3f}",
        ]
        for row in found.rows
    ]
    (one,), (two,) = ([row for row in found.rows if row["ranks"] == size] for size in (1, 2))
    ratio, share = two["p50"] / one["p50"], alone[0]["call_seconds"] / alone[0]["step_seconds"]
    aims = [
        ["2 ranks of 1 thread / 1 rank of 2 threads, medians", f"{ratio:.3f}", f"at most {_MOST_TIMES:g}",
         _yes(ratio <= _MOST_TIMES)],
        ["calls of ranks in a step of one process", f"{share:.4%}", f"at most {_MOST_ALONE:.0%}",
         _yes(share <= _MOST_ALONE)],
    ]  # fmt: skip
    headings = ("ranks", "threads of each", "p20, s", "p50", "p80", "least–most")
    return (
        f"{table(headings, lines)}\n\n{table(('ratio', 'measured', 'aimed', 'reached'), aims)}\n\n{found.conditions()}"
    )


def scaling(results: Results) -> str:
    """Modelled steps: a line for each number of ranks, a column for each network and minibatch."""
    rows = _having(results, "efficiency").rows
    columns: dict[tuple[str, bool, int], dict[int, Row]] = {}
    for row in rows:
        base = row["minibatch"] // row["ranks"] if row["growing"] else row["minibatch"]
        columns.setdefault((row["network"], row["growing"], base), {})[row["ranks"]] = row
    tables = []
    for growing, title in (
        (False, "The same minibatch for all (strong scaling)"),
        (True, "So many images a rank (weak)"),
    ):
        own = {(name, base): column for (name, grows, base), column in columns.items() if grows == growing}
        headings = ["ranks (modelled)", *(f"{name}, {base:,}{' a rank' if growing else ''}" for name, base in own)]
        sizes = sorted({size for column in own.values() for size in column})
        lines = [[size, *(_step(column.get(size)) for column in own.values())] for size in sizes]
        tables.append(f"*{title}: modelled ms a step, and efficiency.*\n\n{table(headings, lines)}")
    assumed = rows[0]["assumed"]
    image = 1e6 * assumed["image_seconds"]
    sentence = (
        f"Modelled with D = {assumed['features']:,} features, P = {assumed['weights']:,} weights and "
        f"{assumed['norms']} BatchNorms in the generator, and {image:.1f} µs of kernels an image on one GPU."
    )
    return "\n\n".join([*tables, sentence])


def _step(row: Row | None) -> str:
    return "" if row is None else f"{1e3 * row['total']:.2f} ({row['efficiency']:.0%})"


TABLES: Mapping[str, tuple[str, Writer]] = {
    "ranks-equality": ("ranks_cpu", equality),
    "ranks-bytes": ("ranks_cpu", traffic),
    "ranks-times": ("ranks_cpu", times),
    "ranks-scaling": ("ranks_cpu", scaling),
}
