"""The formats that Pillow and its plugins decode themselves."""

from __future__ import annotations

import contextlib
import functools
import importlib

from PIL import Image

# Pillow has no HEIC of its own.
with contextlib.suppress(ImportError, OSError):
    importlib.import_module("pillow_heif").register_heif_opener()

_NOT_DECODED = frozenset(("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"))
"""What Pillow names but only writes, only recognises, or hands to a program outside."""


@functools.cache
def formats() -> tuple[str, ...]:
    """By Pillow's names, in the order in which it tries them; whatever else a file holds is no picture."""
    Image.init()
    return tuple(name for name in Image.ID if name in Image.OPEN and name not in _NOT_DECODED)


def suffixes() -> tuple[str, ...]:
    """How names of picture files end, in lower case."""
    Image.init()
    return tuple(sorted(suffix for suffix, form in Image.EXTENSION.items() if form not in _NOT_DECODED))
