"""Times on CUDA, on a device that is not there: how many calls, between what, divided by what."""

from __future__ import annotations

import contextlib
import gc
import time
import weakref
from collections.abc import Iterator

import pytest
import torch
from helpers.fake_cuda import Event, FakeCuda

from bench import step_profile
from bench.cuda import STEPS, Cuda, Kernel, busy_seconds, cuda_of, kernels_inside, kernels_of, replay_of, step_time
from bench.kernels import steps as kernel_steps
from bench.kernels.steps import criterion_seconds, measure_step
from bench.kernels.times import GRAPHED_CALLS, MOST_COPIES, Calls, Timing
from bench.rows import FLUSHED_BYTES, print_rows
from bench.scenario import Problem, Scenario

SMALL = Problem("vgg-small", 32)


def test_only_cuda_has_events() -> None:
    assert cuda_of("cpu") is cuda_of(torch.device("cpu")) is None


class TestCapture:
    """`Cuda.capture` itself, over a torch.cuda that only writes down what it is asked for."""

    @pytest.fixture
    def log(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        log: list[str] = []

        class Stream:
            def __init__(self, name: str = "side"):
                self.name = name

            def wait_stream(self, other: Stream) -> None:
                log.append(f"{self.name} waits for {other.name}")

        class Graph:
            def replay(self) -> None:
                log.append("replay")

        @contextlib.contextmanager
        def inside(what: object, stream: Stream | None = None) -> Iterator[None]:
            name = f"on {what.name}" if isinstance(what, Stream) else f"capture on {stream.name}"
            log.append(name)
            yield
            log.append(f"end of {name}")

        main = Stream("main")
        for name, value in {
            "Stream": Stream, "CUDAGraph": Graph, "graph": inside, "stream": inside,
            "current_stream": lambda: main, "set_stream": lambda stream: log.append(f"back to {stream.name}"),
            "synchronize": lambda: log.append("wait"),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        return log

    def test_what_is_captured_has_run_on_the_same_stream_before(self, log: list[str]) -> None:
        replay = Cuda().capture(lambda: log.append("call"))
        before = ["side waits for main", "on side", *["call"] * 3, "end of on side", "wait"]
        assert log == [*before, "capture on side", "call", "end of capture on side", "back to main"]
        log.clear()
        replay()
        replay()
        assert log == ["replay"] * 2

    def test_a_replay_keeps_the_memory_that_its_graph_uses(self, log: list[str]) -> None:
        buffer = torch.zeros(3)
        kept = weakref.ref(buffer)
        replay = Cuda().capture(buffer.zero_)
        del buffer
        gc.collect()
        assert kept() is not None
        del replay
        gc.collect()
        assert kept() is None

    def test_a_failed_capture_leaves_the_stream_as_it_was(self, log: list[str]) -> None:
        calls = []

        def call() -> None:
            calls.append(1)
            if len(calls) == 4:
                raise RuntimeError("operation not permitted when stream is capturing")

        with pytest.raises(RuntimeError, match="not permitted"):
            Cuda().capture(call)
        assert log[-1] == "back to main"


class TestSteps:
    def test_many_steps_between_two_events_and_nothing_waits_in_between(self) -> None:
        cuda = FakeCuda()
        taken = step_time(cuda.busy("step", 0.25), cuda)
        assert cuda.log == ["wait", "mark", *["step"] * STEPS, "mark"]
        assert STEPS >= 20
        assert taken.seconds == 0.25

    def test_the_host_s_time_is_that_of_the_first_step_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Later ones may wait for room in the queue."""
        cuda, taking, now = FakeCuda(), [1.0, 10.0, 10.0, 10.0], [0.0]
        monkeypatch.setattr(time, "perf_counter", lambda: now[0])

        def step() -> None:
            now[0] += taking.pop(0)

        taken = step_time(step, cuda, steps=4)
        assert not taking
        assert taken.host == 1

    def test_a_cpu_takes_one_step_by_the_wall_clock(self) -> None:
        calls: list[int] = []
        taken = step_time(lambda: (calls.append(1), time.sleep(0.01)), None)
        assert len(calls) == 1
        assert taken.seconds >= 0.01
        assert taken.host is None


class TestReplays:
    @pytest.mark.parametrize(("buffers", "expected"), [(1, 20), (3, 21), (20, 20), (50, 50)])
    def test_calls_rotate_over_their_buffers(self, buffers: int, expected: int) -> None:
        cuda = FakeCuda()
        replay, count = replay_of([cuda.busy(str(n), 1.0) for n in range(buffers)], 20, cuda)
        assert count == expected
        assert cuda.log == ["capture"]
        replay()
        assert cuda.log[1:] == [str(n) for n in range(buffers)] * (expected // buffers)

    def timing(self, cuda: FakeCuda, floor_bytes: int) -> tuple[Timing, list[Calls]]:
        made: list[Calls] = []

        def calls() -> Calls:
            made.append({"ours": cuda.busy("ours", 2e-6), "theirs": cuda.busy("theirs", 5e-6)})
            return made[-1]

        return Timing("sum", "8", torch.float32, calls(), calls, floor_bytes), made

    @pytest.mark.parametrize("floor_bytes", [FLUSHED_BYTES, FLUSHED_BYTES // 40 - 7, 4000])
    def test_an_operation_s_time_is_a_replay_s_share(self, floor_bytes: int) -> None:
        cuda = FakeCuda()
        timing, made = self.timing(cuda, floor_bytes)
        ours, theirs = timing.rows(3, "cpu", cuda)
        assert len(made) == MOST_COPIES or (len(made) - 1) * floor_bytes >= FLUSHED_BYTES, (
            "other buffers fill the cache"
        )
        assert cuda.log.count("capture") == 2
        calls = -(-GRAPHED_CALLS // len(made)) * len(made)
        # Three timed replays and one before them; once more for the memory.
        assert cuda.log.count("ours") == cuda.log.count("theirs") == 4 * calls + 1
        assert (ours.p50, theirs.p50) == (pytest.approx(2), pytest.approx(5))
        assert theirs.relative == pytest.approx(2.5)
        assert ours.bytes_per_second == pytest.approx(floor_bytes / 2e-6)

    def test_who_cannot_be_captured_is_left_out_and_told(self, monkeypatch, capsys) -> None:
        cuda = FakeCuda()
        timing, _ = self.timing(cuda, FLUSHED_BYTES)
        captured = iter([RuntimeError("operation not permitted when stream is capturing"), None])

        def capture(call):
            if error := next(captured):
                raise error
            return call

        monkeypatch.setattr(cuda, "capture", capture)
        (row,) = timing.rows(1, "cpu", cuda)
        assert (row.backend, row.relative) == ("theirs", 1)
        assert "sum, ours: left out" in capsys.readouterr().err


# Two operators in a range of thread 1, one beside it, one at the same time in thread 2; then what they launched.
TRACE = [
    Event("user_annotation", "criterion", 100, 200, own=1),
    Event("cpu_op", "gfmn::relu_moments", 110, 150, own=2),
    Event("cpu_op", "aten::add", 120, 130, own=3),
    Event("cpu_op", "aten::convolution", 210, 250, own=4),
    Event("cpu_op", "aten::convolution", 110, 150, thread=2, own=5),
    Event("gpu_user_annotation", "criterion", 1000, 9000, launched_by=1),
    Event("kernel", "mine", 1000, 1400, launched_by=2),
    Event("gpu_memset", "Memset", 1400, 1500, launched_by=3),
    Event("kernel", "conv", 1500, 4500, launched_by=4),
    Event("kernel", "conv", 4000, 5000, launched_by=5),
    Event("kernel", "averager_step_kernel", 6000, 6200),
    Event("cuda_runtime", "cudaLaunchKernel", 115, 116, launched_by=2),
]


class TestTraces:
    def test_kernels_are_what_runs_on_the_device(self) -> None:
        names = ["mine", "Memset", "conv", "conv", "averager_step_kernel"]
        assert [kernel.name for kernel in kernels_of(TRACE)] == names
        assert kernels_of(TRACE)[0].seconds == pytest.approx(400e-9)

    def test_a_range_holds_what_its_operators_launched(self) -> None:
        assert [kernel.name for kernel in kernels_inside(TRACE, "criterion")] == ["mine", "Memset"]
        assert kernels_inside(TRACE, "nothing") == []

    def test_a_replayed_kernel_is_known_by_name_and_counted_once(self) -> None:
        found = kernels_inside(TRACE, "criterion", {"averager_step_kernel", "mine"})
        assert [kernel.name for kernel in found] == ["mine", "Memset", "averager_step_kernel"]

    def test_time_is_busy_while_any_kernel_runs(self) -> None:
        kernels = [Kernel("late", 90, 100), Kernel("a", 0, 40), Kernel("inside", 10, 20), Kernel("over", 30, 50)]
        assert busy_seconds(kernels) == pytest.approx(60e-9)
        assert busy_seconds([]) == 0

    def test_the_criterion_s_share_is_of_all_kernels(self) -> None:
        pytest.importorskip("triton")
        assert criterion_seconds(TRACE) == (pytest.approx(700e-9), pytest.approx(4700e-9))


def test_the_share_of_a_step_comes_from_its_trace(monkeypatch) -> None:
    """Real steps; the device's times are made up."""
    cuda = FakeCuda(traced=TRACE)
    taken: list[int] = []
    real = kernel_steps.engine_step

    def counted(parts):
        step = real(parts)

        def run() -> None:
            taken.append(1)
            cuda.now += 0.125
            if len(taken) < 3:
                step()

        return run

    monkeypatch.setattr(kernel_steps, "engine_step", counted)
    monkeypatch.setattr(kernel_steps, "criterion_seconds", lambda events: (3e-3, 12e-3) if events is TRACE else None)
    scenario = Scenario.calibrated(SMALL, "cpu")
    row = measure_step(scenario, 4, "reference", torch.float32, 2, cuda)
    assert len(taken) == (2 + 2) * STEPS + 1
    assert (row.p20, row.p50, row.p80) == (0.125,) * 3
    assert (row.criterion_p50, row.share) == (3e-3, 0.25)
    assert row.host_p50 is not None
    assert row.as_json()["host_p50"] == row.host_p50
    assert row.cells()["p50"] == "125.00"


def test_the_profile_of_a_step(monkeypatch, capsys) -> None:
    traced = [
        Event("kernel", "void cudnn::ops::nchwToNhwcKernel<float>", 0, 1_000_000),
        Event("kernel", "vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>", 1_000_000, 2_000_000),
        Event("kernel", "sm90_xmma_fprop_implicit_gemm", 3_000_000, 6_000_000),
    ]
    cuda = FakeCuda(traced=traced)
    monkeypatch.setattr(step_profile, "environment", lambda device: {"device": device})
    row = step_profile.profile_row(SMALL, 64, torch.bfloat16, cuda.busy("step", 20e-3), cuda)
    assert (row.kernels, row.layout_kernels, row.add_kernels) == (3, 1, 1)
    assert (row.step, row.busy) == (pytest.approx(20e-3), pytest.approx(5e-3))
    assert row.idle == pytest.approx(0.75)
    assert row.longest[0] == ("sm90_xmma_fprop_implicit_gemm", pytest.approx(3e-3))
    assert row.environment == {"device": "cuda"}
    print_rows([row])
    assert capsys.readouterr().out.splitlines()[2].endswith("| 20.00 | 0.00 | 5.00 | 75% |")


def test_a_profile_without_a_device_is_one_line(capsys) -> None:
    from engine.configuration.command import run_command

    with pytest.raises(SystemExit) as exit_:
        run_command(step_profile.main, [])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
