"""An independent judge of generated digits: does a classifier that never saw the engine recognise them?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.datasets import load_digits
from sklearn.svm import SVC

CLASSES = 10
SHARES = (0.04, 0.18)
CONFIDENT = 0.6
CONFIDENT_SHARE = 0.75
DEVIATION_RATIO = 0.5


INK = 127
"""Pixels whose largest channel is above this are ink."""


@dataclass
class Verdict:
    """What the classifier says of a set of pictures.

    Attributes:
        shares: `[10]`, share of the pictures that fall in each class.
        confident: share of the pictures with a top probability above 0.6.
        deviation_ratios: `[10]`, mean pixel deviation within each class over the real digits'.
        chroma: mean over pixels of ink of the largest channel minus the smallest, of 255; real digits have 0.
    """

    shares: np.ndarray
    confident: float
    deviation_ratios: np.ndarray
    chroma: float

    @property
    def failures(self) -> list[str]:
        """What is wrong with the pictures; empty if they pass."""
        found = []
        low, high = SHARES
        if self.shares.min() < low or self.shares.max() > high:
            found.append(f"shares {self.shares.round(3).tolist()} leave {SHARES}")
        if self.confident < CONFIDENT_SHARE:
            found.append(f"only {self.confident:.1%} are recognised with confidence")
        if self.deviation_ratios.min() < DEVIATION_RATIO:
            found.append(f"too little variety within a class: {self.deviation_ratios.round(2).tolist()}")
        return found


class DigitJudge:
    """`SVC(probability=True, random_state=0)` fitted to real 8×8 digits (all of them by default)."""

    def __init__(self, rows: slice = slice(None)):
        pixels, classes = load_digits(return_X_y=True)
        self.real = np.array([self._deviation(pixels[classes == k]) for k in range(CLASSES)])
        self.classifier = SVC(probability=True, random_state=0).fit(pixels[rows], classes[rows])

    @staticmethod
    def _deviation(pixels: np.ndarray) -> float:
        return float(pixels.std(axis=0).mean()) if len(pixels) else 0.0

    def judge(self, images: np.ndarray) -> Verdict:
        """Judge `images`, uint8 [N, 32, 32, 3]: the 24×24 centre, area-averaged to 8×8 and scaled to 0…16."""
        grey = images.astype(np.float64).mean(axis=3)[:, 4:28, 4:28]
        pixels = grey.reshape(-1, 8, 3, 8, 3).mean(axis=(2, 4)).reshape(-1, 64) * (16 / 255)
        probabilities = self.classifier.predict_proba(pixels)
        classes = probabilities.argmax(axis=1)
        shares = np.bincount(classes, minlength=CLASSES) / len(pixels)
        deviations = np.array([self._deviation(pixels[classes == k]) for k in range(CLASSES)])
        confident = float((probabilities.max(axis=1) > CONFIDENT).mean())
        return Verdict(shares, confident, deviations / self.real, chroma(images))


def edge_level(images: np.ndarray) -> float:
    """Mean of the outermost ring of pixels of `images`, uint8 [N, H, W, 3], of 255; real digits have 0."""
    ring = np.ones(images.shape[1:3], dtype=bool)
    ring[1:-1, 1:-1] = False
    return float(images[:, ring].mean())


def chroma(images: np.ndarray) -> float:
    """See `Verdict`; 0 for images without ink."""
    largest, smallest = images.max(axis=3).astype(int), images.min(axis=3).astype(int)
    ink = largest > INK
    return float((largest - smallest)[ink].mean()) if ink.any() else 0.0
