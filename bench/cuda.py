"""How long a CUDA device takes: events around many calls, replays of CUDA graphs, times of single kernels.

`Cuda` is all that is asked of a device; the functions below it do the counting and take any object with its methods.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.rows import seconds
from engine.training.profiling import quiet_profiler

# Steps between two events. None of them waits for another, as in training.
STEPS = 20
# Before a graph is captured: kernels are compiled, and optimizers and loss scaling make their state.
_WARMUP = 3


@dataclass(frozen=True)
class Replay:
    """A captured call.

    Attributes:
        call: kept, because the graph reads and writes the memory of what it holds.
    """

    graph: torch.cuda.CUDAGraph
    call: Callable[[], object]

    def __call__(self) -> None:
        """By one launch."""
        self.graph.replay()


class Cuda:
    """Events, captured calls and kernel times of the current CUDA device.

    Attributes:
        stream: on which calls are captured. Autograd runs a backward pass on the stream of its forward pass, so what is
            to be captured has to be built on this stream, too, if it is only a backward pass.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def on_stream(self) -> AbstractContextManager[Any]:
        """Context in which work goes to `stream`."""
        return torch.cuda.stream(self.stream)

    def wait(self) -> None:
        """Until the device has nothing to do."""
        torch.cuda.synchronize()

    def mark(self) -> torch.cuda.Event:
        """The moment when the device has done all that the current stream was given before."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds_between(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Of device time; waits for `end`."""
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def capture(self, call: Callable[[], object]) -> Callable[[], None]:
        """A replay of what `call` does on the device, by one launch; RuntimeError if it cannot be captured."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with self.on_stream():
            for _ in range(_WARMUP):
                call()
        self.wait()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                call()
        finally:
            # Where the capture cannot be ended, PyTorch leaves its stream the current one.
            torch.cuda.set_stream(current)
        return Replay(graph, call)

    def events(self, call: Callable[[], object]) -> Sequence[Any]:
        """Kineto's events while `call` runs, up to the end of its work on the device."""
        quiet_profiler()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
            call()
            self.wait()
        profiler = trace.profiler
        assert profiler is not None
        assert profiler.kineto_results is not None
        return profiler.kineto_results.events()


def cuda_of(device: torch.device | str) -> Cuda | None:
    """None if `device` is none of CUDA's."""
    return Cuda() if torch.device(device).type == "cuda" else None


@dataclass(frozen=True)
class StepTime:
    """One step's time.

    Attributes:
        seconds: on CUDA a share of the time between two events, `STEPS` un-synchronised steps apart; else wall clock.
        host: seconds until the host had handed one step to a device that had nothing else to do; None without CUDA.
    """

    seconds: float
    host: float | None = None


def step_time(step: Callable[[], object], cuda: Cuda | None, steps: int = STEPS) -> StepTime:
    """Time `steps` steps on CUDA, one on a CPU."""
    if cuda is None:
        return StepTime(seconds(step, "cpu"))
    cuda.wait()
    begin, begun = cuda.mark(), time.perf_counter()
    step()
    # Of the first alone: once the queue is full the host waits for the device.
    host = time.perf_counter() - begun
    for _ in range(steps - 1):
        step()
    return StepTime(cuda.seconds_between(begin, cuda.mark()) / steps, host)


def replay_of(calls: Sequence[Callable[[], object]], at_least: int, cuda: Cuda) -> tuple[Callable[[], None], int]:
    """All `calls` one after the other, again and again until there are `at_least`, as one graph; and their number.

    Calls on buffers of their own, larger in all than the cache, find nothing there that they have left.
    """
    times = -(-at_least // len(calls))

    def run() -> None:
        for _ in range(times):
            for call in calls:
                call()

    return cuda.capture(run), times * len(calls)


def replay_seconds(replay: Callable[[], object], cuda: Cuda) -> float:
    """Device time of one replay of a graph."""
    begin = cuda.mark()
    replay()
    return cuda.seconds_between(begin, cuda.mark())


@dataclass(frozen=True)
class Kernel:
    """One kernel, or one copy or fill of memory, that a device has run.

    Attributes:
        begin, end: nanoseconds of the trace's clock.
    """

    name: str
    begin: int
    end: int

    @property
    def seconds(self) -> float:
        """How long it ran."""
        return (self.end - self.begin) / 1e9


def busy_seconds(kernels: Iterable[Kernel]) -> float:
    """How long at least one of them ran."""
    total, until = 0, 0
    for kernel in sorted(kernels, key=lambda kernel: kernel.begin):
        total += max(0, kernel.end - max(kernel.begin, until))
        until = max(until, kernel.end)
    return total / 1e9


def kernels_of(events: Iterable[Any]) -> list[Kernel]:
    """What ran on the device, of Kineto's events. Its ranges, which other events fill, are left out."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    return [
        Kernel(event.name(), event.start_ns(), event.end_ns()) for event in events if event.activity_type() in kinds
    ]


def kernels_inside(events: Iterable[Any], range_: str, names: Collection[str] = ()) -> list[Kernel]:
    """Of `kernels_of`, those launched by operators inside a `record_function(range_)`, and those called by `names`.

    The replay of a graph has launched its kernels outside of any operator: there they are known by name alone.
    """
    events = list(events)
    ranges = [
        (event.start_thread_id(), event.start_ns(), event.end_ns())
        for event in events
        if event.activity_type() == "user_annotation" and event.name() == range_
    ]
    operators = {
        event.correlation_id()
        for event in events
        if event.activity_type() in ("cpu_op", "user_annotation")
        and any(event.start_thread_id() == thread and begin <= event.start_ns() <= end for thread, begin, end in ranges)
    }
    return kernels_of(event for event in events if event.linked_correlation_id() in operators or event.name() in names)
