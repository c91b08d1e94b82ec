"""What `tests/engine/representation/test_pretrain_ranks.py` runs in every process of a job.

`pretrain_worker.py FOLDER CASE…` pretrains a tiny float64 network on a rank's share of every minibatch, and saves what
one process can be compared with. `pretrain_worker.py SIGNAL RANK STEP FLAG…` is `engine.pretrain` with these flags, and
one rank gets a signal in the middle of a step.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from engine import pretrain
from engine.configuration.command import run_command
from engine.representation.architectures import Architecture
from engine.representation.pretraining import images as sources
from engine.representation.pretraining import training
from engine.representation.pretraining.images import Images, TrainingImages, open_images
from engine.representation.pretraining.recipe import Recipe, one_cycle
from engine.representation.pretraining.tasks import make_task
from engine.training.ranks import Ranks
from pipelines import ImageDataset, open_dataset

COUNT, SIZE = 44, 32
# Name → (files or arrays, streamed, the recipe). 40 of the 44 images are trained on.
CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "classify": ("arrays", False, {"batch_size": 8, "steps": 7, "flip": True}),
    "empty share": ("arrays", False, {"batch_size": 19, "steps": 4}),  # of the last minibatch, which has two images
    "rotate": ("arrays", False, {"task": "rotate", "batch_size": 7, "steps": 4}),
    "autoencode": ("arrays", False, {"task": "autoencode", "batch_size": 5, "steps": 3, "lr": 1e-4}),
    "files": ("files", False, {"batch_size": 8, "steps": 3}),
    "streamed": ("files", True, {"batch_size": 6, "steps": 10}),
}
BAD = range(12, 24)


class Tiny(nn.Module):
    """BatchNorm twice, one of them in a block, and a pooling."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, stride=4, padding=1, bias=False), nn.BatchNorm2d(4)
        conv = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.block = nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2))
        self.last = nn.Linear(6, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(torch.relu(self.bn(self.conv(x)))).mean(dim=(2, 3)))


class Double:
    """Images in float64."""

    def __init__(self, source: TrainingImages) -> None:
        self.source, self.steps_per_epoch = source, source.steps_per_epoch

    def epoch(self, number: int, first: int) -> Iterator[Images]:
        return ((images.double(), shown) for images, shown in self.source.epoch(number, first))

    def held_out(self) -> Iterator[Images]:
        return ((images.double(), shown) for images, shown in self.source.held_out())


def make_data(folder: Path) -> None:
    """The same pictures of noise in an array and in files, of which twelve in a row are no pictures."""
    pictures = np.random.default_rng(0).integers(0, 256, (COUNT, SIZE, SIZE, 3), dtype=np.uint8)
    np.savez(folder / "arrays.npz", images=pictures, labels=np.arange(COUNT) % 3)
    for name in "ab":
        (folder / "files" / name).mkdir(parents=True)
    for n, picture in enumerate(pictures):
        path = folder / "files" / "ab"[n >= COUNT // 2] / f"{n:02d}.png"
        Image.fromarray(picture).save(path)
        if n in BAD:
            path.write_bytes(b"no picture")


def open_data(folder: Path, kind: str) -> ImageDataset:
    if kind == "arrays":
        return open_dataset("images", folder / "arrays.npz", image_size=SIZE)
    return open_dataset("images", folder / "files", image_size=SIZE, skip_bad_images=True)


def run(case: str, folder: Path, ranks: Ranks) -> dict[str, Tensor]:
    """Everything that was learnt, the last gradients, and the history."""
    kind, streamed, options = CASES[case]
    recipe, dataset = Recipe(**options), open_data(folder, kind)
    torch.manual_seed(3)
    task = make_task(recipe.task, Architecture(lambda outputs, size: Tiny(outputs)), dataset)
    task.module.double()
    # Few at a time: of some minibatches that are read into memory no picture is good.
    sources._READING_BATCH, sources.IN_MEMORY_BYTES = 4, 0 if streamed else 2**30
    cpu = torch.device("cpu")
    source = open_images(dataset, recipe.batch_size, seed=1, device=cpu, loader="torch", ranks=ranks)
    labels = torch.from_numpy(dataset.labels)
    pretraining = training.Pretraining(task, Double(source), labels, recipe, device=cpu, ranks=ranks)
    pretraining.run(None, {"architecture": "tiny"}, every=1e9, progress=False)
    found = dict(task.module.state_dict())
    found |= {f"gradient.{name}": weight.grad for name, weight in task.module.named_parameters()}
    found["history"] = torch.tensor([list(entry.values()) for entry in pretraining.history], dtype=torch.float64)
    if not streamed:
        found["pictures"] = source.images
    return found


def main(folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.join()
    for case in cases:
        torch.save(run(case, folder, ranks), folder / f"{case}.{ranks.size}.{ranks.rank}.pt")
    ranks.close()


def signalled(number: int, step: int) -> Callable[[int, int], float]:
    """A learning rate in whose step `step` this process gets a signal."""

    def rate(taken: int, total: int) -> float:
        if taken == step - 1:
            os.kill(os.getpid(), number)
        return one_cycle(taken, total)

    return rate


def stopped(number: int, rank: int, step: int, flags: list[str]) -> None:
    if int(os.environ["RANK"]) == rank:
        training.one_cycle = signalled(number, step)
    run_command(pretrain.main, flags)


if __name__ == "__main__":
    if sys.argv[1].isdecimal():
        stopped(*map(int, sys.argv[1:4]), sys.argv[4:])
    else:
        main(Path(sys.argv[1]), sys.argv[2:])
