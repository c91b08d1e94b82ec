"""Improved GAN: the generator matches the mean of a critic's hidden layer, and the critic may know classes.

Source: Salimans et al. 2016 (arXiv 1606.03498), sections 3.1 and 5, and their code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from engine.comparison.games.adversarial import minimax_critic
from engine.comparison.games.outputs import checked
from engine.comparison.games.protocols import Stateless
from engine.support.errors import InputError

UNLABELLED = -1


def feature_matching(real: Tensor, fake: Tensor) -> Tensor:
    """‖E h(x) − E h(G)‖², as [] (section 3.1).

    The authors' code has the mean of |E h(x) − E h(G)| over features in its place.

    Args:
        real: features h [n, F] of real images, of the critic's last hidden layer.
        fake: features h [m, F] of generated images.

    Raises:
        InputError: "real", if it isn't [n ≥ 1, F]; "fake", if it isn't [m ≥ 1, F] with the same F.
    """
    real, fake = checked(real, fake)
    return (real.mean(dim=0) - fake.mean(dim=0)).square().sum()


def labelled_critic(logits: Tensor, labels: Tensor) -> Tensor:
    """−E log p(y | x, x is real) = E [log Σ_j exp l_j(x) − l_y(x)], as []: over the images that have a label.

    The first half of the loss of k+1 classes (section 5). 0 if no image has a label.

    Args:
        logits: outputs l [n, k] of real images.
        labels: y [n], integers from 0 to k−1, or −1 for an image without a label.

    Raises:
        InputError: "logits", if it isn't [n ≥ 1, k]; "labels", if it isn't integers [n].
    """
    logits, _ = checked(logits, logits)
    if labels.shape != logits.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError("labels", f"expected integers [{len(logits)}], got {list(labels.shape)} {labels.dtype}")
    total = cross_entropy(logits, labels.long(), ignore_index=UNLABELLED, reduction="sum")
    return total / (labels != UNLABELLED).sum().clamp_min(1)


def unlabelled_critic(real: Tensor, fake: Tensor) -> Tensor:
    """−E log D(x) − E log(1 − D(G)), as [], with D the probability of the k classes of real images together.

    The second half of the loss of k+1 classes (section 5). The logit of the last class, "generated", is fixed at 0, so
    that D = Z/(Z + 1) with Z = Σ_j exp l_j, and log Z is the logit of D:

        E softplus(−log Z(x)) + E softplus(log Z(G))

    The authors' code has half of it.

    Args:
        real: outputs l [n, k] of real images.
        fake: outputs l [m, k] of generated images.

    Raises:
        InputError: "real" or "fake", as for `feature_matching`.
    """
    real, fake = checked(real, fake)
    return softplus(-real.logsumexp(dim=1)).mean() + softplus(fake.logsumexp(dim=1)).mean()


@dataclass(frozen=True)
class FeatureMatching(Stateless):
    """The generator minimises `feature_matching` of the critic's features; the critic tells real from generated images.

    Args:
        classes: k of the data set's labels; None for a critic without classes, whose loss is `minimax_critic`. With
            classes it is `labelled_critic` + `unlabelled_critic`.

    Raises:
        InputError: "classes", if it is below 1.
    """

    classes: int | None = None
    reads_real = True
    on_features = True

    def __post_init__(self) -> None:
        if self.classes is not None and self.classes < 1:
            raise InputError("classes", f"must be at least 1, got {self.classes}")

    @property
    def outputs(self) -> int:  # type: ignore[override]  # a number by instance, not by class
        """One, or one for each class."""
        return self.classes or 1

    @property
    def reads_labels(self) -> bool:  # type: ignore[override]
        """Whether there are classes."""
        return self.classes is not None

    @property
    def of_host(self) -> bool:  # type: ignore[override]
        """Whether there are classes: the host has the numbers by which labels are picked."""
        return self.reads_labels

    def critic_loss(self, real: Tensor, fake: Tensor, labels: Tensor | None = None) -> Tensor:
        """The critic's loss of outputs [n, k or 1], [m, k or 1], and labels [n] if there are classes.

        Raises:
            InputError: "real", "fake" or "labels", if it has another shape; "labels", if there are classes and no
                labels.
        """
        if self.classes is None:
            return minimax_critic(real, fake)
        if labels is None:
            raise InputError("labels", f"the game of {self.classes} classes needs the labels of real images")
        checked(real, fake, self.classes)
        return labelled_critic(real, labels) + unlabelled_critic(real, fake)

    def generator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """`feature_matching` of the critic's features [n, h] and [m, h]."""
        return feature_matching(real, fake)
