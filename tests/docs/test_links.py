"""Every link of every page leads somewhere, and every command, path, name and flag in a page's code exists."""

from __future__ import annotations

from pathlib import Path

import pytest
from page_checks import ROOT, broken_links, headings, missing_references, pages, resolves

PAGES = pages()
IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_what_code_names_exists(page: Path) -> None:
    assert missing_references(page) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[gone](gone.md)", "gone.md: no such file"),
        ("![picture](docs/gone.png)", "docs/gone.png: no such file"),
        ("# Here\n[there](#there)", "#there: no such heading"),
        ("[there](other.md#elsewhere)", "other.md#elsewhere: no such heading"),
        ("[`gone`](code.py)", "code.py: does not define gone"),
        ("[`Known.gone`](code.py)", "code.py: does not define Known.gone"),
        ("[`kernels/code.py`](code.py)", "code.py: does not define kernels/code.py"),
    ],
)
def test_a_broken_link_is_found(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# Other\n")
    (tmp_path / "code.py").write_text("class Known:\n    def member(self): ...\n")
    page = tmp_path / "page.md"
    page.write_text(text)
    assert broken_links(page, tmp_path) == [problem]


def test_sound_links_are_not_complained_of(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# The `other` one: 2 things\n")
    (tmp_path / "code.py").write_text("class Known:\n    def member(self): ...\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n[a](#here) [b](other.md#the-other-one-2-things) [c](https://example.com/x) [`Known.member`](code.py) "
        "[`code.py`](code.py) [`code`](code.py)\n```\n[d](nowhere.md)\n```\n"
    )
    assert broken_links(page, tmp_path) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("```\npython -m engine.gone --out x\n```", "engine.gone: no such command"),
        ("```\npython -m engine.train \\\n  --no-such-thing 3\n```", "--no-such-thing: no such flag"),
        ("With `--no-such-thing` it", "--no-such-thing: no such flag"),
        ("`engine/gone.py` has it", "engine/gone.py: no such path"),
        ("`engine.train.gone` does it", "engine.train.gone: no such name"),
        ("run `make gone`", "make gone: no such target"),
    ],
)
def test_a_missing_reference_is_found(text: str, problem: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    assert problem in missing_references(page)


def test_names_are_looked_up_in_modules_classes_and_packages() -> None:
    assert resolves("engine.train.main")
    assert resolves("engine.AMA")
    assert resolves("engine.comparison.distances.moments.Moments.merge")
    assert not resolves("engine.comparison.distances.moments.Moments.gone")


def test_anchors_are_those_of_github_and_mkdocs_alike() -> None:
    assert headings("## Identity 2: moments merge exactly\n```\n# a comment\n```\n") == {
        "identity-2-moments-merge-exactly"
    }
