"""What has the verdict on the samples of an experiment's runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.comparison.distances import kernels, mmd
from engine.configuration.config import Config
from engine.configuration.inputs import load_run_sampler, open_data
from engine.evaluation.judges import EvaluationNetwork, evaluation_network
from engine.evaluation.metrics import KID_SUBSET, compute_metrics
from pipelines import read_pixels

if TYPE_CHECKING:
    from bench.paper.runs import ExperimentPlan


_SEED = 2_000
"""Of the judged z, the same for every run: no run is trained with it."""


class Judge:
    """The evaluating network and the real images, which all runs of a scale share."""

    def __init__(self, plan: ExperimentPlan, config: Config):
        self.plan = plan
        size = config.data.image_size
        self.network: EvaluationNetwork = evaluation_network(plan.scale.network, image_size=size)
        real = read_pixels(open_data(config))
        self.real: Tensor = real[:200] if plan.smoke else real
        self.device = torch.device(plan.device)

    def __call__(self, folder: Path) -> dict[str, float]:
        """Metrics of samples of the run in `folder`."""
        samples = load_run_sampler(folder).to(self.device).draw_pixels(self.plan.samples, seed=_SEED)
        subset = min(KID_SUBSET, len(samples), len(self.real))
        found = compute_metrics(
            samples, self.real, self.network, self.plan.scale.metrics, device=self.device, kid_subset_size=subset
        )
        return {**found, "pixel_distance": pixel_distance(samples, self.real)}


@torch.no_grad()
def pixel_distance(samples: Tensor, real: Tensor, most: int = 5_000) -> float:
    """Energy distance 2 E‖x−y‖ − E‖x−x'‖ − E‖y−y'‖ of images uint8 [N, 3, H, W] as vectors, of at most `most` each.

    In units of the largest pixel value and of a root mean square over pixels: 2 between black and white.
    """
    x, y = (images[:most].to("cpu").flatten(1).float() / (255 * images[0].numel() ** 0.5) for images in (samples, real))
    return float(mmd(x, y, kernels.energy()))
