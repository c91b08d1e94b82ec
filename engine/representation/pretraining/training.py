"""The training loop of pretraining: one cycle of the learning rate, the same bits for the same seed on one machine."""

from __future__ import annotations

import json
import logging
import math
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.generation.batch_norm import share_batches
from engine.representation.architectures import find_architecture
from engine.representation.pretraining.images import Augmentation, TrainingImages, open_images
from engine.representation.pretraining.recipe import Recipe, one_cycle
from engine.representation.pretraining.result import PretrainResult
from engine.representation.pretraining.shares import Rows
from engine.representation.pretraining.tasks import Task, make_task
from engine.support.errors import InputError, Interrupted, differences, one_line
from engine.support.files import read_safetensors, save_safetensors
from engine.training.checkpoint import flatten_optimizer, restore_optimizer
from engine.training.precision import repeatable
from engine.training.progress import Progress
from engine.training.ranks import ALONE, Ranks
from engine.training.stopping import StopRequest
from pipelines import ImageDataset, ImageLoader, sent
from pipelines.dataset import EncodedDataset

log = logging.getLogger("gfmn")

_CHECKPOINT = "gfmn-pretraining-1"
_LOG_EVERY = 10
_SEED_STRIDE = 1_000_003
"""A prime, so that the random numbers of (seed, step) meet those of another seed only after a million steps."""


class UnfitCheckpoint(InputError):
    """A checkpoint of pretraining that is damaged, or of a run with other settings."""


def pretrain(
    architecture: str,
    dataset: ImageDataset,
    *,
    image_size: int | None = None,
    device: str | torch.device = "cpu",
    loader: str = "auto",
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    resume: bool = False,
    progress: bool = True,
    ranks: Ranks = ALONE,
    **recipe: Any,
) -> PretrainResult:
    """Train `architecture` on nine tenths of `dataset` and judge it by the last tenth.

    Classifiers are trained as in the paper's supplement: SGD with momentum, weight decay 5e-4, random crops and
    mirrored images; the learning rate rises and falls in one cycle.

    Args:
        architecture: a name of `engine.representation.architectures.ARCHITECTURES`.
        image_size: the dataset's; given only to be checked.
        device: where to train.
        loader: the decoder of images that are not in memory: "auto", "dali" or "torch".
        checkpoint: a file that is written every `checkpoint_seconds`, and after Ctrl-C. It stays when training ends;
            remove it once the result is saved.
        resume: continue from `checkpoint` if it exists, with the bits of an uninterrupted run.
        progress: show a progress bar on a terminal, and lines elsewhere.
        ranks: the processes that share every minibatch, and take the steps of a single one. All have the result; rank 0
            writes the checkpoint, from which any number of them can resume.
        recipe: the fields of `Recipe`: task, epochs or steps, batch_size, lr, momentum, weight_decay, crop_padding,
            flip, seed and amp.

    Raises InputError for settings that do not fit each other or the dataset, or that other ranks do not have, and if
    the loss stops being finite; UnfitCheckpoint for a checkpoint that cannot be continued; Interrupted after Ctrl-C
    (of any rank), once the checkpoint is written.
    """
    if image_size not in (None, dataset.image_size):
        raise InputError("image_size", f"is {image_size}, but the dataset's images have {dataset.image_size} pixels")
    settings = Recipe(**recipe)
    if settings.crop_padding > dataset.image_size:
        raise InputError("crop_padding", f"must be at most the images' {dataset.image_size} pixels")
    if settings.batch_size < ranks.size:
        raise InputError("batch_size", f"a minibatch of {settings.batch_size} is too small for {ranks.size} processes")
    task = _make_task(architecture, dataset, settings)
    fingerprint = dataset.fingerprint()
    _check_alike(ranks, zlib.crc32(repr((architecture, settings, sorted(fingerprint.items()))).encode()))
    source = open_images(
        dataset,
        settings.batch_size,
        seed=settings.seed,
        device=torch.device(device),
        loader=loader,
        progress=progress,
        ranks=ranks,
    )
    labels = None if dataset.labels is None else torch.from_numpy(dataset.labels)[: dataset.num_pictures]
    pretraining = Pretraining(task, source, labels, settings, device=device, ranks=ranks)
    metadata = _metadata(architecture, dataset, settings, task, pretraining.steps) | _decoding(dataset, loader)
    file = None if checkpoint is None else Path(checkpoint)
    if resume and file is not None and file.exists():
        pretraining.load(file, metadata)
    _check_begun(ranks, pretraining.step, file)
    pretraining.run(file, metadata, every=checkpoint_seconds, progress=progress)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in task.network.state_dict().items()}
    history = pretraining.history
    return PretrainResult(state, task.metric, history[-1]["validation"], history, metadata)


