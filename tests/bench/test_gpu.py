"""`make gpu` itself: what it says without a device, and what it makes of its jobs, whatever they do."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu

ROOT = Path(__file__).parents[2]
MARK = re.compile(r"pytest\.mark\.requires_gpu")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`module(name, code)`: a job that runs `code` as `python -m name`."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")

    def make(name: str, code: str, limit_s: int = 30) -> gpu.Job:
        (tmp_path / f"{name}.py").write_text(code)
        return gpu.Job(name, (name,), limit_s)

    return make


FINE = "import sys; open(sys.argv[2], 'w').write('[{\"p50\": 1}]'); print('well')"
WRONG = "import sys; print('worse', file=sys.stderr); sys.exit(3)"
# A child that holds on to the output, as a hanging measurement in a process of its own would.
FAMILY = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[0]).with_suffix(".pid").write_text(str(child.pid))
print("started", flush=True)
{then}
"""
# Rows as a benchmark writes them, one at a time, and then nothing more.
ROWS = """
import pathlib, sys, time
from bench.rows import Row, RowFile

def measure():
    for n in range(2):
        yield Row(environment={"n": n})
    pathlib.Path(sys.argv[0]).with_suffix(".ready").touch()
    time.sleep(600)

with RowFile(pathlib.Path(sys.argv[2])) as file:
    file.keep(measure())
"""


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def ended(process: int) -> bool:
    deadline = time.monotonic() + 10
    while is_running(process):
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
            return False
        time.sleep(0.01)
    return True


def test_without_a_device_it_says_so_in_one_line(capsys, tmp_path: Path) -> None:
    gpu.main(["--json", str(tmp_path / "gpu.json")])
    assert capsys.readouterr().out == "no CUDA device here: nothing was run\n"
    assert not list(tmp_path.iterdir())


class TestOneJob:
    def test_that_passes(self, module, tmp_path: Path) -> None:
        found = gpu.run_job(module("fine", FINE), tmp_path)
        assert (found["status"], found["rows"], found["output"]) == ("passed", [{"p50": 1}], ["well"])
        assert found["command"].startswith("python -m fine --json ")

    def test_that_fails(self, module, tmp_path: Path) -> None:
        found = gpu.run_job(module("wrong", WRONG), tmp_path)
        assert (found["status"], found["rows"], found["output"]) == ("failed", None, ["worse"])

    @pytest.mark.parametrize(
        ("then", "limit_s", "status"),
        [("time.sleep(600)", 5, "timed out"), ("", 30, "passed"), ("sys.exit(1)", 30, "failed")],
        ids=["hangs", "forgets its child", "fails and forgets it"],
    )
    def test_takes_its_children_with_it(self, then: str, limit_s: int, status: str, module, tmp_path: Path) -> None:
        job = module("family", FAMILY.format(then=then), limit_s)
        begun = time.monotonic()
        found = gpu.run_job(job, tmp_path)
        assert time.monotonic() - begun < 20, "who holds the output is not waited for"
        assert (found["status"], found["output"]) == (status, ["started"])
        assert ended(int((tmp_path / "family.pid").read_text()))

    def test_rows_from_before_its_time_was_over_are_kept(self, module, tmp_path: Path, monkeypatch) -> None:
        def over(process: subprocess.Popen[bytes], limit_s: float) -> int:
            while not (tmp_path / "rows.ready").exists():
                assert process.poll() is None
                time.sleep(0.01)
            monkeypatch.undo()
            raise subprocess.TimeoutExpired("rows", limit_s)

        job = module("rows", ROWS)
        monkeypatch.setattr(subprocess.Popen, "wait", over)
        found = gpu.run_job(job, tmp_path)
        assert found["status"] == "timed out"
        assert [row["environment"]["n"] for row in found["rows"]] == [0, 1]

    def test_that_is_interrupted_is_killed_too(self, module, tmp_path: Path, monkeypatch) -> None:
        def interrupted(*_: object) -> None:
            while not (tmp_path / "family.pid").exists() or not (tmp_path / "family.pid").read_text():
                time.sleep(0.01)
            monkeypatch.undo()
            raise KeyboardInterrupt

        job = module("family", FAMILY.format(then="time.sleep(600)"))
        monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            gpu.run_job(job, tmp_path)
        assert ended(int((tmp_path / "family.pid").read_text()))


