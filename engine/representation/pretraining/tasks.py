"""What a network is pretrained to do. Every task trains a whole architecture, its outputs included."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.generation.networks import GENERATOR_SIZES, build_generator
from engine.representation.architectures import Architecture
from engine.support.errors import InputError
from pipelines import ImageDataset


class Task(Protocol):
    """A loss, and what the network is judged by.

    Attributes:
        module: what is trained, the network and whatever the task adds to it.
        network: the part that becomes the extractor.
        metric: name of the value that `score` sums up.
        optimizer: "sgd" or "adam".
        lr, weight_decay: the usual ones.
    """

    module: nn.Module
    network: nn.Module
    metric: str
    optimizer: str
    lr: float
    weight_decay: float

    def loss(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """Mean over the images [N, 3, H, W]."""
        ...

    def score(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """Sum of the metric over the images."""
        ...


class _Scores:
    """Classification of any kind, by the paper's recipe (supplement): SGD at 0.1, weight decay 5e-4."""

    metric = "accuracy"
    optimizer, lr, weight_decay = "sgd", 0.1, 5e-4

    def __init__(self, architecture: Architecture, image_size: int, num_classes: int):
        self.module = self.network = architecture.make(num_classes, image_size)

    def posed(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The images as the network sees them, and the classes it should find, int64."""
        raise NotImplementedError

    def loss(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """Cross entropy."""
        images, classes = self.posed(images, labels)
        return F.cross_entropy(self.module(images).float(), classes)


class Classify(_Scores):
    """The class of the image; for labelled datasets."""

    def __init__(self, architecture: Architecture, dataset: ImageDataset):
        if dataset.labels is None or dataset.num_classes < 2:
            raise InputError(
                f"--task: classify needs a dataset with at least 2 classes, {dataset.name} has "
                f"{dataset.num_classes or 'no labels'}; use --task rotate or --task autoencode"
            )
        super().__init__(architecture, dataset.image_size, dataset.num_classes)

    def posed(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Images and labels as they are."""
        assert labels is not None
        return images, labels

    def score(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """How many are right."""
        return (self.module(images).argmax(1) == labels).sum()


class Rotate(_Scores):
    """By which of four quarter turns the image is rotated (Gidaris et al. 2018); needs no labels."""

    def __init__(self, architecture: Architecture, dataset: ImageDataset):
        super().__init__(architecture, dataset.image_size, 4)

    def posed(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """One quarter of the batch for each turn: the batches are random already."""
        quarters = images.tensor_split(4)
        turned = torch.cat([quarter.rot90(turns, (2, 3)) for turns, quarter in enumerate(quarters)])
        counts = torch.tensor([len(quarter) for quarter in quarters])
        classes = torch.arange(4).repeat_interleave(counts).to(images.device)
        return turned.contiguous(memory_format=torch.channels_last), classes

    def score(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """How many are right, each turned all four ways."""
        right = [(self.module(images.rot90(turns, (2, 3))).argmax(1) == turns).sum() for turns in range(4)]
        return torch.stack(right).sum() / 4


class Autoencoder(nn.Module):
    """Images to tanh of the encoder's outputs, and back by the DCGAN-like generator (paper, section 5.1)."""

    def __init__(self, encoder: nn.Module, image_size: int, latent: int):
        super().__init__()
        self.encoder = encoder
        self.decoder = build_generator("dcgan", image_size=image_size, nz=latent)

    def forward(self, images: Tensor) -> Tensor:
        """The reconstruction, [N, 3, H, W]."""
        return self.decoder(self.encoder(images).tanh())


class Autoencode:
    """The image itself, through a latent code: mean squared error of pixels in [-1, 1], by Adam.

    The code has 128 values for up to 32 pixels and 512 above (the paper's for CelebA).
    """

    metric = "reconstruction_error"
    optimizer, lr, weight_decay = "adam", 1e-3, 0.0

    def __init__(self, architecture: Architecture, dataset: ImageDataset):
        size = dataset.image_size
        if size not in GENERATOR_SIZES:
            sizes = ", ".join(map(str, GENERATOR_SIZES))
            raise InputError(f"--task: autoencode decodes to images of {sizes} pixels, not {size}")
        latent = 128 if size <= 32 else 512
        self.network = architecture.make(latent, size)
        self.module: nn.Module = Autoencoder(self.network, size, latent)

    def loss(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """Mean squared error of the pixels."""
        return F.mse_loss(self.module(images).float(), images)

    def score(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """Mean squared error of each image, summed over the images."""
        return (self.module(images).float() - images).square().mean(dim=(1, 2, 3)).sum()


TASKS: dict[str, Callable[[Architecture, ImageDataset], Task]] = {
    "classify": Classify,
    "rotate": Rotate,
    "autoencode": Autoencode,
}


def make_task(name: str, architecture: Architecture, dataset: ImageDataset) -> Task:
    """The task by its name; InputError if it is unknown, or if the dataset does not have what it needs."""
    if name not in TASKS:
        raise InputError(f"--task: {name!r} is not one of {', '.join(TASKS)}")
    return TASKS[name](architecture, dataset)


def one_cycle(step: int, total: int) -> float:
    """Share of the peak learning rate at `step` of `total`: up in the first fifth, then down a half cosine to 0."""
    rise = max(total // 5, 1)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(total - rise, 1)))