def _make_task(architecture: str, dataset: ImageDataset, recipe: Recipe) -> Task:
    """The task with its network, whose initial weights the seed decides; the caller's random state stays as it was."""
    try:
        found = find_architecture(architecture, dataset.image_size)
    except InputError as error:
        raise InputError("architecture", error.message) from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        task = make_task(recipe.task, found, dataset)
    task.lr = task.lr if recipe.lr is None else recipe.lr
    task.weight_decay = task.weight_decay if recipe.weight_decay is None else recipe.weight_decay
    if recipe.momentum is not None:
        if task.momentum is None:
            raise InputError("momentum", f"the task {recipe.task} is trained by Adam, which has none; leave it out")
        task.momentum = recipe.momentum
    return task


def _check_alike(ranks: Ranks, digest: int) -> None:
    """InputError unless all ranks have the same settings and images."""
    first, *others = ranks.meet("alike", digest)  # which waits for images that others download or digest only now
    for rank, other in enumerate(others, start=1):
        if other != first:
            raise InputError("dataset", f"process {rank} has other images or settings than process 0")


def _check_begun(ranks: Ranks, step: int, file: Path | None) -> None:
    """InputError unless all ranks go on from the same step."""
    first, *others = ranks.counts(step)
    for rank, other in enumerate(others, start=1):
        if other != first:
            raise InputError(
                file or "",
                f"process {rank} would go on from step {other}, process 0 from step {first}; let all processes read "
                "the same checkpoint",
            )


def _metadata(architecture: str, dataset: ImageDataset, recipe: Recipe, task: Task, steps: int) -> dict[str, str]:
    """Everything that decides the weights: saved with them, and compared when a run resumes."""
    fingerprint = dataset.fingerprint()
    return {
        "architecture": architecture,
        "task": recipe.task,
        "image_size": str(dataset.image_size),
        "seed": str(recipe.seed),
        "dataset": dataset.name,
        "dataset_sha256": str(fingerprint["content_sha256"]),
        "labels_sha256": str(fingerprint["labels_sha256"]),
        "steps": str(steps),
        "batch_size": str(recipe.batch_size),
        "lr": str(task.lr),
        **({} if task.momentum is None else {"momentum": str(task.momentum)}),
        "weight_decay": str(task.weight_decay),
        "crop_padding": str(recipe.crop_padding),
        "flip": str(recipe.flip),
        "amp": str(recipe.amp),
    }


def _decoding(dataset: ImageDataset, loader: str) -> dict[str, str]:
    """What decides the images of files besides their content, which images in memory have gone through already."""
    if not isinstance(dataset, EncodedDataset):
        return {}
    return {
        "center_crop": str(dataset.preprocessing.center_crop or "none"),
        "skip_bad_images": str(dataset.skip_bad_images),
        "loader": ImageLoader(dataset, 1, backend=loader).backend,
    }


def step_seed(seed: int, step: int) -> int:
    """Seed of the random numbers of one training step, the same whether the run was interrupted before it or not."""
    return (seed * _SEED_STRIDE + step) % 2**63


