"""The kernels' benchmark: the audit finds what it should, bytes are what a hand counts, no time for a wrong result.

Whether Triton interprets or compiles is settled when it is imported, so all that needs Triton runs in other processes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.marks import slow

from bench.kernels import __main__ as program
from bench.kernels import times
from bench.kernels.steps import Clocked, measure_step
from bench.kernels.times import OperationRow, Timing, timing_of_averager, timing_of_pairs, timings_of_tap
from bench.kernels.workloads import TapShape, taps_of
from bench.rows import print_rows, read_json, write_json
from bench.scenario import Problem, Scenario
from engine.representation.zoo import make_network

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def _python(code: str, *arguments: Path, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    root = Path(__file__).parents[2]
    return subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300)


# The command line itself, with fewer variants to compile and one constant changed.
_AUDIT = """
import functools
import sys

import torch

from bench.kernels import __main__ as program, audit
from kernels.triton import launching, moments

audit.DTYPE_BYTES = {{torch.bfloat16: 2}}
audit.launched = lambda: ()  # the designed variants are enough here
{change}
program.audit = functools.partial(audit.audit, only="{only}")
program.main(["--audit", "--targets", "sm_90", "--json", sys.argv[1]])
"""


@needs_triton
class TestAudit:
    def test_sound_kernels_pass(self, tmp_path: Path) -> None:
        run = _python(_AUDIT.format(change="", only="relu_moments_backward"), tmp_path / "rows.json")
        assert run.returncode == 0, run.stderr
        rows = json.loads((tmp_path / "rows.json").read_text())
        assert f"{len(rows)} variants, 0 violations" in run.stdout
        assert {row["variant"] for row in rows} >= {"64×64, relu", "32×128, relu6", "16×256, relu"}
        for row in rows:
            assert (row["kernel"], row["target"]) == ("relu_moments_backward_kernel", "sm_90")
            assert row["violations"] == []
            assert 16 < row["registers"] <= 255
            assert row["spilled"] == row["stack"] == 0
            assert row["widest_load"] == row["widest_store"] == 16
            assert 0 < row["occupancy"] <= 1
            assert f"| {row['variant']} | sm_90 | {row['registers']} |" in run.stdout

    @pytest.mark.parametrize(
        ("change", "only", "complaint"),
        [
            slow("moments.BLOCK_MERGE = 8192", "merge_splits", r"spills \d+ bytes; uses \d+ bytes of stack"),
            ("launching.BLOCKS_F = (4,)", "relu_moments_backward", "0 16-byte stores, 2 needed"),
        ],
        ids=["spilled", "narrow"],
    )
    def test_unsound_kernels_fail_the_command(self, change: str, only: str, complaint: str, tmp_path: Path) -> None:
        """8,192 features a program are too many registers; 4 features side by side are 8 bytes of bfloat16."""
        run = _python(_AUDIT.format(change=change, only=only), tmp_path / "rows.json")
        assert run.returncode == 1, run.stderr
        violations = [line for line in run.stdout.splitlines() if line.startswith("violation: ")]
        assert violations, run.stdout
        assert all(only in line and re.search(complaint, line) for line in violations), violations
        assert f"{len(violations)} violations" in run.stdout


_HAND_COUNT = """
import json

import torch

from bench.kernels.audit import audit
from bench.kernels.traffic import AccessCounter
from kernels import triton as backend

try:
    audit()
except RuntimeError as error:
    assert "unset" in str(error)
else:
    raise AssertionError("an audit of interpreted kernels")

partial, sums, step = torch.ones(4, 3, dtype=torch.float64), torch.empty(6, dtype=torch.float64), torch.tensor(0)
with AccessCounter(sums=sums, step=step) as counter:
    backend.sum_partials_kernel[(1,)](partial, sums, step, 3, ADVANCE=True, BLOCK=1024)
assert sums.tolist() == [3, 3, 3, 3, 6, 6] and step.item() == 1
print(json.dumps(counter.moved))

grad, y, a, b = torch.ones(3, 5, 2, 1).bfloat16(), torch.ones(3, 5, 2, 1).bfloat16(), torch.ones(10), torch.ones(10)
with AccessCounter(grad=grad, y=y, a=a, b=b) as counter:
    backend.relu_moments_backward(grad, y, a, b)
