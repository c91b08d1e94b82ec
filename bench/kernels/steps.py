"""Times of whole training steps, and what moments, averager and coefficients take of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.profiler import record_function

from bench.cuda import Cuda, StepTime, cuda_of, kernels_inside, kernels_of, step_time
from bench.kernels.workloads import EXTRACTOR, IMAGE_SIZE, MINIBATCH, short, triton_backend
from bench.rows import Row, environment, percentiles
from bench.scenario import Problem, Scenario, engine_step

OPERATIONS = ("relu_moments", "relu_moments_backward", "averager_step")
_CRITERION = "criterion"


@dataclass(frozen=True)
class CriterionRow(Row):
    """Whole training steps, and what the three operations take of them: moments, averager, ∂L/∂y.

    Attributes:
        backend: of the operations.
        p20, p50, p80: seconds a step; on CUDA see `bench.cuda.StepTime`.
        criterion_p50: median seconds inside the operations; on CUDA of their kernels.
        share: median over the steps of their part of the step; on CUDA of the time of all kernels.
        host_p50: median seconds until the host had handed over a step; None on a CPU.
    """

    extractor: str
    minibatch: int
    dtype: str
    backend: str
    p20: float
    p50: float
    p80: float
    criterion_p50: float
    share: float
    host_p50: float | None = None

    def cells(self) -> dict[str, object]:
        """Seconds (on CUDA milliseconds, and the host's), and the share in percent."""
        on_gpu = self.host_p50 is not None
        unit, scale = ("ms", 1e3) if on_gpu else ("s", 1.0)
        return {
            "extractor": self.extractor,
            "minibatch": self.minibatch,
            "dtype": self.dtype,
            "kernels": self.backend,
            f"step p20, {unit}": f"{scale * self.p20:.2f}",
            "p50": f"{scale * self.p50:.2f}",
            "p80": f"{scale * self.p80:.2f}",
            **({"host, ms": f"{1e3 * self.host_p50:.2f}"} if self.host_p50 is not None else {}),
            f"criterion, {unit}": f"{scale * self.criterion_p50:.3f}",
            "share": f"{self.share:.1%}",
        }


def measure_steps(device: str, repetitions: int) -> Iterator[CriterionRow]:
    """Training steps of `EXTRACTOR` with a DCGAN generator: both dtypes, by the fastest backend and by `reference`."""
    scenario = Scenario.calibrated(Problem(EXTRACTOR, IMAGE_SIZE), device)
    cuda = cuda_of(device)
    for dtype in (torch.bfloat16, torch.float32):
        for backend in ("auto", "reference"):
            yield measure_step(scenario, MINIBATCH, backend, dtype, repetitions, cuda)


@dataclass
class Clocked:
    """The operations of a backend, each inside a `record_function` range, and with a clock around it on a CPU.

    Attributes:
        functions: stand in for the backend's module.
        inside: seconds of wall clock spent in them so far. Nothing waits for a GPU: what the clock says of one is the
            host's part.
    """

    backend: ModuleType
    inside: float = 0.0
    functions: SimpleNamespace = field(init=False)

    def __post_init__(self) -> None:
        timed = {name: self._timed(getattr(self.backend, name)) for name in OPERATIONS}
        self.functions = SimpleNamespace(__name__=self.backend.__name__, **timed)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            with record_function(_CRITERION):
                result = function(*args, **options)
            self.inside += time.perf_counter() - begun
            return result

        return call


def measure_step(
    scenario: Scenario, minibatch: int, backend: str, dtype: torch.dtype, repetitions: int, cuda: Cuda | None = None
) -> CriterionRow:
    """`repetitions` training steps after two untimed ones; on CUDA as many times `bench.cuda.STEPS`, and one traced."""
    parts = scenario.parts(minibatch, None if dtype == torch.float32 else dtype, kernels=backend)
    clocked = Clocked(parts.objective.kernels)
    parts.objective.feature_pass.kernels = clocked.functions  # type: ignore[assignment]  # has the same functions
    step = engine_step(parts)
    whole: list[StepTime] = []
    criterion: list[float] = []
    for n in range(repetitions + 2):
        clocked.inside = 0.0
        taken = step_time(step, cuda)
        if n >= 2:
            whole.append(taken)
            criterion.append(clocked.inside)
    if cuda is None:
        shares = [inner / taken.seconds for inner, taken in zip(criterion, whole, strict=True)]
    else:
        inside, busy = criterion_seconds(cuda.events(step))
        criterion, shares = [inside], [inside / busy]
    hosts = [taken.host for taken in whole if taken.host is not None]
    return CriterionRow(
        scenario.problem.extractor, minibatch, short(dtype), backend, *percentiles([taken.seconds for taken in whole]),
        float(np.median(criterion)), float(np.median(shares)), float(np.median(hosts)) if hosts else None,
        environment=environment(scenario.device),
    )  # fmt: skip


def criterion_seconds(events: Sequence[Any]) -> tuple[float, float]:
    """Of a traced step: seconds of the operations' kernels, and of all kernels."""
    names = {name for name in triton_backend().__all__ if name.endswith("_kernel")}
    criterion = kernels_inside(events, _CRITERION, names)
    return sum(kernel.seconds for kernel in criterion), sum(kernel.seconds for kernel in kernels_of(events))
