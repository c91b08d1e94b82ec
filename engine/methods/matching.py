"""Matching: a generator learns to draw images whose features are like those of the real ones. No critic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.generation.low_precision import LowPrecision
from engine.generation.networks import Generator, run_generator, share_batches
from engine.generation.priors import Noise, Prior
from engine.generation.sampling import Sampler
from engine.representation.protocols import Objective
from engine.training.ranks import ALONE, Ranks

_SCALER = "scaler."


class Matching:
    """z → generator → images → objective → ∂L/∂θ → Adam (`engine.methods.protocols.Method`).

    With `MomentMatching` as the objective this is GFMN (dos Santos et al. 2019, algorithm 1); with `OnFeatures` the
    loss is any differentiable distance of features.

    Args:
        generator: on the device, in training mode.
        prior: the law of z.
        objective: the loss of generated images.
        batch_size: N, over all ranks.
        lr, betas: of the generator's Adam.
        amp_dtype: low precision of the generator's arithmetic, None for its own.
        recompute_generator: compute the generator's activations again in backward instead of keeping them.
        batch_statistics: see `Sampler`.
        ranks: the processes that share the minibatch.
        global_batches: whether BatchNorm's batches are those of all ranks, or each its own.
    """

    reads: Literal["nothing", "images"] = "nothing"

    def __init__(
        self,
        generator: Generator,
        prior: Prior,
        objective: Objective,
        *,
        batch_size: int,
        lr: float,
        betas: tuple[float, float] = (0.5, 0.999),
        amp_dtype: torch.dtype | None = None,
        recompute_generator: bool = False,
        batch_statistics: bool = False,
        ranks: Ranks = ALONE,
        global_batches: bool = True,
    ):
        self.generator, self.prior, self.objective = generator, prior, objective
        self.batch_size, self.amp_dtype = batch_size, amp_dtype
        self.recompute_generator, self.batch_statistics = recompute_generator, batch_statistics
        self.modules, self.ranks = nn.ModuleDict({"generator": generator}), ranks
        if ranks.size > 1 and global_batches:
            share_batches(generator, ranks)
        self.device = next(generator.parameters()).device
        self.one = torch.ones((), device=self.device)
        self.low = None if amp_dtype is None else LowPrecision(generator, amp_dtype)
        on_gpu = self.device.type == "cuda"
        self.optimizer = torch.optim.Adam(generator.parameters(), lr, betas, fused=True, capturable=on_gpu)
        if on_gpu:
            # Where a captured step reads it; float32 is what the fused kernel takes.
            for group in self.optimizer.param_groups:
                group["lr"] = torch.tensor(lr, dtype=torch.float32, device=self.device)
        self.optimizers: dict[str, torch.optim.Optimizer] = {"generator": self.optimizer}
        # Loss scaling is only needed where gradients underflow: float16.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp_dtype is torch.float16)

    def step(self, batch: Any, noise: Noise) -> Mapping[str, Tensor]:
        """See `Method.step`."""
        z = noise.draw(self.prior, self.batch_size)
        if self.ranks.size > 1:  # one stream, of which each rank has its rows
            z = z[self.ranks.share(self.batch_size)]
        recompute = self.recompute_generator
        if self.low is None:
            images = run_generator(self.generator, z, recompute=recompute)
        else:
            images = self.low.images(z, recompute=recompute)
        loss = self.objective(images)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward(self.one)
        if self.low is not None:
            self.low.collect_gradients()
        # The sum, never the mean: every rank's gradient is that of the one loss of all images (identity 4).
        self.ranks.sum_([weight.grad for weight in self.generator.parameters() if weight.grad is not None])
        try:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        except Exception:
            self._forget_step()
            raise
        return {"loss": loss.detach(), **self.objective.scalars()}

    def _forget_step(self) -> None:
        """After a step that failed, as a capture may, the scaler would go on from its middle: with scales squared."""
        vars(self.optimizer).pop("grad_scale", None)
        vars(self.optimizer).pop("found_inf", None)
        if self.scaler.is_enabled():  # else it has no states
            self.scaler._per_optimizer_states.clear()

    def sampler(self) -> Sampler:
        """See `Method.sampler`."""
        return Sampler(self.prior, self.generator, self.batch_statistics)

    def state_dict(self) -> dict[str, Tensor]:
        """The objective's state, and the loss scaling's where there is one."""
        state = dict(self.objective.state_dict())
        if self.scaler.is_enabled():
            scaler = self.scaler.state_dict()
            state |= {f"{_SCALER}{name}": torch.tensor(value) for name, value in scaler.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.objective.load_state_dict({key: value for key, value in state.items() if not key.startswith(_SCALER)})
        if self.scaler.is_enabled():
            scaler = {key[len(_SCALER) :]: value.item() for key, value in state.items() if key.startswith(_SCALER)}
            self.scaler.load_state_dict(scaler)
