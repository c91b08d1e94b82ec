"""Encoded pictures → RGB, by PIL: the reference that the other decoders agree with.

Orientation tags of cameras are applied, alpha is composited over white, 16-bit grey is scaled to 8 bits (PIL's own
conversion would clip it), CMYK is converted by PIL; gamma and colour profiles are left alone. Of an animation, the
first frame is used. docs/pictures.md has the whole table.
"""

from __future__ import annotations

import contextlib
import io
import logging
import struct
import warnings
from collections.abc import Iterator
from typing import NamedTuple
from zlib import crc32

import numpy as np
from PIL import ExifTags, Image, ImageOps

from pipelines.dataset import EncodedDataset
from pipelines.decoding import jpeg
from pipelines.decoding.formats import formats
from pipelines.decoding.preprocessing import MAX_PIXELS
from pipelines.errors import BadImage, DataError, one_line

# PIL warns of what `decode` refuses or repairs. `warnings.catch_warnings` is of no use in threads.
for _category in (UserWarning, Image.DecompressionBombWarning):
    warnings.filterwarnings("ignore", category=_category, module=r"PIL\.")

_DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N")
_DEEP_IN_32_BITS = ("PNG", "PPM")  # whose 16-bit grey has mode "I"
_TURNED = range(2, 9)
_ON_ITS_SIDE = range(5, 9)
_BITS_PER_SAMPLE = 258  # tag of a TIFF
# What PIL reads an orientation from in the text of a PNG.
_TURNING_TEXT = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")

log = logging.getLogger("gfmn")
_said: list[str] = []


def load(
    dataset: EncodedDataset, picture: int, data: bytes | None = None, *, animations: list[str]
) -> np.ndarray | BadImage:
    """One picture as uint8 [image_size, image_size, 3], or what is wrong with it.

    Args:
        dataset: whose files are read and whose preprocessing is applied.
        picture: which one.
        data: the encoded bytes, where they were read before.
        animations: gets the place of the first file that has several frames; for `say_first_frame`.
    """
    try:
        encoded = dataset.files.read(picture) if data is None else data
        decoded, has_frames = _decode(encoded)
        if has_frames and not animations:
            animations.append(dataset.files.where(picture))
        return np.asarray(dataset.preprocessing.fit(decoded))
    except (DataError, OSError) as error:
        return BadImage(dataset.files.where(picture), one_line(error))


def say_first_frame(animations: list[str]) -> None:
    """Log that the first frame of such files is used, unless this process has said so before."""
    if animations and not _said:
        _said.append(animations[0])
        log.warning("%s: has several frames; the first one is used, in all such files", animations[0])


def decode(data: bytes) -> Image.Image:
    """Encoded bytes → RGB picture, upright.

    Raises:
        DataError: not a picture, cut short, too large, or of a kind that has no 8-bit meaning. The message says why.
    """
    return _decode(data)[0]


def _decode(data: bytes) -> tuple[Image.Image, bool]:
    """The picture, and whether it is the first of several frames."""
    with _explained():
        if headers := jpeg.read_headers(data):
            if headers.flaw is not None:
                raise DataError(f"damaged image ({headers.flaw})")
            data = jpeg.hungry(data, headers)
        picture = _open(data)
        picture.load()
        has_frames = _has_frames(picture)
        white = _deep_white(picture)
        picture = _upright(picture)
        return (_to_rgb(picture) if white is None else _from_deep_grey(picture, white)), has_frames


def _has_frames(picture: Image.Image) -> bool:
    """Whether it is an animation or has several pages. In an MPO, what follows are other views of one photograph."""
    try:
        return getattr(picture, "is_animated", False) and picture.format != "MPO"
    except Exception:  # whatever damaged frames behind the first make it stumble over
        return True


class Look(NamedTuple):
    """What a file's headers say of the picture that `decode` gives.

    Attributes:
        size: (height, width), upright.
        unusual: why a plain `Image.open(file).convert("RGB")` gives another picture; None if it gives the same.
        has_frames: whether that is the first of several frames.
    """

    size: tuple[int, int]
    unusual: str | None
    has_frames: bool


def look(data: bytes) -> Look:
    """Encoded bytes → `Look`; raises `DataError` as `decode` does, for what headers show."""
    if (size := size_if_plain(data)) is not None:
        return Look(size, None, False)
    with _explained():
        picture = _open(data)
        # Pillow turns a TIFF by itself.
        turn = 1 if picture.format == "TIFF" else orientation(picture)
        width, height = picture.size
        unusual = None
        if _deep_white(picture) is not None:
            unusual = "16-bit grey"
        elif picture.has_transparency_data:
            unusual = "transparent"
        elif turn in _TURNED:
            unusual = "turned by its metadata"
        size = (width, height) if turn in _ON_ITS_SIDE else (height, width)
        return Look(size, unusual, _has_frames(picture))


