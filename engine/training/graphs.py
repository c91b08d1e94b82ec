"""A training step as one CUDA graph: captured once, then replayed with one call.

A step launches some hundred kernels, which takes the host several times as long as the device takes to run them. A
graph replays them all in one launch, on the same addresses and with the same arguments. So what a captured step reads
and writes must stay where it is: random numbers come through slots (`engine.generation.drawn_ahead`), counters and the
learning rate are tensors that change in place, and whoever replaces state calls `GraphedStep.reset`.

A graph's temporaries lie in a pool of its own, which nothing outside of it uses while it exists: sampling and
evaluation between two steps need their memory besides. What PyTorch had cached is given back before the capture.

Collectives are part of the graph, and bind all ranks (NVIDIA's "Using NCCL with CUDA Graphs"): a collective is captured
by all of them or by none, and a replay waits on the device until all have replayed. So every rank takes the same number
of eager steps, in which NCCL makes its connections, captures at the same step, and replays only if all have captured.
Nothing is exchanged between hosts inside of a captured step. PyTorch's watchdog neither sees captured collectives nor
disturbs a capture of this thread's, so there is no timeout of a replay: `Ranks.watch` ends a process whose replay waits
for a failed rank. A communicator can only be destroyed after the graphs that use it (NCCL 2.26), hence `close`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from engine.support.errors import one_line
from engine.training.ranks import ALONE, Ranks

log = logging.getLogger("gfmn")

EAGER_STEPS = 3
"""Real steps before the capture. They compile kernels, and make what exists only after a step: the optimizer's state,
the loss scaling's, libraries' plans and workspaces."""

Scalars = Mapping[str, Tensor]
Step = Callable[[], Scalars]


class Graphs(Protocol):
    """All that a graphed step asks of CUDA."""

    def aside(self, step: Step) -> Scalars:
        """Take a step on the stream that captures, after all that the device has been told and before what follows."""
        ...

    def capture(self, step: Step) -> tuple[Callable[[], None], Scalars]:
        """Record what `step` tells the device, which does nothing of it. Returns the replay, and the step's results:
        every replay writes to them."""
        ...

    def drain(self) -> None:
        """Wait for the device."""
        ...


class CudaGraphs:
    """`Graphs` by torch.cuda, on one device."""

    def __init__(self, device: torch.device):
        self.device = device
        self._side: torch.cuda.Stream | None = None

    @property
    def _stream(self) -> torch.cuda.Stream:
        if self._side is None:
            self._side = torch.cuda.Stream(self.device)
        return self._side

    def aside(self, step: Step) -> Scalars:
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            scalars = step()
        current.wait_stream(self._stream)
        return scalars

    def capture(self, step: Step) -> tuple[Callable[[], None], Scalars]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        scalars: Scalars = {}
        reason: Exception | None = None
        try:
            # In the mode "global" a call of any other thread that may not be captured would end the capture: loaders
            # and writers have threads that allocate or wait, and know nothing of it. Autograd's thread belongs to the
            # step, and its allocations go to the graph's pool in either mode.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                try:
                    scalars = step()
                except Exception as error:
                    reason = error
                    raise
        except Exception as error:
            reason = reason or error  # rather what the step did than that the capture could not be ended then
        finally:
            # Where a capture cannot be ended, PyTorch leaves its stream the current one.
            torch.cuda.set_stream(current)
        if reason is not None:
            try:
                raise reason
            finally:
                del reason  # its traceback holds this frame, and what the step had on the device
        return graph.replay, scalars

    def drain(self) -> None:
        torch.cuda.synchronize(self.device)


class GraphedStep:
    """A step that is taken eagerly `EAGER_STEPS` times, then captured, then replayed.

    A step that cannot be captured, by this rank or by another one, stays eager, which a warning says once. Captures
    don't execute: a failed one leaves what is on the device as it was. The Python of a step runs at its capture and in
    no replay, so it must not count anything.

    Args:
        step: takes a step and returns scalars on the device. Its shapes are always the same.
        graphs: of the device.
        release: called before a capture, to let go of what eager steps left and a captured one makes anew.
        ranks: the processes that take the step together.
    """

    def __init__(self, step: Step, graphs: Graphs, release: Callable[[], None], ranks: Ranks = ALONE):
        self.step, self.graphs, self.release, self.ranks = step, graphs, release, ranks
        self._eager, self._refused = EAGER_STEPS, False
        self._replay: Callable[[], None] | None = None
        self._scalars: Scalars = {}

    @property
    def is_captured(self) -> bool:
        """Whether steps are replayed."""
        return self._replay is not None

    def __call__(self) -> Scalars:
        """Take a step. Its results are overwritten by the next step."""
        if self._refused:
            return self.step()
        if self._eager > 0:
            self._eager -= 1
            with self.ranks.rehearsing():
                return self.graphs.aside(self.step)
        if self._replay is None and not self._capture():
            return self.step()
        assert self._replay is not None
        self._replay()
        return self._scalars

    def reset(self) -> None:
        """Forget the graph: state was replaced, or a number that the step reads from Python has changed."""
        if self._replay is not None:
            self.graphs.drain()
        self.close()

    def close(self) -> None:
        """Forget the graph, without waiting for the device: before the group of ranks is left, however that comes."""
        self._replay, self._scalars, self._eager = None, {}, EAGER_STEPS

    def _capture(self) -> bool:
        self.release()
        reason = ""
        try:
            with self.ranks.capturing():
                self._replay, self._scalars = self.graphs.capture(self.step)
        except Exception as error:  # what is wrong with the step itself comes again when it is taken eagerly
            reason = one_line(error)
        if self.ranks.agree(bool(reason)):
            self._refused, self._replay, self._scalars = True, None, {}
            self.release()
            why = reason or "another process of this job cannot"
            log.warning("warning: the step cannot be captured in a CUDA graph (%s); it runs without", why)
        return not self._refused
