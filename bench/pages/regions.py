"""Regions of a Markdown page that a command fills from files of rows.

A region stands between `<!-- rows: NAME -->` and `<!-- end -->`. Rows are read by their keys, as `--json` wrote them:
old results must stay readable when the class of a row changes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.rows import newest_file
from engine.support.errors import InputError

Row = Mapping[str, Any]
_REGION = re.compile(r"(<!-- rows: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)
_MARKER = re.compile(r"<!-- (?:rows: [^>]*|end) -->")
_PACKAGES = {"python": "Python", "torch": "PyTorch", "triton": "Triton", "nvidia-dali-cuda130": "DALI"}


@dataclass(frozen=True)
class Results:
    """The rows of one file, and the file's name.

    Attributes:
        rows: in the file's order.
        source: the file, relative to the repository.
    """

    rows: Sequence[Row]
    source: str

    def conditions(self, *packages: str) -> str:
        """A line on where the rows come from: machine, versions of Python, PyTorch and `packages`, commit, date."""
        seen = [row["environment"] for row in self.rows]
        versions = [
            f"{_PACKAGES[package]} {_distinct(entry['versions'][package] for entry in seen)}"
            for package in ("python", "torch", *packages)
        ]
        threads = _distinct(entry["threads"] for entry in seen)
        return (
            f"*{_distinct(entry['processor'] for entry in seen)}, threads: {threads}; {', '.join(versions)}; "
            f"commit {_distinct(entry['commit'] for entry in seen)}; {_distinct(entry['date'] for entry in seen)}; "
            f"rows in `{self.source}`.*"
        )


def _distinct(values: Iterable[object]) -> str:
    return ", ".join(sorted({str(value) for value in values}))


Writer = Callable[[Results], str]


def read_results(folder: Path, kind: str) -> Results:
    """The newest file `KIND_YYYY-MM-DD.json` of `folder`; InputError if there is none, or it holds no rows."""
    file = newest_file(folder, kind)
    if file is None:
        raise InputError("results", f"{folder} has no file {kind}_YYYY-MM-DD.json")
    rows = json.loads(file.read_text())
    if not isinstance(rows, list) or not rows:
        raise InputError("results", f"{file} holds no rows")
    return Results(rows, f"bench/results/{file.name}")


def fill(text: str, write: Callable[[str], str]) -> str:
    """`text` with every region's body replaced by `write(name)`; InputError if the markers do not pair up."""
    regions = list(_REGION.finditer(text))
    for region in regions:
        if _MARKER.search(region["body"]):
            raise InputError("page", f"the region {region['name']} has no end")
    if len(_MARKER.findall(text)) != 2 * len(regions):
        raise InputError("page", "markers <!-- rows: NAME --> and <!-- end --> do not pair up")
    return _REGION.sub(lambda region: f"{region[1]}\n{write(region['name'])}\n\n{region[4]}", text)
