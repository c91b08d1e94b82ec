"""Codes without an encoder: a table of them that is learnt with the generator (GLO), the nearest of many samples
(IMLE), and the one after the other (GLANN)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.comparison.image_losses import ImageErrors, pyramid_errors
from engine.generation.batch_norm import share_batches
from engine.generation.learnt import FittedGaussian, MappedNoise, MappingNetwork
from engine.generation.low_precision import LowPrecision
from engine.generation.networks import Generator, run_generator
from engine.generation.priors import Ball, Noise, Prior, check_radius
from engine.generation.sampling import Sampler
from engine.methods.everywhere import everywhere
from engine.methods.gradient_step import GradientStep, part_of
from engine.methods.pools import Pool, Rows, pixel_rows
from engine.methods.protocols import SKIPPED
from engine.methods.row_adam import RowAdam
from engine.support.errors import InputError
from engine.training.ranks import ALONE, Ranks
from pipelines import Batch

MAP_DECAY = 1e-5
"""Weight decay of the map from noise to codes (Hoshen et al. 2019)."""
_GENERATOR, _POOL, _STEPS = "generator.", "pool.", "steps"


class CodeTable(nn.Module):
    """One code in the ball of `radius` for each of `count` real images.

    Attributes:
        codes: [count, nz], a parameter. They begin at `start` (`principal_codes`), or uniform in the ball, by `seed`.

    Raises:
        InputError: "radius" isn't positive.
    """

    def __init__(
        self,
        count: int,
        nz: int,
        *,
        radius: float = 1.0,
        seed: int = 0,
        start: Tensor | None = None,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        check_radius(radius)
        self.radius = radius
        self.codes = nn.Parameter((Ball(nz, radius).draw(count, seed) if start is None else start).to(device))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As every module's; ValueError if the codes are those of other images, or of another length."""
        found, own = tuple(state_dict["codes"].shape), tuple(self.codes.shape)
        if found != own:
            raise ValueError(f"{found[0]} codes of {found[1]} dimensions, where this run has {own[0]} of {own[1]}")
        return super().load_state_dict(state_dict, strict, assign)

    @torch.no_grad()
    def project_(self, rows: Tensor) -> None:
        """In place, z ← z · min(1, radius / ‖z‖) for the codes of these numbers."""
        z = self.codes[rows]
        norm = z.norm(dim=1, keepdim=True)
        self.codes.index_copy_(0, rows, torch.where(norm > self.radius, z * (self.radius / norm), z))


