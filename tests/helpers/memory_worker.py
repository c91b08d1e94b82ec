"""What `tests/engine/training/test_planner_ranks.py` runs in every process of a job: `memory_worker.py FOLDER`.

Measures what the allocator reports of two training steps on a rank's share of the minibatch.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.rows import peak_memory
from engine.configuration.build import make_method
from engine.configuration.config import Config
from engine.configuration.objectives import blank_reference
from engine.configuration.planning import Planner
from engine.configuration.running import make_schedule
from engine.training.ranks import Ranks
from engine.training.run_folder import RunFolder
from engine.training.trainer import Trainer

# Name → flags. A small minibatch of a network with many features: the moments that ranks exchange weigh most.
CASES: dict[str, dict[str, Any]] = {
    "plain": {"batch_size": 16},
    "moments": {"batch_size": 4, "extractor": "vgg-small", "image_size": 64},
    "chunks": {"batch_size": 15, "chunk_size": 2, "recompute_generator": True},
    "mmd": {"batch_size": 16, "method": "mmd", "mmd_images": 64, "pool": "grid4"},
}


def configuration(case: str) -> Config:
    return Config.build("digits", {"weights": ("random",), "kernels": "reference", **CASES[case]})


def measured(case: str, ranks: Ranks) -> int:
    """From before objective and optimizer are made to the end of the second step."""
    config = configuration(case)
    plans = Planner(config)
    known = blank_reference(config, plans.extractor, torch.rand)

    def two_steps() -> None:
        method = make_method(config, plans.generator, plans.extractor, known, ranks=ranks)
        trainer = Trainer(method, make_schedule(config), RunFolder("nowhere"), {}, ranks=ranks)
        trainer.train_step()
        trainer.train_step()

    gc.collect()
    return peak_memory(two_steps, torch.device("cpu"))


class Patient:
    """A collective's work, that gloo's thread lets go first: PyTorch's profiler sees no memory that is freed there."""

    def __init__(self, work: Any):
        self.work = work

    def wait(self) -> None:
        self.work.wait()
        time.sleep(0.005)
        self.work = None


def patient(collective: Callable[..., Any]) -> Callable[..., Patient | None]:
    def call(*args: Any, async_op: bool = False, **options: Any) -> Patient | None:
        work = Patient(collective(*args, async_op=True, **options))
        return work if async_op else work.wait()

    return call


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.all_reduce, dist.all_gather_single = patient(dist.all_reduce), patient(dist.all_gather_single)
    ranks = Ranks.join()
    found = {case: measured(case, ranks) for case in CASES}
    (folder / f"{ranks.rank}.json").write_text(json.dumps(found))
    ranks.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
