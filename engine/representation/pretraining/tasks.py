"""The tasks that a network is pretrained for.

Every task trains a whole architecture (`engine.representation.architectures`), its outputs included.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.generation.networks import GENERATOR_SIZES, build_generator
from engine.representation.architectures import Architecture
from engine.representation.encoders import Autoencoder, Encoder
from engine.representation.pretraining.shares import Rows
from engine.support.errors import InputError
from pipelines import ImageDataset


class Task(Protocol):
    """A loss to train with, and a metric to judge the network by.

    Attributes:
        module: everything that is trained: the network, and what the task adds to it.
        network: the part that becomes the extractor.
        metric: name of the value that `score` sums up.
        momentum: of SGD, unless the recipe names another; None for a task that is trained by Adam.
        lr, weight_decay: the optimizer's, unless the recipe names others.
    """

    module: nn.Module
    network: nn.Module
    metric: str
    momentum: float | None
    lr: float
    weight_decay: float

    def loss(self, images: Tensor, labels: Tensor | None, rows: Rows) -> Tensor:
        """These images' share of the training loss, which is a mean over the minibatch: L = 1/N Σ_n loss_n.

        Args:
            images: [n, 3, H, W] in [-1, 1].
            labels: int64 [n], if there are any.
            rows: which of the minibatch's N images they are. The losses, and the gradients, of all rows add up.
        """
        ...

    def score(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """The metric, summed over the images."""
        ...


class _Scores:
    """Classification of any kind, by the paper's recipe (supplement): SGD at 0.1, weight decay 5e-4."""

    metric = "accuracy"
    momentum: float | None = 0.9
    lr, weight_decay = 0.1, 5e-4

    def __init__(self, architecture: Architecture, image_size: int, num_classes: int):
        self.module = self.network = architecture.make(num_classes, image_size)

    def posed(self, images: Tensor, labels: Tensor | None, rows: Rows) -> tuple[Tensor, Tensor]:
        """The images as the network sees them, and the classes that it should find, int64."""
        raise NotImplementedError

    def loss(self, images: Tensor, labels: Tensor | None, rows: Rows) -> Tensor:
        """Mean cross entropy of the classes, at least in float32."""
        images, classes = self.posed(images, labels, rows)
        return F.cross_entropy(_wide(self.module(images)), classes, reduction="sum") / rows.total