class TestAllJobs:
    def test_take_ten_minutes_at_most(self) -> None:
        assert sum(job.limit_s for job in gpu.JOBS) <= gpu.BUDGET_S == 600

    def test_come_in_the_order_in_which_they_should_fail(self) -> None:
        """What has to be right before what a step consists of, and that before speed."""
        names = [job.name for job in gpu.JOBS]
        assert names[:3] == ["kernel tests", "tests", "step profile"]
        assert set(names[3:]) == {"kernels", "kernels, step", "memory", "data", "throughput"}
        assert names[-1] == "throughput", "the longest, of which most is known already"

    @pytest.mark.parametrize("job", [job for job in gpu.JOBS if job.rows], ids=lambda job: job.name)
    def test_benchmarks_take_their_flags_and_measure_the_device(self, job: gpu.Job) -> None:
        name, *flags = job.arguments
        found = importlib.import_module(name)
        if hasattr(found, "__path__"):  # a package: `python -m` runs its __main__
            found = importlib.import_module(f"{name}.__main__")
        args = found.parser().parse_args([*flags, "--json", "rows.json"])
        assert str(args.json) == "rows.json"
        if job.name != "step profile":  # which knows no other device
            assert args.device == "cuda"

    def test_every_test_of_the_triton_kernels_runs(self) -> None:
        (job,) = (job for job in gpu.JOBS if job.name == "kernel tests")
        arguments = [*job.arguments, "--collect-only", "--numprocesses", "0"]
        done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        found = {line.split(":")[0] for line in done.stdout.splitlines() if line.startswith("tests/")}
        needed = {
            "operations",
            "operators",
            "dataset_moments",
            "pairwise",
            "public",
            "triton",
            "triton_training",
            "watch",
        }
        assert found >= {f"tests/kernels/test_{name}.py" for name in needed}

    def test_every_other_test_that_requires_a_device_runs(self) -> None:
        (job,) = (job for job in gpu.JOBS if job.name == "tests")
        folders = {ROOT / argument for argument in job.arguments if argument.startswith("tests/")}
        assert all(folder.is_dir() for folder in folders)
        assert "requires_gpu" in job.arguments[job.arguments.index("-m") + 1]
        marked = [path for path in (ROOT / "tests").rglob("test_*.py") if MARK.search(path.read_text())]
        assert len(marked) >= 3
        assert all(folders & {*path.parents} or path.parent.name == "kernels" for path in marked)


def test_the_file_is_whole_after_every_job(module, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", lambda device: {"commit": "abc", "device": device})
    jobs = (module("fine", FINE), module("wrong", WRONG), module("again", FINE))
    monkeypatch.setattr(gpu, "JOBS", jobs)
    out = tmp_path / "new" / "gpu.json"
    seen: list[list[str]] = []

    def watched(job: gpu.Job, folder: Path) -> dict[str, object]:
        seen.append(list(json.loads(out.read_text())["results"]) if out.exists() else [])
        return run_job(job, folder)

    run_job = gpu.run_job
    monkeypatch.setattr(gpu, "run_job", watched)
    with pytest.raises(SystemExit) as exit_:
        gpu.main(["--json", str(out)])
    assert exit_.value.code == 1
    assert seen == [[], ["fine"], ["fine", "wrong"]]
    written = json.loads(out.read_text())
    assert written["environment"] == {"commit": "abc", "device": "cuda"}
    assert {name: (entry["status"], entry["rows"]) for name, entry in written["results"].items()} == {
        "fine": ("passed", [{"p50": 1}]),
        "wrong": ("failed", None),
        "again": ("passed", [{"p50": 1}]),
    }
    printed = capsys.readouterr().out
    assert "| fine | passed |" in printed
    assert "| wrong | failed |" in printed