class Pretraining:
    """A task's network, its optimizer and its place in the run: everything that a checkpoint holds.

    Args:
        task: made for the data set.
        source: of the batches.
        labels: int64, one of every picture; None if there are none.
        recipe: rates are the task's by now, everything else is read here.
        device: where the network goes.
        ranks: the processes that take the steps together, and have the same network at every moment. The first writes.

    Attributes:
        step: training steps taken.
        steps: training steps of the whole run.
        history: one entry per epoch (see `PretrainResult`).
    """

    def __init__(
        self,
        task: Task,
        source: TrainingImages,
        labels: Tensor | None,
        recipe: Recipe,
        *,
        device: str | torch.device,
        ranks: Ranks = ALONE,
    ):
        self.task, self.source, self.labels, self.ranks = task, source, labels, ranks
        self.augmentation = Augmentation(recipe.crop_padding, recipe.flip)
        self.steps, self.seed, self.amp = recipe.total_steps(source.steps_per_epoch), recipe.seed, recipe.amp
        self.device = torch.device(device)
        if ranks.size > 1:
            share_batches(task.module, ranks)
        task.module.to(self.device).to(memory_format=torch.channels_last)
        # One kernel for all parameters on a GPU. On a CPU the fused ones round differently, and gain nothing.
        shared: dict[str, Any] = {"weight_decay": task.weight_decay, "fused": self.device.type == "cuda"}
        parameters = task.module.parameters()
        self.optimizer: torch.optim.Optimizer
        if task.momentum is None:
            self.optimizer = torch.optim.Adam(parameters, task.lr, **shared)
        else:
            self.optimizer = torch.optim.SGD(parameters, task.lr, momentum=task.momentum, **shared)
        self.step = 0
        self.history: list[dict[str, float]] = []
        # Sum of this epoch's losses, and how many.
        self.losses = torch.zeros(2, dtype=torch.float64, device=self.device)

    def run(self, file: Path | None, metadata: dict[str, str], *, every: float, progress: bool) -> None:
        """Train up to the last step; write a checkpoint to `file` every so many seconds."""
        self._saved = time.monotonic()
        what = f"pretraining {metadata['architecture']}"
        show = progress and self.ranks.rank == 0
        progress_of = Progress(what, self.steps, done=self.step, unit="steps", show=show)
        # Launchers send the same signal more than once.
        with progress_of as bar, StopRequest(patient=self.ranks.size > 1) as stop, repeatable():
            while self.step < self.steps:
                epoch, first = divmod(self.step, self.source.steps_per_epoch)
                last = min((epoch + 1) * self.source.steps_per_epoch, self.steps)
                for images, shown in self.source.epoch(epoch, first):
                    self._take_step(images, shown)
                    bar.advance()
                    if self.step == last:
                        break
                    if self.step % _LOG_EVERY == 0:
                        bar.tell(f"loss {self._mean_loss():.4f}")
                    self._pause(stop, file, metadata, every)
                self.step = last  # a batch of unreadable files alone never arrives
                self._end_epoch(epoch, bar)
                self._pause(stop, file, metadata, every)

    def _pause(self, stop: StopRequest, file: Path | None, metadata: dict[str, str], every: float) -> None:
        """Between two steps: write the checkpoint if it is due, and stop after Ctrl-C."""
        if self.step == self.steps:
            return
        status = self._stopped(stop)
        if file is not None and (status or time.monotonic() - self._saved >= every):
            self._save_now(file, metadata, stopping=status != 0)
        if status:
            where = "nothing was written" if file is None else f"the checkpoint is {file}"
            raise Interrupted(f"interrupted at step {self.step} of {self.steps}; {where}", status)

    def _stopped(self, stop: StopRequest) -> int:
        """The exit status of whichever rank was told to stop, 0 if none was.

        All of them ask after the same steps, where the host waits anyway.
        """
        if self.ranks.size > 1 and self.device.type != "cpu" and self.step % _LOG_EVERY:
            return 0
        return max(self.ranks.counts(stop.status if stop.requested else 0))

    def _save_now(self, file: Path, metadata: dict[str, str], *, stopping: bool) -> None:
        self._mean_loss()
        try:
            if self.ranks.rank == 0:
                self.save(file, metadata)
        except InputError as error:
            if stopping:
                raise
            log.warning("warning: %s; if pretraining is interrupted now, steps are lost", error)
        self._saved = time.monotonic()

    def _take_step(self, images: Tensor, shown: Tensor) -> None:
        rate = self.task.lr * one_cycle(self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.step += 1
        rows = Rows.of_ranks(len(images), self.ranks)
        if rows.total < 2:
            return  # nearly everything of a streamed batch may be held out
        random = torch.Generator().manual_seed(step_seed(self.seed, self.step))
        images = self.augmentation(images, random, rows)
        self.task.module.train()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            loss = self.task.loss(images, self._labels(shown), rows)
        loss.backward()
        loss = loss.detach()
        # The sum, never the mean: every rank's loss is its share of the one loss of all images (docs/method.md).
        gradients = [weight.grad for weight in self.task.module.parameters() if weight.grad is not None]
        self.ranks.sum_([*gradients, loss])
        self.optimizer.step()
        self.losses += torch.stack([loss, torch.ones_like(loss)])

    def _labels(self, shown: Tensor) -> Tensor | None:
        return None if self.labels is None else sent(self.labels[shown], self.device)

    def _mean_loss(self) -> float:
        """The mean loss of this epoch so far; raise InputError if it is not finite."""
        total, count = self.losses.tolist()
        mean = total / max(count, 1)
        if not math.isfinite(mean):
            raise InputError("lr", f"the loss became {mean} by step {self.step}; lower the learning rate")
        return mean

    def _end_epoch(self, epoch: int, bar: Progress) -> None:
        loss, validation = self._mean_loss(), self.validate()
        self.losses.zero_()
        self.history.append({"epoch": epoch + 1, "step": self.step, "loss": loss, "validation": validation})
        bar.tell(f"loss {loss:.4f}, {self.task.metric.replace('_', ' ')} {validation:.4f}")

    @torch.no_grad()
    def validate(self) -> float:
        """The task's metric on the held-out images, which the ranks share."""
        self.task.module.eval()
        # Of the metric, and how many images it is of.
        sums, count = torch.zeros(2, dtype=torch.float64, device=self.device), 0
        for images, shown in self.source.held_out():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                sums[0] += self.task.score(images, self._labels(shown))
            count += len(images)
        sums[1] += count
        self.ranks.sum_([sums])
        total, images_in_all = sums.tolist()
        return total / max(images_in_all, 1)

    def save(self, file: Path, metadata: dict[str, str]) -> None:
        """Write a checkpoint, whole or not at all; raise InputError if the loss is no longer finite."""
        self._mean_loss()
        tensors = {f"module/{name}": tensor for name, tensor in self.task.module.state_dict().items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in flatten_optimizer(self.optimizer).items()}
        tensors["losses"] = self.losses
        place = {"format": _CHECKPOINT, "step": str(self.step), "history": json.dumps(self.history)}
        save_safetensors(file, tensors, {**place, "settings": json.dumps(metadata)})

    def load(self, file: Path, metadata: dict[str, str]) -> None:
        """Continue from a checkpoint; UnfitCheckpoint if it is damaged or of a run with other settings."""
        advice = "delete it to start again"
        try:
            tensors, found = read_safetensors(file, _CHECKPOINT, "a checkpoint of engine.pretrain", advice)
        except InputError as error:
            raise UnfitCheckpoint(error.argument, error.message) from None
        try:
            settings = json.loads(found["settings"])
            was = {name: str(settings.get(name)) for name in metadata}
            if different := differences(was, metadata):
                name = next(name for name, value in metadata.items() if was[name] != value)
                raise UnfitCheckpoint(
                    "dataset" if name.endswith("_sha256") else name,
                    f"{file} was written with other settings: {different}; resume with the same, or delete the file "
                    "to start again",
                )
            self.task.module.load_state_dict(dict(_under("module/", tensors)))
            restore_optimizer(self.optimizer, dict(_under("optimizer/", tensors)))
            self.losses.copy_(tensors["losses"])
            self.step, self.history = int(found["step"]), json.loads(found["history"])
        except InputError:
            raise
        except (KeyError, IndexError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise UnfitCheckpoint(file, f"is damaged ({one_line(error)}); {advice}") from None


def _under(prefix: str, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name.removeprefix(prefix), tensor) for name, tensor in tensors.items() if name.startswith(prefix))