class Classify(_Scores):
    """Learn the class of the image; for labelled data sets."""

    def __init__(self, architecture: Architecture, dataset: ImageDataset):
        if dataset.labels is None or dataset.num_classes < 2:
            raise InputError(
                "task",
                f"classify needs a dataset with at least 2 classes, {dataset.name} has "
                f"{dataset.num_classes or 'no labels'}; choose rotate or autoencode",
            )
        super().__init__(architecture, dataset.image_size, dataset.num_classes)

    def posed(self, images: Tensor, labels: Tensor | None, rows: Rows) -> tuple[Tensor, Tensor]:
        """The images and labels, unchanged."""
        assert labels is not None
        return images, labels

    def score(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """How many images get the right class."""
        return (self.module(images).argmax(1) == labels).sum()


_TINT, _TINT_SHARE = 0.05, 0.5


def _tints() -> list[tuple[float, float, float]]:
    """Factors of red, green and blue, 1 at most: none, and six hues."""
    found = [(1.0, 1.0, 1.0)]
    for hue in range(6):
        angles = (math.tau * (hue / 6 - channel / 3) for channel in range(3))
        gains = [1 + _TINT * math.cos(angle) for angle in angles]
        red, green, blue = (gain / max(gains) for gain in gains)
        found.append((red, green, blue))
    return found


TINTS = _tints()
"""What `Tinted` dyes images with. Telling slight ones takes features that answer to slight ones."""


class Tinted(Classify):
    """Learn the class of a grey image, and in which colour it was dyed: for labelled data sets without colours.

    Whoever tells digits needs no hue, and features that were trained on grey images hardly change with it: generated
    images keep fringes of colour that no such feature sees. Here the images of a minibatch are dyed in turn in all
    `TINTS`, and half the cross entropy of the tints is added to that of the classes.
    """

    def __init__(self, architecture: Architecture, dataset: ImageDataset):
        super().__init__(architecture, dataset)
        self.classes = dataset.num_classes
        self.module = self.network = architecture.make(self.classes + len(TINTS), dataset.image_size)

    def loss(self, images: Tensor, labels: Tensor | None, rows: Rows) -> Tensor:
        """Mean cross entropies of the classes and of the tints, at least in float32."""
        images, classes = self.posed(images, labels, rows)
        tints = torch.arange(rows.start, rows.stop, device=images.device) % len(TINTS)
        gains = torch.tensor(TINTS, dtype=images.dtype, device=images.device)[tints]
        outputs = _wide(self.module((images + 1) * gains[:, :, None, None] - 1))
        of_classes, of_tints = outputs.split([self.classes, len(TINTS)], dim=1)
        missed = F.cross_entropy(of_classes, classes, reduction="sum")
        return (missed + _TINT_SHARE * F.cross_entropy(of_tints, tints, reduction="sum")) / rows.total

    def score(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """How many images, as they are, get the right class."""
        return (self.module(images)[:, : self.classes].argmax(1) == labels).sum()


class Rotate(_Scores):
    """Learn by how many quarter turns the image is rotated, 0 to 3 (Gidaris et al. 2018); needs no labels."""

    def __init__(self, architecture: Architecture, dataset: ImageDataset):
        super().__init__(architecture, dataset.image_size, 4)

    def posed(self, images: Tensor, labels: Tensor | None, rows: Rows) -> tuple[Tensor, Tensor]:
        """One quarter of the minibatch for each turn: minibatches are random already."""
        least, more = divmod(rows.total, 4)
        ends = [turns * least + min(turns, more) for turns in range(5)]
        quarters = images.split([rows.within(*quarter) for quarter in itertools.pairwise(ends)])
        turned = torch.cat([quarter.rot90(turns, (2, 3)) for turns, quarter in enumerate(quarters)])
        classes = torch.cat(
            [torch.full((len(quarter),), turns, device=images.device) for turns, quarter in enumerate(quarters)]
        )
        return turned.contiguous(memory_format=torch.channels_last), classes

    def score(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """How many images are right, as a mean over their four turns."""
        right = [(self.module(images.rot90(turns, (2, 3))).argmax(1) == turns).sum() for turns in range(4)]
        return torch.stack(right).sum() / 4


class Autoencode:
    """Learn to reconstruct the image from a latent code: mean squared error of pixels in [-1, 1], by Adam.

    The code is tanh of the network's outputs, and the DCGAN-like generator draws it (paper, section 5.1).

    The code has 128 values for up to 32 pixels and 512 above (the paper's for CelebA).
    """

    metric = "reconstruction_error"
    momentum: float | None = None
    lr, weight_decay = 1e-3, 0.0

    def __init__(self, architecture: Architecture, dataset: ImageDataset):
        size = dataset.image_size
        if size not in GENERATOR_SIZES:
            sizes = ", ".join(map(str, GENERATOR_SIZES))
            raise InputError("task", f"autoencode decodes to images of {sizes} pixels, not {size}")
        latent = 128 if size <= 32 else 512
        self.network = architecture.make(latent, size)
        encoder = Encoder(self.network, latent, bounded=True)
        self.module: nn.Module = Autoencoder(encoder, build_generator("dcgan", image_size=size, nz=latent))

    def loss(self, images: Tensor, labels: Tensor | None, rows: Rows) -> Tensor:
        """Mean squared error of the reconstructed pixels, at least in float32."""
        error = F.mse_loss(_wide(self.module(images)), images, reduction="sum")
        return error / (rows.total * math.prod(images.shape[1:]))

    def score(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """Mean squared error of each image, summed over the images."""
        return (_wide(self.module(images)) - images).square().mean(dim=(1, 2, 3)).sum()


def _wide(outputs: Tensor) -> Tensor:
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


TASKS: dict[str, Callable[[Architecture, ImageDataset], Task]] = {
    "classify": Classify,
    "tinted": Tinted,
    "rotate": Rotate,
    "autoencode": Autoencode,
}


def make_task(name: str, architecture: Architecture, dataset: ImageDataset) -> Task:
    """The task `name`; raise InputError if it is unknown, or if the data set lacks what it needs."""
    if name not in TASKS:
        raise InputError("task", f"{name!r} is not one of {', '.join(TASKS)}")
    return TASKS[name](architecture, dataset)
