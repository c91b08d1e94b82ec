"""The figures: many small panels in one picture with few colours, so that the file stays small."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from bench.toy.dirac import ADDITIONS, DiracRow
from bench.toy.distances import DistanceRow
from bench.toy.planes import Plane
from bench.toy.witness import SIDE, Picture
from engine.support.files import write_atomically

_DPI, _COLOURS = 80, 128
_WITNESS = ListedColormap([str(level) for level in (0.58, 0.65, 0.72, 0.79, 0.86, 0.93, 1.0)][::-1])
_VERDICTS = {
    "converges": "tab:green",
    "chatters": "yellowgreen",
    "creeps": "tab:blue",
    "circles": "tab:orange",
    "stops": "tab:purple",
    "diverges": "tab:red",
}


def save(path: Path, figure: Figure) -> None:
    """Draw a figure as PNG with a palette, the whole file or nothing."""
    drawn, kept = io.BytesIO(), io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(drawn, format="png", dpi=_DPI)
    picture = Image.open(drawn).convert("RGB")
    picture = picture.quantize(_COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    picture.save(kept, format="png", optimize=True)
    write_atomically(path, kept.getvalue())


def dirac(found: Sequence[tuple[DiracRow, np.ndarray]]) -> Figure:
    """θ to the right, ψ upwards, a panel for every game and addition; the colour is the verdict."""
    shown = [(row, path) for row, path in found if row.update == "in turns"]
    games = list(dict.fromkeys(row.game for row, _ in shown))
    figure = Figure(figsize=(1.0 * len(ADDITIONS) + 1.2, 0.85 * len(games) + 0.6))
    panels = figure.subplots(len(games), len(ADDITIONS), squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for row, path in shown:
        axes = panels[games.index(row.game), list(ADDITIONS).index(row.addition)]
        axes.set_axis_on()
        _bare(axes, 2.2)
        axes.axhline(0, color="lightgray", linewidth=0.5)
        axes.axvline(0, color="lightgray", linewidth=0.5)
        axes.plot(*path.T, color=_VERDICTS[row.verdict], linewidth=0.8)
        axes.plot(*path[0], ".", color="black", markersize=3)
    for axes, name in zip(panels[0], ADDITIONS):
        axes.set_title(name, fontsize=8)
    for axes, game in zip(panels[:, 0], games):
        axes.text(-0.1, 0.5, game, fontsize=8, ha="right", va="center", transform=axes.transAxes)
    for index, (verdict, colour) in enumerate(_VERDICTS.items()):
        figure.text(0.2 + 0.13 * index, 0.012, verdict, color=colour, fontsize=8)
    figure.subplots_adjust(left=0.14, right=0.99, top=0.965, bottom=0.035, wspace=0.06, hspace=0.06)
    return figure


def distances(rows: Sequence[DistanceRow], curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Distances of δ_0 and δ_θ along θ; each over its largest value, those that agree as one line.

    Args:
        rows: of points.
        curves: name → θ, and the distance there.
    """
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axes = figure.subplots()
    drawn: list[tuple[list[str], np.ndarray, np.ndarray]] = []
    for row in rows:
        thetas, values = curves[row.name]
        values = values / values.max()
        for names, _, others in drawn:
            if np.abs(values - others).max() < 1e-6:
                names.append(row.name)
                break
        else:
            drawn.append(([row.name], thetas, values))
    for names, thetas, values in drawn:
        axes.plot(thetas, values, linewidth=1.2, label=", ".join(names))
    axes.set(xlabel="θ", ylabel="distance over its largest", ylim=(-0.03, 1.05))
    axes.grid(color="whitesmoke")
    figure.legend(loc="outside lower center", fontsize=7, ncols=1, frameon=False)
    return figure


def witnesses(pictures: Sequence[Sequence[Picture]]) -> Figure:
    """The witness as grey contours, real points, and at generated points the direction of its gradient; a line where
    the kernel of a point amid the generated ones is ½.

    Arrows are as long as the gradient's norm, but for those that would be longer than a panel's eighth.
    """
    rows, columns = len(pictures), len(pictures[0])
    figure = Figure(figsize=(2.9 * columns, 2.6 * rows), layout="constrained")
    line = np.linspace(-SIDE, SIDE, pictures[0][0].witness.shape[0])
    for axes, picture in zip(figure.subplots(rows, columns, squeeze=False).flat, [p for row in pictures for p in row]):
        values = picture.witness.numpy()
        axes.contourf(line, line, values, levels=7, cmap=_WITNESS)
        axes.contour(line, line, picture.kernel.numpy(), levels=[0.5], colors="tab:orange", linewidths=1.2)
        axes.plot(*picture.real[:100].T, ".", color="tab:green", markersize=2)
        shown, arrows = picture.fake[:60], picture.gradients[:60]
        norms = arrows.norm(dim=1, keepdim=True)
        arrows = arrows * (0.75 / norms.clamp_min(0.75))
        axes.plot(*shown.T, ".", color="tab:red", markersize=2)
        axes.quiver(*shown.T, *arrows.T, color="tab:blue", angles="xy", scale_units="xy", scale=1, width=0.006)
        axes.set_title(picture.title, fontsize=8)
        _bare(axes, SIDE)
    return figure


def scatters(plane: Plane, found: Sequence[tuple[str, Tensor]], columns: int = 7) -> Figure:
    """A panel for everyone's points, over the law's centres."""
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(1.25 * columns, 1.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes in panels:
        axes.set_axis_off()
    for axes, (name, points) in zip(figure.axes, found):
        axes.set_axis_on()
        axes.plot(*plane.centres.T, ".", color="lightgray", markersize=5 if len(plane.centres) < 100 else 1)
        axes.plot(*points[:500].T, ",", color="tab:blue")
        axes.set_title(name, fontsize=7)
        _bare(axes, 2.9)
    return figure


def _bare(axes: Axes, side: float) -> None:
    axes.set(xlim=(-side, side), ylim=(-side, side), xticks=[], yticks=[], aspect="equal")
    for spine in axes.spines.values():
        spine.set_linewidth(0.4)
