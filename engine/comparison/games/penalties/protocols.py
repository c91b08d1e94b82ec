"""What a penalty is: a term for every image of a critic's minibatch, and what becomes of the loss with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from engine.support.errors import InputError


@dataclass(frozen=True)
class Play:
    """One critic step, as a penalty sees it.

    Images are those of this rank alone; outputs are those of all ranks, with the graph to each rank's critic.

    Args:
        critic: images [n, 3, H, W] → outputs [n, F]. Each image's outputs must depend on that image alone wherever a
            penalty differentiates by images: no BatchNorm in training mode, no minibatch discrimination.
        real, fake: this rank's images, [n, 3, H, W] each, detached. (Images that require a gradient get one.)
        phi_real, phi_fake: the critic's outputs [N, F] for the real and the generated images of all ranks.
        uniform: k → [n, k] numbers uniform in [0, 1), this rank's rows of a stream that all ranks share, so that an
            image's numbers don't depend on the number of ranks. Each call goes on in the stream.
        own: the rows of `phi_real` and `phi_fake` that are this rank's; all of them by default: the only rank's.
        passed: this rank's real images as a leaf that requires a gradient, and the critic's outputs [n, F] of them,
            which `phi_real` was made of; None if there is no such pass. See `real_pass`.

    Raises:
        InputError: "fake", if there aren't as many as real ones, of the same shape; "own", if it has another number of
            rows than there are images.
    """

    critic: Callable[[Tensor], Tensor]
    real: Tensor
    fake: Tensor
    phi_real: Tensor
    phi_fake: Tensor
    uniform: Callable[[int], Tensor]
    own: slice = field(default_factory=lambda: slice(None))
    passed: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.fake.shape != self.real.shape:
            shapes = f"{list(self.fake.shape)}, and the real ones are {list(self.real.shape)}"
            raise InputError("fake", f"penalties need as many generated images as real ones, of one size: {shapes}")
        for outputs in (self.phi_real, self.phi_fake):
            if len(outputs[self.own]) != len(self.real):
                rows = f"{len(outputs[self.own])} of {len(outputs)} rows, and this rank has {len(self.real)} images"
                raise InputError("own", f"must be the rows of this rank's outputs: it is {rows}")

    def real_pass(self) -> tuple[Tensor, Tensor]:
        """Real images that outputs can be differentiated by, and the critic's outputs [n, F] of them.

        It is the game's own pass if the caller has kept it, else another one.
        """
        if self.passed is not None:
            return self.passed
        images = tracked(self.real)
        return images, self.critic(images)


def tracked(images: Tensor) -> Tensor:
    """The images, or if they require no gradient, the same ones as a leaf that does."""
    return images if images.requires_grad else images.detach().requires_grad_()


PENALTY, SCALE = "penalty", "scale"
"""Figures: what is added to the loss, and what it is divided by."""


class Penalty(Protocol):
    """What keeps a critic smooth.

    A critic step adds one number for every image of this rank, `terms`. The caller joins those of all ranks and gives
    them to `applied`, so that W ranks compute the loss of one. Terms are float32 at least, and differentiable in the
    critic's parameters; those of `phi_real` and `phi_fake` reach other ranks' graphs as well.
    """

    @property
    def double_backward(self) -> bool:
        """Whether terms contain derivatives by images: no BatchNorm, autocast, fused or compiled critic then."""
        ...

    @property
    def at_real(self) -> bool:
        """Whether terms contain derivatives by the real images themselves (`Play.real_pass`)."""
        ...

    @property
    def has_terms(self) -> bool:
        """Whether `applied` does anything; otherwise nobody needs to join terms, which are zeros."""
        ...

    @property
    def figure(self) -> str:
        """What the log calls the mean of the terms."""
        ...

    def terms(self, play: Play) -> Tensor:
        """[n], one number for every image of this rank (or every pair of a real and a generated one)."""
        ...

    def applied(self, loss: Tensor, terms: Tensor) -> Tensor:
        """The critic's loss [] with the penalty, from the game's loss [] and the terms [N] of all ranks."""
        ...

    def project_(self, critic: nn.Module) -> None:
        """Move the critic's parameters back to where they may be, in place, after its optimizer's step."""
        ...


class Added:
    """What most penalties have in common: loss + mean of the terms, and parameters may be anything."""

    double_backward: bool = False
    at_real: bool = False
    has_terms: bool = True
    figure: str = PENALTY

    def applied(self, loss: Tensor, terms: Tensor) -> Tensor:
        """See `Penalty.applied`."""
        return loss + terms.mean()

    def project_(self, critic: nn.Module) -> None:
        """Nothing to move."""
