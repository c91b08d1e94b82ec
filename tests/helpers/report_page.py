"""Reports to look at: write one, read what it says, check how it is nested."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from engine import report
from engine.configuration.command import run_command

VOID = {"meta", "link", "img", "input", "br", "hr", "line", "polyline", "circle"}


def write(run: Path, *flags: str) -> str:
    report.main(["--run", str(run), *flags])
    return (run / "report.html").read_text()


def change(run: Path, group: str, **values: Any) -> None:
    config = json.loads((run / "config.json").read_text())
    config[group].update(values)
    (run / "config.json").write_text(json.dumps(config))


def text_of(markup: str) -> str:
    """What a reader sees, on one line."""
    shown = re.sub(r"<(script|style)>.*?</\1>", "", markup, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", shown)).split())


class Outline(HTMLParser):
    """Elements, and mistakes in how they are nested."""

    def __init__(self, markup: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.mistakes: list[str] = []
        self.feed(markup)
        self.close()
        self.mistakes += self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            self.mistakes.append(f"</{tag}> in {self.open}")

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def error_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        run_command(report.main, argv)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line
