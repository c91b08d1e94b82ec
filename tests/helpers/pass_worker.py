"""What `tests/engine/training/test_shared_passes.py` runs in every process of a job: `pass_worker.py FOLDER`.

The statistics pass and an evaluation, shared by the ranks; saves what one process can be compared with.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from helpers import rank_worker
from torch import nn

from engine.comparison.reference.bank import BankKind
from engine.comparison.reference.cache import cached_reference
from engine.comparison.reference.statistics_pass import reference_loader
from engine.comparison.reference.target import MomentsKind
from engine.evaluation.judges import evaluation_network
from engine.representation.extractor import Extractor
from engine.training.job import job
from engine.training.ranks import Ranks
from engine.training.run_folder import RunFolder
from engine.training.schedule import Schedule
from engine.training.trainer import Trainer
from engine.training.validation import Validation
from pipelines import open_dataset, read_pixels

SAMPLES = 70


def references(folder: Path, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Moments and a bank of 61 images, and moments of two, of features in float64."""
    network, found = extractor(), {}
    for name, kind, images in [
        ("all", MomentsKind(), 61),
        ("few", MomentsKind(), 2),
        ("bank", BankKind("mean", 20), 61),
    ]:
        dataset = open_dataset("images", folder / f"{images}.npy", image_size=rank_worker.SIZE)
        loader = reference_loader(network, dataset, batch_size=7, seed=0, shard=ranks.rank, num_shards=ranks.size)
        made: Any = cached_reference(kind, network, loader, kernels="reference", ranks=ranks)
        assert made.count == min(images, 20 if name == "bank" else images)
        found |= {f"{name}.{key}": getattr(made, key) for key in ("mean", "m2", "features") if hasattr(made, key)}
    return found


def extractor() -> Extractor:
    return rank_worker.extractor()


def evaluations(folder: Path, ranks: Ranks, *, batch_statistics: bool) -> list[dict[str, Any] | None]:
    """Two evaluations of a generator whose running statistics are other ones on further ranks."""
    method = rank_worker.make("none", ranks)
    method.batch_statistics = batch_statistics
    for norm in method.generator.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean += 1 + ranks.rank
    dataset = open_dataset("images", folder / "61.npy", image_size=rank_worker.SIZE)
    networks = [
        evaluation_network(name, weights=folder / f"{file}.safetensors", image_size=rank_worker.SIZE)
        for name, file in (("vgg-small", "judge"), ("dcgan-encoder", "encoder"))
    ]
    real = read_pixels(dataset, backend="torch", shard=ranks.rank, num_shards=ranks.size)
    validation = Validation(networks, real, every=1, samples=SAMPLES, adapt_lr=True, ranks=ranks)
    run = RunFolder(folder / "run")
    trainer = Trainer(
        method, Schedule(steps=2, batch_size=8, seed=3, evaluate_every=1), run, {}, validation, ranks=ranks
    )
    found = []
    for step in (1, 2):
        trainer.step = step
        evaluation = trainer._evaluate()
        found.append(None if evaluation is None else evaluation.metrics)
    return found


def run(folder: Path, ranks: Ranks) -> dict[str, Any]:
    torch.set_num_threads(1)
    # Exchanges that follow each other, of other sizes.
    words = [ranks.from_first(f"{word} {ranks.rank}".encode()) for word in ("one", "another", "")]
    return {
        "words": words,
        "references": references(folder, ranks),
        "evaluations": {both: evaluations(folder, ranks, batch_statistics=both) for both in (False, True)},
    }


def main(folder: Path) -> None:
    with job() as ranks:
        torch.save(run(folder, ranks), folder / f"{ranks.size}.{ranks.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
