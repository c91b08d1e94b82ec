"""bench.pages: the committed pages are what the committed rows say, and edits by hand don't survive."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from page_checks import ROOT
from torch import nn

from bench.pages.__main__ import PAGES, TABLES, main, write
from bench.pages.performance import CONVOLUTION_GFLOP
from bench.pages.regions import Results, fill, read_results
from engine.representation.build import build_extractor
from engine.support.errors import InputError

RESULTS = ROOT / "bench/results"
ENVIRONMENT = {
    "processor": "P", "threads": 2, "commit": "abc", "date": "2026-01-02", "versions": {"python": "3", "torch": "2"},
}  # fmt: skip


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A copy of the pages."""
    for page in PAGES:
        shutil.copy(ROOT / "docs" / page, tmp_path / page)
    return tmp_path


def test_pages_are_what_the_rows_say(docs: Path) -> None:
    main(["--docs", str(docs)])
    for page in PAGES:
        assert (docs / page).read_text() == (ROOT / "docs" / page).read_text(), f"{page}: run python -m bench.pages"


def test_every_table_is_on_one_page() -> None:
    text = "".join((ROOT / "docs" / page).read_text() for page in PAGES)
    assert sorted(re.findall(r"<!-- rows: ([\w-]+) -->", text)) == sorted(TABLES)


def test_an_edit_by_hand_is_found_and_undone(docs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = docs / "performance.md"
    sound = page.read_text()
    seconds = read_results(RESULTS, "throughput_cpu").rows[0]["p50"]
    edited = sound.replace(f"| {seconds:.3f} |", "| 0.001 |", 1)
    assert edited != sound
    page.write_text(edited)
    with pytest.raises(SystemExit) as stopped:
        main(["--check", "--docs", str(docs)])
    assert stopped.value.code == 1
    assert "performance.md" in capsys.readouterr().err
    assert page.read_text() == edited
    main(["--docs", str(docs)])
    assert page.read_text() == sound


def test_prose_is_left_alone() -> None:
    text = "before\n<!-- rows: a -->\nold\n<!-- end -->\nbetween\n<!-- rows: b -->\n<!-- end -->\nafter\n"
    filled = fill(text, str.upper)
    assert filled == (
        "before\n<!-- rows: a -->\n\nA\n\n<!-- end -->\nbetween\n<!-- rows: b -->\n\nB\n\n<!-- end -->\nafter\n"
    )
    assert fill(filled, str.upper) == filled


@pytest.mark.parametrize(
    "text", ["<!-- rows: a -->\n", "<!-- end -->\n", "<!-- rows: a -->\n<!-- rows: b -->\n<!-- end -->\n"]
)
def test_markers_must_pair_up(text: str) -> None:
    with pytest.raises(InputError) as error:
        fill(text, str)
    assert error.value.argument == "page"


def test_unknown_tables_and_missing_rows_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        write("no-such-table", RESULTS)
    assert error.value.argument == "page"
    with pytest.raises(InputError) as error:
        write("throughput", tmp_path)
    assert error.value.argument == "results"


def test_the_newest_rows_count(tmp_path: Path) -> None:
    for name in ("a_cpu_2026-01-09", "a_cpu_2026-11-01", "a_cpu_2025-12-31", "another_a_cpu_2027-01-01", "a_cpu_old"):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"name": name}]))
    results = read_results(tmp_path, "a_cpu")
    assert results.rows == [{"name": "a_cpu_2026-11-01"}]
    assert results.source == "bench/results/a_cpu_2026-11-01.json"


def test_conditions_name_machine_versions_and_date() -> None:
    other = {**ENVIRONMENT, "threads": 1, "commit": "def"}
    line = Results([{"environment": ENVIRONMENT}, {"environment": other}], "rows.json").conditions()
    assert line == "*P, threads: 1, 2; Python 3, PyTorch 2; commit abc, def; 2026-01-02; rows in `rows.json`.*"


def test_every_table_of_rows_says_where_they_come_from() -> None:
    """A kind of rows has several tables; at least the first of them names the conditions."""
    kinds = {kind for kind, _ in TABLES.values()}
    texts = {kind: [write(name, RESULTS) for name, (own, _) in TABLES.items() if own == kind] for kind in kinds}
    for kind, tables in texts.items():
        assert re.search(r"PyTorch [\d.]+.*commit .*20\d\d-\d\d-\d\d; rows in `bench/results/", tables[0]), kind


def test_gigaflops_of_the_convolutions() -> None:
    """By hand: 2 · C_in · k² for every output value, forward and input gradient, 64 images."""
    count = 0

    def add(module: nn.Module, inputs: tuple, output) -> None:
        nonlocal count
        count += 2 * output.numel() * module.in_channels * module.kernel_size[0] * module.kernel_size[1]

    extractor = build_extractor("vgg19+resnet18", image_size=32)
    convolutions = [module for module in extractor.modules() if isinstance(module, nn.Conv2d)]
    for convolution in convolutions:
        convolution.register_forward_hook(add)
    extractor.features(convolutions[0].weight.new_zeros(1, 3, 32, 32))
    assert len(convolutions) == 16 + 19  # ResNet18's last one comes after its last tap
    assert pytest.approx(2 * 64 * count / 1e9, abs=0.05) == CONVOLUTION_GFLOP


def test_flags_have_todays_names_whenever_the_rows_were_measured(tmp_path: Path) -> None:
    old = json.loads((RESULTS / read_results(RESULTS, "memory_cpu").source.rpartition("/")[2]).read_text())
    for row in old:
        if "variant" in row:
            name = row["variant"].replace("--checkpoint-generator", "--recompute-generator")
            row["variant"] = name.replace("--checkpoint stages", "--recompute stages")
    (tmp_path / "memory_cpu_2027-01-01.json").write_text(json.dumps(old))
    for name in ("memory-aims", "memory-capacity"):
        assert write(name, tmp_path) == write(name, RESULTS)
        assert "--checkpoint" not in write(name, RESULTS)
