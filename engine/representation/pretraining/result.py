"""The result of pretraining: weights, the held-out metric and the history."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from engine.support.files import save_safetensors

EXTRACTOR_FORMAT = "gfmn-extractor-1"


@dataclass(frozen=True)
class PretrainResult:
    """A trained network.

    Attributes:
        state_dict: of the architecture, on the CPU; `build_extractor(weights=)` takes the file that `save` writes.
        metric: "accuracy" (share of held-out images) or "reconstruction_error" (mean squared error of pixels in
            [-1, 1]).
        validation: the metric on the held-out tenth of the images.
        history: one entry per epoch: epoch, step, loss (mean over the epoch), validation.
        metadata: what the network is and was made from, as strings.
    """

    state_dict: dict[str, Tensor]
    metric: str
    validation: float
    history: list[dict[str, float]]
    metadata: Mapping[str, str]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        metadata = {**self.metadata, "format": EXTRACTOR_FORMAT, self.metric: f"{self.validation:.6g}"}
        save_safetensors(path, self.state_dict, metadata)
