"""All judges of a run on the page, side by side with what was matched, and the warning where they part."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.report_page import Outline, text_of, write

from engine.reporting.judges import judges_compared

FALLING, RISING = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def entries(matched: list[float], *judges: list[float], first: str = "Inception-v3") -> list[dict[str, Any]]:
    names = [first, "resnet18", "timm:<b>"]
    found = []
    for step, (loss, *distances) in enumerate(zip(matched, *judges, strict=True), start=1):
        networks = [
            {"network": name, "is_inception": name == "Inception-v3", "kernel_distance": value, "frechet_distance": 9.5}
            for name, value in zip(names, distances)
        ]
        evaluation = {"samples": 1000, **networks[0], **({"others": networks[1:]} if networks[1:] else {})}
        found.append({"step": step, "loss": loss, "images_per_second": 1.0, "evaluation": evaluation})
    return found


def page_of(run: Path, log: list[dict[str, Any]]) -> str:
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    markup = write(run)
    assert Outline(markup).mistakes == []
    return markup


def test_all_judges_are_side_by_side(run: Path) -> None:
    markup = page_of(run, entries(FALLING, RISING, FALLING, FALLING))
    section = markup.split("<h2>Judges side by side</h2>")[1].split("</section>")[0]
    columns = re.findall(r"<th scope=\"col\">(.*?)</th>", section)
    assert columns == [
        "step",
        "loss, matched",
        "KID, Inception-v3",
        "FID, Inception-v3",
        "kernel distance (not KID), resnet18",
        "Fréchet distance (not FID), resnet18",
        "kernel distance (not KID), timm:&lt;b&gt;",
        "Fréchet distance (not FID), timm:&lt;b&gt;",
    ]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr><td>.*?</tr>", section)]
    assert len(rows) == 6
    assert rows[0] == ["1", "6.000", "1.000", "9.500", "6.000", "9.500", "6.000", "9.500"]
    captions = [text_of(caption) for caption in re.findall(r"<figcaption>(.*?)</figcaption>", section, re.DOTALL)]
    assert captions == [
        "Loss, matched",
        "KID, Inception-v3",
        "Kernel distance (not KID), resnet18",
        "Kernel distance (not KID), timm:<b>",
    ]
    assert "Warning" not in section
    assert "5 evaluations in a row: of their 10 pairs, at least 9" in text_of(section)
    assert len(markup.split("<h2>Evaluation on ")) == 4, "each judge has its own table, too"


@pytest.mark.parametrize(
    ("matched", "judges", "said"),
    [
        (FALLING, [RISING, RISING], "at the evaluations of steps 5 to 6, the last one among them."),
        (FALLING, [RISING], "at the evaluations of steps 5 to 6, the last one among them."),
        ([*FALLING[:5], 9.0], [RISING, RISING], "at the evaluation of step 5."),
        (FALLING, [RISING, FALLING], ""),
        (RISING, [RISING, RISING], ""),
    ],
)
def test_the_page_warns_where_they_part(matched, judges, said: str, run: Path) -> None:
    text = text_of(page_of(run, entries(matched, *judges)))
    assert ("Warning. The samples came closer" in text) is bool(said)
    assert said in text


def test_spans_of_steps_are_kept_apart() -> None:
    matched = [float(value) for value in range(20, 8, -1)]
    rising = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    compared = judges_compared(entries(matched, rising, first="vgg19"))
    assert compared is not None
    assert compared.warning.endswith("of steps 5 to 6, 11 to 12, the last one among them.")


def test_one_judge_that_agrees_needs_no_section(run: Path) -> None:
    assert "side by side" not in page_of(run, entries(FALLING, FALLING))
    assert judges_compared([]) is None


def test_a_matched_network_is_marked(run: Path) -> None:
    log = entries(FALLING, RISING, FALLING)
    for entry in log:
        entry["evaluation"]["others"][0]["is_matched"] = True
    compared = judges_compared(log)
    assert compared is not None
    assert compared.columns[4] == "kernel distance (not KID), resnet18 (matched)"
    assert compared.warning.endswith("of steps 5 to 6, the last one among them.")
