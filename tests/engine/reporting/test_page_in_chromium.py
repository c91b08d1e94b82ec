"""The report in a browser: every image decodes, nothing is fetched, nothing sticks out."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def chromium() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        reason = "needs Chromium; on Debian: apt-get install --no-install-recommends chromium"
        if os.environ.get("GFMN_REQUIRE_CHROMIUM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


Browse = Callable[..., Any]
BEFORE = """<script>window.problems = [];
addEventListener("error", event => problems.push(event.message || event.target.outerHTML.slice(0, 80)), true);
addEventListener("securitypolicyviolation", event => problems.push(event.violatedDirective));</script>"""
AFTER = """<script>addEventListener("load", () => setTimeout(() => {
let found; try { found = (() => { %s })(); } catch (error) { problems.push(String(error)); }
parent.postMessage(JSON.stringify({found, problems}), "*"); }, 100));</script>"""
FRAME = """<!DOCTYPE html><title>frame</title><style>body {margin: 0} iframe {border: 0; display: block}</style>
<script>addEventListener("message", event => { const result = document.createElement("pre");
result.id = "result"; result.textContent = event.data; document.body.append(result); });</script>
<iframe src="%s" width="%d" height="%d"></iframe>"""


@pytest.fixture
def browse(chromium: str, tmp_path: Path) -> Browse:
    """`browse(page, script, width, picture)`: what the script returns in a frame `width` pixels wide, without errors.

    A window of headless Chromium is not narrower than about 500 pixels; a frame is.
    """

    def look(page: Path, script: str = "return 0", width: int = 1200, picture: Path | None = None) -> Any:
        markup = page.read_text().replace("<head>", "<head>" + BEFORE).replace("</body>", AFTER % script + "</body>")
        (tmp_path / "page.html").write_text(markup)
        (tmp_path / "frame.html").write_text(FRAME % ("page.html", width, 3200))
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
        command += ["--virtual-time-budget=4000", f"--window-size={max(width, 500)},3200"]
        command += ["--dump-dom"] if picture is None else [f"--screenshot={picture}"]
        done = subprocess.run(
            [*command, (tmp_path / "frame.html").as_uri()], capture_output=True, text=True, timeout=300, check=True
        )
        if picture is not None:
            return None
        result = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
        assert result is not None, done.stdout[-2000:] + done.stderr[-2000:]
        answer = json.loads(html.unescape(result[1]))
        assert answer["problems"] == []
        return answer["found"]

    return look


def test_in_chromium_every_image_decodes_and_nothing_is_fetched(page: Path, browse: Browse) -> None:
    found = browse(
        page,
        """const images = [...document.images];
        return {sizes: images.map(image => image.naturalWidth * image.naturalHeight),
            fetched: performance.getEntriesByType("resource").map(entry => entry.name.slice(0, 20)),
            charts: [...document.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect().width),
            outside: [...document.querySelectorAll("svg text")].filter(text => {
                const own = text.getBoundingClientRect(), svg = text.closest("svg").getBoundingClientRect();
                return own.left < svg.left - 1 || own.right > svg.right + 1; }).length}""",
    )
    assert len(found["sizes"]) == 1 + 3 + (6 + 6) * 6 + 1
    assert min(found["sizes"]) >= 32 * 32
    assert all(name.startswith("data:") for name in found["fetched"])
    assert len(found["charts"]) == 3 + 1
    assert min(found["charts"]) > 300
    assert found["outside"] == 0


def test_in_chromium_the_slider_changes_the_picture(page: Path, browse: Browse) -> None:
    script = """const range = document.querySelector("#steps input"), seen = [];
        for (const value of [range.value, 0, 1]) {
            range.value = value; range.dispatchEvent(new Event("input"));
            const visible = [...document.querySelectorAll("#steps img")].filter(image => image.offsetParent);
            seen.push([document.querySelector("#steps output").textContent, range.getAttribute("aria-valuetext"),
                visible.map(image => image.alt), visible.map(image => image.src)]);
        }
        return seen;"""
    seen = browse(page, script)
    assert [row[:2] for row in seen] == [["step 6"] * 2, ["step 2"] * 2, ["step 4"] * 2]
    assert all(len(row[3]) == 1 and row[0] in row[2][0] for row in seen)
    assert len({row[3][0] for row in seen}) == 3


@pytest.mark.parametrize("width", [390, 800, 1280])
def test_in_chromium_nothing_sticks_out(width: int, page: Path, browse: Browse) -> None:
    script = """document.querySelectorAll("details").forEach(one => one.open = true);
        return [innerWidth, document.documentElement.scrollWidth,
            Math.min(...[...document.querySelectorAll(".match img")].map(image => image.width))];"""
    inner, scroll, smallest = browse(page, script, width)
    assert inner == width
    assert scroll <= width
    assert smallest >= 44


@pytest.mark.parametrize("width", [390, 1280])
def test_in_chromium_there_is_something_to_see(width: int, page: Path, browse: Browse, tmp_path: Path) -> None:
    browse(page, width=width, picture=tmp_path / "shot.png")
    with Image.open(tmp_path / "shot.png") as picture:
        pixels = np.asarray(picture.convert("L"), dtype=float)[:, :width]
    bands = np.array_split(pixels[:2400], 6)
    assert all(band.std() > 5 for band in bands)
