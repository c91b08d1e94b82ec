"""Settings that need something of the GPU: a CUDA graph, low precision, a driver that fits. One line where it lacks."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from helpers.runs import command
from torch._subclasses import FakeTensorMode

import kernels
from engine import precompute, pretrain, train
from engine.configuration import running
from engine.configuration.config import Config
from engine.configuration.inputs import check_graph, check_precision, choose_device
from engine.configuration.modelling import is_captured
from engine.generation.drawn_ahead import CudaLane, DrawnAhead
from engine.generation.priors import Gaussian, Noise
from engine.methods.matching import Matching
from engine.support.errors import InputError
from engine.training.graphs import CudaGraphs
from engine.training.precision import AMP_DTYPES
from kernels import reference

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
QUICK = "--weights random --batch-size 4 --steps 3 --layers 1 --nz 8 --kernels reference --loader torch --threads 1"


def config(**settings: object) -> Config:
    return Config.build("digits", settings)


class TestCudaGraph:
    def test_without_cuda_it_is_one_line_before_any_work(self, tmp_path: Path, capsys) -> None:
        out = tmp_path / "run"
        argv = [*QUICK.split(), "--device", "cpu", "--cuda-graph", "--out", str(out)]
        code, errors = command(train.main, argv, capsys)
        assert (code, errors) == (2, "error: --cuda-graph: needs a CUDA device, and this run is on the CPU\n")
        assert not out.exists()

    def test_a_run_that_had_one_is_resumed_on_a_cpu_without(self, tmp_path: Path, monkeypatch, capsys) -> None:
        monkeypatch.setenv("GFMN_CACHE", str(tmp_path / "cache"))
        out = tmp_path / "run"
        argv = [*QUICK.split(), "--device", "cpu", "--no-cuda-graph", "--out", str(out)]
        train.main([*argv, "--steps", "2"])
        file = out / "config.json"
        assert '"cuda_graph": false' in file.read_text()
        file.write_text(file.read_text().replace('"cuda_graph": false', '"cuda_graph": true'))
        resume = ["--resume", "--steps", "3", "--out", str(out)]
        code, errors = command(train.main, resume, capsys)
        assert (code, errors.count("\n")) == (2, 1)
        assert errors.startswith("error: --cuda-graph: ")
        train.main([*resume, "--no-cuda-graph"])

    def test_the_plain_kernels_have_none(self) -> None:
        check_graph(config(cuda_graph=True), CUDA)
        check_graph(config(cuda_graph=False, kernels="reference"), CUDA)
        check_graph(config(kernels="reference"), CPU)
        for settings in ({"kernels": "reference"}, {"fused_ama": False}):
            with pytest.raises(InputError, match="needs the Triton kernels, not --kernels reference") as error:
                check_graph(config(cuda_graph=True, **settings), CUDA)
            assert error.value.argument == "cuda_graph"

    def test_a_distance_that_needs_the_host_has_none(self, monkeypatch) -> None:
        with pytest.raises(InputError, match="--method frechet cannot be captured") as error:
            check_graph(config(method="frechet", cuda_graph=True), CUDA)
        assert error.value.argument == "cuda_graph"
        check_graph(config(method="frechet"), CUDA)
        monkeypatch.setattr(running, "chosen_backend", lambda name, device, dtype: kernels)
        assert running.make_machinery(config(method="frechet"), CUDA)["graphs"] is None
        assert is_captured(config())
        assert not is_captured(config(method="frechet"))

    def test_on_a_cpu_nothing_is_captured_or_drawn_ahead(self) -> None:
        found = running.make_machinery(config(seed=5), CPU)
        assert type(found["noise"]) is Noise
        assert torch.equal(found["noise"].draw(Gaussian(3), 2), Noise(5).draw(Gaussian(3), 2))
        assert found["graphs"] is None
        assert found["kernels"] is reference

    @pytest.mark.parametrize(
        ("wanted", "backend", "captures"),
        [
            (None, "triton", True),
            (True, "triton", True),
            (False, "triton", False),
            (None, "reference", False),
            (False, "reference", False),
        ],
    )
    def test_on_a_gpu_it_comes_with_triton(self, wanted, backend: str, captures: bool, monkeypatch) -> None:
        chosen = kernels if backend == "triton" else reference  # any other module will do for Triton's
        monkeypatch.setattr(running, "chosen_backend", lambda name, device, dtype: chosen)
        found = running.make_machinery(config(cuda_graph=wanted), CUDA)
        assert isinstance(found["graphs"], CudaGraphs) == captures
        assert found["kernels"] is chosen
        assert isinstance(found["noise"], DrawnAhead)
        assert isinstance(found["noise"].lane, CudaLane)

    def test_where_triton_cannot_run_it_is_refused(self, monkeypatch) -> None:
        monkeypatch.setattr(running, "chosen_backend", lambda name, device, dtype: reference)
        with pytest.raises(InputError, match="cannot run here") as error:
            running.make_machinery(config(cuda_graph=True), CUDA)
        assert error.value.argument == "cuda_graph"

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_a_rate_lies_where_a_captured_step_reads_it(self, device: str) -> None:
        with FakeTensorMode():
            method = Matching(torch.nn.Linear(4, 3, device=device), Gaussian(4), None, batch_size=2, lr=5e-5)
        (group,) = method.gradient_step.optimizer.param_groups
        assert method.gradient_step.optimizer.defaults["lr"] == 5e-5
        assert group["fused"]
        assert group["capturable"] == (device == "cuda")
        if device == "cpu":
            assert group["lr"] == 5e-5
        else:
            assert (group["lr"].shape, group["lr"].dtype) == ((), torch.float32), "what the fused kernel takes"
            assert group["lr"].device.type == "cuda"


class TestPrecision:
    @pytest.fixture
    def capability(self, monkeypatch: pytest.MonkeyPatch):
        def pretend(major: int, minor: int) -> None:
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Old GPU")

        return pretend

    @pytest.mark.parametrize(
        ("dtype", "own", "message"),
        [
            (torch.bfloat16, (7, 5), "bf16 needs a GPU of compute capability 8.0 or newer, and Old GPU has 7.5; "
             "--amp-dtype fp16 runs there"),
            (torch.bfloat16, (5, 2), "bf16 needs a GPU of compute capability 8.0 or newer, and Old GPU has 5.2; leave "
             "out --amp"),
            (torch.float16, (5, 2), "fp16 needs a GPU of compute capability 5.3 or newer, and Old GPU has 5.2; leave "
             "out --amp"),
        ],
    )  # fmt: skip
    def test_what_the_gpu_lacks_is_said(self, dtype, own: tuple[int, int], message: str, capability) -> None:
        capability(*own)
        with pytest.raises(InputError) as error:
            check_precision(dtype, CUDA)
        assert (error.value.argument, error.value.message) == ("amp_dtype", message)
        check_precision(dtype, CPU)
        check_precision(None, CUDA)

    @pytest.mark.parametrize("name", ["bf16", "fp16"])
    def test_a_cpu_without_it_is_warned_of(
        self, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        for supported in (True, False):
            monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda supported=supported: supported)
            caplog.clear()
            check_precision(AMP_DTYPES[name], CPU)
            assert [f"no fast {name}" in line for line in caplog.messages] == ([] if supported else [True])

    @pytest.mark.parametrize(("dtype", "own"), [(torch.bfloat16, (8, 0)), (torch.float16, (5, 3))])
    def test_what_it_has_is_used(self, dtype, own: tuple[int, int], capability) -> None:
        capability(*own)
        check_precision(dtype, CUDA)

    @pytest.mark.parametrize(
        ("main", "more", "flag"),
        [
            (train.main, [*QUICK.split(), "--amp"], "--amp-dtype"),
            (precompute.main, [*QUICK.split(), "--amp"], "--amp-dtype"),
            (pretrain.main, ["--steps", "2", "--amp"], "--amp"),
        ],
        ids=["train", "precompute", "pretrain"],
    )
    def test_every_command_says_it_before_any_work(self, main, more, flag, capability, monkeypatch, tmp_path, capsys):
        capability(7, 5)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        more = [flag for flag in more if flag not in ("--kernels", "reference")] if main is not train.main else more
        code, errors = command(main, [*more, "--device", "cuda", "--out", str(tmp_path / "out")], capsys)
        assert (code, errors.count("\n")) == (2, 1)
        assert errors.startswith(f"error: {flag}: bf16 needs a GPU of compute capability 8.0")


class TestOldDriver:
    @pytest.fixture
    def old_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A device file, and PyTorch's own words on a driver that it cannot use."""

        def is_available() -> bool:
            warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old\n", stacklevel=1)
            return False

        monkeypatch.setattr(torch.cuda, "is_available", is_available)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # by which tests hide GPUs
        monkeypatch.setattr(Path, "glob", lambda path, pattern: iter([path / "nvidia0"]))

    def test_auto_says_so_in_one_line_and_takes_the_cpu(self, old_driver: None, caplog, capsys) -> None:
        assert choose_device("auto") == CPU
        (record,) = caplog.records
        assert record.getMessage() == (
            "warning: /dev/nvidia0 is there, but PyTorch for CUDA 13.0 cannot use it (is the driver too old?); "
            "the CPU is used"
        )
        assert capsys.readouterr().err == ""

    def test_cuda_is_refused_with_the_same_reason(self, old_driver: None) -> None:
        with pytest.raises(InputError, match=r"\(/dev/nvidia0 is there, .*driver too old.*; use --device cpu") as error:
            choose_device("cuda")
        assert error.value.argument == "device"
        assert "\n" not in str(error.value)

    def test_a_build_without_cuda_is_not_the_driver_s_fault(self, old_driver: None, monkeypatch, caplog) -> None:
        monkeypatch.setattr(torch.version, "cuda", None)
        assert choose_device("auto") == CPU
        assert "this PyTorch is built without CUDA" in caplog.text

    def test_without_a_gpu_nothing_is_said(self, monkeypatch, caplog) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(Path, "glob", lambda path, pattern: iter([]))
        assert choose_device("auto") == CPU
        assert not caplog.records
        with pytest.raises(InputError, match="no GPU, or no driver"):
            choose_device("cuda")
