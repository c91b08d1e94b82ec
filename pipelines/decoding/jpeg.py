"""What a JPEG says before it is decoded: its size, whether it may be turned, and whether all of its data are there.

libjpeg fills what is missing with grey and only warns, and neither PIL nor DALI passes the warning on. Three things
give missing data away all the same: restart markers that are too few, scans that never come, and, in a picture of one
scan, a decoder that is still hungry where the scan ends (`hungry`).
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

_FRAMES = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended and progressive, Huffman-coded
_PROGRESSIVE = 0xC2
_OTHER_FRAMES = frozenset(range(0xC3, 0xD0)) - {0xC4, 0xC8, 0xCC}  # lossless, hierarchical, arithmetic
_STANDALONE = frozenset((0x01, *range(0xD0, 0xD9)))
# Both start with a fixed byte: that is what makes them fast.
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
# libjpeg reads up to eight bytes ahead. These are no code of any table, so they make up for no block that is missing.
_PADDING = b"\xfe" * 8
_COEFFICIENTS = 64  # of a block
_NEVER = 16  # bits that have not come: more than any coefficient has


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
    return data if headers.scan_end is None else data[: headers.scan_end].rstrip(b"\xff") + _PADDING


def _read(data: bytes) -> Jpeg | None:
    frame: tuple[int, int, int] | None = None
    components: dict[int, tuple[int, int]] = {}
    progressive = has_metadata = False
    interval = scan_end = restarts_missing = 0
    scans: list[bytes] = []
    position = 2
    while data[position : position + 2] != b"\xff\xd9":
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF or marker in _STANDALONE:
            position += 1 if marker == 0xFF else 2
            continue
        start = position + 4
        position += 2 + (data[position + 2] << 8 | data[position + 3])
        if marker in _FRAMES:
            if frame is not None:
                return None
            precision, height, width, count = struct.unpack_from(">BHHB", data, start)
            frame, progressive = (height, width, precision), marker == _PROGRESSIVE
            for entry in range(start + 6, start + 6 + 3 * count, 3):
                components[data[entry]] = (data[entry + 1] >> 4, data[entry + 1] & 15)
        elif marker in _OTHER_FRAMES:
            return None
        elif marker == 0xE1:
            has_metadata = True
        elif marker == 0xDD:
            interval = data[start] << 8 | data[start + 1]
        elif marker == 0xDA:
            end = _SCAN_END.search(data, position)
            if frame is None or end is None:
                return None
            scan_end = end.start()
            scans.append(data[start:position])
            if interval:
                needed = -(-_units(frame, scans[-1], components) // interval) - 1
                restarts_missing += max(0, needed - len(_RESTART.findall(data, position, scan_end)))
            position = scan_end
    if frame is None or not scans:
        return None
    flaw = None
    if restarts_missing:
        flaw = f"{restarts_missing} of its restart markers are missing, and data with them"
    elif _incomplete(scans, list(components), progressive):
        flaw = "scans are missing"
    whole = len(scans) == 1 and not progressive
    return Jpeg(*frame, len(components), has_metadata, scan_end if whole else None, flaw)


def _units(frame: tuple[int, int, int], scan: bytes, components: dict[int, tuple[int, int]]) -> int:
    """Coded units of a scan: blocks of one component, or groups of blocks of several."""
    height, width, _ = frame
    across, down = (max(factors) for factors in zip(*components.values(), strict=True))
    if scan[0] == 1:
        own_across, own_down = components[scan[1]]
        height, width = -(-height * own_down // down), -(-width * own_across // across)
        across = down = 1
    return -(-width // (8 * across)) * -(-height // (8 * down))


def _incomplete(scans: list[bytes], components: list[int], progressive: bool) -> bool:
    """Whether a component, or some bits of its coefficients, never come. A scan is given by its header's content."""
    if not progressive:
        return sum(scan[0] for scan in scans) < len(components)
    wanting = {component: [_NEVER] * _COEFFICIENTS for component in components}
    for scan in scans:
        first, last, bits = scan[-3:]
        before, after = bits >> 4 or _NEVER, bits & 15
        for component in scan[1 : 1 + 2 * scan[0] : 2]:
            band = wanting[component][first : last + 1]
            if any(bits_wanting != before for bits_wanting in band):
                return True
            wanting[component][first : last + 1] = [after] * len(band)
    return any(map(any, wanting.values()))
