"""Rows: the committed ones are still readable, calls take turns, a file of rows is what was written."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.data import LoadingRow
from bench.kernels.steps import CriterionRow
from bench.kernels.times import OperationRow
from bench.memory.rows import CapacityRow, MemoryRow, SavedRow, ScaleRow
from bench.paper.runs import RunRow
from bench.rows import (
    Row,
    RowFile,
    cold_seconds,
    environment,
    interleaved,
    peak_memory,
    percentiles,
    print_rows,
    read_json,
    rounds,
    seconds,
    write_json,
)
from bench.throughput import StepRow


@dataclass(frozen=True)
class LengthRow(Row):
    thing: str
    metres: float
    width: float | None = None


def test_environment_comes_by_itself_and_last(tmp_path: Path) -> None:
    rows = [LengthRow("stick", 1.5), LengthRow("pole", 4.0, environment={"commit": "abc"})]
    assert {"versions", "processor", "threads", "load", "commit", "date"} == set(rows[0].environment)
    assert list(rows[0].as_json()) == ["thing", "metres", "environment"]
    write_json(tmp_path / "new" / "rows.json", rows)
    assert read_json(tmp_path / "new" / "rows.json", LengthRow) == rows
    (tmp_path / "rows.json").write_text('[{"thing": "stick", "feet": 5}]')
    with pytest.raises(TypeError, match="feet"):
        read_json(tmp_path / "rows.json", LengthRow)


def test_what_a_row_does_not_have_is_in_no_file(tmp_path: Path) -> None:
    rows = [LengthRow("stick", 1.5), LengthRow("plank", 4.0, 0.2)]
    assert list(rows[1].as_json()) == ["thing", "metres", "width", "environment"]
    write_json(tmp_path / "rows.json", rows)
    assert read_json(tmp_path / "rows.json", LengthRow) == rows


class TestRowFile:
    def test_rows_are_there_as_they_come(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "rows.json"

        def measure() -> Iterator[LengthRow]:
            for n in range(3):
                yield LengthRow("stick", n)
                assert [row.metres for row in read_json(path, LengthRow)] == [7, *range(n + 1)]
            raise KeyboardInterrupt

        def benchmark() -> None:
            pole = LengthRow("pole", 7)
            with RowFile(path) as file:
                assert file.keep([pole]) == [pole]
                file.keep(measure())

        with pytest.raises(KeyboardInterrupt):
            benchmark()
        assert [row.metres for row in read_json(path, LengthRow)] == [7, 0, 1, 2]

    def test_a_later_table_replaces_the_one_before(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.json"
        tables = [[LengthRow("stick", n), LengthRow("pole", n)] for n in (1, 2)]

        def measure() -> Iterator[list[LengthRow]]:
            for table in tables:
                yield table
                assert read_json(path, LengthRow) == [first, *table]

        first = LengthRow("first", 0)
        with RowFile(path) as file:
            file.keep([first])
            assert file.keep_latest(measure()) == tables[-1]
            file.keep([LengthRow("last", 3)])
        assert [row.thing for row in read_json(path, LengthRow)] == ["first", "stick", "pole", "last"]

    @pytest.mark.parametrize("kind", ["pipe", "standard output"])
    def test_what_cannot_be_replaced_is_written_once(self, kind: str, tmp_path: Path, capfd) -> None:
        if kind == "pipe":
            path = tmp_path / "pipe"
            os.mkfifo(path)
            reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        else:
            path = Path("/dev/stdout")
        with RowFile(path) as file:
            file.keep([LengthRow("stick", 1), LengthRow("pole", 2)])
        text = os.read(reader, 10_000).decode() if kind == "pipe" else capfd.readouterr().out
        assert [row["thing"] for row in json.loads(text)] == ["stick", "pole"]

    def test_without_a_file_rows_are_only_kept(self) -> None:
        rows = [LengthRow("stick", 1)]
        with RowFile(None) as file:
            assert file.keep(iter(rows)) == file.rows == rows


class TestDeviceOfTheCall:
    """On a machine with a GPU, `--device cpu` measures the CPU."""

    @pytest.fixture(autouse=True)
    def gpu_that_nobody_may_ask(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def asked(*_: object) -> None:
            raise AssertionError("asked the GPU")

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for name in ("synchronize", "memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, asked)

    @pytest.mark.parametrize("timed", [seconds, cold_seconds])
    @pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
    def test_time(self, timed, device) -> None:
        assert timed(lambda: time.sleep(0.01), device) >= 0.01
        with pytest.raises(AssertionError, match="asked the GPU"):
            seconds(lambda: None, "cuda")

    def test_memory(self) -> None:
        assert peak_memory(lambda: torch.ones(1000).sum(), "cpu") == pytest.approx(4000, abs=64)
        with pytest.raises(AssertionError, match="asked the GPU"):
            peak_memory(lambda: None, "cuda")

    def test_processor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Great {device}")
        assert environment("cuda")["processor"] == "Great cuda"
        assert "CPU" in environment()["processor"]
        assert environment(torch.device("cpu"))["processor"] == environment()["processor"]


def test_rounds_say_what_was_found_so_far() -> None:
    calls = {"a": lambda: 1, "b": lambda: 2}
    tables = list(rounds(calls, 3, lambda call: call(), warmup=2))
    assert tables == [{"a": [1] * n, "b": [2] * n} for n in (1, 2, 3)]
    assert interleaved(calls, 3, lambda call: call(), warmup=2) == tables[-1]


def test_table_of_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([LengthRow("stick", 1.5), LengthRow("pole", 4.0)])
    expected = ["| thing | metres |", "| --- | --- |", "| stick | 1.5 |", "| pole | 4.0 |"]
    assert capsys.readouterr().out.splitlines() == expected


def test_calls_take_turns_in_changing_order() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}

    def measured(call) -> int:
        call()
        return len(order)

    found = interleaved(calls, 20, measured, warmup=2)
    rounds = [order[n : n + 3] for n in range(0, len(order), 3)]
    assert len(rounds) == 22
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) == 6, "every order has come"
    for name, values in found.items():
        assert values == [position + 1 for position, called in enumerate(order) if called == name][2:]


def test_percentiles() -> None:
    values = np.random.default_rng(0).permutation(101).tolist()
    assert percentiles(values) == (20, 50, 80)


# What docs and later versions read: the names in bench/results/ are the rows' fields.
_RESULTS = {
    "data": (LoadingRow,),
    "kernels_pairs": (OperationRow,),
    "kernels_step": (CriterionRow,),
    "kernels_times": (OperationRow,),
    "paper_*": (RunRow,),
    "memory": (MemoryRow, ScaleRow, SavedRow, CapacityRow),
    "scale": (StepRow,),
    "throughput": (StepRow,),
}


def named(kind: type[Row]) -> set[str]:
    return {entry.name for entry in fields(kind)}


def needed(kind: type[Row]) -> set[str]:
    return {entry.name for entry in fields(kind) if entry.default is not None}


@pytest.mark.parametrize("name", _RESULTS)
def test_committed_results_are_readable(name: str) -> None:
    """Every object has the fields of one kind of row, all but what it may lack; that writes it again byte for byte."""
    files = list((Path(__file__).parents[2] / "bench/results").glob(f"{name}_cpu_*.json"))
    assert files
    for path in files:
        again, kinds = [], set()
        for values in json.loads(path.read_text()):
            (kind,) = (kind for kind in _RESULTS[name] if needed(kind) <= set(values) <= named(kind))
            kinds.add(kind)
            row = kind(**values)
            assert all(isinstance(heading, str) for heading in row.cells())
            again.append(row.as_json())
        assert kinds == set(_RESULTS[name])
        assert json.dumps(again, indent=1) + "\n" == path.read_text()
