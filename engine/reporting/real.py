"""The run's real images, if they are still available, and a feature space for comparing samples with them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from safetensors import SafetensorError

from engine.configuration.build import make_extractor, pretrained_files
from engine.configuration.config import Config
from engine.configuration.inputs import open_data
from engine.reporting.charts import number
from engine.reporting.neighbours import Features, channel_means
from engine.representation.zoo import is_fixed
from engine.support.errors import InputError
from engine.support.files import open_safetensors
from engine.training.run_folder import RunFolder
from pipelines import DataError, ImageDataset

log = logging.getLogger("gfmn")


@dataclass(frozen=True)
class FeatureSpace:
    """Features whose distances decide which images are near, and a description of them for the page."""

    features: Features
    description: str


def feature_space(name: str, weights: str | None, image_size: int, device: torch.device) -> FeatureSpace:
    """The features of an evaluation network; "inception" is torch-fidelity's. Raises what `evaluation_network` does."""
    from engine.evaluation.judges import evaluation_network  # torch-fidelity takes a second to import

    network = evaluation_network(None if name == "inception" else name, weights=weights, image_size=image_size)
    return FeatureSpace(lambda images: network.features(images, device=device), f"the features of {network.label}")


@dataclass(frozen=True)
class RealImages:
    """The run's data set, and the feature space in which its images are compared with samples.

    Attributes:
        dataset, space: None if unavailable.
        num_features: of the run's own extractor; None if that is unavailable or another space was chosen.
        changed: one sentence for each difference from the training.
        missing: one line that says why samples cannot be compared; None if they can.
        trained: the fingerprint in the newest checkpoint; empty if there is none.
    """

    dataset: ImageDataset | None = None
    space: FeatureSpace | None = None
    num_features: int | None = None
    changed: tuple[str, ...] = ()
    missing: str | None = None
    trained: Mapping[str, str] = field(default_factory=dict)


def open_real(run: RunFolder, config: Config, device: torch.device, space: FeatureSpace | None = None) -> RealImages:
    """Open the run's data set and extractor; `space` takes the extractor's place. Of a method without one, or with one
    of pixels or colours alone, which averaged over positions tell no shapes, that is EfficientNet-Lite0's.

    If one of them is no longer available, this warns, and the page is written without the comparison.
    """
    dataset, num_features, changed = None, None, []
    trained = _trained_with(run)
    try:
        dataset = open_data(config)
        if trained.get("data_count", str(len(dataset))) != str(len(dataset)):
            changed.append(f"the data set had {number(int(trained['data_count']))} images in training")
        if space is None and not (config.needs.features and _tells_shapes(config.networks.extractor)):
            space = feature_space("efficientnet-lite0", None, config.data.image_size, device)
        if space is None:
            # Batch statistics would let the features of an image depend on the others beside it.
            pretrained = pretrained_files(config, dataset, device, run.extractor)
            extractor = make_extractor(config.replaced({"extractor_bn": "running"}), dataset, device, pretrained)
            weights = extractor.fingerprint["extractor_weights"]
            if trained.get("extractor_weights", weights) != weights:
                changed.append("the extractor’s weights are not those of the training")
            num_features = extractor.num_features
            space = FeatureSpace(
                channel_means(extractor),
                f"the channels of all {len(extractor.taps)} taps of {extractor.name}, averaged over positions",
            )
    except (InputError, DataError) as error:
        missing = " ".join(str(error).split())
        log.warning("%s: no nearest real images in the report: %s", run.path, missing)
        return RealImages(dataset, missing=missing, trained=trained)
    return RealImages(dataset, space, num_features, tuple(changed), trained=trained)


def _tells_shapes(extractor: str) -> bool:
    return not all(is_fixed(part) for part in extractor.split("+"))


def _trained_with(run: RunFolder) -> dict[str, str]:
    """The fingerprint in the newest checkpoint; empty if there is none."""
    try:
        with open_safetensors(run.checkpoint_paths()[-1]) as file:
            return dict(json.loads(file.metadata()["fingerprint"]))
    except (IndexError, KeyError, TypeError, ValueError, OSError, SafetensorError):
        return {}
