"""Where a training step's time goes: a torch.profiler trace of a few steps."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from engine.support.errors import WriteError, reason
from engine.support.files import write_atomically

log = logging.getLogger("gfmn")

# The first step compiles.
_FIRST = 1
_ROWS = 15


def quiet_profiler() -> None:
    """Keep Kineto from announcing its starts and stops on stderr; call it before the process's first trace."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")


class StepProfiler:
    """Context around training steps; traces `steps` of them after `warmup` others, or does nothing if there are none.

    Writes a trace for chrome://tracing or Perfetto to `path` and logs the operators that took most time themselves.

    Args:
        steps: to trace; None for none.
        path: of the trace.
        different: steps at the beginning that are not like those that follow.

    Attributes:
        warmup: steps before the traced ones: those that are different, and one for the profiler itself.
    """

    def __init__(self, steps: int | None, path: Path, different: int = 0):
        self.path, self.warmup = path, max(different, _FIRST) + 1
        self.profiler: profile | None = None
        if steps:
            quiet_profiler()
            plan = schedule(wait=self.warmup - 1, warmup=1, active=steps, repeat=1)
            self.profiler = profile(schedule=plan, on_trace_ready=self._write, profile_memory=True)

    def __enter__(self) -> StepProfiler:
        if self.profiler is not None:
            self.profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.profiler is not None:
            self.profiler.stop()

    def step(self) -> None:
        """After every training step."""
        if self.profiler is not None:
            self.profiler.step()

    def _write(self, done: profile) -> None:
        # By way of a file of our own: torch says nothing of a write that fails, and replaces what is no plain file.
        try:
            with tempfile.TemporaryDirectory() as folder:
                trace = Path(folder) / "trace.json"
                done.export_chrome_trace(str(trace))
                write_atomically(self.path, trace.read_bytes())
        except OSError as error:
            raise WriteError(self.path, f"could not be written, {reason(error)}") from None
        on_gpu = ProfilerActivity.CUDA in done.activities and any(
            event.self_device_time_total for event in done.key_averages()
        )
        by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        log.info("%s\ntrace: %s", done.key_averages().table(sort_by=by, row_limit=_ROWS), self.path)
