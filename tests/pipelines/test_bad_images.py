"""One file that cannot be used stops a pass with one line that names it, or is skipped, counted and listed."""

from __future__ import annotations

import functools
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pipelines.sources.folder
from pipelines import BadImage, DataError, ImageLoader, open_dataset

NAME = "05 bad"

# pytest puts its own warning filters above those of the code under test
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


@functools.cache
def bomb() -> bytes:
    """144 million pixels in a PNG of 18 kB."""
    file = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(photos: list[np.ndarray], tmp_path: Path) -> Path:
    """Twelve good JPEGs, 96×96, named 00.jpg to 11.jpg."""
    folder = tmp_path / "images"
    folder.mkdir()
    for n in range(12):
        Image.fromarray(photos[n % 3][n : n + 96, 100:196]).save(folder / f"{n:02d}.jpg")
    return folder


def spoil(folder: Path, kind: str) -> Path:
    """Put one bad file among the good ones; return its path."""
    good = (folder / "05.jpg").read_bytes()
    png = folder / f"{NAME}.png"
    jpg = folder / f"{NAME}.jpg"
    picture = Image.open(io.BytesIO(good))
    if kind == "truncated JPEG":
        jpg.write_bytes(good[: len(good) // 2])
    elif kind == "JPEG cut, end mark left":
        jpg.write_bytes(good[: len(good) // 2] + good[-2:])
        return jpg
    elif kind == "truncated PNG":
        picture.save(png)
        png.write_bytes(png.read_bytes()[:-500])
        return png
    elif kind == "PNG damaged inside":
        picture.save(png)
        data = bytearray(png.read_bytes())
        data[len(data) // 2] ^= 0xFF
        png.write_bytes(data)
        return png
    elif kind == "text named .png":
        png.write_text("I am not an image.\n" * 10)
        return png
    elif kind == "zero bytes":
        jpg.touch()
    elif kind == "smaller than the crop":
        picture.crop((0, 0, 96, 79)).save(jpg)
    elif kind == "smaller than the crop, PNG with alpha":
        picture.crop((0, 0, 79, 96)).convert("RGBA").save(png)
        return png
    elif kind == "bomb":
        png.write_bytes(bomb())
        return png
    elif kind == "broken link":
        jpg.symlink_to("gone.jpg")
    elif kind == "link to itself":
        jpg.symlink_to(jpg)
    elif kind == "pipe":
        os.mkfifo(jpg)
    return jpg


KINDS = [
    "truncated JPEG",
    "truncated PNG",
    "PNG damaged inside",
    "text named .png",
    "zero bytes",
    "smaller than the crop",
    "smaller than the crop, PNG with alpha",
    "bomb",
    "broken link",
    "link to itself",
    "pipe",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_image_stops_the_pass_with_one_line(
    folder: Path, backend: str, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = spoil(folder, kind)
    dataset = open_dataset("images", folder, center_crop=80)
    assert len(dataset) == 13
    seen: list[int] = []
    message, option = "nothing was raised", None
    try:
        for batch in ImageLoader(dataset, 2, backend=backend):
            seen += batch.indices.tolist()
    except DataError as error:
        message, option = str(error), error.option
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 250
    assert option == "skip_bad_images"
    assert seen == [0, 1, 2, 3], "what came before the bad file is delivered"
    assert capfd.readouterr() == ("", ""), "DALI's own account is dozens of lines, some of them written by C++"


@pytest.mark.parametrize("kind", KINDS)
def test_bad_images_are_skipped_counted_and_listed(folder: Path, backend: str, kind: str) -> None:
    path = spoil(folder, kind)
    good = open_dataset("images", folder, center_crop=80, skip_bad_images=True, horizontal_flip=True)
    loader = ImageLoader(good, 3, backend=backend, shuffle=True)
    assert loader.bad_images == []
    bad = sorted(os.listdir(folder)).index(path.name)
    for _ in range(2):
        seen: list[int] = []
        for batch in loader:
            assert len(batch.images) == len(batch.indices) > 0
            assert batch.images.isfinite().all()
            seen += batch.indices.tolist()
        assert sorted(seen) == [n for n in range(26) if n % 13 != bad]
        (listed,) = loader.bad_images
        assert isinstance(listed, BadImage)
        assert listed.path == str(path)
        assert "\n" not in str(listed)
    assert "skip_bad_images" in good.fingerprint()


def test_skipping_leaves_the_other_images_as_they_were(folder: Path, backend: str) -> None:
    before = torch.cat([batch.images for batch in ImageLoader(open_dataset("images", folder), 5, backend=backend)])
    for kind in KINDS[:5]:
        spoil(folder, kind)
    dataset = open_dataset("images", folder, skip_bad_images=True)
    loader = ImageLoader(dataset, 5, backend=backend)
    after = torch.cat([batch.images for batch in loader])
    assert torch.equal(before, after)
    assert len(loader.bad_images) == 2  # one .jpg and one .png: later kinds replace earlier ones


def test_only_bad_images_yield_no_batch(folder: Path, backend: str) -> None:
    for path in folder.iterdir():
        path.write_text("nothing")
    loader = ImageLoader(open_dataset("images", folder, skip_bad_images=True), 5, backend=backend)
    assert list(loader) == []
    assert len(loader.bad_images) == 12


def test_a_jpeg_that_is_damaged_inside_gives_the_same_images(folder: Path) -> None:
    """libjpeg repairs such files; whatever it makes of them, both backends must agree on using them or not."""
    pytest.importorskip("nvidia.dali")
    spoil(folder, "JPEG cut, end mark left")
    results = []
    for backend in ("torch", "dali"):
        loader = ImageLoader(open_dataset("images", folder, skip_bad_images=True), 4, backend=backend)
        indices = torch.cat([batch.indices for batch in loader]).tolist()
        results.append((indices, [bad.path for bad in loader.bad_images]))
    assert results[0] == results[1]


def test_a_file_that_vanishes_during_the_pass(folder: Path, backend: str) -> None:
    loader = ImageLoader(open_dataset("images", folder), 1, backend=backend)
    (folder / "11.jpg").unlink()
    with pytest.raises(DataError, match=r"11\.jpg: no such file"):
        list(loader)
    with pytest.raises(DataError, match=r"11\.jpg: no such file"):
        loader.dataset.fingerprint()


def test_no_permission(folder: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:  # for whom permissions are no obstacle
        read_file = pipelines.sources.folder.read_file

        def refused(path: str) -> bytes:
            if path.endswith("07.jpg"):
                raise PermissionError(13, "Permission denied", path)
            return read_file(path)

        monkeypatch.setattr(pipelines.sources.folder, "read_file", refused)
    else:
        (folder / "07.jpg").chmod(0)
    with pytest.raises(DataError, match=r"07\.jpg: permission denied"):
        list(ImageLoader(open_dataset("images", folder), 4, backend=backend))


def test_no_permission_for_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = folder / "closed"
    closed.mkdir()
    Image.open(folder / "01.jpg").save(closed / "inside.jpg")
    if os.geteuid() == 0:
        scandir = os.scandir

        def refused(path: Path) -> object:
            if str(path).endswith("closed"):
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(pipelines.sources.folder.os, "scandir", refused)
    else:
        closed.chmod(0)
    with pytest.raises(DataError, match=r"closed: permission denied"):
        open_dataset("images", folder)
    dataset = open_dataset("images", folder, skip_bad_images=True)
    assert len(dataset) == 12
    assert [bad.path for bad in ImageLoader(dataset, 4).bad_images] == [str(closed)]


def test_an_empty_class_folder(photos: list[np.ndarray], tmp_path: Path) -> None:
    for name in ("cats", "dogs", "empty"):
        (tmp_path / name).mkdir()
    for name in ("cats", "dogs"):
        Image.fromarray(photos[0]).save(tmp_path / name / "one.jpg")
    (tmp_path / "empty" / "readme.txt").write_text("soon")
    with pytest.raises(DataError) as error:
        open_dataset("images", tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'empty'}: class folder without images of its own")
    dataset = open_dataset("images", tmp_path, skip_bad_images=True)
    assert dataset.labels.tolist() == [0, 1]
    assert dataset.num_classes == 2
    assert [bad.path for bad in ImageLoader(dataset, 2).bad_images] == [str(tmp_path / "empty")]
