"""From a loss to new weights: backward, the sum over ranks, loss scaling, clipping, and the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.methods.rmsprop import RMSprop
from engine.training.ranks import ALONE, Ranks

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": RMSprop,
}
"""Those that change nothing where they are told, on the device, of a gradient that is not finite."""
_WEIGHT_DECAY = {"adam": 0.0, "adamw": 0.01}
_SCALER = "scaler."


class GradientStep:
    """One module's optimizer (Adam and AdamW are torch's own, fused), and what its gradients go through before.

    In this order: the sum over ranks, never the mean; with float16 the division by the loss's scale; the clipping of
    the norm of all gradients together, g ← g · min(1, clip_grad / (‖g‖ + 1e-6)), as torch's `clip_grad_norm_` has it.
    A step with a gradient that is NaN or infinite leaves the weights and the optimizer's state as they were, on all
    ranks alike, since all have the same sum. The host waits for nothing, and all of it can be captured in a CUDA graph.

    Args:
        module: what is trained, on its device.
        lr: learning rate. On a GPU a float32 tensor of it is what the optimizer reads, so that it can change in place.
        betas: Adam's; RMSprop has torch's α, 0.99.
        optimizer: "adam"; "adamw", whose weight decay is decoupled from the gradient (Loshchilov and Hutter 2019); or
            "rmsprop".
        weight_decay: of AdamW, torch's 0.01 by default; ValueError with the others, whose gradients it would change.
        clip_grad: the largest norm; None for any.
        scaled: scale the loss, which float16 needs, where small gradients would be 0.
        ranks: the processes whose gradients are added.

    Attributes:
        optimizer, scaler: torch's, or `RMSprop`.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        lr: float,
        betas: tuple[float, float] = (0.5, 0.999),
        optimizer: str = "adam",
        weight_decay: float | None = None,
        clip_grad: float | None = None,
        scaled: bool = False,
        ranks: Ranks = ALONE,
    ):
        if weight_decay is not None and optimizer != "adamw":
            raise ValueError(f"weight_decay: is adamw's, and the optimizer is {optimizer}")
        self.parameters, self.clip_grad, self.ranks = list(module.parameters()), clip_grad, ranks
        device = self.parameters[0].device
        on_gpu = device.type == "cuda"
        options: dict[str, Any] = {}
        if optimizer in _WEIGHT_DECAY:
            decay = _WEIGHT_DECAY[optimizer] if weight_decay is None else weight_decay
            options = {"betas": betas, "weight_decay": decay, "fused": True, "capturable": on_gpu}
        self.optimizer = OPTIMIZERS[optimizer](self.parameters, lr, **options)
        if on_gpu:
            # Where a captured step reads it; float32 is what the fused kernel takes.
            for group in self.optimizer.param_groups:
                group["lr"] = torch.tensor(lr, dtype=torch.float32, device=device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        self.one = torch.ones((), device=device)

    def take(
        self, loss: Tensor, after_backward: Callable[[], None] | None = None, leaf: Tensor | None = None
    ) -> Tensor:
        """∂loss/∂weights → new weights. Returns 1 if a gradient was not finite and nothing changed, else 0 (float32).

        Args:
            loss: [], this rank's part of it.
            after_backward: called before the gradients are looked at, to put them in place.
            leaf: of this rank alone, whose gradient is wanted besides. With float16 the loss's scale falls where that
                overflows, on any rank, as where a weight's does: the step is skipped. The gradient stays scaled.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward(self.one)
        if after_backward is not None:
            after_backward()
        gradients = [weight.grad for weight in self.parameters if weight.grad is not None]
        self.ranks.sum_(gradients)
        try:
            skip = self._unscale(gradients)
            if leaf is not None and self.scaler.is_enabled():
                self._look_at(leaf, skip)
            if self.clip_grad is not None:
                torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_grad, foreach=True)
            self._step(skip)
        except Exception:
            self._forget_step()
            raise
        return skip

    def _unscale(self, gradients: list[Tensor]) -> Tensor:
        """Divide by the loss's scale, in place; returns 1 if any gradient is not finite, else 0: float32, []."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
            (found,) = self.scaler._found_inf_per_device(self.optimizer).values()
            return found
        found = torch.zeros((), device=self.one.device)
        with torch.no_grad():  # the scaler's own kernel: one launch for all of them
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, self.one)
        return found

    def _look_at(self, leaf: Tensor, found: Tensor) -> None:
        """Let `found`, which is the scaler's, be 1 if the leaf's gradient isn't finite on one of the ranks."""
        assert leaf.grad is not None
        bad = (~leaf.grad.isfinite().all()).to(found.dtype)
        self.ranks.sum_([bad])
        found.copy_(torch.maximum(found, bad.clamp(max=1)))

    def _step(self, skip: Tensor) -> None:
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
            return
        # As the scaler tells a fused optimizer.
        self.optimizer.found_inf = skip  # type: ignore[attr-defined]
        self.optimizer.step()
        del self.optimizer.found_inf  # type: ignore[attr-defined]

    def _forget_step(self) -> None:
        """After a step that failed, as a capture may, the scaler would go on from its middle: with scales squared."""
        vars(self.optimizer).pop("grad_scale", None)
        vars(self.optimizer).pop("found_inf", None)
        if self.scaler.is_enabled():  # else it has no states
            self.scaler._per_optimizer_states.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """The loss scaling's state where there is one; the optimizer's is the trainer's to keep."""
        if not self.scaler.is_enabled():
            return {}
        return {f"{_SCALER}{name}": torch.tensor(value) for name, value in self.scaler.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `state_dict`; returns those entries of `state` that are not its own."""
        if self.scaler.is_enabled():
            self.scaler.load_state_dict({name: kept.item() for name, kept in part_of(state, _SCALER).items()})
        return {key: value for key, value in state.items() if not key.startswith(_SCALER)}


def part_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose names begin with `prefix`, without it."""
    return {name[len(prefix) :]: kept for name, kept in state.items() if name.startswith(prefix)}
