"""The training loop: z → generator → images → moments → ∂L/∂images → Adam."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from engine.comparison.moment_matching import MomentMatching
from engine.configuration.command import Interrupted
from engine.configuration.config import Config
from engine.generation.networks import run_generator
from engine.generation.sampling import draw_z, sample, sample_pixels
from engine.support.errors import InputError
from engine.support.pixels import grid, save_png
from engine.training.checkpoint import Checkpoint, flatten_optimizer, restore_optimizer, save_generator
from engine.training.logbook import NoEvents, event_writer
from engine.training.profiling import WARMUP, StepProfiler
from engine.training.run_folder import RunFolder
from engine.training.stopping import StopRequest

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from engine.training.validation import Validation

log = logging.getLogger("gfmn")

GRID = 64
_NEVER = torch.iinfo(torch.int64).max


class Trainer:
    """Trains a generator against an objective and keeps its run folder.

    A run is reproducible bit for bit on one machine: z comes from a CPU generator seeded by the configuration, and a
    checkpoint holds everything that the next step depends on.

    Args:
        generator: z [N, nz] → images; on the device, in training mode.
        objective: its averager's state is part of the checkpoints.
        config: of the run.
        run: the folder, already started.
        fingerprint: of extractor, precision and dataset; a checkpoint with another one is refused.
        validation: compares samples with the real images now and then; None for never.
    """

    def __init__(
        self,
        generator: nn.Module,
        objective: MomentMatching,
        config: Config,
        run: RunFolder,
        fingerprint: dict[str, str],
        validation: Validation | None = None,
    ):
        self.generator, self.objective, self.config, self.run = generator, objective, config, run
        self.fingerprint = fingerprint
        self.validation = validation
        training = config.training
        self.device = objective.extractor.device
        self.optimizer = torch.optim.Adam(
            generator.parameters(), lr=training.lr, betas=(training.beta1, training.beta2), fused=True
        )
        self.ema: AveragedModel | None = None
        if training.generator_ema is not None:
            average = get_ema_multi_avg_fn(training.generator_ema)
            self.ema = AveragedModel(generator, multi_avg_fn=average, use_buffers=True)
        self.amp_dtype = amp_dtype(config)
        # Loss scaling is only needed where gradients underflow: float16.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype is torch.float16)
        self.random = torch.Generator().manual_seed(training.seed)
        self.fixed_z = draw_z(GRID, config.networks.nz, training.seed + 1).to(self.device)
        self.step = 0
        self.first_bad_step = torch.tensor(_NEVER, device=self.device)

    def train_step(self) -> Tensor:
        """One step; returns the loss on the device, and never waits for it."""
        training = self.config.training
        z = torch.randn(training.batch_size, self.config.networks.nz, generator=self.random)
        z = z.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            images = run_generator(self.generator, z, checkpoint=training.checkpoint_generator)
        loss = self.objective(images)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.generator)
        self.step += 1
        loss = loss.detach()
        bad = torch.where(loss.isfinite(), _NEVER, self.step)
        self.first_bad_step = torch.minimum(self.first_bad_step, bad)
        return loss

    def fit(self) -> None:
        """Train to the configured number of steps, then write the generator, samples and plots.

        Raises Interrupted after Ctrl-C (a checkpoint has been written), InputError if the loss is not finite.
        """
        total = self.config.training.steps
        output = self.config.output
        writer = event_writer(self.run.tensorboard, purge_step=self.step + 1)
        bar = tqdm(total=total, initial=self.step, desc="training", unit="step", disable=None, dynamic_ncols=True)
        plain = _PlainProgress(total, self.step) if bar.disable else None
        if output.profile is not None and total - self.step < output.profile + WARMUP:
            raise InputError(
                f"--profile: {output.profile} steps after {WARMUP} of warm-up are more than {total - self.step}"
            )
        clock, clock_step = time.perf_counter(), self.step
        profiler = StepProfiler(output.profile, self.run.profile)
        with StopRequest() as stop, contextlib.closing(writer), bar, profiler:
            while self.step < total and not stop.requested:
                loss = self.train_step()
                profiler.step()
                bar.update()
                last = self.step == total
                evaluate = self.validation is not None and self.validation.due(self.step, last)
                if last or evaluate or self.step % output.log_every == 0:
                    self.check_finite()
                    now = time.perf_counter()
                    rate = (self.step - clock_step) * self.config.training.batch_size / (now - clock)
                    entry = self._log(loss, rate, writer, self._evaluate() if evaluate else None)
                    clock, clock_step = time.perf_counter(), self.step
                    bar.set_postfix(loss=f"{entry['loss']:.4g}", images_per_second=f"{rate:.0f}")
                    if plain is not None:
                        plain.show(self.step, entry)
                elif self.device.type == "cpu":
                    self.check_finite()
                if self.step % output.sample_every == 0 or last:
                    self._sample(writer)
                if self.step % output.checkpoint_every == 0 or last:
                    self.save()
            if self.step < total:
                self.save()
                command = f"python -m engine.train --resume --out {self.run.path}"
                raise Interrupted(f"stopped at step {self.step} of {total}; go on with: {command}")

    def sampling_generator(self) -> nn.Module:
        """The module whose weights are sampled from: the moving average if there is one."""
        return self.generator if self.ema is None else self.ema.module

    @torch.no_grad()
    def sample(self, z: Tensor) -> Tensor:
        """Images [N, 3, H, W] of `z` [N, nz], float32, in [-1, 1]."""
        return sample(self.sampling_generator(), z, batch_statistics=self.config.networks.sample_bn == "batch")

    def save(self) -> None:
        """Write the generator and a checkpoint, unless something in them is not finite."""
        self._check_weights()
        self._save_generator(self.run.generator)
        self.run.save_checkpoint(self._checkpoint(), keep=self.config.output.keep_checkpoints)

    def _check_weights(self) -> None:
        self.check_finite()
        for name, tensor in self.generator.state_dict().items():
            if not bool(tensor.isfinite().all()):
                raise self._diverged(self.step, f"the generator's {name}")

    def _save_generator(self, path: Path) -> None:
        networks = self.config.networks
        save_generator(
            path,
            self.sampling_generator(),
            name=networks.generator,
            image_size=self.config.data.image_size,
            nz=networks.nz,
            step=self.step,
        )

    def _checkpoint(self) -> Checkpoint:
        parts = {
            "generator": self.generator.state_dict(),
            "optimizer": flatten_optimizer(self.optimizer),
            "objective": self.objective.state_dict(),
            "random": {"z": self.random.get_state()},
        }
        if self.ema is not None:
            parts["ema"] = self.ema.state_dict()
        if self.validation is not None:
            parts["validation"] = {**self.validation.state_dict(), "lr": torch.tensor(self.lr, dtype=torch.float64)}
        if self.scaler.is_enabled():
            state = self.scaler.state_dict()
            parts["scaler"] = {name: torch.tensor(float(value)) for name, value in state.items()}
        return Checkpoint(self.step, parts, self.fingerprint)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from `checkpoint`; InputError if it was made with other networks or other data."""
        differing = sorted(
            key for key in self.fingerprint if checkpoint.fingerprint.get(key) not in (None, self.fingerprint[key])
        )
        if differing:
            details = "; ".join(
                f"{key} was {checkpoint.fingerprint[key]}, is {self.fingerprint[key]}" for key in differing
            )
            raise InputError(f"--resume: {self.run.path} was made from something else: {details}")
        try:
            parts = checkpoint.parts
            self.generator.load_state_dict(parts["generator"])
            restore_optimizer(self.optimizer, parts["optimizer"])
            self.objective.load_state_dict(parts["objective"])
            self.random.set_state(parts["random"]["z"])
            if self.ema is not None:
                self.ema.load_state_dict(parts["ema"])
            if self.validation is not None and "validation" in parts:
                self.validation.load_state_dict(parts["validation"])
                self.optimizer.param_groups[0]["lr"] = float(parts["validation"]["lr"])
            if self.scaler.is_enabled():
                self.scaler.load_state_dict({name: value.item() for name, value in parts["scaler"].items()})
        except (KeyError, RuntimeError, ValueError) as error:
            path = self.run.checkpoint_path(checkpoint.step)
            raise InputError(f"{path}: does not fit this run's networks ({error})") from None
        self.step = checkpoint.step

    def check_finite(self) -> None:
        """InputError that names the first step whose loss was NaN or infinite. Waits for the device."""
        step = int(self.first_bad_step)
        if step != _NEVER:
            raise self._diverged(step, "the loss")

    def _diverged(self, step: int, what: str) -> InputError:
        paths = self.run.checkpoint_paths()
        kept = f"the last good checkpoint is {paths[-1]}" if paths else "there is no checkpoint yet"
        return InputError(f"{what} became NaN or infinite at step {step}; {kept}; try a lower --lr or --ama-lr")

    def _evaluate(self) -> dict[str, Any]:
        """Compare samples of fresh z with the real images; keep the best generator; lower the rate if it is time."""
        assert self.validation is not None
        seed = self.config.training.seed
        evaluation = self.validation.evaluate(
            lambda count: self._draw(count, seed + 1_000_003 * self.step), self.step, seed
        )
        self.optimizer.param_groups[0]["lr"] *= evaluation.lr_factor
        if evaluation.best:
            self._check_weights()
            self._save_generator(self.run.best_generator)
            self._checkpoint().save(self.run.best_checkpoint)
        return evaluation.metrics

    def _draw(self, count: int, seed: int) -> Tensor:
        z = draw_z(count, self.config.networks.nz, seed % 2**63).to(self.device)
        batches = self.config.networks.sample_bn == "batch"
        return sample_pixels(self.sampling_generator(), z, batch_statistics=batches)

    @property
    def lr(self) -> float:
        """The generator's learning rate now."""
        return self.optimizer.param_groups[0]["lr"]

    def _log(
        self, loss: Tensor, rate: float, writer: SummaryWriter | NoEvents, evaluation: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        loss_mean, loss_variance, mean_norm, variance_norm = self.objective.sums.tolist()
        entry = {
            "step": self.step,
            "loss": loss.item(),
            "loss_mean": loss_mean,
            "loss_variance": loss_variance,
            "difference_norm": math.sqrt(mean_norm + variance_norm),
            "images_per_second": rate,
            "peak_memory_bytes": peak_memory(self.device),
        }
        scalars = {name: value for name, value in entry.items() if name != "step"}
        if evaluation is not None:
            entry |= {"lr": self.lr, "evaluation": evaluation}
            numbers = {name: value for name, value in evaluation.items() if isinstance(value, float)}
            scalars |= {"lr": self.lr, **{f"evaluation/{name}": value for name, value in numbers.items()}}
        with self.run.metrics.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        for name, value in scalars.items():
            writer.add_scalar(name, value, self.step)
        return entry

    def _sample(self, writer: SummaryWriter | NoEvents) -> None:
        picture = grid(self.sample(self.fixed_z), columns=8)
        save_png(self.run.samples / f"step_{self.step:08d}.png", picture)
        writer.add_image("samples", picture, self.step)


class _PlainProgress:
    """Twenty lines over a run, where a bar cannot be drawn."""

    def __init__(self, total: int, step: int):
        self.total, self.every = total, max(total // 20, 1)
        self.next = step + 1
        self.start, self.first = time.perf_counter(), step

    def show(self, step: int, entry: dict[str, Any]) -> None:
        if step < self.next and step != self.total:
            return
        self.next = step + self.every
        left = (time.perf_counter() - self.start) / (step - self.first) * (self.total - step)
        log.info(
            "step %d/%d  loss %.4g  %.0f images/s  %.0f s left",
            step,
            self.total,
            entry["loss"],
            entry["images_per_second"],
            left,
        )


def amp_dtype(config: Config) -> torch.dtype | None:
    """The low precision of the run, None without `--amp`."""
    if not config.training.amp:
        return None
    return torch.bfloat16 if config.training.amp_dtype == "bf16" else torch.float16


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on CUDA, the process's largest resident size elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
