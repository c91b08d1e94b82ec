"""The throughput benchmark: every variant is right before it is timed, and a wrong one is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers.fake_cuda import FakeCuda
from torch.utils._python_dispatch import TorchDispatchMode

from bench import precisions, throughput
from bench.cuda import STEPS, StepTime
from bench.precisions import Precision, full_precisions, low_precision
from bench.scenario import RECOMPUTE_GENERATOR, Problem, Scenario, engine_step, plain_step

SMALL = Problem("vgg-small", 32)
LOW = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def rows():
    soon, found = throughput.measure_variants(SMALL, 8, "cpu", 1, torch.bfloat16)
    assert [(row.variant, row.dtype) for row in soon] == [
        (row.variant, row.dtype) for row in found if "compiled" not in row.variant
    ], "what needs no compiler has its first rows before what does"
    return found


@pytest.mark.slow
def test_every_variant_is_there_and_right(rows):
    assert [(row.variant, row.dtype) for row in rows] == [
        ("naive", "float32"),
        ("naive, frozen", "float32"),
        ("naive, frozen, compiled", "float32"),
        ("naive, frozen, compiled, autocast", "bf16"),
        ("ours", "float32"),
        ("convolution floor", "float32"),
        ("generator alone", "float32"),
        ("ours", "bf16"),
        ("convolution floor", "bf16"),
        ("generator alone", "bf16"),
    ]
    for row in rows:
        assert 0 < row.p20 <= row.p50 <= row.p80
        assert row.images_per_second == 8 / row.p50
        compared = row.variant.startswith(("naive", "ours"))
        assert (row.gradient_error <= (5e-3 if row.dtype == "float32" else 0.2)) == compared
        assert row.environment["commit"]
        assert row.host_p50 is None


@pytest.mark.slow
def test_ratios(rows):
    seconds = {(row.variant, row.dtype): row.p50 for row in rows}
    found = throughput.ratios(rows)
    assert found["naive / ours --amp"] == seconds["naive", "float32"] / seconds["ours", "bf16"]
    floor = seconds["convolution floor", "bf16"] + seconds["generator alone", "bf16"]
    assert found["ours --amp / (convolution floor + generator)"] == seconds["ours", "bf16"] / floor
    lines = throughput.ratios_table(rows).splitlines()
    assert lines[2:] == [f"| {name} | {value:.2f} |" for name, value in found.items()]


@pytest.mark.slow
def test_table_holds_the_rows(rows, capsys):
    throughput.print_rows(rows)
    headings, _, *lines = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines())
    assert headings == ["variant", "dtype", "p20, s", "p50", "p80", "images/s", "gradient error"]
    assert [line[:2] for line in lines] == [[row.variant, row.dtype] for row in rows]
    for row, line in zip(rows, lines, strict=True):
        assert [float(cell) for cell in line[2:5]] == pytest.approx([row.p20, row.p50, row.p80], abs=6e-4)
        assert float(line[5]) == pytest.approx(row.images_per_second, abs=0.6)
        assert len(line) == (6 if math.isnan(row.gradient_error) else 7)


def test_a_wrong_gradient_is_not_timed(monkeypatch):
    right = Scenario.naive

    def wrong(self, **switches):
        objective = right(self, **switches)
        with torch.no_grad():
            next(objective.networks.parameters()).mul_(1.1)
        return objective

    monkeypatch.setattr(Scenario, "naive", wrong)
    with pytest.raises(RuntimeError, match="naive, float32: gradient off by"):
        next(throughput.measure_variants(SMALL, 8, "cpu", 1, torch.bfloat16))


class TestPrecision:
    """On CUDA float32 is IEEE or TF32, as its row says; who is asked here is PyTorch's flag, which a CPU has, too."""

    @pytest.fixture(autouse=True)
    def pretended_device(self, monkeypatch):
        real = precisions.choose_device
        monkeypatch.setattr(precisions, "choose_device", lambda name, float32: real("cpu", float32=float32))
        monkeypatch.setattr(throughput, "environment", lambda device: {"device": device})
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)

    def test_names_and_tolerances(self):
        assert [(own.name, own.dtype, own.tolerance) for own in full_precisions("cuda")] == [
            ("float32", None, 5e-3),
            ("tf32", None, 0.1),
        ]
        assert [(own.name, own.tolerance) for own in full_precisions("cpu")] == [("float32", 5e-3)]
        low = {(device, dtype): low_precision(device, dtype) for device in ("cpu", "cuda") for dtype in LOW}
        assert {key: own.tolerance for key, own in low.items()} == {
            ("cpu", torch.bfloat16): 0.2, ("cpu", torch.float16): 0.05,
            ("cuda", torch.bfloat16): 0.25, ("cuda", torch.float16): 0.1,
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("name", "dtype", "tf32"), [("float32", None, False), ("tf32", None, True), ("bf16", torch.bfloat16, True)]
    )
    @pytest.mark.parametrize("before", [False, True])
    def test_is_in_force_while_it_is_asked_for(self, name, dtype, tf32, before):
        torch.backends.cudnn.allow_tf32 = before
        seen = []
        step = Precision(name, dtype, "cuda").applied(lambda: seen.append(torch.backends.cudnn.allow_tf32))
        assert not seen
        step()
        assert (seen, torch.backends.cudnn.allow_tf32) == ([tf32], before)
        with pytest.raises(KeyError), Precision(name, dtype, "cuda").in_force():
            raise KeyError
        assert torch.backends.cudnn.allow_tf32 is before

    def test_every_variant_is_made_and_timed_in_its_own(self, monkeypatch):
        """Naive variants and ours alike; both kinds of float32 are rows of their own."""
        made, timed = [], []

        def watched(*_):
            flag = torch.backends.cudnn.allow_tf32
            made.append(flag)
            return lambda: timed.append((flag, torch.backends.cudnn.allow_tf32))

        class Floor:
            def __init__(self, *arguments):
                self.step = watched(*arguments)

            def __call__(self):
                self.step()

        full = [Precision(name, None, "cuda") for name in ("float32", "tf32")]
        monkeypatch.setattr(throughput, "full_precisions", lambda device: full)
        monkeypatch.setattr(throughput, "low_precision", lambda device, dtype: Precision("bf16", dtype, "cuda"))
        monkeypatch.setattr(throughput, "exact_gradient", lambda scenario, images: (None, torch.ones(3)))
        for name in ("naive_gradient", "engine_gradient"):
            monkeypatch.setattr(throughput, name, lambda *_: torch.ones(3) * 1.004)
        for name in ("plain_step", "engine_step"):
            monkeypatch.setattr(throughput, name, watched)
        monkeypatch.setattr(throughput, "Convolutions", Floor)
        monkeypatch.setattr(throughput, "step_time", lambda step, cuda: (step(), StepTime(2e-3, 1e-3))[1])
        *_, rows = throughput.measure_variants(SMALL, 8, "cpu", 2, torch.bfloat16)
        assert [(row.variant, row.dtype) for row in rows] == [
            *(
                (f"naive{rest}", name)
                for rest in ("", ", frozen", ", frozen, compiled")
                for name in ("float32", "tf32")
            ),
            ("naive, frozen, compiled, autocast", "bf16"),
            *(
                (variant, name)
                for name in ("float32", "tf32", "bf16")
                for variant in ("ours", "convolution floor", "generator alone")
            ),
        ]
        assert made.count(False) == 3 + 3, "IEEE: three naive variants, ours and its two floors"
        assert made.count(True) == 3 + 3 + 1 + 3
        assert len(timed) == (2 + 2) * len(rows) + 2 * (len(rows) - 3), "and two rounds without what is compiled"
        assert all(at_first == now for at_first, now in timed)
        assert all(row.environment == {"device": "cuda"} for row in rows)
        assert rows[0].cells()["host, ms"] == "1.00"
        assert rows[0].cells()["p20, ms"] == "2.00"
        found = throughput.ratios(rows)
        assert "naive compiled / ours tf32" in found
        assert not any("float32" in name for name in found), "who compares with PyTorch as it is compares with TF32"

    @pytest.mark.parametrize(("name", "error", "refused"), [
        ("float32", 0.004, False), ("float32", 0.05, True), ("tf32", 0.05, False), ("tf32", 0.3, True),
    ])  # fmt: skip
    def test_a_gradient_is_held_to_its_precision(self, name, error, refused, monkeypatch):
        monkeypatch.setattr(throughput, "full_precisions", lambda device: [Precision(name, None, "cuda")])
        monkeypatch.setattr(throughput, "exact_gradient", lambda scenario, images: (None, torch.ones(3)))
        monkeypatch.setattr(throughput, "naive_gradient", lambda *_: torch.ones(3) * (1 + error))
        monkeypatch.setattr(throughput, "plain_step", lambda *_: StopIteration)  # nothing is compiled for this
        monkeypatch.setattr(Scenario, "parts", lambda *_: pytest.fail("all naive variants have passed"))
        with pytest.raises(RuntimeError if refused else pytest.fail.Exception) as raised:
            next(throughput.measure_variants(SMALL, 2, "cpu", 1, torch.bfloat16))
        assert (f"naive, {name}: gradient off by" in str(raised.value)) == refused