assert (grad == 3).all()
print(json.dumps(counter.moved))
backend.relu_moments_backward(grad, y, a, b)
print(json.dumps(counter.moved))
"""

_COUNT = """
import sys
from pathlib import Path

import torch

from bench.kernels.traffic import count_bytes, print_bytes
from bench.kernels.workloads import TapShape
from bench.rows import write_json

taps = [TapShape((128, 8, 8), residual=False, bias=True, biased=128 * 8 * 8)]
rows = count_bytes(taps, torch.bfloat16)
print_bytes(rows)
unfused = [TapShape((128, 8, 8), residual=False, biased=128 * 8 * 8, biased_before=128 * 8 * 8)]
several = [[TapShape((128, 8, 8), residual=False, readers=readers)] for readers in (0, 2, 3)]
others = [count_bytes(unfused, torch.bfloat16)[0], *(count_bytes(taps, torch.bfloat16)[1] for taps in several)]
write_json(Path(sys.argv[1]), [*rows, *others])
"""


@pytest.mark.parametrize("extractor", ["vgg19", "resnet18"])
def test_taps_know_the_biases_that_arrive(extractor: str) -> None:
    """Every convolution of these has a bias once BatchNorm is folded into it; no convolution adds it on CUDA."""
    network, outputs = make_network(extractor, 32).module, []
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, args, output: outputs.append(output[0].numel()))
    with torch.no_grad():
        network(torch.zeros(1, 3, 32, 32))
    taps = taps_of(extractor, 32)
    assert sum(tap.biased for tap in taps) == sum(outputs)
    assert all(tap.bias and not tap.biased_before for tap in taps)
    assert [tap.readers for tap in taps[:4]] == {"vgg19": [1, 1, 1, 1], "resnet18": [2, 1, 2, 1]}[extractor]
    assert taps[-1].readers == 0
    with_convolution = [tap for tap in taps if tap.biased == 2 * tap.features]
    assert len(with_convolution) == {"vgg19": 0, "resnet18": 3}[extractor], "shortcuts with a convolution of their own"


@needs_triton
class TestBytes:
    def test_count_by_hand(self) -> None:
        run = _python(_HAND_COUNT, interpret=True)
        assert run.returncode == 0, run.stderr
        sums, backward, afterwards = (json.loads(line) for line in run.stdout.splitlines())
        # 4 × 3 float64 partial sums read, 4 + 2 written; the int64 step read and written. Masked lanes move nothing.
        assert sums == {"sums": 6 * 8, "step": 2 * 8, "partial": 4 * 3 * 8}
        # 30 values of bfloat16: the gradient read and written, y read; one program reads 10 coefficients a and b.
        assert backward == {"grad": 2 * 30 * 2, "y": 30 * 2, "a": 10 * 4, "b": 10 * 4, "partial": 0}
        assert afterwards == backward, "the counter stops with its context"

    @pytest.mark.slow
    def test_ours_are_near_the_floor_and_others_are_above(self, tmp_path: Path) -> None:
        run = _python(_COUNT, tmp_path / "rows.json", interpret=True)
        assert run.returncode == 0, run.stderr
        *written, unfused, no_reader, two, three = json.loads((tmp_path / "rows.json").read_text())
        rows = {row["op"]: row for row in written}
        assert set(rows) == {"relu_moments", "relu_moments_backward", "averager_step"}
        features, activation = 128 * 8 * 8, 64 * 2
        bias = 128 * 2
        assert rows["relu_moments"]["floor"] == features * (2 * activation + 2 * 4) + bias
        assert rows["relu_moments_backward"]["floor"] == features * (3 * activation + 2 * 4)
        for row in rows.values():
            assert 1 <= row["ours"] / row["floor"] <= 1.02
            assert row["eager"] > row["compiled"] > row["floor"]
            assert f"| {row['op']} |" in run.stdout
        assert "| all |" in run.stdout
        # A bias in a kernel of its own costs as much again as the whole tap; plain PyTorch always pays that.
        assert unfused["floor"] == features * (2 * activation + 2 * 4)
        assert unfused["eager"] == rows["relu_moments"]["eager"]
        assert unfused["ours"] - unfused["floor"] >= features * 2 * activation
        assert 1.9 <= unfused["ours"] / unfused["floor"] <= 2
        # Gradients of later layers: of none zeros are written first; two go into the kernel; one more is added before.
        one, gradient = rows["relu_moments_backward"], features * activation
        assert [row["floor"] - one["floor"] for row in (no_reader, two, three)] == [-gradient, gradient, 2 * gradient]
        assert [row["ours"] - one["ours"] for row in (no_reader, two, three)] == [gradient, gradient, 4 * gradient]
        assert [row["eager"] - one["eager"] for row in (no_reader, two, three)] == [
            -3 * gradient, 3 * gradient, 6 * gradient,
        ]  # fmt: skip


class TestTimes:
    def test_timing_gives_complete_rows(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        counts = {"ours": 0, "theirs": 0}

        def call(name: str, size: int) -> None:
            counts[name] += 1
            torch.ones(size).sum()

        calls = {"ours": lambda: call("ours", 1000), "theirs": lambda: call("theirs", 2_000_000)}
        rows = Timing("sum", "1000", torch.float32, calls, lambda: calls, floor_bytes=4000).rows(5, "cpu", None)
        assert counts == {"ours": 6, "theirs": 6}, "5 times for the time, once for the memory"
        assert [row.backend for row in rows] == ["ours", "theirs"]
        for row in rows:
            assert 0 < row.p20 <= row.p50 <= row.p80
            assert row.relative == pytest.approx(row.p50 / rows[0].p50)
            assert row.bytes_per_second == pytest.approx(4000 / row.p50 * 1e6)
            assert {"versions", "processor", "threads", "load", "commit", "date"} <= set(row.environment)
            assert {"python", "torch"} <= set(row.environment["versions"])
        assert rows[1].relative > 1
        assert [row.peak_memory for row in rows] == [pytest.approx(4000, abs=64), pytest.approx(8_000_000, abs=64)]
        print_rows(rows)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2 + len(rows)
        for row, line in zip(rows, lines[2:], strict=True):
            times = " | ".join(f"{value:.0f}" for value in (row.p20, row.p50, row.p80))
            assert line.startswith(f"| sum | 1000 | float32 | {row.backend} | {times} | {row.relative:.2f} |")
        write_json(tmp_path / "new" / "rows.json", rows)
        assert read_json(tmp_path / "new" / "rows.json", OperationRow) == rows

    @pytest.mark.parametrize("wrong", [1.1, float("nan")])
    def test_wrong_values_are_refused(self, wrong: float) -> None:
        expected = torch.ones(100)
        times.verify("right", [expected * (1 + 1e-6)], [expected], 1e-5)
        found = expected.clone()
        found[3] = wrong
        with pytest.raises(RuntimeError, match=r"^ours: wrong by .* not worth timing$"):
            times.verify("ours", [expected, found], [expected, expected], 1e-5)
        with pytest.raises(ValueError, match="zip"):
            times.verify("one too few", [expected], [expected, expected], 1e-5)

    def test_wrong_kernel_is_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def averager_step(*args: object, **options: object) -> list[torch.Tensor]:
            a, b, sums = times.plain_averager(*args, **options)
            return [a, b * 1.001, sums]

        impostor = SimpleNamespace(__name__="kernels.compiled", averager_step=averager_step)
        monkeypatch.setattr(times.kernels, "select", lambda *_: impostor)
        with pytest.raises(RuntimeError, match=r"^gfmn, compiled: wrong by 1\.0e-03"):
            timing_of_averager(100, "cpu")

    @pytest.mark.slow  # torch.compile has its own to build
    def test_right_kernels_are(self) -> None:
        timing = timing_of_averager(1000, "cpu")
        assert isinstance(timing, Timing)
        assert list(timing.calls)[1:] == ["plain PyTorch", "torch.compile"]
        assert next(iter(timing.calls)).startswith("gfmn, ")
        assert timing.floor_bytes == 1000 * 18 * 4
        for calls in (timing.calls, timing.again()):
            for call in calls.values():
                call()

    def test_pairs_are_verified_and_repeat(self) -> None:
        timing = timing_of_pairs(70, 50, 20, "cpu")
        assert timing.shape == "70×50×20"
        assert timing.floor_bytes == 4 * 20 * (2 * 70 + 50) + 8 * 70
        assert list(timing.calls)[1:] == ["plain PyTorch"]
        for calls in (timing.calls, timing.again()):
            for call in calls.values():
                call()

    @pytest.mark.parametrize("residual", [False, True], ids=["plain", "shortcut"])
    def test_backends_of_a_tap_agree_before_and_repeat_after(self, residual: bool) -> None:
        forward, backward = timings_of_tap(TapShape((8, 4, 2), residual), torch.float32, "cpu")
        features, activation = 8 * 4 * 2, 64 * 4
        assert forward.floor_bytes == features * ((3 if residual else 2) * activation + 2 * 4)
        assert backward.floor_bytes == features * (3 * activation + 2 * 4)
        for timing in (forward, backward):
            assert timing.shape == "64×8×4×2" + (", shortcut" if residual else "")
            assert list(timing.calls)[1:] == [
                "gfmn, reference", "plain PyTorch", "torch.compile", "ReLU in place and one read, torch.compile",
            ]  # fmt: skip
            for call in timing.calls.values():
                call()
                call()

    def test_calls_made_again_have_buffers_of_their_own(self) -> None:
        """Otherwise a graph of them would find in the cache what the call before has left there."""

        def tensors(value: object) -> Iterator[torch.Tensor]:
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, (tuple, list)):
                for entry in value:
                    yield from tensors(entry)
            elif isinstance(value, partial):
                yield from tensors(value.args)

        def addresses(calls: times.Calls, name: str) -> set[int]:
            call = calls[name]
            call = getattr(call, "__wrapped__", call)  # of torch.no_grad()
            return {tensor.data_ptr() for tensor in tensors(call) if tensor.numel() >= 8 * 4 * 2}

        for timing in timings_of_tap(TapShape((8, 4, 2), True), torch.float32, "cpu"):
            again = timing.again()
            assert list(again) == list(timing.calls)
            for name in again:
                assert addresses(again, name)
                shared = addresses(again, name) & addresses(timing.calls, name)
                assert not shared, f"{timing.op}, {name}"
                again[name]()

    def test_rows_are_written_after_every_operation(self, tmp_path: Path, monkeypatch) -> None:
        path, kept = tmp_path / "rows.json", []

        def measure(
            device: str, repetitions: int, dtypes: list[torch.dtype], operations: list[str]
        ) -> Iterator[OperationRow]:
            assert (device, repetitions, dtypes, operations) == ("cpu", 1, [torch.bfloat16], ["taps"])
            for n in range(2):
                yield OperationRow("sum", "ours", "8", "bfloat16", n, n, n, 1.0, 0.0, 0)
                kept.append(len(json.loads(path.read_text())))
            raise KeyboardInterrupt

        monkeypatch.setattr(program, "measure_operations", measure)
        flags = "--device cpu --operations taps --dtypes bfloat16 --repetitions 1 --json"
        with pytest.raises(KeyboardInterrupt):
            program.main([*flags.split(), str(path)])
        assert kept == [1, 2]

    def test_a_tap_with_a_wrong_kernel_is_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def backward(grad: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
            times.reference.relu_moments_backward(grad, y, a, -b)

        impostor = SimpleNamespace(
            __name__="kernels.compiled",
            relu_moments=times.reference.relu_moments,
            relu_moments_backward=backward,
        )
        monkeypatch.setattr(times.kernels, "select", lambda *_: impostor)
        with pytest.raises(RuntimeError, match=r"^gfmn, compiled: wrong by"):
            timings_of_tap(TapShape((8, 4, 2), residual=False), torch.float32, "cpu")

    def test_share_of_the_criterion(self) -> None:
        """The clock sees the operations, and leaves what they compute as it is."""
        scenario = Scenario.calibrated(Problem("vgg-small", 32), "cpu")
        row = measure_step(scenario, 4, "reference", torch.float32, repetitions=3)
        assert (row.extractor, row.minibatch, row.dtype, row.backend) == ("vgg-small", 4, "float32", "reference")
        assert 0 < row.p20 <= row.p50 <= row.p80
        assert 0 < row.criterion_p50 < row.p50
        assert 0 < row.share < 1

    def test_clock_passes_results_on(self) -> None:
        scenario = Scenario.calibrated(Problem("vgg-small", 32), "cpu")
        images = torch.rand(4, 3, 32, 32)
        gradients, clock = [], None
        for clocked in (False, True):
            objective = scenario.parts(4, kernels="reference").objective
            if clocked:
                clock = Clocked(objective.kernels)
                objective.feature_pass.kernels = clock.functions
            leaf = images.clone().requires_grad_()
            objective(leaf).backward()
            gradients.append(leaf.grad)
        assert torch.equal(*gradients)
        assert clock.inside > 0
