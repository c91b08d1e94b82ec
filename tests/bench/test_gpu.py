"""`make gpu` itself: what it says without a device, and what it makes of its jobs."""

from __future__ import annotations

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


def test_all_jobs_fit_in_ten_minutes():
    assert sum(job.limit_s for job in gpu.JOBS) <= 600
