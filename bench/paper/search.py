"""A small search over a setting's candidates, by a judge that has no say in the verdict."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.commands import RunFailed
from bench.digit_judge import CLASSES, DigitJudge
from bench.paper.experiments import SMALL, Scale
from engine.configuration.config import Config
from engine.configuration.inputs import load_run_sampler, open_data
from engine.evaluation.judges import evaluation_network
from engine.evaluation.metrics import KID_SUBSET, compute_metrics
from engine.support.files import write_atomically
from engine.training.run_folder import RunFolder
from pipelines import read_pixels

PERCEPTUAL = "efficientnet-lite0"
"""Judges trials where there are no digits to be read; Inception has the verdict there."""

Score = Callable[[Path], float]
"""From a run's folder to a number; the larger, the better."""

SEED = 1_000
"""Of the trials, and of what is drawn of them: no judged run begins as a trial, or has its z."""


def judged_by(scale: Scale) -> str:
    """What trials are judged by, in words."""
    if scale.name == SMALL:
        return "the share that a support vector machine reads with confidence, less how uneven the ten digits are"
    return f"minus the kernel distance by {PERCEPTUAL}"


def scorer(scale: Scale, samples: int, device: str) -> Score:
    """The judge of trials. It isn't `scale.network`, which has the verdict."""
    if scale.name == SMALL:
        judge = DigitJudge()

        def readable(folder: Path) -> float:
            pixels = load_run_sampler(folder).to(torch.device(device)).draw_pixels(samples, seed=SEED)
            return readability(judge, pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy())

        return readable

    def close(folder: Path) -> float:
        config = Config.load(RunFolder(folder).config)
        network = evaluation_network(PERCEPTUAL, image_size=config.data.image_size)
        drawn = load_run_sampler(folder).to(torch.device(device)).draw_pixels(samples, seed=SEED)
        real = read_pixels(open_data(config))[: 5 * samples]
        subset = min(KID_SUBSET, len(drawn), len(real))
        found = compute_metrics(drawn, real, network, ("kid",), device=device, kid_subset_size=subset)
        return -found["kernel_distance"]

    return close


def readability(judge: DigitJudge, images: np.ndarray) -> float:
    """Share of `images` uint8 [N, 32, 32, 3] read with confidence, minus ½ Σ_k |share of digit k − 1/10|.

    The second term is the distance of the ten shares from even ones in total variation: a single clear digit is worth
    .1, and not 1.
    """
    verdict = judge.judge(images)
    return verdict.confident - 0.5 * float(np.abs(verdict.shares - 1 / CLASSES).sum())


def kept_score(folder: Path, score: Score) -> float | None:
    """The score of a finished trial, from the file in its folder if it was judged before; None if it isn't finite."""
    file = folder / "score.json"
    if not file.exists():
        found = score(folder)
        text = json.dumps({"score": found if np.isfinite(found) else None}) + "\n"
        write_atomically(file, text.encode())
    found = json.loads(file.read_text())["score"]
    return None if found is None else float(found)


def best(searched: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The flags of the trial with the largest score, the first of equal ones; RunFailed if none has one."""
    numbers = [entry for entry in searched if entry["score"] is not None]
    if not numbers:
        raise RunFailed("every trial failed, or has a score that is not finite; try smaller rates")
    return tuple(max(numbers, key=lambda entry: float(entry["score"]))["flags"].split())
