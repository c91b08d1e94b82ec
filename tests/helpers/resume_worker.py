"""What a test of resumed runs starts in every process of a job: `resume_worker.py FOLDER STOP CASE…`.

Each case of `rank_worker` goes on in float64, from the newest checkpoint in FOLDER/CASE to the step STOP.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from helpers import rank_worker

from engine.training.ranks import Ranks
from engine.training.run_folder import RunFolder
from engine.training.schedule import Schedule
from engine.training.trainer import Trainer


def train(folder: Path, stop: int, case: str, ranks: Ranks) -> None:
    run = RunFolder(folder / case)
    method = rank_worker.make(case, ranks)
    rare = {"sample_every": 1000, "checkpoint_every": 1000, "log_every": 1000}
    trainer = Trainer(
        method, Schedule(steps=stop, batch_size=8, seed=11, generator_ema=(0.5,), **rare), run, {}, ranks=ranks
    )
    checkpoint = run.newest_checkpoint()
    if checkpoint is not None:
        trainer.restore(checkpoint)
    ranks.meet(f"{case} restored", trainer.step)
    trainer.fit()


def main(folder: Path, stop: int, cases: list[str]) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.join()
    for case in cases:
        train(folder, stop, case, ranks)
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
