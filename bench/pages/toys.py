"""The rows of docs/toys.md."""

from __future__ import annotations

from collections.abc import Sequence

from bench.pages.regions import Results, Row, Writer
from bench.rows import table


def _number(value: float, digits: int = 2) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}"  # no −0.00


def _distinct(rows: Sequence[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def dirac(results: Results) -> str:
    """The verdict on every game with every addition."""
    rows = [row for row in results.rows if row["update"] == "in turns"]
    settings = {row["addition"]: row["setting"] for row in rows}
    verdicts = {(row["game"], row["addition"]): row["verdict"] for row in rows}
    headings = ["game", *(f"{name} ({setting})" if setting else name for name, setting in settings.items())]
    lines = [
        [f"`{game}`", *(verdicts.get((game, addition), "") for addition in settings)]
        for game in _distinct(rows, "game")
    ]
    first = rows[0]
    return (
        f"{table(headings, lines)}\n\nSteps of {first['rate']:g} from (θ, ψ) = (1, 1), at most "
        f"{max(row['steps'] for row in rows)} of them. {results.conditions()}"
    )


def rates(results: Results) -> str:
    """Where the eigenvalues are known."""
    lines = [
        [
            f"`{row['game']}`",
            row["addition"],
            _number(row["known_decay"], 3),
            _number(row["decay"], 3) if "decay" in row else "",
            row["verdict"],
        ]
        for row in results.rows
        if row.get("known_decay") is not None
    ]
    return table(("game", "added", "−Re λ", "decay, fitted", "trajectory"), lines)


def updates(results: Results) -> str:
    """Other ways to take steps."""
    lines = [
        [
            f"`{row['game']}`",
            row["addition"],
            row["update"],
            f"({_number(row['theta'])}, {_number(row['psi'])})",
            row["verdict"],
        ]
        for row in results.rows
        if row["update"] != "in turns"
    ]
    return table(("game", "added", "steps", "last (θ, ψ)", "trajectory"), lines)


def points(results: Results) -> str:
    rows = [row for row in results.rows if row["laws"] == "points"]
    headings = ["distance", "computed by", *(f"θ = {theta:g}" for theta in rows[0]["settings"]), "slope at 1", "error"]
    lines = [
        [
            row["name"],
            row["by"],
            *(_number(value, 3) for value in row["found"]),
            _number(row["slope"]),
            f"{row['error']:.0e}",
        ]
        for row in rows
    ]
    return f"{table(headings, lines)}\n\n{results.conditions()}"


def gaussians(results: Results) -> str:
    rows = [row for row in results.rows if row["laws"] == "gaussians"]
    headings = ["distance", "computed by", *(f"N({mean:g}, {s:g}²)" for mean, s in rows[0]["settings"]), "error"]
    lines = [
        [row["name"], row["by"], *(_number(value, 3) for value in row["found"]), f"{row['error']:.0e}"] for row in rows
    ]
    return table(headings, lines)


def witness(results: Results) -> str:
    headings = ("penalty", "critic steps", "MMD²", "gradient's norm: median", "least", "largest", "cosine, median")
    lines = [
        [
            row["penalty"],
            row["steps"],
            _number(row["mmd"], 3),
            *(f"{row[key]:.1e}" for key in ("gradient", "least_gradient", "largest_gradient")),
            _number(row["aligned"]),
        ]
        for row in results.rows
    ]
    return f"{table(headings, lines)}\n\n{results.conditions()}"


def learners(results: Results) -> str:
    headings = ("method", "settings", "steps", "within 3σ", "parts covered", "2-Wasserstein distance")
    lines = [
        [
            row["name"],
            row["settings"],
            row["steps"] or "",
            f"{row['near']:.0%}",
            f"{row['covered']} of 8",
            _number(row["distance"]) if "distance" in row else "not finite",
        ]
        for row in results.rows
    ]
    return f"{table(headings, lines)}\n\n{results.conditions()}"


TABLES: dict[str, tuple[str, Writer]] = {
    "toys-dirac": ("toys_dirac", dirac),
    "toys-rates": ("toys_dirac", rates),
    "toys-updates": ("toys_dirac", updates),
    "toys-points": ("toys_distances", points),
    "toys-gaussians": ("toys_distances", gaussians),
    "toys-witness": ("toys_witness", witness),
    "toys-eight-gaussians": ("toys_eight-gaussians", learners),
    "toys-spiral": ("toys_spiral", learners),
}
"""Region → the kind of rows that it shows, and who writes it."""