class _Pulling:
    """The generator's part: G(z_n) is pulled to x_n, by 1/N Σ_n errors(G(z_n), x_n).

    Args:
        generator: on its device, in training mode.
        reconstruction: errors of drawn and real images.
        batch_size: N, over all ranks.
        amp_dtype, recompute_generator, ranks, global_batches, options: as in `Glo`.
    """

    def __init__(
        self,
        generator: Generator,
        reconstruction: ImageErrors,
        batch_size: int,
        *,
        amp_dtype: torch.dtype | None = None,
        recompute_generator: bool = False,
        ranks: Ranks = ALONE,
        global_batches: bool = True,
        **options: Any,
    ):
        self.generator, self.reconstruction, self.ranks = generator, reconstruction, ranks
        self.share, self.recompute = ranks.share(batch_size), recompute_generator
        if ranks.size > 1 and global_batches:
            share_batches(generator, ranks)
        weight = next(generator.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.low = None if amp_dtype is None else LowPrecision(generator, amp_dtype)
        self.update = GradientStep(generator, scaled=amp_dtype is torch.float16, ranks=ranks, **options)

    def take(self, z: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and whether the step was skipped; a leaf z gets its gradient, of this rank's rows alone.

        Args:
            z: [n, nz], of this rank's share.
            real: its images.
        """
        if self.low is None:
            drawn = run_generator(self.generator, z, recompute=self.recompute)
        else:
            drawn = self.low.images(z, recompute=self.recompute).to(self.dtype)
        errors = self.reconstruction(drawn, real).to(self.dtype)
        loss = everywhere(errors.unsqueeze(1), self.ranks).mean()
        scale = self.update.scaler.scale(torch.ones_like(loss))  # before the step, which may change it
        collect, leaf = None if self.low is None else self.low.collect_gradients, z if z.requires_grad else None
        skipped = self.update.take(loss / self.ranks.size, collect, leaf)
        if z.grad is not None:
            z.grad /= scale
        return loss.detach(), skipped


class Glo:
    """Generative latent optimization (Bojanowski et al. 2018): a code for each real image, learnt with the generator.

        min over θ and all z_i in the ball  of  1/N Σ_i errors(G(z_i; θ), x_i)

    A step has the codes of its images, which have an Adam of their own (`RowAdam`) and are projected to the ball after
    it. Images are drawn from a Gaussian that is fitted to the codes learnt so far, before the first to all.

    Ranks have equal weights and each its share of images. Images are shuffled over all ranks, anew in every epoch: any
    rank may have any, and a code that only one rank kept would have to travel to whoever has its image, with its
    moments, and back. So every rank keeps all M codes, and the gradients of a step's N codes travel, N · nz numbers.
    Codes and moments take 12 · M · nz bytes of each rank: 156 MB for CelebA's 202,599 images and nz 64.

    Args:
        generator: on its device, in training mode.
        table: one code for each real image, on the same device.
        reconstruction: errors of drawn and real images.
        batch_size: N, over all ranks.
        images: how many real images there are; None for as many as codes.
        code_lr: of the codes' Adam, whose β are those of `betas`.
        lr, betas, optimizer, weight_decay, clip_grad: of the generator; see `GradientStep`.
        amp_dtype: low precision of the generator, None for its own.
        recompute_generator: compute the generator's activations again in backward instead of keeping them.
        batch_statistics: see `Sampler`.
        ranks: the processes that share the minibatch.
        global_batches: whether the generator's BatchNorm has the batches of all ranks, or each its own.

    Attributes:
        capturable: never; the images' numbers are the host's.

    Raises:
        InputError: "codes", if they are not the generator's, or not as many as there are images.
    """

    reads: Literal["nothing", "images"] = "images"
    capturable = False

    def __init__(
        self,
        generator: Generator,
        table: CodeTable,
        *,
        reconstruction: ImageErrors = pyramid_errors,
        batch_size: int,
        images: int | None = None,
        code_lr: float = 1e-2,
        lr: float,
        betas: tuple[float, float] = (0.5, 0.999),
        batch_statistics: bool = False,
        ranks: Ranks = ALONE,
        **options: Any,
    ):
        count, nz = table.codes.shape
        if nz != generator.spec.nz:
            raise InputError("codes", f"have {nz} dimensions, and the generator takes {generator.spec.nz}")
        if images is not None and images != count:
            raise InputError("codes", f"are those of {count} images, and the data set has {images}")
        self.generator, self.table, self.ranks = generator, table, ranks
        self.batch_statistics = batch_statistics
        self.pulling = _Pulling(generator, reconstruction, batch_size, lr=lr, betas=betas, ranks=ranks, **options)
        self.modules = nn.ModuleDict({"generator": generator, "codes": table})
        self.row_adam = RowAdam(table.codes, code_lr, betas=betas)
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "generator": self.pulling.update.optimizer,
            "codes": self.row_adam,
        }

    def step(self, batches: Iterator[Batch] | None, noise: Noise) -> Mapping[str, Tensor]:
        """See `Method.step`."""
        assert batches is not None
        batch = next(batches)
        rows, own = self.rows_of(batch)
        z = self.table.codes.detach()[rows[own]].requires_grad_()
        loss, skipped = self.pulling.take(z, batch.images.to(self.pulling.dtype))
        assert z.grad is not None
        gradient = z.grad.new_zeros(len(rows), z.shape[1])
        gradient[own] = z.grad
        self.ranks.sum_([gradient])
        bad = (~gradient.isfinite().all()).to(skipped.dtype)
        self.row_adam.take(rows, gradient, torch.maximum(skipped, bad))
        self.table.project_(rows)
        return {"loss": loss, SKIPPED: skipped, f"codes_{SKIPPED}": bad}

    def rows_of(self, batch: Batch) -> tuple[Tensor, slice]:
        """The numbers of the images of all ranks [N] on the device, and which of them are this rank's."""
        rows, own = self.ranks.gather(batch.indices.to(self.table.codes.device))
        return rows, own

    def sampler(self) -> Sampler:
        """See `Method.sampler`. Waits for the device.

        What no gradient has moved is no code of an image: those that no minibatch has had yet, or of unreadable files.
        """
        codes, learnt = self.table.codes.detach(), self.row_adam.moved()
        prior = FittedGaussian.of(codes[learnt] if bool(learnt.any()) else codes)
        return Sampler(prior, self.generator, self.batch_statistics, codes=codes)

    def state_dict(self) -> dict[str, Tensor]:
        """The loss scaling's state where there is one."""
        return {_GENERATOR + name: kept for name, kept in self.pulling.update.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        self.pulling.update.load_state_dict(part_of(state, _GENERATOR))


class Imle:
    """Implicit maximum likelihood (Li & Malik 2018): each real image pulls the nearest of a pool of samples.

        min over θ of  1/N Σ_i errors(G(z_i; θ), x_i)      z_i = argmin over the pool's z of ‖r(G(z)) − r(x_i)‖²

    Exact nearest neighbours, all of the pool compared. The pool is drawn anew every `pool_every` steps, by the
    generator as it is then, with running statistics. So every real image has a sample near it: no mode is left out.

    Args:
        prior: the law of z.
        pool, pool_every: samples in the pool, and steps between two of them.
        kernels: the backend that finds the nearest; see `Pool`.
        rows: r, what of images is compared to find the nearest.
        generator, reconstruction, batch_size, lr, options: as in `Glo`.

    Raises:
        InputError: "pool" or "kernels", as of `Pool`.
    """

    reads: Literal["nothing", "images"] = "images"
    capturable = False

    def __init__(
        self,
        generator: Generator,
        prior: Prior,
        *,
        reconstruction: ImageErrors = pyramid_errors,
        rows: Rows = pixel_rows,
        pool: int,
        pool_every: int,
        kernels: str | ModuleType = "auto",
        batch_size: int,
        batch_statistics: bool = False,
        ranks: Ranks = ALONE,
        **options: Any,
    ):
        self.generator, self.prior, self.ranks, self.batch_statistics = generator, prior, ranks, batch_statistics
        self.pool = Pool(
            generator,
            prior,
            size=pool,
            every=pool_every,
            rows=rows,
            batch=batch_size,
            at_least=batch_size,
            ranks=ranks,
            kernels=kernels,
        )
        self.pulling = _Pulling(generator, reconstruction, batch_size, ranks=ranks, **options)
        self.modules = nn.ModuleDict({"generator": generator})
        self.optimizers: dict[str, torch.optim.Optimizer] = {"generator": self.pulling.update.optimizer}

    def step(self, batches: Iterator[Batch] | None, noise: Noise) -> Mapping[str, Tensor]:
        """See `Method.step`. "nearest" is the mean squared distance of rows to the nearest ones."""
        assert batches is not None
        self.pool.begin(noise)
        real = next(batches).images.to(self.pulling.dtype)
        rows, own = self.ranks.gather(self.pool.rows(real))
        z, squares = self.pool.nearest(rows)
        loss, skipped = self.pulling.take(z[own].to(self.pulling.dtype), real)
        return {"loss": loss, "nearest": squares.mean(), SKIPPED: skipped}

    def sampler(self) -> Sampler:
        """See `Method.sampler`."""
        return Sampler(self.prior, self.generator, self.batch_statistics)

    def state_dict(self) -> dict[str, Tensor]:
        """The pool, and the loss scaling's state where there is one."""
        pool = {_POOL + name: kept for name, kept in self.pool.state_dict().items()}
        return {**pool, **{_GENERATOR + name: kept for name, kept in self.pulling.update.state_dict().items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`; ValueError if the state is another method's."""
        self.pulling.update.load_state_dict(part_of(state, _GENERATOR))
        self.pool.load_state_dict(part_of(state, _POOL))


class Glann:
    """GLANN (Hoshen et al. 2019): GLO, then with generator and codes as they are IMLE from noise to codes.

        min over T's weights of  1/N Σ_i ‖T(e_i) − z_i‖²      e_i = argmin over the pool's e of ‖T(e) − z_i‖²

    Images are G(T(e)); while GLO learns they are its own.

    Args:
        glo: the first phase.
        mapping: T, noise [N, K] → codes [N, nz].
        noise: the law of e.
        glo_steps: steps of the first phase.
        pool, pool_every, kernels: as in `Imle`.
        batch_size: N, over all ranks.
        lr, betas: of T's AdamW, whose weight decay is `MAP_DECAY`. The authors' code adds 1e-5 · w to the gradients of
            Adam instead.

    Raises:
        InputError: "pool" or "kernels", as of `Pool`.
    """

    reads: Literal["nothing", "images"] = "images"
    capturable = False

    def __init__(
        self,
        glo: Glo,
        mapping: MappingNetwork,
        noise: Prior,
        *,
        glo_steps: int,
        pool: int,
        pool_every: int,
        kernels: str | ModuleType = "auto",
        batch_size: int,
        lr: float,
        betas: tuple[float, float] = (0.5, 0.999),
    ):
        self.glo, self.mapping, self.noise, self.glo_steps = glo, mapping, noise, glo_steps
        self.pool = Pool(
            mapping,
            noise,
            size=pool,
            every=pool_every,
            rows=nn.Flatten(),
            batch=min(pool, 1 << 14),  # the hidden layers of so many rows are small
            at_least=batch_size,
            ranks=glo.ranks,
            kernels=kernels,
        )
        self.update = GradientStep(
            mapping, lr=lr, betas=betas, optimizer="adamw", weight_decay=MAP_DECAY, ranks=glo.ranks
        )
        self.modules = nn.ModuleDict({**glo.modules, "mapping": mapping})
        self.optimizers = {**glo.optimizers, "mapping": self.update.optimizer}
        self.steps = 0

    def step(self, batches: Iterator[Batch] | None, noise: Noise) -> Mapping[str, Tensor]:
        """See `Method.step`. The loss is GLO's, then that of codes; the second phase looks at no image."""
        self.steps += 1
        if self.steps <= self.glo_steps:
            return self.glo.step(batches, noise)
        assert batches is not None
        ranks = self.glo.ranks
        self.pool.begin(noise)
        rows, own = self.glo.rows_of(next(batches))
        codes = self.glo.table.codes.detach()[rows]
        e, _ = self.pool.nearest(codes)
        errors = (self.mapping(e[own].to(codes.dtype)) - codes[own]).square().sum(dim=1, keepdim=True)
        loss = everywhere(errors, ranks).mean()
        skipped = self.update.take(loss / ranks.size)
        return {"loss": loss.detach(), "mapping_loss": loss.detach(), f"mapping_{SKIPPED}": skipped}

    def sampler(self) -> Sampler:
        """See `Method.sampler`: GLO's in the first phase, then mapped noise."""
        glo = self.glo
        if self.steps <= self.glo_steps:
            return glo.sampler()
        prior, codes = MappedNoise(self.mapping, self.noise), glo.table.codes.detach()
        return Sampler(prior, glo.generator, glo.batch_statistics, codes=codes)

    def state_dict(self) -> dict[str, Tensor]:
        """GLO's state, the pool, and the number of steps."""
        pool = {_POOL + name: kept for name, kept in self.pool.state_dict().items()}
        return {**self.glo.state_dict(), **pool, _STEPS: torch.tensor(self.steps)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`; ValueError if the state is another method's."""
        self.glo.load_state_dict(state)
        self.pool.load_state_dict(part_of(state, _POOL))
        self.steps = int(state[_STEPS])
