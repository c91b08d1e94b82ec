"""Files of every kind that docs/pictures.md lists, each with what Pillow alone makes of it."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, features

AVIF = (("avif", "AVIF"),) if features.check("avif") else ()  # not in every build of Pillow
Reading = Callable[[Image.Image], Image.Image]


class File(NamedTuple):
    """One file: its kind (a row of the table), a name with its suffix, its bytes, and Pillow's reading of it."""

    kind: str
    name: str
    data: bytes
    reading: Reading


def encoded(picture: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def as_stored(picture: Image.Image) -> Image.Image:
    return picture.convert("RGB")


def over_white(picture: Image.Image) -> Image.Image:
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")


def upright(picture: Image.Image) -> Image.Image:
    turned = ImageOps.exif_transpose(picture)
    assert turned.height > turned.width, "a reference that isn't turned checks nothing"
    return turned.convert("RGB")


def scaled(most: int) -> Reading:
    """Grey from 0 to `most`."""

    def reading(picture: Image.Image) -> Image.Image:
        grey = np.round(np.asarray(picture).astype(np.float64) * 255 / most)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")

    return reading


def all_files(photo: Image.Image) -> Iterator[File]:
    """Every file, made of an RGB photograph that is wider than high."""
    yield from _jpegs(photo)
    yield from _turned(photo)
    yield from _deep(photo)
    yield from _see_through(photo)
    yield from _plain(photo)
    yield from _animated(photo)


def _jpegs(photo: Image.Image) -> Iterator[File]:
    kind = "JPEG"
    yield File(kind, "baseline.jpg", encoded(photo), as_stored)
    yield File(kind, "progressive.jpeg", encoded(photo, progressive=True, subsampling=0), as_stored)
    yield File(kind, "grey.jfif", encoded(photo.convert("L")), as_stored)
    yield File(kind, "without YCbCr.jpe", encoded(photo, keep_rgb=True), as_stored)
    kind = "CMYK and YCCK"
    inks = encoded(photo.convert("CMYK"), quality=95)
    yield File(kind, "cmyk.jpg", inks, as_stored)
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
    yield File(kind, "ycck.jpg", inks[:2] + adobe + b"\x02" + inks[2:].replace(adobe + b"\x00", b""), as_stored)
    yield File(kind, "cmyk.tif", encoded(photo.convert("CMYK"), "TIFF"), as_stored)


def _directory(order: str, entries: list[tuple[int, int, int, bytes]], following: int = 0) -> bytes:
    """One directory of Exif: entries are (tag, type, count, four bytes)."""
    body = b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in entries)
    return struct.pack(order + "H", len(entries)) + body + struct.pack(order + "I", following)


def _exifs() -> dict[str, bytes]:
    """Exif data that ask for a quarter turn, in forms that are seen in the wild."""
    little, big = b"II*\0", b"MM\0*"
    six = (0x0112, 3, 1, struct.pack("<HH", 6, 0))
    one = (0x0112, 3, 1, struct.pack("<HH", 1, 0))
    decoy = b"\x12\x01\x03\x00\x01\x00\x00\x00\x01\x00\x00\x00"  # an orientation of 1, but in a text
    thumbnail_first = _directory("<", [one])
    return {
        "little": little + struct.pack("<I", 8) + _directory("<", [six]),
        "big": big + struct.pack(">I", 8) + _directory(">", [(0x0112, 3, 1, struct.pack(">HH", 6, 0))]),
        "twice": little + struct.pack("<I", 8) + _directory("<", [(0x0112, 3, 2, struct.pack("<HH", 6, 6))]),
        "long": little + struct.pack("<I", 8) + _directory("<", [(0x0112, 4, 1, struct.pack("<I", 6))]),
        "long big": big + struct.pack(">I", 8) + _directory(">", [(0x0112, 4, 1, struct.pack(">I", 6))]),
        "thumbnail first": little
        + struct.pack("<I", 8 + len(thumbnail_first))
        + thumbnail_first
        + _directory("<", [six], following=8),
        "behind the same bytes": little
        + struct.pack("<I", 8 + len(decoy))
        + decoy
        + _directory("<", [(0x010E, 2, len(decoy), struct.pack("<I", 8)), six]),
    }


XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description {0}>{1}</rdf:Description></rdf:RDF></x:xmpmeta>'
XMPS = {
    "attribute": XMP.format('tiff:Orientation="6"', "").encode(),
    "element": XMP.format("", "<tiff:Orientation>6</tiff:Orientation>").encode(),
}


def _segment(content: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content


def _turned(photo: Image.Image) -> Iterator[File]:
    kind = "orientation"
    jpeg = encoded(photo)
    frame = jpeg.index(b"\xff\xc0")
    behind = frame + 2 + struct.unpack_from(">H", jpeg, frame + 2)[0]
    for form, exif in _exifs().items():
        segment = _segment(b"Exif\0\0" + exif)
        yield File(kind, f"Exif, {form}.jpg", jpeg[:2] + segment + jpeg[2:], upright)
        yield File(kind, f"Exif, {form}, behind the frame header.jpg", jpeg[:behind] + segment + jpeg[behind:], upright)
    for form, xmp in XMPS.items():
        segment = _segment(b"http://ns.adobe.com/xap/1.0/\0" + xmp)
        yield File(kind, f"XMP {form}.jpg", jpeg[:2] + segment + jpeg[2:], upright)
        plain = _segment(b"Exif\0\0II*\0" + struct.pack("<I", 8) + _directory("<", []))
        yield File(kind, f"XMP {form} beside Exif.jpg", jpeg[:2] + plain + segment + jpeg[2:], upright)
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", xmp.decode())
        yield File(kind, f"XMP {form}.png", encoded(photo, "PNG", pnginfo=text), upright)
        yield File(kind, f"XMP {form}.webp", encoded(photo, "WEBP", xmp=xmp), upright)
    for turn in (5, 6, 7, 8):
        exif = Image.Exif()
        exif[0x0112] = turn
        for suffix, form in (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("tif", "TIFF"), *AVIF):
            yield File(kind, f"turn {turn}.{suffix}", encoded(photo, form, exif=exif), upright)
    data = _exifs()["little"]
    for compressed in (False, True):
        text = PngImagePlugin.PngInfo()
        hexadecimal = (b"Exif\0\0" + data).hex()
        text.add_text("Raw profile type exif", f"\nexif\n{len(data) + 6:8}\n{hexadecimal}\n", zip=compressed)
        yield File(kind, f"raw profile {compressed}.png", encoded(photo, "PNG", pnginfo=text), upright)
    png = encoded(photo, "PNG")
    yield File(kind, "behind the pixels.png", png[:-12] + png_chunk(b"eXIf", data) + png[-12:], upright)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    """A PNG of rows that start with their filter's byte, and more chunks before them."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + pixels + png_chunk(b"IEND", b"")


def _deep(photo: Image.Image) -> Iterator[File]:
    kind = "16-bit grey"
    width, height = photo.size
    grey = np.asarray(photo.convert("L")).astype(np.uint16) * 257
    for suffix, form in (("png", "PNG"), ("tif", "TIFF"), ("jp2", "JPEG2000")):
        yield File(kind, f"deep.{suffix}", encoded(Image.fromarray(grey), form), scaled(65535))
    header = b"P5\n%d %d\n65535\n" % (width, height)
    yield File(kind, "deep.pgm", header + grey.astype(">u2").tobytes(), scaled(65535))
    header = b"P5\n%d %d\n4095\n" % (width, height)
    yield File(kind, "12 bits.pgm", header + (grey // 16).astype(">u2").tobytes(), scaled(65535))
    yield File(kind, "12 bits.tif", _tiff_of_12_bits(grey // 16), scaled(4095))
    kind = "16-bit colour"
    colour = np.asarray(photo).astype(np.uint16) * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colour)
    yield File(kind, "deep colour.png", png(width, height, 16, 2, rows), as_stored)
    header = b"P6\n%d %d\n65535\n" % (width, height)
    yield File(kind, "deep colour.ppm", header + colour.astype(">u2").tobytes(), as_stored)


def _tiff_of_12_bits(grey: np.ndarray) -> bytes:
    height, width = grey.shape
    bits = np.unpackbits(grey.astype(">u2").view(np.uint8).reshape(height, width, 2), axis=2)[..., 4:]
    strip = np.packbits(bits.reshape(height, -1), axis=1).tobytes()
    numbers = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(strip)}
    entries = [(tag, 4, 1, struct.pack("<I", number)) for tag, number in numbers.items()]
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + _directory("<", entries)


def _see_through(photo: Image.Image) -> Iterator[File]:
    kind = "transparency"
    alpha = Image.linear_gradient("L").resize(photo.size)
    rgba = photo.copy()
    rgba.putalpha(alpha)
    for suffix, form in (("png", "PNG"), ("webp", "WEBP"), ("tif", "TIFF"), ("tga", "TGA"), *AVIF):
        yield File(kind, f"alpha.{suffix}", encoded(rgba, form), over_white)
    yield File(kind, "one colour.png", encoded(photo, "PNG", transparency=photo.getpixel((9, 9))), over_white)
    few = photo.quantize(16)
    yield File(kind, "palette.png", encoded(few, "PNG", transparency=3), over_white)
    yield File(kind, "palette.gif", encoded(few, "GIF", transparency=3), over_white)
    kind = "grey + alpha"
    grey = photo.convert("L")
    grey.putalpha(alpha)
    yield File(kind, "grey and alpha.png", encoded(grey, "PNG"), over_white)


def _plain(photo: Image.Image) -> Iterator[File]:
    kind = "palette"
    few = photo.quantize(32)
    for suffix, form in (("png", "PNG"), ("gif", "GIF"), ("bmp", "BMP"), ("tif", "TIFF")):
        yield File(kind, f"few.{suffix}", encoded(few, form), as_stored)
    yield File(kind, "two.png", encoded(photo.convert("1"), "PNG"), as_stored)
    kind = "other files that Pillow reads"
    for suffix, form in (("png", "PNG"), ("bmp", "BMP"), ("ppm", "PPM"), ("webp", "WEBP"), ("heic", "HEIF"), *AVIF):
        yield File(kind, f"colour.{suffix}", encoded(photo, form), as_stored)
    yield File(kind, "lossless.webp", encoded(photo, "WEBP", lossless=True), as_stored)
    yield File(kind, "packed.tiff", encoded(photo, "TIFF", compression="tiff_lzw"), as_stored)
    kind = "gamma"
    rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(photo))
    for name, chunk in {
        "dark": png_chunk(b"gAMA", struct.pack(">I", 100_000)),
        "light": png_chunk(b"gAMA", struct.pack(">I", 22_000)),
        "standard": png_chunk(b"sRGB", b"\0"),
        "wide": png_chunk(b"cHRM", struct.pack(">8I", 34567, 35850, 73470, 26530, 11500, 82600, 15700, 1800)),
    }.items():
        yield File(kind, f"{name}.png", png(*photo.size, 8, 2, rows, chunk), as_stored)
    kind = "ICC profiles"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for suffix, form in (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("tif", "TIFF"), *AVIF):
        yield File(kind, f"profile.{suffix}", encoded(photo, form, icc_profile=profile), as_stored)


def _animated(photo: Image.Image) -> Iterator[File]:
    kind = "animations"
    frames = {"save_all": True, "append_images": [ImageOps.invert(photo)]}
    for suffix, form in (("gif", "GIF"), ("png", "PNG"), ("webp", "WEBP"), ("tif", "TIFF"), ("mpo", "MPO"), *AVIF):
        yield File(kind, f"moving.{suffix}", encoded(photo, form, **frames), as_stored)
