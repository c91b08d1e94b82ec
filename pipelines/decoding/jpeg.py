"""What a JPEG says before it is decoded: its size, whether it may be turned, and whether all of its data are there.

libjpeg fills what is missing with grey and only warns, and neither PIL nor DALI passes the warning on. Three things give
missing data away all the same: restart markers that are too few, scans that never come, and, in a picture of one scan,
a decoder that is still hungry where the scan ends (`hungry`).
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
_OTHER_FRAMES = {*range(0xC3, 0xD0)} - {0xC4, 0xC8, 0xCC}  # lossless, hierarchical, arithmetic
_STANDALONE = {0x01, *range(0xD0, 0xD9)}
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_SCAN_END = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")
# libjpeg reads up to eight bytes ahead. These are no code of any table, so they make up for no block that is missing.
_PADDING = b"\xfe" * 8
_LAST = 63  # of a block's 64 coefficients
_NEVER = 16  # bits that have not come: more than any coefficient has


class Component(NamedTuple):
    """One colour plane: its number in the file, and its sampling factors."""

    number: int
    across: int
    down: int


class Jpeg(NamedTuple):
    """The headers of one JPEG.

    Attributes:
        height, width: in pixels, as stored.
        precision: bits of a sample.
        components: colour planes.
        has_metadata: whether there is an APP1 segment (Exif or XMP), which alone can turn the picture.
        scan_end: where the coded data end, if one scan holds all of the picture; else None.
        flaw: what is missing, or None.
    """

    height: int
    width: int
    precision: int
    components: int
    has_metadata: bool
    scan_end: int | None
    flaw: str | None


def read_headers(data: bytes) -> Jpeg | None:
    """The headers of all segments up to the end mark; None for what isn't a Huffman-coded JPEG with an end mark."""
    try:
        return _read(data) if data[:2] == b"\xff\xd8" else None
    except (IndexError, KeyError, struct.error, ZeroDivisionError):
        return None


def hungry(data: bytes, headers: Jpeg) -> bytes:
    """The file without its end mark, if it has one scan: a decoder that needs more data then asks for them and fails.

    At the end mark it would stop and fill the rest with grey. The last block alone can be damaged unnoticed.
    """
    return data if headers.scan_end is None else data[: headers.scan_end] + _PADDING


def _read(data: bytes) -> Jpeg | None:
    frame: tuple[int, int, int] | None = None
    components: dict[int, Component] = {}
    progressive = has_metadata = False
    interval = scans = scan_end = restarts_missing = 0
    wanting: dict[int, list[int]] = {}  # by component: how many low bits of each coefficient have not come yet
    position = 2
    while True:
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF or marker in _STANDALONE:
            position += 1 if marker == 0xFF else 2
            continue
        if marker == 0xD9:
            break
        (length,) = struct.unpack_from(">H", data, position + 2)
        start, position = position + 4, position + 2 + length
        if marker in (_BASELINE, _EXTENDED, _PROGRESSIVE):
            if frame is not None:
                return None
            precision, height, width, count = struct.unpack_from(">BHHB", data, start)
            frame, progressive = (height, width, precision), marker == _PROGRESSIVE
            for entry in range(start + 6, start + 6 + 3 * count, 3):
                components[data[entry]] = Component(data[entry], data[entry + 1] >> 4, data[entry + 1] & 15)
            wanting = {number: [_NEVER] * 64 for number in components}
        elif marker in _OTHER_FRAMES:
            return None
        elif marker == 0xE1:
            has_metadata = True
        elif marker == 0xDD:
            (interval,) = struct.unpack_from(">H", data, start)
        elif marker == 0xDA:
            if frame is None or (end := _SCAN_END.search(data, position)) is None:
                return None
            scans, scan_end = scans + 1, end.start()
            chosen = [components[data[start + 1 + 2 * k]] for k in range(data[start])]
            if interval:
                needed = -(-_units(frame, chosen, components) // interval) - 1
                restarts_missing += max(0, needed - len(_RESTART.findall(data, position, scan_end)))
            first, last, bits = data[position - 3 : position] if progressive else (0, _LAST, 0)
            for component in chosen:
                wanting[component.number][first : last + 1] = [bits & 15] * (last + 1 - first)
            position = scan_end
    if frame is None or not scans:
        return None
    flaw = None
    if restarts_missing:
        flaw = f"{restarts_missing} of its restart markers are missing, and data with them"
    elif any(map(any, wanting.values())):
        flaw = "scans are missing"
    whole = scans == 1 and not progressive
    return Jpeg(*frame, len(components), has_metadata, scan_end if whole else None, flaw)


def _units(frame: tuple[int, int, int], chosen: list[Component], components: dict[int, Component]) -> int:
    """Coded units (blocks, or groups of blocks where planes are interleaved) of a scan of the `chosen` components."""
    height, width, _ = frame
    across, down = (max(part) for part in zip(*((c.across, c.down) for c in components.values()), strict=True))
    if len(chosen) == 1:
        height, width = -(-height * chosen[0].down // down), -(-width * chosen[0].across // across)
        across = down = 1
    return -(-width // (8 * across)) * -(-height // (8 * down))
