"""The training loop: steps, logs, samples, evaluations, checkpoints. What a step does is the method's business."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from engine.generation.networks import Generator
from engine.generation.priors import Noise
from engine.generation.sampling import Sampler
from engine.generation.saved import save_sampler
from engine.methods.protocols import SQUARED, Method
from engine.support.errors import InputError, Interrupted, WriteError, differences, one_line
from engine.support.pixels import grid, save_png
from engine.training.checkpoint import Checkpoint, flatten_optimizer, restore_optimizer
from engine.training.delivery import NoImages, Source
from engine.training.divergence import GENERATOR, Divergence, possessive
from engine.training.graphs import EAGER_STEPS, GraphedStep, Graphs
from engine.training.logbook import Logbook, NoLogbook
from engine.training.precision import peak_memory, repeatable, reset_peak_memory
from engine.training.profiling import StepProfiler
from engine.training.ranks import ALONE, Ranks
from engine.training.rates import Rates
from engine.training.run_folder import COLUMNS, RunFolder, saved_step
from engine.training.schedule import Schedule
from engine.training.stopping import StopRequest
from engine.training.weight_average import WeightAverages
from kernels import reference

if TYPE_CHECKING:
    from engine.training.validation import Evaluation, Validation

log = logging.getLogger("gfmn")

GRID = 64
"""Images of a sample grid."""
# Evaluations draw from seeds far apart from each other and from the run's own.
_EVALUATION_SEEDS = 1_000_003
_ASK_EVERY = 10  # steps at most between two questions whether a rank was told to stop
_RATES = {GENERATOR: "lr", "encoder": "lr", "codes": "code_lr"}
"""The setting of a network's learning rate, where it is not called after the network."""


