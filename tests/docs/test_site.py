"""The documentation as a site: it builds strictly, has every public name, and fetches nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from page_checks import ROOT

import engine

pytest.importorskip("mkdocs", reason="needs the extra [docs]")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; `--strict` makes every warning an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_the_api_has_every_public_name(site: Path) -> None:
    page = (site / "api.html").read_text(encoding="utf-8")
    for name in set(engine.__all__) - {"__version__"}:
        assert re.search(rf'id="engine\.[\w.]+\.{name}"', page), name
    assert 'id="engine.comparison.distances.moments.Moments.merge"' in page


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    fetched = re.compile(r"<(?:script|img|link|iframe|source)\b[^>]*(?:src|href)=[\"']?(?:https?:)?//", re.IGNORECASE)
    for page in site.glob("*.html"):
        if page.name != "demo-report.html":
            assert not fetched.search(page.read_text(encoding="utf-8")), page.name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()[\s\"'(]*(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


def test_links_to_sources_are_text_and_pages_keep_theirs(site: Path) -> None:
    method = (site / "method.html").read_text(encoding="utf-8")
    assert "<code>FeaturePass</code>" in method
    assert ".py" not in " ".join(re.findall(r'href="([^"]*)"', method))
    assert 'href="method.html#identity-2-moments-merge-exactly"' in (site / "kernels.html").read_text(encoding="utf-8")
    assert 'src="demo.png"' in (site / "readme.html").read_text(encoding="utf-8")
