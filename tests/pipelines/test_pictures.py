"""Every kind of picture file, one by one: both loaders give what Pillow gives, and docs/pictures.md lists the kinds."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.picture_kinds import File, all_files
from PIL import Image

import pipelines
from pipelines import ImageLoader, open_dataset
from pipelines.decoding.pil import decode, look

# pytest puts its own warning filters above those of the code under test
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "RuntimeWarning")]
SIZE = 48


@pytest.fixture(scope="module")
def files(photos: list[np.ndarray]) -> list[File]:
    return list(all_files(Image.fromarray(photos[1][100:231, 200:379])))


def reference(file: File) -> np.ndarray:
    """The square that Pillow alone gives, float64 [SIZE, SIZE, 3]."""
    picture = file.reading(Image.open(io.BytesIO(file.data)))
    short = min(picture.size)
    width, height = (SIZE * side // short for side in picture.size)
    left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
    square = picture.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + SIZE, top + SIZE))
    return np.asarray(square, dtype=np.float64)


def test_every_kind_of_file_is_read_as_pillow_reads_it(files: list[File], tmp_path: Path, backend: str) -> None:
    for file in files:
        (tmp_path / file.name).write_bytes(file.data)
    dataset = open_dataset("images", tmp_path, image_size=SIZE)
    images = torch.cat([batch.images for batch in ImageLoader(dataset, 16, backend=backend, workers=2)])
    pixels = (images.permute(0, 2, 3, 1).double().numpy() + 1) * 127.5
    ordered = sorted(files, key=lambda file: file.name)
    assert len(pixels) == len(ordered)
    far = {file.name: np.abs(image - reference(file)).mean() for image, file in zip(pixels, ordered, strict=True)}
    assert {name: value for name, value in far.items() if not value <= 0.5} == {}


def test_headers_say_what_a_plain_reading_would_change(files: list[File]) -> None:
    for file in files:
        found = look(file.data)
        picture = decode(file.data)
        assert found.size == (picture.height, picture.width), file.name
        plainly = Image.open(io.BytesIO(file.data)).convert("RGB")
        same = plainly.size == picture.size and np.array_equal(plainly, picture)
        assert (found.unusual is None) is same, file.name


def test_the_table_has_the_kinds_that_are_tested(files: list[File]) -> None:
    page = (Path(pipelines.__file__).parents[1] / "docs" / "pictures.md").read_text()
    table = re.findall(r"^\| \*\*(.+?)\*\*", page, re.MULTILINE)
    assert set(table) == {file.kind for file in files}
    assert len(table) == len(set(table))


def test_that_the_first_frame_is_used_is_said_once(
    files: list[File],
    tmp_path: Path,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("pipelines.decoding.pil._said", [])
    (still,) = (file for file in files if file.name == "few.gif")
    for number in range(9):
        (tmp_path / f"{number}.gif").write_bytes(still.data)
    loader = ImageLoader(open_dataset("images", tmp_path, image_size=SIZE), 2, backend=backend, workers=2)

    def said() -> list[str]:
        list(loader)
        return [line for line in caplog.messages if "several frames" in line]

    assert said() == []
    for file in files:
        if file.kind == "animations" and not file.name.endswith("mpo"):
            (tmp_path / "4.gif").write_bytes(file.data)
            said()
    assert [line.split(": ")[0] for line in said()] == [str(tmp_path / "4.gif")]
