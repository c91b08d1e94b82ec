"""Images in folders, and a small classifier that torch-fidelity knows from here and not from the engine."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torch_fidelity
from helpers.visiting import enliven
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.representation.architectures import ARCHITECTURES
from pipelines import open_dataset

CLASSES = 7


def digits(first: int, last: int, size: int = 32) -> Tensor:
    """Some of scikit-learn's digits, enlarged: uint8 [N, 3, size, size]."""
    images = torch.from_numpy(open_dataset("digits", image_size=size).images[first:last])
    return images.permute(0, 3, 1, 2).contiguous()


def write_folder(folder: Path, images: Tensor) -> Path:
    """PNG files."""
    folder.mkdir(parents=True)
    for number, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(np.ascontiguousarray(image)).save(folder / f"{number:05}.png")
    return folder


def write_weights(
    path: Path, architecture: str = "vgg-small", outputs: int = CLASSES, seed: int = 0, **metadata: str
) -> Path:
    """Random weights as `engine.pretrain` writes them; `seed` decides them, whatever was drawn before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = enliven(ARCHITECTURES[architecture].make(outputs, 32))
    save_file(module.state_dict(), path, metadata or None)
    return path


def reference(weights: Path) -> type[torch_fidelity.FeatureExtractorBase]:
    """vgg-small with `weights`, written out once more for torch-fidelity, with other names."""
    state = load_file(weights)

    class Reference(torch_fidelity.FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)

        def forward(self, images):
            x = (images.float() - 127.5) / 127.5
            for number, pooled in ((0, False), (3, True), (7, False), (10, True), (14, False), (17, True)):
                conv, norm = (f"features.{number}.", f"features.{number + 1}.")
                x = F.conv2d(x, state[conv + "weight"], state[conv + "bias"], padding=1)
                statistics = (state[norm + name] for name in ("running_mean", "running_var", "weight", "bias"))
                x = F.relu(F.batch_norm(x, *statistics))
                x = F.max_pool2d(x, 2) if pooled else x
            x = x.mean(dim=(2, 3))
            layers = {"128": x, "logits": F.linear(x, state["classifier.weight"], state["classifier.bias"])}
            return tuple(layers[name] for name in self.features_list)

        @staticmethod
        def get_provided_features_list():
            return "128", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "logits" if metric == "isc" else "128"

        @staticmethod
        def can_be_compiled():
            return False

    return Reference
