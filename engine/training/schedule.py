"""How long a run is, and when what is written."""

from __future__ import annotations

from dataclasses import dataclass

from engine.training.rates import CONSTANT, RateSchedule


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long a run is, and when what is written.

    Attributes:
        steps: training steps.
        batch_size: images in a minibatch, for the log's images/s.
        seed: of everything random.
        generator_ema: decays of the moving averages of the generator's weights.
        sample_ema: the one of these averages that is sampled from; the first by default.
        rates: what a step's learning rate is of the run's.
        max_skipped: so many steps in a row may be skipped for a gradient that is not finite.
        log_every, sample_every, checkpoint_every: steps between two lines, grids, checkpoints.
        evaluate_every: steps between two evaluations; None for none.
        keep_checkpoints: how many.
        profile: steps to trace with torch.profiler; None for none.
    """

    steps: int
    batch_size: int
    seed: int = 0
    generator_ema: tuple[float, ...] = ()
    sample_ema: float | None = None
    rates: RateSchedule = CONSTANT
    max_skipped: int = 20
    log_every: int = 10
    sample_every: int = 250
    checkpoint_every: int = 500
    evaluate_every: int | None = None
    keep_checkpoints: int = 2
    profile: int | None = None
