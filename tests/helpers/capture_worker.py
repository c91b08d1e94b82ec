"""What `tests/engine/training/test_ranks.py` runs in two processes: `capture_worker.py FOLDER`.

Steps of one sum over ranks, of which the second rank can't capture any.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from engine.training.graphs import EAGER_STEPS, GraphedStep
from engine.training.ranks import Ranks

Step = Callable[[], Mapping[str, Tensor]]


class HalfGraphs:
    """Graphs that record nothing; those of rank 1 fail."""

    def __init__(self, rank: int) -> None:
        self.rank, self.log = rank, list[str]()

    def aside(self, step: Step) -> Mapping[str, Tensor]:
        return step()

    def capture(self, step: Step) -> tuple[Callable[[], None], Mapping[str, Tensor]]:
        self.log.append("capture")
        if self.rank == 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: self.log.append("replay"), {"sum": torch.zeros(())}

    def drain(self) -> None:
        self.log.append("drain")


class Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main(folder: Path) -> None:
    ranks, said = Ranks.join(), Said()
    logging.getLogger("gfmn").addHandler(said)
    graphs = HalfGraphs(ranks.rank)

    def step() -> Mapping[str, Tensor]:
        own = torch.tensor(float(ranks.rank + 1))
        ranks.counts(ranks.rank)
        ranks.sum_([own])
        return {"sum": own}

    graphed = GraphedStep(step, graphs, lambda: None, ranks)
    sums = [float(graphed()["sum"]) for _ in range(EAGER_STEPS + 3)]
    found = {"sums": sums, "log": graphs.log, "said": " ".join(said.lines)}
    (folder / f"{ranks.rank}.json").write_text(json.dumps(found))
    ranks.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
