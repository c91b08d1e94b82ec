"""Networks side by side: which stream runs what, and who waits for whom, with streams that only take notes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from engine.representation.branches import Branches


class Notes:
    """In place of `torch.cuda`: every call is a line."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.current = "main"

    def stream(self, name: str) -> object:
        notes = self

        class Stream:
            def wait_stream(self, other: object) -> None:
                notes.lines.append(f"{name} waits for {other}")

            def __str__(self) -> str:
                return name

        return Stream()

    @contextlib.contextmanager
    def entered(self, stream: object) -> Iterator[None]:
        before, self.current = self.current, str(stream)
        yield
        self.current = before


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Notes:
    notes = Notes()
    made = iter(("side", "third"))
    main = notes.stream("main")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: notes.stream(next(made)))
    monkeypatch.setattr(torch.cuda, "stream", notes.entered)
    return notes


def test_on_a_gpu(notes: Notes) -> None:
    """Each on its own stream, the same forward and backward, between a fork and a join."""
    branches = Branches(torch.device("cuda"))

    def call(name: str):
        def run() -> str:
            notes.lines.append(f"{name} on {notes.current}")
            return name

        return run

    assert branches.run([call("a"), call("b")]) == ["a", "b"]
    fork, join = "side waits for main", "main waits for side"
    assert notes.lines == [fork, "a on main", "b on side", join]
    notes.lines.clear()
    assert branches.run([call("a"), call("b")], last_first=True) == ["a", "b"]
    assert notes.lines == [fork, "b on side", "a on main", join]
    notes.lines.clear()
    assert branches.run([call("a")]) == ["a"]
    assert notes.lines == ["a on main"]


def test_on_a_cpu(notes: Notes) -> None:
    order: list[int] = []
    calls = [lambda n=n: order.append(n) or n for n in range(3)]
    assert Branches(torch.device("cpu")).run(calls, last_first=True) == [0, 1, 2]
    assert order == [2, 1, 0]
    assert notes.lines == []
