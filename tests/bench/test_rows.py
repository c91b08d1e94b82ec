"""Rows: the committed ones are still readable, calls take turns, a file of rows is what was written."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest

from bench.data import LoadingRow
from bench.kernels.times import CriterionRow, OperationRow
from bench.memory.rows import CapacityRow, MemoryRow, SavedRow, ScaleRow
from bench.paper.runs import RunRow
from bench.rows import Row, interleaved, percentiles, print_rows, read_json, write_json
from bench.throughput import StepRow


@dataclass(frozen=True)
class LengthRow(Row):
    thing: str
    metres: float


def test_environment_comes_by_itself_and_last(tmp_path: Path) -> None:
    rows = [LengthRow("stick", 1.5), LengthRow("pole", 4.0, environment={"commit": "abc"})]
    assert {"versions", "processor", "threads", "load", "commit", "date"} == set(rows[0].environment)
    assert list(rows[0].as_json()) == ["thing", "metres", "environment"]
    write_json(tmp_path / "new" / "rows.json", rows)
    assert read_json(tmp_path / "new" / "rows.json", LengthRow) == rows
    (tmp_path / "rows.json").write_text('[{"thing": "stick", "feet": 5}]')
    with pytest.raises(TypeError, match="feet"):
        read_json(tmp_path / "rows.json", LengthRow)


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
    "kernels_step": (CriterionRow,),
    "kernels_times": (OperationRow,),
    "paper_*": (RunRow,),
    "memory": (MemoryRow, ScaleRow, SavedRow, CapacityRow),
    "scale": (StepRow,),
    "throughput": (StepRow,),
}


@pytest.mark.parametrize("name", _RESULTS)
def test_committed_results_are_readable(name: str) -> None:
    """Every object has exactly the fields of one kind of row, which writes it again byte for byte."""
    files = list((Path(__file__).parents[2] / "bench/results").glob(f"{name}_cpu_*.json"))
    assert files
    for path in files:
        again, kinds = [], set()
        for values in json.loads(path.read_text()):
            (kind,) = (kind for kind in _RESULTS[name] if {entry.name for entry in fields(kind)} == set(values))
            kinds.add(kind)
            row = kind(**values)
            assert all(isinstance(heading, str) for heading in row.cells())
            again.append(row.as_json())
        assert kinds == set(_RESULTS[name])
        assert json.dumps(again, indent=1) + "\n" == path.read_text()
