"""The bookkeeping around a CUDA graph, with fakes of all that CUDA does."""

from __future__ import annotations

import contextlib
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from engine.training.graphs import EAGER_STEPS, CudaGraphs, GraphedStep


class FakeGraphs:
    """A graph that records nothing but what was asked of it; its replay calls the step."""

    def __init__(self, log: list[str], error: Exception | None = None):
        self.log, self.error = log, error

    def aside(self, step):
        self.log.append("aside")
        return step()

    def capture(self, step):
        self.log.append("capture")
        if self.error is not None:
            raise self.error
        return (lambda: self.log.append("replay")), {"loss": torch.tensor(-1.0)}

    def drain(self):
        self.log.append("drain")


def graphed(log: list[str], error: Exception | None = None) -> GraphedStep:
    def step() -> dict[str, Tensor]:
        log.append("step")
        return {"loss": torch.tensor(1.0)}

    return GraphedStep(step, FakeGraphs(log, error), lambda: log.append("release"))


EAGER = ["aside", "step"] * EAGER_STEPS


def test_three_real_steps_then_a_capture_then_replays() -> None:
    log: list[str] = []
    step = graphed(log)
    for _ in range(EAGER_STEPS):
        assert not step.is_captured
        assert float(step()["loss"]) == 1
    assert log == EAGER
    first, second = step(), step()
    assert log[len(EAGER) :] == ["release", "capture", "replay", "replay"]
    assert step.is_captured
    assert first["loss"] is second["loss"], "every replay writes to the same scalars"
    assert float(first["loss"]) == -1


def test_after_a_reset_it_captures_again() -> None:
    log: list[str] = []
    step = graphed(log)
    step.reset()
    assert log == [], "there was nothing to wait for"
    for _ in range(EAGER_STEPS + 1):
        step()
    log.clear()
    step.reset()
    assert not step.is_captured
    for _ in range(EAGER_STEPS + 2):
        step()
    assert log == ["drain", *EAGER, "release", "capture", "replay", "replay"]


def test_what_cannot_be_captured_runs_without_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    log: list[str] = []
    step = graphed(log, RuntimeError("operation not permitted\nCUDA kernel errors might be reported elsewhere"))
    results = [step() for _ in range(EAGER_STEPS + 3)]
    assert all(float(result["loss"]) == 1 for result in results)
    assert log[len(EAGER) :] == ["release", "capture", "release", "step", "step", "step"]
    assert not step.is_captured
    (record,) = caplog.records
    message = record.getMessage()
    assert "cannot be captured in a CUDA graph (operation not permitted)" in message
    assert "\n" not in message
    step.reset()
    step()
    assert log[-1] == "step", "it isn't tried again"


def test_a_mistake_in_the_step_itself_comes_out() -> None:
    def step() -> dict[str, Tensor]:
        raise ValueError("a mistake")

    wrong = GraphedStep(step, FakeGraphs([], ValueError("a mistake")), lambda: None)
    with pytest.raises(ValueError, match="a mistake"):
        wrong()
    wrong._eager = 0
    with pytest.raises(ValueError, match="a mistake"):
        wrong()


class FakeCuda:
    """torch.cuda with streams that have names; a capture that fails leaves its stream the current one, as PyTorch's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.log: list[object] = []
        self.current = self.stream("main")
        self.error_at_end: str | None = None
        for name in ("current_stream", "stream", "set_stream", "synchronize", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, f"_{name}"))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.stream("side"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: self.log.append("replay")))

    def stream(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, wait_stream=lambda other: self.log.append(f"{name} waits for {other.name}"))

    def _current_stream(self, device):
        return self.current

    def _set_stream(self, stream):
        self.current = stream

    def _synchronize(self, device):
        self.log.append("synchronize")

    @contextlib.contextmanager
    def _stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextlib.contextmanager
    def _graph(self, graph, *, stream, capture_error_mode):
        before, self.current = self.current, stream
        self.log.append(f"capture on {stream.name}, {capture_error_mode}")
        try:
            yield
        finally:
            if self.error_at_end is not None:
                raise RuntimeError(self.error_at_end)
            self.current = before


class TestCudaGraphs:
    @pytest.fixture
    def cuda(self, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
        return FakeCuda(monkeypatch)

    def test_order_of_streams(self, cuda: FakeCuda) -> None:
        graphs = CudaGraphs(torch.device("cuda"))

        def step():
            cuda.log.append(f"step on {cuda.current.name}")
            return {}

        graphs.aside(step)
        assert cuda.log == ["side waits for main", "step on side", "main waits for side"]
        cuda.log.clear()
        replay, _ = graphs.capture(step)
        assert cuda.log == ["capture on side, thread_local", "step on side"]
        assert cuda.current.name == "main"
        replay()
        graphs.drain()
        assert cuda.log[2:] == ["replay", "synchronize"]

    @pytest.mark.parametrize("at_end", [True, False])
    def test_a_failed_capture_says_why_and_leaves_the_stream(self, at_end: bool, cuda: FakeCuda) -> None:
        """What the step did wrong is the reason, not that the capture could not be ended then."""
        held = []

        def step():
            temporary = torch.zeros(3)
            held.append(weakref.ref(temporary))
            raise RuntimeError("not permitted")

        cuda.error_at_end = "capture was invalidated" if at_end else None
        with pytest.raises(RuntimeError, match="not permitted"):
            CudaGraphs(torch.device("cuda")).capture(step)
        assert cuda.current.name == "main"

        gc.disable()
        try:
            with contextlib.suppress(RuntimeError):
                CudaGraphs(torch.device("cuda")).capture(step)
            assert held[-1]() is None, "the step's tensors go at once"
        finally:
            gc.enable()

    def test_a_capture_that_only_fails_at_its_end(self, cuda: FakeCuda) -> None:
        cuda.error_at_end = "a stream was not joined"
        with pytest.raises(RuntimeError, match="a stream was not joined"):
            CudaGraphs(torch.device("cuda")).capture(dict)
        assert cuda.current.name == "main"
