"""`make gpu` itself: what it says without a device, and what it makes of its jobs."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from bench import gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run everything")
def test_without_a_device_it_says_so_in_one_line(capsys, tmp_path):
    gpu.main(["--json", str(tmp_path / "gpu.json")])
    assert capsys.readouterr().out == "no CUDA device here: nothing was run\n"
    assert not list(tmp_path.iterdir())


def test_jobs_that_pass_fail_and_hang(tmp_path, monkeypatch):
    (tmp_path / "fine.py").write_text("import sys; open(sys.argv[2], 'w').write('[1]'); print('well')")
    (tmp_path / "wrong.py").write_text("import sys; print('worse', file=sys.stderr); sys.exit(3)")
    (tmp_path / "slow.py").write_text("import time; print('wait', flush=True); time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = {name: gpu.run_job(gpu.Job(name, (name,), limit_s=5), tmp_path) for name in ("fine", "wrong", "slow")}
    assert {name: result["status"] for name, result in found.items()} == {
        "fine": "passed", "wrong": "failed", "slow": "timed out",
    }  # fmt: skip
    assert found["fine"]["rows"] == [1]
    assert found["wrong"]["output"] == ["worse"]
    assert found["slow"]["output"] == ["wait"]
    assert found["wrong"]["rows"] is None


@pytest.mark.parametrize("job", [job for job in gpu.JOBS if job.rows], ids=lambda job: job.name)
def test_every_benchmark_takes_its_flags(job):
    module, *flags = job.arguments
    found = importlib.import_module(module)
    if hasattr(found, "__path__"):  # a package: `python -m` runs its __main__
        found = importlib.import_module(f"{module}.__main__")
    args = found.parser().parse_args([*flags, "--json", "rows.json"])
    assert str(args.json) == "rows.json"
    assert getattr(args, "device", "cuda") == "cuda"


@pytest.mark.parametrize("job", [job for job in gpu.JOBS if not job.rows], ids=lambda job: job.name)
def test_every_test_job_has_tests(job):
    """pytest fails if it selects none, or if a folder does not exist."""
    *_, mark = job.arguments[:3]
    folders = [Path(__file__).parents[2] / folder for folder in job.arguments[3:]]
    assert all(folder.is_dir() for folder in folders)
    assert any(mark in path.read_text() for folder in folders for path in folder.rglob("test_*.py"))


def test_one_job_that_fails_fails_all_and_is_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "fine.py").write_text("import sys; open(sys.argv[2], 'w').write('[{\"p50\": 1}]')")
    (tmp_path / "wrong.py").write_text("import sys; print('worse', file=sys.stderr); sys.exit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", lambda: {"commit": "abc"})
    monkeypatch.setattr(gpu, "JOBS", (gpu.Job("one", ("fine",), 30), gpu.Job("other", ("wrong",), 30)))
    out = tmp_path / "new" / "gpu.json"
    with pytest.raises(SystemExit) as exit_:
        gpu.main(["--json", str(out)])
    assert exit_.value.code == 1
    written = json.loads(out.read_text())
    assert written["environment"] == {"commit": "abc"}
    assert {name: (entry["status"], entry["rows"]) for name, entry in written["results"].items()} == {
        "one": ("passed", [{"p50": 1}]),
        "other": ("failed", None),
    }
    printed = capsys.readouterr().out
    assert "| one | passed |" in printed
    assert "| other | failed |" in printed
