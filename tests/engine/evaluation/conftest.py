"""Weights for the networks that judge: of a small classifier of ours, and of torch-fidelity's Inception."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.judging import write_weights
from helpers.visiting import enliven
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from engine.evaluation.judges import EvaluationNetwork, evaluation_network


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a vgg-small with seven classes."""
    return write_weights(tmp_path_factory.mktemp("weights") / "small.safetensors")


@pytest.fixture(scope="session")
def network(weights: Path) -> EvaluationNetwork:
    """That vgg-small."""
    return evaluation_network("vgg-small", weights=weights, image_size=32)


@pytest.fixture
def small(weights: Path) -> list[str]:
    """Flags of the evaluating network."""
    text = f"--feature-extractor vgg-small --weights {weights} --kid-subset-size 40 --device cpu --threads 1"
    return text.split()


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of torch-fidelity's Inception, in a file as torch-fidelity publishes them."""

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_):
            return None

    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save({}, path)
    torch.manual_seed(5)
    module = enliven(Unloaded("unloaded", ["2048"], feature_extractor_weights_path=path))
    torch.save(module.state_dict(), path)
    return path
