"""What a criterion is, and what the pass over the features hands to it.

A criterion says *what* the gradient of every feature is. Masks, chunks, recomputation, memory layout, low precision and
the upstream gradient are the business of `engine.representation.feature_pass` alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from engine.training.ranks import Ranks
from kernels.plain import activate_


@dataclass(frozen=True)
class Affine:
    """The gradient of a loss that knows each feature by its moments: ∂L/∂y_nd = a_d + b_d · y_nd.

    See docs/method.md, identity 1.

    Attributes:
        a, b: `[d_j]` float32 (float64 for float64 features), in the memory order (H, W, C).
    """

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class PerImage:
    """The gradient of any other loss: ∂L/∂y = g + slope · y.

    Attributes:
        g: for the images asked for, `[n, C, H, W]`, or what broadcasts to it: `[n, C, 1, 1]` for channel means.
        slope: of the same kind, for features that are deviations over a map; None is 0.
    """

    g: Tensor
    slope: Tensor | None = None


@dataclass(frozen=True)
class TapInput:
    """What arrives at a tap: a value before the bias, the shortcut and the activation that are left to apply.

    Attributes:
        x: `[n, C, H, W]`, channels_last. Whoever collects leaves the activation's output in it.
        residual: of x's shape, to be added first; None if there is none.
        activation: "relu", "relu6" or "none".
        bias: `[C]`, to be added first; None if there is none.
    """

    x: Tensor
    residual: Tensor | None
    activation: str
    bias: Tensor | None = None

    def activate_(self) -> Tensor:
        """`x ← activation(x + bias + residual)` in place, the features y; returns x."""
        activate_(self.x, self.bias, self.residual, self.activation)
        return self.x


class Collector(Protocol):
    """Sees every feature once: all that a pass without gradients needs."""

    def collect(self, tap: int, x: TapInput, images: slice) -> None:
        """Read the features of `images`, a slice of the minibatch, at a tap.

        On return `x.x` holds the features y: call `x.activate_()`, or a kernel that does the same on the way.
        """
        ...


class Criterion(Collector, Protocol):
    """Turns the features of one minibatch into a loss and into the gradient of every feature.

    The pass calls `collect` for every tap of every chunk, then `finish` once, and in backward `gradient` for every tap
    of every chunk. Chunks may come in any order.
    """

    def finish(self, ranks: Ranks) -> Tensor:
        """The loss, a scalar on the device, once all chunks have been collected; the one place where ranks meet."""
        ...

    def gradient(self, tap: int, images: slice) -> Affine | PerImage:
        """∂loss/∂y of a tap, for the images of one chunk. An `Affine` must not depend on the images."""
        ...


class Objective(Protocol):
    """A differentiable loss of generated images, with what it remembers between two minibatches."""

    def __call__(self, images: Tensor) -> Tensor:
        """The loss of `images` [N, 3, H, W] in [-1, 1], a scalar."""
        ...

    def scalars(self) -> dict[str, Tensor]:
        """Further numbers of the last call for the log: scalars on the device."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the next call depends on."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> Any:
        """The inverse of `state_dict`; ValueError if the state is another objective's."""
        ...
