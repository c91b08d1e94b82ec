"""The real images of a run and a feature space to compare samples with them in, if they can still be had."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open

from engine.configuration.build import make_extractor, open_data
from engine.configuration.config import Config
from engine.reporting.charts import number
from engine.reporting.neighbours import Features, channel_means
from engine.support.errors import InputError
from engine.training.run_folder import RunFolder
from pipelines import DataError, ImageDataset

log = logging.getLogger("gfmn")


@dataclass(frozen=True)
class Space:
    """Where distances between images are measured: the features, and what they are in words."""

    features: Features
    description: str


def chosen_space(name: str, weights: str | None, image_size: int, device: torch.device) -> Space:
    """The features of an evaluation network; InputError if there is no such network or no weights of it."""
    from engine.evaluation.metrics import evaluation_network  # torch-fidelity takes a second to import

    network = evaluation_network(None if name == "inception" else name, weights=weights, image_size=image_size)
    return Space(lambda images: network.features(images, device=device), f"the features of {network.label}")


@dataclass(frozen=True)
class Real:
    """The run's dataset, and where its images are compared with samples.

    Attributes:
        dataset, space: None if they could not be had.
        num_features: that were matched, None if that is not known.
        changed: what differs from training, in words.
        missing: why there is nothing to compare with, one line; None if there is.
    """

    dataset: ImageDataset | None = None
    space: Space | None = None
    num_features: int | None = None
    changed: tuple[str, ...] = ()
    missing: str | None = None


def open_real(run: RunFolder, config: Config, device: torch.device, space: Space | None = None) -> Real:
    """Open what the run was trained on; `space` takes the place of its own extractor.

    What can't be opened any more costs a warning, not the page.
    """
    dataset, num_features, changed = None, None, []
    trained = _trained_with(run)
    try:
        dataset = open_data(config)
        if trained.get("data_count", str(len(dataset))) != str(len(dataset)):
            changed.append(f"the data set had {number(int(trained['data_count']))} images in training")
        if space is None:
            # Batch statistics would let the features of an image depend on the others beside it.
            extractor = make_extractor(config.replaced({"extractor_bn": "running"}), dataset, device)
            weights = extractor.fingerprint["extractor_weights"]
            if trained.get("extractor_weights", weights) != weights:
                changed.append("the extractor’s weights are not those of the training")
            num_features = extractor.num_features
            space = Space(
                channel_means(extractor),
                f"the channels of all {len(extractor.taps)} taps of {extractor.name}, averaged over positions",
            )
    except (InputError, DataError) as error:
        missing = " ".join(str(error).split())
        log.warning("%s: no nearest real images in the report: %s", run.path, missing)
        return Real(dataset, missing=missing)
    return Real(dataset, space, num_features, tuple(changed))


def _trained_with(run: RunFolder) -> dict[str, str]:
    """The fingerprint in the newest checkpoint; empty if there is none."""
    try:
        with safe_open(run.checkpoint_paths()[-1], framework="pt") as file:
            return dict(json.loads(file.metadata()["fingerprint"]))
    except (IndexError, KeyError, TypeError, ValueError, OSError, SafetensorError):
        return {}
