"""What is modelled of a step of every method is what PyTorch's allocator reports of one."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from helpers.marks import quick

from bench.rows import memory_changes
from engine.comparison.reference.bank import FeatureBank
from engine.configuration.build import make_method, of_images
from engine.configuration.config import Config
from engine.configuration.inputs import open_data
from engine.configuration.methods import NEEDS
from engine.configuration.modelling import predict
from engine.configuration.objectives import blank_reference
from engine.configuration.planning import Planner
from engine.configuration.running import make_delivery, make_schedule
from engine.training.run_folder import RunFolder
from engine.training.trainer import Trainer
from pipelines import ImageDataset

# Of these the second kind of step is modelled, too, and minibatches whose moments are added are alike.
FLAGS: dict[str, dict[str, Any]] = {
    "glann": {"glo_steps": 2, "steps": 4},
    "gmmn-ae": {"autoencoder_steps": 2, "steps": 4},
    "molm": {"moment_steps": 1, "moment_images": 32},
}
METHODS = [name for name in NEEDS if name != "gfmn"]  # whose flags have tests of their own


@pytest.mark.parametrize("method", quick(METHODS, ["frechet", "gan", "dfm", "vae", "glo"]))
def test_prediction_is_within_a_tenth_of_the_allocator(method: str) -> None:
    """From the second step on, with all that is there then."""
    given = {"method": method, "batch_size": 16, **FLAGS.get(method, {})}
    if NEEDS[method].features:
        given |= {"weights": ("random",)}
    config = Config.build("digits", given)
    planner, dataset = Planner(config), open_data(config)
    predicted = predict(
        config, planner.generator, planner.extractor, networks=planner.networks, images=len(dataset)
    ).peak
    trainers: list[Trainer] = []

    def take_one_step() -> None:
        trainers.append(make_trainer(config, planner, dataset))
        trainers[0].train_step()

    def take_the_others() -> None:
        for _ in range(config.training.steps - 1 if "steps" in given else 1):
            trainers[0].train_step()

    gc.collect()
    there = sum(memory_changes(take_one_step))
    measured = there + max(np.cumsum([0, *memory_changes(take_the_others)]))
    assert predicted == pytest.approx(measured, rel=0.1)


def make_trainer(config: Config, planner: Planner, dataset: ImageDataset) -> Trainer:
    if planner.extractor is None:
        known = of_images(config, dataset, device=torch.device("cpu"))
        method = make_method(config, planner.generator, networks=planner.networks, **known)
    else:
        found = blank_reference(config, planner.extractor, torch.rand, len(dataset))
        known = {"scales": torch.ones(found.features.shape[1])} if isinstance(found, FeatureBank) else {}
        method = make_method(config, planner.generator, planner.extractor, found, **known)
    images = {"images": make_delivery(config, dataset, torch.device("cpu"))} if method.reads == "images" else {}
    return Trainer(method, make_schedule(config), RunFolder("nowhere"), {}, **images)