def _open(data: bytes) -> Image.Image:
    if not data:
        raise DataError("the file is empty")
    picture = Image.open(io.BytesIO(data), formats=formats())
    if picture.width * picture.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    return picture


def stored_size(data: bytes) -> tuple[int, int]:
    """(height, width) as the picture lies in its file, before anything turns it; DataError if it is unreadable."""
    with _explained():
        width, height = _open(data).size
        return height, width


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """PIL's errors as `DataError`."""
    try:
        yield
    except Image.DecompressionBombError:
        raise DataError(f"refused as a decompression bomb (limit {MAX_PIXELS:,} pixels)") from None
    except Image.UnidentifiedImageError:
        raise DataError("not an image that can be read") from None
    except (DataError, MemoryError):
        raise
    except Exception as error:  # PIL's plugins raise whatever a damaged file makes them stumble over
        raise DataError(f"damaged image ({one_line(error)})") from None


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # a damaged tag says nothing about the pixels
        return picture


def orientation(picture: Image.Image) -> int | None:
    """How the picture is to be turned, 1 (upright) to 8, by PIL's own parser of Exif and XMP; None if it stumbles."""
    try:
        return picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # whatever damaged metadata make it stumble over
        return None


def _deep_white(picture: Image.Image) -> int | None:
    """The number that is white in 16-bit grey, which PIL's conversion to RGB would clip; None for other pictures."""
    if picture.mode not in _DEEP_GREY and (picture.mode != "I" or picture.format not in _DEEP_IN_32_BITS):
        return None
    bits = getattr(picture, "tag_v2", {}).get(_BITS_PER_SAMPLE)
    return 4095 if bits == (12,) else 65535


def _from_deep_grey(picture: Image.Image, white: int) -> Image.Image:
    deep = np.asarray(picture).astype(np.uint32).clip(0, white)
    grey = ((deep * 255 + white // 2) // white).astype(np.uint8)
    if isinstance(transparent := picture.info.get("transparency"), int):
        grey[deep == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _to_rgb(picture: Image.Image) -> Image.Image:
    """Any other mode of PIL → RGB."""
    if picture.mode in ("I", "F"):
        raise DataError(f"32-bit pixels (mode {picture.mode}) have no defined range; convert it to 8 or 16 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    try:
        return picture.convert("RGB")
    except ValueError:
        raise DataError(f"colours of mode {picture.mode} cannot be converted; save it as RGB") from None


def size_if_plain(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a complete, plain 8-bit picture, which every decoder reads as PIL does; None for all others.

    Plain are JPEG (grey or colour, upright), PNG (8-bit grey or RGB, not interlaced) and WebP (without alpha). Only
    headers, the end of the file and the checksums of a PNG are looked at, which costs microseconds; what passes may
    still be damaged inside.
    """
    try:
        if data[:3] == b"\xff\xd8\xff":
            return _plain_jpeg(data)
        if data[:8] == b"\x89PNG\r\n\x1a\n":
            return _plain_png(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _plain_webp(data)
    except (IndexError, struct.error):
        pass
    return None


def _plain_jpeg(data: bytes) -> tuple[int, int] | None:
    headers = jpeg.read_headers(data)
    if headers is None or headers.flaw is not None or data[-2:] != b"\xff\xd9":
        return None
    if headers.precision != 8 or headers.components not in (1, 3):
        return None
    if headers.has_metadata and not _is_upright(data):
        return None
    return headers.height, headers.width


def _is_upright(data: bytes) -> bool:
    try:
        return orientation(Image.open(io.BytesIO(data), formats=formats())) == 1
    except Exception:  # PIL's plugins raise whatever a damaged file makes them stumble over
        return False


def _plain_png(data: bytes) -> tuple[int, int] | None:
    if data[-8:-4] != b"IEND":
        return None
    width, height, depth, colour, _, _, interlace = struct.unpack_from(">IIBBBBB", data, 16)
    if depth != 8 or colour not in (0, 2) or interlace:
        return None
    position, kind = 8, b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        (checksum,) = struct.unpack_from(">I", data, end)
        unusual = kind in (b"tRNS", b"eXIf", b"acTL") or data.startswith(_TURNING_TEXT, position + 8)
        if unusual or checksum != crc32(memoryview(data)[position + 4 : end]):
            return None
        position = end + 4
    return height, width


def _plain_webp(data: bytes) -> tuple[int, int] | None:
    (size,) = struct.unpack_from("<I", data, 4)
    if size + 8 != len(data):
        return None
    if data[12:16] == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return height & 0x3FFF, width & 0x3FFF
    if data[12:16] == b"VP8L" and data[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", data, 21)
        if not bits >> 28 & 1:
            return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    return None
