"""Signals in every command: a checkpoint and a status where there is work to keep, one line everywhere else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from helpers.marks import slow
from helpers.runs import command

from engine import precompute, pretrain, train
from engine.representation.feature_pass import FeaturePass
from engine.representation.pretraining.training import Pretraining
from engine.support.errors import Interrupted, require
from engine.training.stopping import StopRequest
from engine.training.trainer import Trainer
from pipelines.loading.loader import dali_is_importable

pytestmark = pytest.mark.usefixtures("own_cache")

TRAINING = """--weights random --batch-size 4 --steps 4 --layers 1 --nz 8 --kernels reference --loader torch
    --log-every 1 --sample-every 4 --checkpoint-every 4 --threads 1"""
# A command, the function of it that is called again and again, and its flags.
WORK = {
    "train": (train.main, (Trainer, "train_step"), TRAINING),
    "pretrain": (pretrain.main, (Pretraining, "_take_step"), "--steps 4 --batch-size 8 --threads 1"),
    "precompute": (precompute.main, (FeaturePass, "collect"), f"{TRAINING} --batch-size 256"),
}
CAME = [
    ("train", signal.SIGINT),
    ("train", signal.SIGTERM),
    ("train", signal.SIGHUP),
    ("train", signal.SIGUSR1),
    ("pretrain", signal.SIGUSR1),
    ("precompute", signal.SIGTERM),
]


def second_call(place: tuple[type, str], number: signal.Signals, patch: pytest.MonkeyPatch) -> None:
    """Let the signal come during the second call."""
    owner, name = place
    original, calls = getattr(owner, name), []

    def signalled(self, *arguments, **options):
        calls.append(0)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return original(self, *arguments, **options)

    patch.setattr(owner, name, signalled)


@pytest.mark.parametrize(("name", "number"), CAME, ids=lambda value: getattr(value, "name", value))
def test_work_is_kept(name: str, number: signal.Signals, tmp_path: Path, monkeypatch, capsys) -> None:
    main, place, text = WORK[name]
    flags = [*text.split(), "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        second_call(place, number, patch)
        status, errors = command(main, flags, capsys)
    assert status == 128 + number
    assert "Traceback" not in errors
    kept = {"train": "out/checkpoints/step_*", "pretrain": "out.checkpoint", "precompute": "out.partial"}
    assert list(tmp_path.glob(kept[name]))
    if name == "train":
        flags = ["--resume", "--out", str(tmp_path / "out")]
    calls = []
    original = getattr(*place)
    monkeypatch.setattr(*place, lambda *given, **options: calls.append(0) or original(*given, **options))
    main([*flags, *(["--resume"] if name == "pretrain" else [])])
    assert (tmp_path / "out").exists()
    if name != "precompute":
        assert len(calls) == 2, "of four steps two were left"


def test_a_sigint_that_a_shell_had_ignored_stops_training(tmp_path: Path, monkeypatch) -> None:
    """As a script leaves it to what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        second_call((Trainer, "train_step"), signal.SIGINT, monkeypatch)
        with pytest.raises(Interrupted) as stopped:
            train.main([*TRAINING.split(), "--out", str(tmp_path / "run")])
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.status == 130
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def test_an_ignored_sighup_stays_ignored(tmp_path: Path, monkeypatch, capsys) -> None:
    """As nohup leaves SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        second_call((Trainer, "train_step"), signal.SIGHUP, monkeypatch)
        train.main([*TRAINING.split(), "--out", str(tmp_path / "run")])
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "run" / "samples.png").exists()


@pytest.mark.parametrize(
    ("first", "second", "patient", "interrupts"),
    [
        (signal.SIGINT, signal.SIGINT, False, True),
        (signal.SIGTERM, signal.SIGINT, False, True),
        (signal.SIGUSR1, signal.SIGTERM, False, False),
        (signal.SIGTERM, signal.SIGTERM, False, False),
        (signal.SIGINT, signal.SIGINT, True, False),
    ],
)
def test_only_a_second_ctrl_c_interrupts(first, second, patient: bool, interrupts: bool) -> None:
    with StopRequest(patient=patient) as stop:
        signal.raise_signal(first)
        assert stop.requested
        if interrupts:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(second)
        else:
            signal.raise_signal(second)
        assert stop.status == 128 + first


# As extension modules do it: Ctrl-C while the module is set up becomes an ImportError.
SWALLOWING = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(20):
        time.sleep(0.01)
except KeyboardInterrupt:
    raise ImportError("initialization failed")
"""


@pytest.mark.parametrize(
    ("module", "ask"),
    [("nvidia.dali", dali_is_importable), ("lmdb", lambda: require("lmdb", "LSUN"))],
    ids=["nvidia.dali", "lmdb"],
)
def test_an_interrupted_import_is_no_absent_library(
    module: str, ask: Callable[[], object], tmp_path: Path, monkeypatch, capsys
) -> None:
    file = tmp_path / (module.replace(".", "/") + ".py")
    file.parent.mkdir(exist_ok=True)
    file.write_text(SWALLOWING)
    monkeypatch.syspath_prepend(tmp_path)
    package = module.rpartition(".")[0]
    if package:
        stub = ModuleType(package)
        stub.__path__ = [str(file.parent)]
        monkeypatch.setitem(sys.modules, package, stub)
    monkeypatch.setitem(sys.modules, module, None)  # so that what was there comes back
    monkeypatch.delitem(sys.modules, module)
    found = []

    def main(argv: object) -> None:
        found.append(ask())
        time.sleep(10)

    status, errors = command(main, [], capsys)
    assert (status, errors.count("\n")) == (130, 1)
    assert found == [True] or [getattr(one, "__name__", None) for one in found] == [module]


def test_an_interruption_that_a_library_renames(capsys) -> None:
    def main(argv: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except KeyboardInterrupt:
            raise RuntimeError("error in a callback") from None

    status, errors = command(main, [], capsys)
    assert (status, errors.count("\n")) == (130, 1)


def interrupted_when(module: str, loaded: str, delay: float = 0.0) -> tuple[int, str]:
    """Status and errors of `python -m module --help`, interrupted once it has loaded a library of this name."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *([] if module.endswith("env") else ["--help"])],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while loaded not in maps.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


@pytest.mark.parametrize(
    ("module", "loaded"),
    [
        ("engine.train", "libtorch_global_deps"),
        ("engine.train", "libtorch_python"),
        ("engine.sample", "_multiarray_umath"),
        ("bench.data", "libtorch_global_deps"),
        slow("engine.env", "libtorch_global_deps"),  # it waits for all of torch
    ],
)
def test_ctrl_c_while_libraries_are_imported(module: str, loaded: str) -> None:
    status, errors = interrupted_when(module, loaded)
    assert (status, errors.count("\n")) == (130, 1), errors


@pytest.mark.slow
@pytest.mark.parametrize("module", ["train", "precompute", "pretrain", "sample", "evaluate", "report"])
def test_ctrl_c_in_the_first_seconds(module: str) -> None:
    for delay in (0.02, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4):
        status, errors = interrupted_when(f"engine.{module}", "libtorch_global_deps", delay)
        assert (status, errors.count("\n")) in ((130, 1), (0, 0)), errors
