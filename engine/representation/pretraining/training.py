"""The training loop of pretraining: one cycle of the learning rate, the same bits for the same seed on one machine."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from engine.representation.architectures import find_architecture
from engine.representation.pretraining.images import Augmentation, TrainingImages, open_images
from engine.representation.pretraining.result import PretrainResult
from engine.representation.pretraining.tasks import Task, make_task, one_cycle
from engine.support.errors import InputError, Interrupted
from engine.support.files import read_safetensors, save_safetensors
from engine.training.checkpoint import flatten_optimizer, restore_optimizer
from engine.training.stopping import StopRequest
from pipelines import ImageDataset

_CHECKPOINT = "gfmn-pretraining-1"
_LOG_EVERY = 10
DEFAULT_EPOCHS = 6
_DEFAULT_STEPS = (150, 2000)


def pretrain(
    architecture: str,
    dataset: ImageDataset,
    *,
    task: str = "classify",
    image_size: int | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 64,
    lr: float | None = None,
    momentum: float = 0.9,
    weight_decay: float | None = None,
    crop_padding: int = 4,
    flip: bool = False,
    seed: int = 0,
    device: str | torch.device = "cpu",
    amp: bool = False,
    loader: str = "auto",
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    resume: bool = False,
    progress: bool = True,
) -> PretrainResult:
    """Train `architecture` on nine tenths of `dataset` and judge it by the last tenth.

    Classifiers are trained as in the paper's supplement: SGD with momentum, weight decay 5e-4, random crops and
    mirrored images; the learning rate rises and falls in one cycle.

    Args:
        architecture: a name of `engine.representation.architectures.ARCHITECTURES`.
        task: "classify" (needs labels), "rotate" or "autoencode".
        image_size: the dataset's; given only to be checked.
        epochs, steps: how long, one of the two. Neither: six epochs, but at least 150 and at most 2,000 steps.
        lr, momentum, weight_decay: of SGD, 0.1, 0.9 and 5e-4 by default; "autoencode" uses Adam at 1e-3 with none.
        crop_padding: of the random crops, in pixels.
        flip: show images mirrored, too; wrong for digits and letters.
        seed: of initial weights, order and augmentation. The held-out images do not depend on it.
        amp: bfloat16 autocast.
        loader: who decodes images that are not in memory: "auto", "dali" or "torch".
        checkpoint: file that is written every `checkpoint_seconds`, and when interrupted. It is left where it is, to be
            removed once the result is saved.
        resume: go on from `checkpoint` if it is there, with the bits of an uninterrupted run.

    Raises InputError for options that do not fit each other or the dataset, and if the loss stops being finite;
    Interrupted after Ctrl-C, once the checkpoint is written.
    """
    if image_size not in (None, dataset.image_size):
        raise InputError(f"--image-size: is {image_size}, but the dataset's images have {dataset.image_size} pixels")
    for flag, value in (("--epochs", epochs), ("--steps", steps)):
        if value is not None and value < 1:
            raise InputError(f"{flag}: must be at least 1, got {value}")
    if epochs is not None and steps is not None:
        raise InputError("--steps: give --epochs or --steps, not both")
    for flag, rate in (("--lr", lr), ("--momentum", momentum), ("--weight-decay", weight_decay)):
        if rate is not None and not (0 <= rate < math.inf and (rate > 0 or flag != "--lr")):
            raise InputError(f"{flag}: must be a positive number, got {rate}")
    found = find_architecture(architecture, dataset.image_size, "--arch")
    augmentation = Augmentation(crop_padding, flip)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = make_task(task, found, dataset)
    made.lr = made.lr if lr is None else lr
    made.weight_decay = made.weight_decay if weight_decay is None else weight_decay
    source = open_images(dataset, batch_size, seed=seed, device=torch.device(device), loader=loader, progress=progress)
    if steps is None:
        default = min(max(DEFAULT_EPOCHS * source.steps_per_epoch, _DEFAULT_STEPS[0]), _DEFAULT_STEPS[1])
        steps = default if epochs is None else epochs * source.steps_per_epoch
    fingerprint = dataset.fingerprint()
    metadata = {
        "architecture": architecture,
        "task": task,
        "image_size": str(dataset.image_size),
        "seed": str(seed),
        "dataset": dataset.name,
        "dataset_sha256": str(fingerprint["content_sha256"]),
        "labels_sha256": str(fingerprint["labels_sha256"]),
        "steps": str(steps),
        "batch_size": str(batch_size),
        "lr": str(made.lr),
        "momentum": str(momentum),
        "weight_decay": str(made.weight_decay),
        "crop_padding": str(crop_padding),
        "flip": str(flip),
        "amp": str(amp),
    }
    labels = None if dataset.labels is None else torch.from_numpy(dataset.labels)[: dataset.num_pictures]
    pretraining = _Pretraining(
        made, source, labels, augmentation, steps=steps, momentum=momentum, seed=seed, device=device, amp=amp
    )
    file = None if checkpoint is None else Path(checkpoint)
    if resume and file is not None and file.exists():
        pretraining.load(file, metadata)
    pretraining.run(file, metadata, every=checkpoint_seconds, progress=progress)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in made.network.state_dict().items()}
    history = pretraining.history
    return PretrainResult(state, made.metric, history[-1]["validation"], history, metadata)


class _Pretraining:
    """A task's network, optimizer and place in the run: everything that a checkpoint holds."""

    def __init__(
        self,
        task: Task,
        source: TrainingImages,
        labels: Tensor | None,
        augmentation: Augmentation,
        *,
        steps: int,
        momentum: float,
        seed: int,
        device: str | torch.device,
        amp: bool,
    ):
        self.task, self.source, self.labels, self.augmentation = task, source, labels, augmentation
        self.steps, self.seed, self.device, self.amp = steps, seed, torch.device(device), amp
        task.module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        parameters = task.module.parameters()
        self.optimizer: torch.optim.Optimizer
        if task.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(parameters, task.lr, momentum=momentum, weight_decay=task.weight_decay)
        else:
            self.optimizer = torch.optim.Adam(parameters, task.lr, weight_decay=task.weight_decay)
        self.step = 0
        self.history: list[dict[str, float]] = []
        # Sum of this epoch's losses, and how many.
        self.losses = torch.zeros(2, dtype=torch.float64, device=self.device)

    def run(self, file: Path | None, metadata: dict[str, str], *, every: float, progress: bool) -> None:
        """Train up to the last step, with checkpoints to `file` every so many seconds."""
        self._saved = time.monotonic()
        bar = tqdm(
            total=self.steps,
            initial=self.step,
            desc=f"pretraining {metadata['architecture']}",
            unit="step",
            dynamic_ncols=True,
            disable=None if progress else True,
        )
        with bar, StopRequest() as stop, torch.backends.cudnn.flags(deterministic=True, benchmark=False):
            while self.step < self.steps:
                epoch, first = divmod(self.step, self.source.steps_per_epoch)
                last = min((epoch + 1) * self.source.steps_per_epoch, self.steps)
                for images, shown in self.source.epoch(epoch, first):
                    self._train_step(images, shown)
                    bar.update()
                    if self.step == last:
                        break
                    if self.step % _LOG_EVERY == 0:
                        bar.set_postfix(loss=f"{self._mean_loss():.4f}", refresh=False)
                    self._pause(stop, file, metadata, every)
                self.step = last  # a batch of nothing but unreadable files does not arrive
                self._end_epoch(epoch, bar)
                self._pause(stop, file, metadata, every)

    def _pause(self, stop: StopRequest, file: Path | None, metadata: dict[str, str], every: float) -> None:
        """Between two steps: write the checkpoint if it is time, and stop if that was asked for."""
        if self.step == self.steps:
            return
        if file is not None and (stop.requested or time.monotonic() - self._saved >= every):
            self.save(file, metadata)
            self._saved = time.monotonic()
        if stop.requested:
            where = "nothing was written" if file is None else f"--resume goes on from {file}"
            raise Interrupted(f"interrupted at step {self.step} of {self.steps}; {where}")

    def _train_step(self, images: Tensor, shown: Tensor) -> None:
        rate = self.task.lr * one_cycle(self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.step += 1
        if len(images) < 2:
            return  # nearly everything of a streamed batch may be held out
        random = torch.Generator().manual_seed((self.seed * 1_000_003 + self.step) % 2**63)
        images = self.augmentation(images, random)
        self.task.module.train()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            loss = self.task.loss(images, self._labels(shown))
        loss.backward()
        self.optimizer.step()
        self.losses += torch.stack([loss.detach(), torch.ones_like(loss)])

    def _labels(self, shown: Tensor) -> Tensor | None:
        return None if self.labels is None else self.labels[shown].to(self.device)

    def _mean_loss(self) -> float:
        """Of this epoch so far; InputError if it is not finite."""
        total, count = self.losses.tolist()
        mean = total / max(count, 1)
        if not math.isfinite(mean):
            raise InputError(f"--lr: the loss became {mean} by step {self.step}; lower the learning rate")
        return mean

    def _end_epoch(self, epoch: int, bar: tqdm) -> None:
        loss, validation = self._mean_loss(), self.validate()
        self.losses.zero_()
        self.history.append({"epoch": epoch + 1, "step": self.step, "loss": loss, "validation": validation})
        bar.set_postfix({"loss": f"{loss:.4f}", self.task.metric: f"{validation:.4f}"}, refresh=False)

    @torch.no_grad()
    def validate(self) -> float:
        """The task's metric on the held-out images."""
        self.task.module.eval()
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for images, shown in self.source.held_out():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                total += self.task.score(images, self._labels(shown))
            count += len(images)
        return total.item() / max(count, 1)

    def save(self, file: Path, metadata: dict[str, str]) -> None:
        """Write a checkpoint, whole or not at all; InputError if the loss is not finite any more."""
        self._mean_loss()
        tensors = {f"module/{name}": tensor for name, tensor in self.task.module.state_dict().items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in flatten_optimizer(self.optimizer).items()}
        tensors["losses"] = self.losses
        place = {"format": _CHECKPOINT, "step": str(self.step), "history": json.dumps(self.history)}
        save_safetensors(file, tensors, {**place, "settings": json.dumps(metadata)})

    def load(self, file: Path, metadata: dict[str, str]) -> None:
        """Go on from a checkpoint; InputError if it is damaged or of a run with other settings."""
        tensors, found = read_safetensors(file, _CHECKPOINT, "a checkpoint of engine.pretrain")
        settings = json.loads(found["settings"])
        for name, value in metadata.items():
            if settings.get(name) != value:
                flag = "--" + name.replace("_", "-")
                raise InputError(
                    f"{flag}: {file} was written with {settings.get(name)}, not {value}; "
                    "resume with the same flags, or delete the file to start again"
                )
        self.task.module.load_state_dict(dict(_under("module/", tensors)))
        restore_optimizer(self.optimizer, dict(_under("optimizer/", tensors)))
        self.losses.copy_(tensors["losses"])
        self.step, self.history = int(found["step"]), json.loads(found["history"])


def _under(prefix: str, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name.removeprefix(prefix), tensor) for name, tensor in tensors.items() if name.startswith(prefix))
