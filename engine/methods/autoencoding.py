"""Autoencoding: an encoder and a decoder that reproduce real images, and codes that are drawn to a prior.

The decoder is the generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.comparison.code_losses import kl_to_normal, root_mmd_of_codes, wae_mmd
from engine.comparison.games import GAMES
from engine.comparison.image_losses import ImageErrors, pixel_errors
from engine.generation.batch_norm import share_batches
from engine.generation.learnt import FittedGaussian, MappedNoise, MappingNetwork
from engine.generation.low_precision import LowPrecision
from engine.generation.networks import Generator, run_generator
from engine.generation.priors import Gaussian, Noise, Prior
from engine.generation.sampling import Sampler
from engine.methods.adversarial import as_it_is
from engine.methods.everywhere import everywhere
from engine.methods.gradient_step import GradientStep, part_of
from engine.methods.protocols import SKIPPED
from engine.representation.encoders import CodeCritic, Encoder
from engine.support.errors import InputError
from engine.training.ranks import ALONE, Ranks
from pipelines import Batch

DIVERGENCES = ("none", "kl", "mmd", "gan")
_RECENT = 2048
"""Codes that a Gaussian is fitted to."""


class Autoencoding:
    """One step of an encoder e and a decoder G together (`engine.methods.protocols`):

        L = 1/N Σ_n errors(G(z_n), x_n) + weight · divergence

    with z = e(x), or of a gaussian encoder z = μ(x) + σ(x) ε. The divergences, by name:

        none  the autoencoder. Images are drawn from a Gaussian that is fitted to the last 2,048 codes, or the last
              minibatch if that is larger.
        kl    1/N Σ_n KL(N(μ(x_n), σ(x_n)) ‖ N(0, I)), the variational autoencoder (Kingma & Welling 2014).
        mmd   MMD² of the minibatch's codes and as many draws of the prior (WAE-MMD, Tolstikhin et al. 2018).
        gan   the non-saturating loss by a critic that tells codes from draws of the prior, and takes a step before
              (WAE-GAN, the adversarial autoencoder).

    Ranks have equal weights and each its share of images. Errors of images and codes travel (`everywhere`), and
    gradients are added: W ranks take the step of one.

    Args:
        generator, encoder: on one device, in training mode; one optimizer trains both.
        prior: the law of codes.
        divergence: of `DIVERGENCES`.
        weight: of the divergence.
        reconstruction: errors of drawn and real images.
        code_critic: of "gan".
        batch_size: N, over all ranks.
        lr, clip_grad: of both networks; see `GradientStep`.
        betas, optimizer, weight_decay: of these and the critic of codes.
        critic_lr: of the critic of codes; None for half of `lr`, as published.
        amp_dtype: low precision of encoder and decoder, None for their own.
        recompute_generator: compute the decoder's activations again in backward instead of keeping them.
        batch_statistics: see `Sampler`.
        ranks: the processes that share the minibatch.
        global_batches: whether the decoder's BatchNorm has the batches of all ranks, or each its own. The encoder's
            has those of all.

    Raises:
        InputError: "divergence", if it isn't known or needs another encoder; "prior", if codes can't be drawn to it.
    """

    reads: Literal["nothing", "images"] = "images"
    capturable = True

    def __init__(
        self,
        generator: Generator,
        encoder: Encoder,
        prior: Prior,
        divergence: str = "none",
        *,
        weight: float = 1.0,
        reconstruction: ImageErrors = pixel_errors,
        code_critic: CodeCritic | None = None,
        batch_size: int,
        lr: float,
        betas: tuple[float, float] = (0.5, 0.999),
        optimizer: str = "adam",
        weight_decay: float | None = None,
        clip_grad: float | None = None,
        critic_lr: float | None = None,
        amp_dtype: torch.dtype | None = None,
        recompute_generator: bool = False,
        batch_statistics: bool = False,
        ranks: Ranks = ALONE,
        global_batches: bool = True,
    ):
        _check(divergence, encoder, prior, code_critic)
        self.generator, self.encoder, self.prior, self.code_critic = generator, encoder, prior, code_critic
        self.divergence, self.weight, self.reconstruction = divergence, weight, reconstruction
        self.batch_size, self.ranks, self.share = batch_size, ranks, ranks.share(batch_size)
        self.recompute_generator, self.batch_statistics = recompute_generator, batch_statistics
        if ranks.size > 1:
            share_batches(encoder, ranks)
            if global_batches:
                share_batches(generator, ranks)
        both = nn.ModuleDict({"generator": generator, "encoder": encoder})
        weights = next(encoder.parameters())
        self.device, self.dtype = weights.device, weights.dtype
        self.low = None if amp_dtype is None else LowPrecision(generator, amp_dtype)
        scaled = amp_dtype is torch.float16
        options: dict[str, Any] = {"betas": betas, "optimizer": optimizer, "weight_decay": weight_decay, "ranks": ranks}
        of_both = GradientStep(both, lr=lr, clip_grad=clip_grad, scaled=scaled, **options)
        self.updates, self.modules = {"generator": of_both}, both
        if code_critic is not None:
            self.modules = nn.ModuleDict({**both, "code_critic": code_critic})
            critic_lr = lr / 2 if critic_lr is None else critic_lr
            self.updates["code_critic"] = GradientStep(code_critic, lr=critic_lr, **options)
        self.optimizers = {name: update.optimizer for name, update in self.updates.items()}
        self.game = GAMES["nonsaturating"]()
        self.epsilon = Gaussian(encoder.nz)  # one object: `DrawnAhead` knows it by that
        rows = max(_RECENT, batch_size) if divergence == "none" else 0
        self.recent = torch.zeros(rows, encoder.nz, device=self.device)
        self.seen = torch.zeros((), dtype=torch.int64, device=self.device)

    def step(self, batches: Iterator[Batch] | None, noise: Noise) -> Mapping[str, Tensor]:
        """See `Method.step`. Besides the loss its parts: "reconstruction", and "divergence" before its weight."""
        assert batches is not None
        real = next(batches).images.to(self.dtype)
        codes, terms = self._encode(real, noise)
        errors = self.reconstruction(self._decode(codes), real)
        parts = everywhere(torch.stack([errors.to(self.dtype), *terms], dim=1), self.ranks).mean(dim=0)
        found: dict[str, Tensor] = {}
        loss = parts[0]
        if self.divergence == "none":
            self._remember(everywhere(codes.detach(), self.ranks))
        else:
            divergence = parts[1] if self.divergence == "kl" else self._of_all(codes, noise, found)
            found["divergence"] = divergence.detach()
            loss = loss + self.weight * divergence
        after = None if self.low is None else self.low.collect_gradients
        skipped = self.updates["generator"].take(loss / self.ranks.size, after)
        return {"loss": loss.detach(), "reconstruction": parts[0].detach(), **found, SKIPPED: skipped}

    def _encode(self, real: Tensor, noise: Noise) -> tuple[Tensor, list[Tensor]]:
        """Codes [n, nz], and what the divergence knows of each image."""
        if not self.encoder.gaussian:
            return self.encoded(self.encoder, real), []
        mean, log_variance = self.encoded(self._law, real).chunk(2, dim=1)
        epsilon = noise.draw(self.epsilon, self.batch_size)[self.share].to(self.dtype)
        return mean + (log_variance / 2).exp() * epsilon, [kl_to_normal(mean, log_variance)]

    def _law(self, real: Tensor) -> Tensor:
        return torch.cat(self.encoder.law(real), dim=1)

    def encoded(self, network: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
        """What the encoder says of images, in its weights' dtype whatever its arithmetic's."""
        if self.low is None:
            return network(real)
        with torch.autocast(self.device.type, self.low.dtype):
            found = network(real)
        return found.to(self.dtype)

    def _decode(self, codes: Tensor) -> Tensor:
        recompute = self.recompute_generator
        if self.low is None:
            return run_generator(self.generator, codes, recompute=recompute)
        return self.low.images(codes, recompute=recompute).to(self.dtype)

    def _of_all(self, codes: Tensor, noise: Noise, found: dict[str, Tensor]) -> Tensor:
        """The divergence of all ranks' codes from the prior; the critic's step before it, with its scalars in
        `found`."""
        codes = everywhere(codes, self.ranks)
        z = noise.draw(self.prior, self.batch_size).to(self.dtype)
        if self.code_critic is None:
            return wae_mmd(codes, z, coordinate_variance(self.prior))
        loss = self.game.critic_loss(self.code_critic(z), self.code_critic(codes.detach()))
        found[f"code_critic_{SKIPPED}"] = self.updates["code_critic"].take(loss / self.ranks.size)
        found["code_critic_loss"] = loss.detach()
        with as_it_is(self.code_critic):
            score = self.code_critic(codes)
        return self.game.generator_loss(score, score)

    @torch.no_grad()
    def _remember(self, codes: Tensor) -> None:
        """The last rows of `recent` are the last codes."""
        self.recent.copy_(torch.cat((self.recent[len(codes) :], codes.to(self.recent.dtype))))
        self.seen += len(codes)

    def sampler(self) -> Sampler:
        """See `Method.sampler`. Waits for the device, if a Gaussian is to be fitted."""
        return Sampler(self._law_of_codes(), self.generator, self.batch_statistics, self.encoder)

    def _law_of_codes(self) -> Prior:
        count = min(int(self.seen), len(self.recent)) if self.divergence == "none" else 0
        return FittedGaussian.of(self.recent[-count:]) if count > 1 else self.prior

    def state_dict(self) -> dict[str, Tensor]:
        """The codes that are remembered, and the loss scaling's state where there is one."""
        state = {"recent": self.recent, "seen": self.seen}
        for network, update in self.updates.items():
            state |= {f"{network}.{name}": kept for name, kept in update.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`; ValueError if the state is another method's."""
        if state["recent"].shape != self.recent.shape:
            raise ValueError(f"recent: expected {list(self.recent.shape)}, got {list(state['recent'].shape)}")
        self.recent.copy_(state["recent"])
        self.seen.copy_(state["seen"])
        for network, update in self.updates.items():
            update.load_state_dict(part_of(state, f"{network}."))


class CodeMatching:
    """GMMN with an autoencoder (Li et al. 2015, section 4): first the autoencoder alone; then its networks stay as they
    are, and one learns that maps noise to codes like those of real images, by √MMD² (`root_mmd_of_codes`).

    Args:
        autoencoding: with the divergence "none". Its options are those of both phases.
        mapping: T, noise [N, K] → codes [N, nz].
        noise: the law of T's noise.
        autoencoder_steps: steps of the first phase.
        bandwidths: σ of `root_mmd_of_codes`, in units of the root of codes' mean squared distance.
        lr, betas, optimizer, weight_decay: of T.

    Attributes:
        capturable: never; the two phases have different steps.
    """

    reads: Literal["nothing", "images"] = "images"
    capturable = False

    def __init__(
        self,
        autoencoding: Autoencoding,
        mapping: MappingNetwork,
        noise: Prior,
        *,
        autoencoder_steps: int,
        bandwidths: Sequence[float],
        lr: float,
        betas: tuple[float, float] = (0.5, 0.999),
        optimizer: str = "adam",
        weight_decay: float | None = None,
    ):
        self.autoencoding, self.mapping, self.noise = autoencoding, mapping, noise
        self.autoencoder_steps, self.bandwidths = autoencoder_steps, tuple(bandwidths)
        options: dict[str, Any] = {"betas": betas, "optimizer": optimizer, "weight_decay": weight_decay}
        self.update = GradientStep(mapping, lr=lr, ranks=autoencoding.ranks, **options)
        self.modules = nn.ModuleDict({**autoencoding.modules, "mapping": mapping})
        self.optimizers = {**autoencoding.optimizers, "mapping": self.update.optimizer}
        self.steps = 0

    def step(self, batches: Iterator[Batch] | None, noise: Noise) -> Mapping[str, Tensor]:
        """See `Method.step`. The loss is the autoencoder's, then that of codes."""
        self.steps += 1
        if self.steps <= self.autoencoder_steps:
            return self.autoencoding.step(batches, noise)
        assert batches is not None
        own, ranks = self.autoencoding, self.autoencoding.ranks
        real = next(batches).images.to(own.dtype)
        with torch.no_grad():
            codes = everywhere(own.encoded(own.encoder.eval(), real), ranks)
        z = noise.draw(self.noise, own.batch_size)[own.share].to(own.dtype)
        loss = root_mmd_of_codes(everywhere(self.mapping(z), ranks), codes, self.bandwidths)
        skipped = self.update.take(loss / ranks.size)
        return {"loss": loss.detach(), "mapping_loss": loss.detach(), f"mapping_{SKIPPED}": skipped}

    def sampler(self) -> Sampler:
        """See `Method.sampler`: mapped noise, or in the first phase the autoencoder's."""
        if self.steps <= self.autoencoder_steps:
            return self.autoencoding.sampler()
        own = self.autoencoding
        return Sampler(MappedNoise(self.mapping, self.noise), own.generator, own.batch_statistics, own.encoder)

    def state_dict(self) -> dict[str, Tensor]:
        """The autoencoder's state, and the number of steps."""
        return {**self.autoencoding.state_dict(), "steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`; ValueError if the state is another method's."""
        self.steps = int(state["steps"])
        self.autoencoding.load_state_dict(state)


def coordinate_variance(prior: Prior) -> float:
    """The variance of each coordinate of a draw; InputError if the law has none that is known."""
    known = {"gaussian": 1.0, "uniform": 1 / 3}
    if prior.name == "ball":  # of radius r: r² / (nz + 2)
        return float(getattr(prior, "radius", 1.0)) ** 2 / (prior.nz + 2)
    if prior.name not in known:
        raise InputError("prior", f"{prior.name} is none that codes can be drawn to")
    return known[prior.name]


def _check(divergence: str, encoder: Encoder, prior: Prior, code_critic: CodeCritic | None) -> None:
    if divergence not in DIVERGENCES:
        raise InputError("divergence", f"{divergence!r} is not one of {', '.join(DIVERGENCES)}")
    if encoder.gaussian != (divergence == "kl"):
        raise InputError("divergence", f"kl is that of gaussian encoders alone, and this is {divergence}")
    if (code_critic is not None) != (divergence == "gan"):
        raise InputError("divergence", f"gan is that of a critic of codes alone, and this is {divergence}")
    if divergence == "kl" and prior.name != "gaussian":
        raise InputError("prior", f"kl is that to a gaussian, not {prior.name}")
    if divergence == "mmd":
        coordinate_variance(prior)
