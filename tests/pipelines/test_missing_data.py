"""JPEGs whose data are missing, though they end as they should: both loaders find them, and nothing else."""

from __future__ import annotations

import functools
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import DataError, ImageLoader, open_dataset
from pipelines.decoding.pil import decode, size_if_plain

END = b"\xff\xd9"


@pytest.fixture(scope="module")
def photo(photos: list[np.ndarray]) -> Image.Image:
    """183×211 pixels: neither side is a multiple of a block."""
    return Image.fromarray(photos[1][100:311, 200:383])


def jpeg(picture: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", **options)
    return file.getvalue()


def cut(data: bytes, share: float) -> bytes:
    """Nothing of the coded data behind this share of the file, but the end mark."""
    return data[: int(len(data) * share)].rstrip(b"\xff") + END


def without_middle(data: bytes) -> bytes:
    return data[: len(data) // 2].rstrip(b"\xff") + data[len(data) * 2 // 3 :]


def without_restarts(data: bytes, first: int, last: int) -> bytes:
    """Without some of the parts between restart markers."""
    places = [match.start() for match in re.finditer(rb"\xff[\xd0-\xd7]", data)]
    return data[: places[first]] + data[places[last] :]


def without_scan(data: bytes, number: int) -> bytes:
    """Without one scan of a progressive file, and its table."""
    places = [match.start() for match in re.finditer(rb"\xff\xc4", data)]
    return data[: places[number]] + data[places[number + 1] :]


PROGRESSIVE = {"progressive": True, "quality": 90}
RESTARTS = {"restart_marker_blocks": 7}
DAMAGES = {
    "half": ({}, "RGB", functools.partial(cut, share=0.5)),
    "nearly nothing": ({}, "RGB", functools.partial(cut, share=0.12)),
    "all but the end": ({}, "RGB", functools.partial(cut, share=0.97)),
    "full chroma": ({"subsampling": 0, "quality": 97}, "RGB", functools.partial(cut, share=0.6)),
    "own tables": ({"optimize": True, "quality": 40}, "RGB", functools.partial(cut, share=0.8)),
    "grey": ({}, "L", functools.partial(cut, share=0.7)),
    "inks": ({}, "CMYK", functools.partial(cut, share=0.7)),
    "no YCbCr": ({"keep_rgb": True}, "RGB", functools.partial(cut, share=0.7)),
    "middle": ({}, "RGB", without_middle),
    "restarts, half": (RESTARTS, "RGB", functools.partial(cut, share=0.5)),
    "restarts, one part": (RESTARTS, "RGB", functools.partial(without_restarts, first=3, last=4)),
    "restarts, a whole cycle": (RESTARTS, "RGB", functools.partial(without_restarts, first=1, last=9)),
    "progressive, first scans only": (PROGRESSIVE, "RGB", functools.partial(cut, share=0.3)),
    "progressive, without the last scan": (PROGRESSIVE, "RGB", functools.partial(cut, share=0.6)),
    "progressive, without a scan": (PROGRESSIVE, "RGB", functools.partial(without_scan, number=4)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_missing_data_stop_the_decoding(photo: Image.Image, damage: str) -> None:
    options, mode, spoil = DAMAGES[damage]
    good = jpeg(photo.convert(mode), **options)
    assert np.array_equal(decode(good), Image.open(io.BytesIO(good)).convert("RGB"))
    bad = spoil(good)
    assert len(bad) < len(good)
    Image.open(io.BytesIO(bad)).load()  # which is content with it
    with pytest.raises(DataError, match="damaged image"):
        decode(bad)


def test_both_loaders_find_the_same_files(photo: Image.Image, tmp_path: Path, backend: str) -> None:
    for number, (name, (options, mode, spoil)) in enumerate(DAMAGES.items()):
        (tmp_path / f"{name}.jpg").write_bytes(spoil(jpeg(photo.convert(mode), **options)))
        jpeg_of_grey = jpeg(Image.new("RGB", (70 + number, 90), (128, 128, 128)), quality=30 + number)
        (tmp_path / f"sound {name}.jpg").write_bytes(jpeg_of_grey)  # grey as missing data are
    loader = ImageLoader(open_dataset("images", tmp_path, image_size=32, skip_bad_images=True), 4, backend=backend)
    images = np.concatenate([batch.images.numpy() for batch in loader])
    assert {Path(bad.path).stem for bad in loader.bad_images} == set(DAMAGES)
    assert len(images) == len(DAMAGES)
    assert np.abs((images + 1) * 127.5 - 128).max() < 0.01


@pytest.mark.parametrize("options", [{}, RESTARTS, {"optimize": True, "quality": 20}, {"quality": 100}], ids=str)
def test_no_more_than_the_last_blocks_can_be_missing(photo: Image.Image, options: dict[str, object]) -> None:
    good = jpeg(photo, **options)
    for missing in (24, 30, 50, 100, 1000):
        with pytest.raises(DataError, match="damaged image"):
            decode(good[: -2 - missing].rstrip(b"\xff") + END)


@pytest.mark.parametrize("content", ["photo", "flat", "noise"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_sound_files_are_left_alone(photo: Image.Image, content: str, mode: str) -> None:
    rng = np.random.default_rng(3)
    rows = ({}, {"quality": 1}, {"quality": 100, "subsampling": 0}, {"optimize": True, "subsampling": 1})
    rows += ({"restart_marker_blocks": 1}, {"restart_marker_rows": 1}, {"progressive": True, **RESTARTS})
    for width, height in ((1, 1), (7, 3), (16, 16), (17, 33), (100, 37)):
        picture = {
            "photo": photo.crop((0, 0, width, height)),
            "flat": Image.new("RGB", (width, height), (128, 128, 128)),
            "noise": Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)),
        }[content]
        for options in rows:
            data = jpeg(picture.convert(mode), **options)
            for tail in (b"", b"what some cameras write behind the end"):
                found = np.asarray(decode(data + tail))
                assert np.array_equal(found, Image.open(io.BytesIO(data)).convert("RGB")), (width, height, options)
            assert (size_if_plain(data) == (height, width)) is (mode != "CMYK")


def test_missing_data_stop_the_pass_with_the_files_name(photo: Image.Image, tmp_path: Path, backend: str) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jpg").write_bytes(jpeg(photo))
    (tmp_path / "bad.jpg").write_bytes(cut(jpeg(photo), 0.6))
    with pytest.raises(DataError) as error:
        list(ImageLoader(open_dataset("images", tmp_path), 2, backend=backend))
    assert str(error.value).startswith(f"{tmp_path / 'bad.jpg'}: damaged image")
    assert error.value.option == "skip_bad_images"


def test_with_a_crop_what_is_left_over_is_sound(photo: Image.Image, tmp_path: Path, backend: str) -> None:
    """DALI reads no further than the crop."""
    shares = {f"{percent}.jpg": percent / 100 for percent in range(10, 99, 8)}
    for name, share in shares.items():
        (tmp_path / name).write_bytes(cut(jpeg(photo), share))
    (tmp_path / "sound.jpg").write_bytes(jpeg(photo))
    dataset = open_dataset("images", tmp_path, image_size=32, center_crop=90, skip_bad_images=True)
    loader = ImageLoader(dataset, 5, backend=backend)
    images = np.concatenate([batch.images.numpy() for batch in loader])
    assert np.abs((images - images[-1]) * 127.5).mean(axis=(1, 2, 3)).max() <= 0.5
    found = {Path(bad.path).name for bad in loader.bad_images}
    assert found >= {name for name, share in shares.items() if share < 0.6}
    if backend == "torch":
        assert found == set(shares)
