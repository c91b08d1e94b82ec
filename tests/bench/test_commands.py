"""bench.commands: what a process used is its own, and no process outlives the one that waits for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from bench import gpu, methods, photographs
from bench.commands import Usage, run_module

_CHILD = """
import signal, sys, time
from pathlib import Path

def stop(number, frame):
    Path(sys.argv[1] + ".stopped").write_text(str(number))
    sys.exit(128 + number)

signal.signal(signal.SIGTERM, stop)
Path(sys.argv[1] + ".begun").touch()
time.sleep(60)
"""
_PARENT = """
import sys
from bench.commands import check, in_turn, interruptible, run_module

try:
    with interruptible():
        def work(name):
            check(run_module("child", [name]), name)
        list(in_turn(work, ["1", "2", "3"], int(sys.argv[1])))
except KeyboardInterrupt:
    print("interrupted")
"""


def test_the_peak_is_not_that_of_the_parent() -> None:
    held = np.ones(600 * 2**20, dtype=np.uint8)
    assert held[-1] == 1
    del held
    ended = run_module("timeit", ["-n", "1", "-r", "1", "sum(range(10**5))"])
    assert 1 < ended.usage.mebibytes < 200


def test_a_process_that_held_much_says_so() -> None:
    ended = run_module("timeit", ["-n", "1", "-r", "1", "bytearray(b'x') * (300 * 2**20)"])
    assert 300 < ended.usage.mebibytes < 400


@pytest.mark.parametrize(
    ("command", "work", "flags"),
    [(methods, "pretrain", ["--docs"]), (photographs, "cut", ["--docs"]), (gpu, "run_job", ["--json"])],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_commands_that_train_take_a_signal_for_ctrl_c(
    command: ModuleType, work: str, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the processes which they wait for do not outlive them."""
    monkeypatch.setattr(command, work, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", lambda device: {})
    with pytest.raises(KeyboardInterrupt):
        command.main([*flags, str(tmp_path / "out")])
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("jobs", [1, 2])
def test_processes_are_told_to_stop_and_waited_for(jobs: int, number: int, tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text(_CHILD)
    path = os.pathsep.join((str(tmp_path), str(Path(__file__).parents[2])))
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(jobs)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    names = [str(name + 1) for name in range(jobs)]
    until = time.monotonic() + 30
    while not all((tmp_path / f"{name}.begun").exists() for name in names) and time.monotonic() < until:
        time.sleep(0.02)
    parent.send_signal(number)  # to it alone: its processes know nothing of that
    said, _ = parent.communicate(timeout=30)
    assert said == "interrupted\n"
    assert sorted(path.name for path in tmp_path.glob("*.begun")) == [f"{name}.begun" for name in names]
    assert [(tmp_path / f"{name}.stopped").read_text() for name in names] == [str(int(signal.SIGTERM))] * jobs


def test_usage_adds_up() -> None:
    assert Usage(1, 2, 3) + Usage(10, 20, 2) == Usage(11, 22, 3)
    assert Usage(1, 2, 3) + Usage(0, None, 0) == Usage(1, None, 3)
