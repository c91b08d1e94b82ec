"""Every kind of file becomes the RGB that a person sees, and headers are read as PIL reads them."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from helpers.picture_kinds import png, png_chunk
from PIL import EpsImagePlugin, Image

from pipelines import DataError
from pipelines.decoding.pil import decode, size_if_plain
from pipelines.decoding.preprocessing import Preprocessing

# pytest puts its own warning filters above those of the code under test
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "RuntimeWarning")]


def encoded(picture: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def photo(photos: list[np.ndarray]) -> np.ndarray:
    """uint8 [150, 201, 3]."""
    return np.ascontiguousarray(photos[1][100:250, 200:401])


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_colour_is_unchanged(photo: np.ndarray, form: str) -> None:
    assert np.array_equal(decode(encoded(Image.fromarray(photo), form)), photo)


@pytest.mark.parametrize(("form", "bound"), [("JPEG", 6), ("WEBP", 8)])
def test_lossy_colour_is_close(photo: np.ndarray, form: str, bound: float) -> None:
    difference = np.abs(np.asarray(decode(encoded(Image.fromarray(photo), form, quality=90))).astype(int) - photo)
    assert difference.mean() < bound


def test_grey_is_repeated(photo: np.ndarray) -> None:
    grey = photo[..., 1].copy()
    assert np.array_equal(decode(encoded(Image.fromarray(grey), "PNG")), np.stack([grey] * 3, axis=-1))


def test_16_bit_grey_is_scaled_not_clipped(photo: np.ndarray) -> None:
    deep = (photo[..., 1].astype(np.uint32) * 257 + 200).clip(0, 65535).astype(np.uint16)
    picture = Image.fromarray(deep)
    for form in ("PNG", "TIFF"):
        rgb = np.asarray(decode(encoded(picture, form)))
        expected = np.floor(deep / 65535 * 255 + 0.5).astype(np.uint8)
        assert np.array_equal(rgb, np.stack([expected] * 3, axis=-1)), form
    clipped = np.asarray(picture.convert("RGB"))
    assert np.abs(clipped.astype(int) - photo[..., 1:2]).mean() > 50, "PIL alone would clip"


def test_16_bit_colour(photo: np.ndarray) -> None:
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in photo)
    data = png(photo.shape[1], photo.shape[0], 16, 2, rows)
    assert size_if_plain(data) is None
    assert np.array_equal(decode(data), photo)


def test_alpha_is_composited_over_white(photo: np.ndarray) -> None:
    alpha = np.linspace(0, 255, photo.shape[1]).round().astype(np.uint8)[None].repeat(photo.shape[0], axis=0)
    rgba = np.dstack([photo, alpha])
    share = alpha[..., None] / 255
    expected = photo * share + 255 * (1 - share)
    for form, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        data = encoded(Image.fromarray(rgba), form, **options)
        assert size_if_plain(data) is None
        assert np.abs(np.asarray(decode(data)) - expected).max() <= 1, form


def test_transparent_number_of_deep_grey_is_white(photo: np.ndarray) -> None:
    deep = photo[..., 1].astype(np.uint16) * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    number = int(deep[5, 5])
    data = png(deep.shape[1], deep.shape[0], 16, 0, rows, png_chunk(b"tRNS", struct.pack(">H", number)))
    expected = np.where(deep == number, 255, photo[..., 1])
    assert np.array_equal(decode(data), np.stack([expected] * 3, axis=-1))


def test_transparent_colour_of_a_palette_is_white(photo: np.ndarray) -> None:
    picture = Image.fromarray(photo).quantize(16)
    indices = np.asarray(picture)
    rgb = np.asarray(decode(encoded(picture, "PNG", transparency=3)))
    assert (rgb[indices == 3] == 255).all()
    assert np.array_equal(rgb[indices != 3], np.asarray(picture.convert("RGB"))[indices != 3])


def test_cmyk(photo: np.ndarray) -> None:
    cmyk = np.dstack([255 - photo, np.zeros_like(photo[..., 0])])
    data = encoded(Image.fromarray(cmyk, mode="CMYK"), "JPEG", quality=95)
    assert size_if_plain(data) is None
    assert np.abs(np.asarray(decode(data)).astype(int) - photo).mean() < 6, "inks are subtracted, not shown"


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_orientation_of_cameras(photo: np.ndarray, orientation: int, form: str) -> None:
    turns = {1: 0, 3: 2, 6: 3, 8: 1}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(photo), form, exif=exif)
    straight = np.asarray(decode(encoded(Image.fromarray(photo), form)))
    assert np.array_equal(decode(data), np.rot90(straight, turns))
    if orientation != 1:
        assert size_if_plain(data) is None, "other decoders would not turn it"


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True, "subsampling": 0}),
        ("JPEG", {"restart_marker_blocks": 4, "comment": "hello"}),
        ("JPEG", {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_files_are_recognised_with_their_size(
    photo: np.ndarray, form: str, options: dict[str, object], mode: str
) -> None:
    data = encoded(Image.fromarray(photo).convert(mode), form, **options)
    assert size_if_plain(data) == (150, 201)
    assert size_if_plain(data[:-3]) is None, "a file without its end is not plain"


def test_a_header_cut_anywhere_is_survived(photo: np.ndarray) -> None:
    for form in ("JPEG", "PNG", "WEBP", "BMP", "TIFF"):
        data = encoded(Image.fromarray(photo), form)
        for end in [*range(200), *range(200, len(data) - 1, len(data) // 20)]:
            assert size_if_plain(data[:end]) is None
            # the two bytes that end a JPEG must not hide that it is cut
            size_if_plain(data[:end] + b"\xff\xd9")
            with pytest.raises(DataError) as error:
                decode(data[:end])
            assert "\n" not in str(error.value)
            assert "0x" not in str(error.value)


def test_a_png_with_a_wrong_checksum_is_not_plain(photo: np.ndarray) -> None:
    data = encoded(Image.fromarray(photo), "PNG")
    for position in range(33, len(data) - 12, len(data) // 50):
        assert size_if_plain(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]) is None


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_a_range_are_refused(photo: np.ndarray, mode: str) -> None:
    with pytest.raises(DataError, match="no defined range"):
        decode(encoded(Image.fromarray(photo).convert("L").convert(mode), "TIFF"))


@pytest.mark.parametrize("side", [9_500, 14_000])  # PIL itself would warn of the first and refuse the second
def test_decompression_bombs_are_refused_before_they_are_unpacked(side: int) -> None:
    data = encoded(Image.new("1", (side, side)), "PNG")
    assert len(data) < 10**5
    with pytest.raises(DataError, match="decompression bomb"):
        decode(data)
    with pytest.raises(DataError, match="decompression bomb"):
        Preprocessing().geometry(side, side)


def test_a_line_that_would_become_huge_is_refused() -> None:
    with pytest.raises(DataError, match="elongated"):
        Preprocessing(image_size=64).fit(Image.new("RGB", (8_000_000, 2)))


@pytest.mark.parametrize("crop", [None, 100, 101])
@pytest.mark.parametrize("size", [32, 33, 64, 200])
def test_the_geometry_is_torchvisions(photo: np.ndarray, crop: int | None, size: int) -> None:
    from torchvision.transforms import v2

    for height, width in ((150, 201), (149, 200), (143, 120), (101, 101), (150, 102)):
        picture = Image.fromarray(photo[:height, :width])
        steps = [v2.Resize(size, v2.InterpolationMode.BILINEAR, antialias=True), v2.CenterCrop(size)]
        reference = v2.Compose(([v2.CenterCrop(crop)] if crop else []) + steps)(picture)
        result = Preprocessing(image_size=size, center_crop=crop).fit(picture)
        assert np.array_equal(result, reference)


def test_no_other_program_decodes(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would hand PostScript to Ghostscript, whatever the file is called."""
    script = tmp_path / "gs"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    drawing = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 8 8 rectfill\nshowpage\n%%EOF\n"
    with pytest.raises(DataError, match="not an image that can be read"):
        decode(drawing)
    assert not (tmp_path / "called").exists()
