"""What a game is: what critic and generator each want, as losses of the critic's outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine.support.errors import InputError


class Game(Protocol):
    """What critic and generator want; both minimise a loss of the critic's outputs for the minibatch of all ranks.

    `real` is [n, F] and `fake` [m, F]: the critic's outputs for n real and m generated images. Losses are [], in the
    outputs' dtype (float32 for half precision), and differentiable twice. What a game keeps is in `state_dict`.

    Attributes:
        outputs: F, how many outputs per image the critic must have; None if any number will do.
        reads_real: whether `generator_loss` looks at `real`. Games that don't may be given fake outputs twice.
        on_features: whether `generator_loss` takes the critic's `features` [n, h] in place of its outputs.
        reads_labels: whether `critic_loss` takes `labels` [n] of the real images as a third argument.
        of_host: whether a loss needs the host: it waits for the device, or the host picks what is read.
    """

    @property
    def outputs(self) -> int | None: ...

    @property
    def reads_real(self) -> bool: ...

    @property
    def on_features(self) -> bool: ...

    @property
    def reads_labels(self) -> bool: ...

    @property
    def of_host(self) -> bool: ...

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """What the critic minimises, []."""
        ...

    def generator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """What the generator minimises, []."""
        ...

    def update_(self, real: Tensor, fake: Tensor) -> None:
        """Change what the game keeps, in place, after a critic step; no gradient, no waiting for the device."""
        ...

    def figures(self, real: Tensor, fake: Tensor, loss: Tensor) -> Mapping[str, Tensor]:
        """Scalars for the log, on the device and without gradient; "distance" among them where the game has one.

        Args:
            loss: `critic_loss` of these outputs, detached, of which most distances are the negative.
        """
        ...

    def state_dict(self) -> Mapping[str, Any]:
        """What the game keeps from step to step; empty for most."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any:
        """The inverse of `state_dict`."""
        ...


class Stateless:
    """What games have in common that keep nothing, have one output per image, and judge generated images alone."""

    outputs: int | None = 1
    reads_real: bool = False
    on_features: bool = False
    reads_labels: bool = False
    of_host: bool = False

    def update_(self, real: Tensor, fake: Tensor) -> None:
        """Nothing to update."""

    def figures(self, real: Tensor, fake: Tensor, loss: Tensor) -> Mapping[str, Tensor]:
        """Nothing to log."""
        return {}

    def state_dict(self) -> Mapping[str, Any]:
        """Empty."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """InputError if there is something to load: the state is another game's."""
        if state_dict:
            raise InputError("state_dict", f"is another game's: it has {', '.join(sorted(state_dict))}")


class Stateful(nn.Module):
    """The same for games that keep scalars from step to step: buffers in float64, whatever the outputs are in."""

    outputs: int | None = 1
    reads_real: bool = False
    on_features: bool = False
    reads_labels: bool = False
    of_host: bool = False

    def keep(self, name: str, value: float) -> None:
        """Keep a scalar, that starts as `value`, as the buffer `name`."""
        self.register_buffer(name, torch.tensor(value, dtype=torch.float64))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As PyTorch's; InputError if the names aren't those of the buffers: the state is another game's."""
        wanted = dict(self.named_buffers())
        if strict and set(state_dict) != set(wanted):
            found = ", ".join(sorted(state_dict)) or "nothing"
            raise InputError("state_dict", f"is another game's: it has {found}, not {', '.join(sorted(wanted))}")
        return super().load_state_dict(state_dict, strict, assign)