def test_rows_are_written_after_every_round(monkeypatch, tmp_path):
    """A benchmark that is killed has the medians of the rounds before."""
    kept = []
    path = tmp_path / "rows.json"

    def measure(*_):
        for n in (1, 2):
            row = throughput.step_row("ours", Precision("bf16", torch.bfloat16, "cpu"), SMALL, 8, [StepTime(n)] * n)
            yield [row]
            kept.append(json.loads(path.read_text())[0]["p50"])
        raise KeyboardInterrupt

    monkeypatch.setattr(throughput, "measure_variants", measure)
    with pytest.raises(KeyboardInterrupt):
        throughput.main(["--device", "cpu", "--json", str(path)])
    assert kept == [1, 2]
    assert json.loads(path.read_text())[0]["p50"] == 2


class Recorded(TorchDispatchMode):
    """The biases of the convolutions inside it."""

    def __init__(self):
        super().__init__()
        self.biases = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.biases.append(args[2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_floor_has_no_bias_on_cuda(on_gpu):
    """The engine adds it together with the ReLU there; alone it is a kernel of its own."""
    floor = throughput.Convolutions(Scenario.shapes(SMALL).extractor, 2)
    assert floor.with_bias
    floor.with_bias = not on_gpu
    with Recorded() as mode:
        floor()
    assert len(mode.biases) == len(floor.work) > 0
    assert all((bias is None) == on_gpu for bias in mode.biases)


def test_the_floors_are_graphs_on_cuda(monkeypatch):
    """One launch each: what the device needs, without the host."""
    cuda = FakeCuda()
    monkeypatch.setattr(throughput, "cuda_of", lambda device: cuda)
    for name in ("plain_step", "engine_step", "Convolutions"):
        monkeypatch.setattr(throughput, name, lambda *_: cuda.busy("step", 1e-3))
    monkeypatch.setattr(throughput, "naive_gradient", lambda *_: torch.ones(3))
    monkeypatch.setattr(throughput, "exact_gradient", lambda scenario, images: (None, torch.ones(3)))
    monkeypatch.setattr(throughput, "engine_gradient", lambda *_: torch.ones(3))
    soon, rows = throughput.measure_variants(SMALL, 2, "cpu", 1, torch.bfloat16)
    assert cuda.log.count("capture") == 4, "convolutions and generator, in float32 and bfloat16"
    assert cuda.log.count("step") == STEPS * ((1 + 1) * len(soon) + (2 + 1) * len(rows))
    assert all(row.p50 == pytest.approx(1e-3) for row in rows)
    assert all(row.host_p50 is not None for row in rows)


def test_scale(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "SCALE", (1, 2, 3))
    command = "--scale --extractor vgg-small --batch-size 4 --repetitions 1 --device cpu --json"
    throughput.main([*command.split(), str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["minibatch"] for row in rows] == [4, 8, 12]
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert lines[0][0] == "minibatch"
    assert lines[0][-1] == "/ minibatch 8"
    per_image = [row["p50"] / row["minibatch"] for row in rows]
    for row, line, own in zip(rows, lines[2:], per_image, strict=True):
        assert line[0] == str(row["minibatch"])
        assert [float(cell) for cell in line[4:]] == pytest.approx(
            [1e3 * own, own / per_image[0], own / per_image[1]], abs=6e-3
        )


@pytest.mark.parametrize(
    ("flags", "message"), [("--repetitions 0", "--repetitions"), ("--batch-size 1", "--batch-size")]
)
def test_bad_input(flags, message, capsys):
    with pytest.raises(SystemExit):
        throughput.main(flags.split())
    assert message in capsys.readouterr().err


def test_convolutions_are_all_there():
    scenario = Scenario.shapes(Problem("vgg19+resnet18", 32))
    shapes = [tuple(grad.shape) for _, _, grad in throughput.Convolutions(scenario.extractor, 2).work]
    assert len(shapes) == 16 + 16 + 3  # VGG19's, ResNet18's up to its 16th ReLU, shortcuts that change the width
    assert shapes[0] == (2, 64, 32, 32)


def test_engine_and_naive_version_take_the_same_step():
    """From the same generator, z and target both losses send the generator the same way."""
    scenario = Scenario.calibrated(SMALL, "cpu")
    parts = scenario.parts(8)
    images = torch.rand(8, 3, 32, 32) * 2 - 1
    ours, naive = (images.clone().requires_grad_() for _ in range(2))
    parts.objective(ours).backward()
    scenario.naive()(naive).backward()
    # AMA's first step is α·sign(Δ), so each of the few features whose Δ is nearly 0 may differ.
    assert torch.nn.functional.cosine_similarity(ours.grad.flatten(), naive.grad.flatten(), dim=0) > 0.999


def test_steps_train_the_generator():
    scenario = Scenario.calibrated(SMALL, "cpu")
    parts = scenario.parts(4, torch.bfloat16, chunk_size=2, **RECOMPUTE_GENERATOR)
    generator = scenario.generator()
    for network, step in (
        (parts.generator, engine_step(parts)),
        (generator, plain_step(generator, scenario.naive(), 4)),
    ):
        before = [parameter.detach().clone() for parameter in network.parameters()]
        step()
        assert all(not torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))


def test_a_chunk_is_at_most_the_minibatch():
    scenario = Scenario.shapes(SMALL)
    assert scenario.config(4, chunk_size=8).matching.chunk_size is None
    assert scenario.config(8, chunk_size=8).matching.chunk_size == 8