class Trainer:
    """Trains a method and keeps its run folder.

    A run is reproducible bit for bit on one machine: z comes from a CPU generator with a seed, and a checkpoint holds
    everything that the next step depends on.

    Args:
        method: its modules are on the device.
        schedule: how long, and when what is written.
        run: the folder, already started.
        fingerprint: of extractor, precision and dataset; a checkpoint with another one is refused.
        validation: compares samples with the real images now and then; None for never.
        images: the real minibatches of a method that reads images; None for one that reads nothing.
        noise: the run's random numbers; None for the seed's, drawn when a step asks for them.
        kernels: the backend that watches losses.
        graphs: captures the step after a few, and replays it; None for a step that always runs as it is written. The
            result is the same. A method that is not `capturable` is never captured.
        ranks: the processes that take the steps together, and draw and judge samples. The first of them writes.
    """

    def __init__(
        self,
        method: Method,
        schedule: Schedule,
        run: RunFolder,
        fingerprint: Mapping[str, str],
        validation: Validation | None = None,
        *,
        images: Source | None = None,
        noise: Noise | None = None,
        kernels: ModuleType = reference,
        graphs: Graphs | None = None,
        ranks: Ranks = ALONE,
    ):
        if (method.reads == "images") == (images is None):
            raise ValueError(f"images: {'none' if images is None else 'some'} for a method that reads {method.reads}")
        self.method, self.schedule, self.run, self.ranks = method, schedule, run, ranks
        self.writes = ranks.rank == 0
        self.validation = validation
        self.fingerprint = {**fingerprint, **(validation.fingerprint if validation is not None else {})}
        generator = method.modules["generator"]
        assert isinstance(generator, Generator)
        self.generator = generator
        self.device = next(self.generator.parameters()).device
        self.ema = WeightAverages(self.generator, schedule.generator_ema, schedule.sample_ema)
        self.noise = Noise(schedule.seed, self.device) if noise is None else noise
        self.images: Source = NoImages() if images is None else images
        self.rates = Rates(method.optimizers, schedule.rates)
        self.step = 0
        self.divergence = Divergence(method.optimizers, self.device, schedule.max_skipped, kernels)
        self.graphed: GraphedStep | None = None
        if graphs is not None and method.capturable:
            self.graphed = GraphedStep(self._step, graphs, self._drop_gradients, ranks)

    def train_step(self) -> Mapping[str, Tensor]:
        """One step; returns the method's scalars on the device, and never waits for it.

        What is counted in Python is counted here, around what a graph replays. The scalars are overwritten by the next
        step.
        """
        self.noise.deliver()
        self.images.deliver()
        self._give_rates()
        scalars = self._step() if self.graphed is None else self.graphed()
        self.images.end()
        self.noise.draw_ahead()
        self.step += 1
        self.ema.count()
        return scalars

    def _step(self) -> Mapping[str, Tensor]:
        """What the device does in a step: no Python number in it changes, and what is kept changes in place."""
        self.noise.begin()
        self.images.begin()
        scalars = dict(self.method.step(self.images.batches, self.noise))
        self.ema.take_in(self.generator)
        self.divergence.take_in(scalars)
        return scalars

    def _drop_gradients(self) -> None:
        for optimizer in self.method.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def fit(self) -> None:
        """Train to the last step, then write the generator, a checkpoint and samples.

        Raises Interrupted after Ctrl-C and signals alike (a checkpoint has been written), InputError if the loss is not
        finite, or the gradient of many steps in a row, WriteError if something cannot be written (a checkpoint has been
        tried).
        """
        schedule, total, profiled = self.schedule, self.schedule.steps, self.schedule.profile
        profiler = StepProfiler(profiled, self.run.profile, 0 if self.graphed is None else EAGER_STEPS + 1)
        if profiled is not None and total - self.step < profiled + profiler.warmup:
            if self.step == 0:
                raise InputError(
                    "profile", f"{profiled} steps after {profiler.warmup} of warm-up are more than {total}"
                )
            profiler = StepProfiler(None, self.run.profile)  # a resumed run has no room for it any more
        if not self.writes:
            profiler = StepProfiler(None, self.run.profile)
        clock, clock_step = time.perf_counter(), self.step
        logbook = Logbook(self.run.metrics, self.run.tensorboard, self.step, total) if self.writes else NoLogbook()
        reset_peak_memory(self.device)
        graphed: Any = contextlib.nullcontext() if self.graphed is None else contextlib.closing(self.graphed)
        with StopRequest() as stop, self._saved_before_failing(), logbook, profiler, repeatable(), graphed:
            status = 0
            while self.step < total and not (status := self._stopped(stop)):
                scalars = self.train_step()
                logbook.advance()
                last = self.step == total
                evaluate = schedule.evaluate_every is not None and (last or self.step % schedule.evaluate_every == 0)
                evaluation: Evaluation | None = None
                if last or evaluate or self.step % schedule.log_every == 0:
                    self.check_finite()
                    now = time.perf_counter()
                    rate = (self.step - clock_step) * schedule.batch_size / (now - clock)
                    evaluation = self._evaluate() if evaluate else None
                    self._log(logbook, scalars, rate, evaluation)
                    clock, clock_step = time.perf_counter(), self.step
                elif self.device.type == "cpu":
                    self.check_finite()
                if self.step % schedule.sample_every == 0 or last:
                    self._sample(logbook)
                # After all else that this step writes: a resumed run goes on with the next step.
                if evaluation is not None and evaluation.best:
                    assert self.validation is not None
                    with self.validation.keep(evaluation):
                        self._save_best()
                if self.step % schedule.checkpoint_every == 0 or last:
                    self.save()
                profiler.step()
            if self.step < total:
                self.save()
                raise Interrupted(f"stopped at step {self.step} of {total}", status)

    def _stopped(self, stop: StopRequest) -> int:
        """The exit status of whichever rank was told to stop, 0 if none was.

        All of them ask after the same steps. Hosts wait for each other then, and for no device.
        """
        if self.ranks.size > 1 and self.device.type != "cpu" and self.step % min(self.schedule.log_every, _ASK_EVERY):
            return 0
        return max(self.ranks.counts(stop.status if stop.requested else 0))

    @contextlib.contextmanager
    def _saved_before_failing(self) -> Iterator[None]:
        """What cannot be written ends training, but a checkpoint may still find room; the error says which is there."""
        try:
            yield
        except (WriteError, OSError) as error:
            with contextlib.suppress(InputError):
                self.run.restore_config()
                self.save()
            if isinstance(error, OSError):
                raise
            paths = self.run.checkpoint_paths()
            kept = f"the last checkpoint is {paths[-1]}" if paths else "there is no checkpoint yet"
            raise WriteError(error.argument, f"{error.message}; stopped after step {self.step}, and {kept}") from error

    def sampler(self) -> Sampler:
        """The method's sampler, with a moving average of the generator if there is any."""
        sampler = self.method.sampler()
        average = self.ema.generator
        return sampler if average is None else dataclasses.replace(sampler, generator=average)

    def save(self) -> None:
        """Write a checkpoint, then the generator, unless something in them is not finite."""
        if not self.writes:
            return
        self._check_weights()
        self.run.save_checkpoint(self._checkpoint(), keep=self.schedule.keep_checkpoints)
        self.save_generator()

    def save_generator(self) -> None:
        """Write the generator alone."""
        if self.writes:
            if self.step == self.schedule.steps:
                self.run.drop_pictures()
            self._save_sampler(self.run.generator)

    def _save_best(self) -> None:
        if not self.writes:
            return
        self._check_weights()
        self._checkpoint().save(self.run.best_checkpoint)
        self._save_sampler(self.run.best_generator)

    def _save_sampler(self, path: Path) -> None:
        save_sampler(path, self.sampler(), self.step, self.fingerprint.get("data_content_sha256"))

    def _check_weights(self) -> None:
        self.check_finite()
        for name, module in self.method.modules.items():
            for key, tensor in module.state_dict().items():
                if not bool(tensor.isfinite().all()):
                    raise self._diverged(name, possessive(name, key), self.step)

    def _checkpoint(self) -> Checkpoint:
        method = self.method
        parts: dict[str, dict[str, Tensor]] = {name: module.state_dict() for name, module in method.modules.items()}
        parts |= {f"optimizer.{name}": flatten_optimizer(optimizer) for name, optimizer in method.optimizers.items()}
        parts |= {"rates": self.rates.state_dict(), "skipped": self.divergence.state_dict()}
        parts |= {"method": method.state_dict(), "random": self.noise.state_dict(), **self.ema.parts()}
        parts["images"] = self.images.state_dict()
        if self.validation is not None:
            parts["validation"] = self.validation.state_dict()
        return Checkpoint(self.step, parts, self.fingerprint)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Resume from `checkpoint`; InputError if it was made with other networks or other data."""
        if different := differences(checkpoint.fingerprint, self.fingerprint):
            raise InputError("checkpoint", f"{self.run.path} was made from something else: {different}")
        try:
            parts = checkpoint.parts
            for name, module in self.method.modules.items():
                module.load_state_dict(parts[name])
            for name, optimizer in self.method.optimizers.items():
                restore_optimizer(optimizer, parts[f"optimizer.{name}"])
            self.rates.load_state_dict(parts["rates"])
            with repeatable():  # a pool of samples is drawn again, to the bit
                self.method.load_state_dict(parts.get("method", {}))
            self.noise.load_state_dict(parts["random"])
            self.images.load_state_dict(parts.get("images", {}))
            self.ema.load_parts(parts)
            self.divergence.load_state_dict(parts.get("skipped", {}), checkpoint.step)
            if self.validation is not None and "validation" in parts:
                self.validation.load_state_dict(parts["validation"])
        except (KeyError, IndexError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise InputError(
                "checkpoint", f"that of step {checkpoint.step} does not fit this run's networks ({one_line(error)})"
            ) from None
        self.step = checkpoint.step
        self._give_rates()
        if self.graphed is not None:
            self.graphed.reset()
        if self.writes and saved_step(self.run.best_checkpoint) == self.step:
            # A kill may have come between that checkpoint and its generator.
            self._save_sampler(self.run.best_generator)

    def check_finite(self) -> None:
        """InputError that names the first step whose loss was NaN or infinite, or if too many steps in a row had such
        a gradient and were skipped. Waits for the device."""
        if (found := self.divergence.found(self.step)) is not None:
            raise self._diverged(*found)

    def _diverged(self, network: str, what: str, step: int) -> InputError:
        paths = self.run.checkpoint_paths()
        kept = f"the last good checkpoint is {paths[-1]}" if paths else "there is no checkpoint yet"
        # Its loss is of the critic's outputs, so that either may be the reason.
        whose = ", its own or the critic's," if network == GENERATOR and "critic" in self.method.optimizers else ","
        return InputError(
            _RATES.get(network, f"{network}_lr"),
            f"{what} became NaN or infinite at step {step}; {kept}; try a lower learning rate{whose} in another folder",
        )

    def _evaluate(self) -> Evaluation | None:
        """Compare samples of fresh z with the real images; lower the rate if it is time.

        Every rank draws its share of the samples; what was found is rank 0's to know.
        """
        assert self.validation is not None
        ranks, seed, sampler = self.ranks, self.schedule.seed, self._sampler_of_first()
        of_samples = (seed + _EVALUATION_SEEDS * self.step) % 2**63

        def draw(count: int) -> Tensor:
            return sampler.draw_pixels(count, of_samples, ranks.share(count, sampler.indivisible))

        evaluation = self.validation.evaluate(draw, self.step, seed)
        factor, *_ = self.ranks.meet(f"evaluated {self.step}", None if evaluation is None else evaluation.lr_factor)
        self._scale_lr(factor)
        return evaluation

    def _sampler_of_first(self) -> Sampler:
        """Rank 0's sampler, which is the one that is saved: ranks may have other running statistics."""
        sampler = self.sampler()
        if self.ranks.size == 1:
            return sampler
        generator = copy.deepcopy(sampler.generator)
        self.ranks.copy_first([*generator.parameters(), *generator.buffers()])
        return dataclasses.replace(sampler, generator=generator)

    @property
    def lr(self) -> float:
        """The generator's learning rate in the step that comes next."""
        return self.rates.of("generator", self.step)

    def _scale_lr(self, factor: float) -> None:
        self.rates.scale(factor)
        self._give_rates()

    def _give_rates(self) -> None:
        if self.rates.give(self.step) and self.graphed is not None:
            self.graphed.reset()  # a number of Python's is part of what was captured

    def _log(
        self, logbook: Logbook | NoLogbook, scalars: Mapping[str, Tensor], rate: float, evaluation: Evaluation | None
    ) -> None:
        entry: dict[str, Any] = {"step": self.step}
        for name, value in scalars.items():
            squared = name.endswith(SQUARED)
            entry[name.removesuffix(SQUARED)] = math.sqrt(value.item()) if squared else value.item()
        entry |= {"images_per_second": rate, "peak_memory_bytes": peak_memory(self.device)}
        if evaluation is not None or self.schedule.rates.varies:
            entry["lr"] = self.lr
        if evaluation is not None and len(self.ema.averages) > 1:
            entry["sample_ema"] = self.ema.sampled
        entry |= self.divergence.totals()
        logbook.write(entry, None if evaluation is None else evaluation.metrics)

    def _sample(self, logbook: Logbook | NoLogbook) -> None:
        if not self.writes:
            return
        picture = self.picture()
        save_png(self.run.samples / f"step_{self.step:08d}.png", picture)
        logbook.picture("samples", picture, self.step)

    def picture(self) -> Tensor:
        """The grid of images of z that the run's seed decides, uint8 [3, H, W]."""
        return grid(self.sampler().draw(GRID, self.schedule.seed + 1), COLUMNS)
