"""Denoising feature matching: a game in which the generator follows a denoiser of the critic's features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.comparison.games.adversarial import nonsaturating
from engine.comparison.games.denoising import denoising_error, denoising_generator
from engine.comparison.games.penalties import Penalty
from engine.generation.batch_norm import share_batches
from engine.generation.networks import Generator
from engine.generation.priors import Gaussian, Noise, Prior
from engine.methods.adversarial import Adversarial, as_it_is
from engine.methods.everywhere import everywhere
from engine.methods.gradient_step import GradientStep
from engine.methods.protocols import SKIPPED
from engine.representation.critics.critic import LinearCritic
from engine.representation.critics.denoiser import Denoiser
from engine.support.errors import InputError
from pipelines import Batch


class DenoisingFeatureMatching(Adversarial):
    """Steps of the critic and one of the generator, as in `Adversarial`, then one of the denoiser, on a minibatch of
    real images of its own (`engine.methods.protocols`).

        critic:      E softplus(−D(x)) + E softplus(D(G)), with its penalties
        generator:   λ_a E softplus(−D(G)) + λ_d E ‖Φ(G) − r(Φ(G))‖²/h
        denoiser r:  E ‖Φ(x) − r(Φ(x) + σε)‖²/h, ε ~ N(0, I)

    Φ are the critic's features [N, h], which the denoiser takes as they are. The generator takes r(Φ(G)) as it is, with
    r's running statistics.

    Source: Warde-Farley & Bengio 2017 (see `games.denoising`); that r(Φ(G)) has no gradient is as in
    chainer-gan-lib.

    Args:
        generator, critic, denoiser: on one device, in training mode.
        prior: the law of z.
        penalties: of the critic.
        adversarial, denoising: λ_a and λ_d.
        deviation: σ, in units of the critic's features.
        denoiser_lr: learning rate of the denoiser, which has the generator's β, optimizer and weight decay; None for
            the generator's.
        options: as of `Adversarial`.

    Raises:
        InputError: "critic", as `Adversarial`, and if its outputs aren't one, of its features.
    """

    def __init__(
        self,
        generator: Generator,
        critic: LinearCritic,
        denoiser: Denoiser,
        prior: Prior,
        penalties: Sequence[Penalty] = (),
        *,
        adversarial: float = 1.0,
        denoising: float = 0.03,
        deviation: float = 1.0,
        denoiser_lr: float | None = None,
        **options: Any,
    ):
        if not isinstance(critic, LinearCritic) or critic.spec.outputs != 1:
            raise InputError("critic", "needs one output, which a linear layer gives of the features to be denoised")
        super().__init__(generator, critic, prior, nonsaturating(), penalties, **options)
        self.critic: LinearCritic = critic
        self.denoiser, self.deviation = denoiser, deviation
        self.weights = {"adversarial": adversarial, "denoising": denoising}
        self.modules["denoiser"] = denoiser
        if self.ranks.size > 1:
            share_batches(denoiser, self.ranks)
        optimizer = options.get("optimizer", "adam")
        self.denoiser_step = GradientStep(
            denoiser,
            lr=options["lr"] if denoiser_lr is None else denoiser_lr,
            betas=options.get("betas", (0.5, 0.999)),
            optimizer=optimizer,
            weight_decay=options.get("weight_decay") if optimizer == "adamw" else None,
            ranks=self.ranks,
        )
        self.optimizers["denoiser"] = self.denoiser_step.optimizer
        self._corruption: Gaussian | None = None

    def step(self, batches: Iterator[Batch] | None, noise: Noise) -> Mapping[str, Tensor]:
        """See `Method.step`."""
        assert batches is not None
        return {**super().step(batches, noise), **self._denoiser_step(next(batches), noise)}

    def _generator_step(self, batches: Iterator[Batch], noise: Noise) -> tuple[Tensor, Tensor]:
        with as_it_is(self.critic):
            features = self.scored.features(self._draw(noise))
            outputs = everywhere(self.scored.outputs(features), self.ranks)
            self.denoiser.eval()
            with torch.no_grad():
                denoised = self.denoiser(features)
            self.denoiser.train()
            errors = everywhere(denoising_error(features, denoised), self.ranks)
            loss = denoising_generator(outputs, errors, **self.weights)
            skipped = self._take_generator(loss / self.ranks.size)
        return loss.detach(), skipped

    def _denoiser_step(self, batch: Batch, noise: Noise) -> Mapping[str, Tensor]:
        with torch.no_grad():
            features = self.scored.features(batch.images.to(self.dtype))
        if self._corruption is None:  # one object: `DrawnAhead` knows it by that
            self._corruption = Gaussian(features.shape[1])
        corruption = noise.draw(self._corruption, self.batch_size)[self.share].to(self.dtype)
        before = [kept.clone() for kept in self.denoiser.buffers()]
        errors = denoising_error(features, self.denoiser(features + self.deviation * corruption))
        loss = everywhere(errors, self.ranks).mean()
        skipped = self.denoiser_step.take(loss / self.ranks.size)
        with torch.no_grad():  # running statistics, like weights, stay as they were after a step that was skipped
            for old, kept in zip(before, self.denoiser.buffers(), strict=True):
                kept.copy_(torch.where(skipped > 0, old, kept))
        return {"denoiser_loss": loss.detach(), f"denoiser_{SKIPPED}": skipped}
