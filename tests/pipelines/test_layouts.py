"""Shapes of arrays: those with one reading are taken, and every refusal names a remedy that works."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pytest

from pipelines import DataError, open_dataset


def refusal(path: Path) -> str:
    """The one line that opening the array file ends with."""
    with pytest.raises(DataError) as error:
        open_dataset("images", path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    return str(error.value)


def advised(message: str, images: np.ndarray) -> np.ndarray:
    """What the expression after "save" makes of the array."""
    expression = re.search(r"save ((?:np\.|\(*images).*?)(?:, (?:or|without) .*)?$", message)
    assert expression, message
    return eval(expression[1], {"images": images, "np": np})


NORMAL = np.linspace(-2.1, 2.6, 256)
VALUES = {
    "float from 0 to 1": lambda x: (x / 255).astype(np.float32),
    "half from 0 to 1": lambda x: (x / 255).astype(np.float16),
    "float from -1 to 1": lambda x: (x / 127.5 - 1).astype(np.float32),
    "float from 0 to 255": lambda x: x.astype(np.float64),
    "standardised": lambda x: NORMAL[x],
    "int64": lambda x: x.astype(np.int64),
    "16 bits": lambda x: x.astype(np.uint16) * 257,
}


@pytest.mark.parametrize("kind", VALUES)
def test_the_conversion_that_is_named_gives_the_bytes_back(kind: str, tiles: np.ndarray, tmp_path: Path) -> None:
    pictures = tiles.copy()
    pictures[0, 0, 0], pictures[0, 0, 1] = 0, 255
    other = VALUES[kind](pictures)
    path = tmp_path / "other.npy"
    np.save(path, other)
    np.save(path, advised(refusal(path), other))
    assert np.array_equal(open_dataset("images", path).images, pictures)


@pytest.mark.parametrize(
    ("bits", "scale"), [(np.bool_, 255), (np.int8, 255), (np.float32, 255)], ids=["booleans", "int8", "float"]
)
def test_black_and_white(bits: type, scale: int, tiles: np.ndarray, tmp_path: Path) -> None:
    white = (tiles > 127).astype(bits)
    np.save(tmp_path / "white.npy", white)
    np.save(tmp_path / "white.npy", advised(refusal(tmp_path / "white.npy"), white))
    assert np.array_equal(open_dataset("images", tmp_path / "white.npy").images, (tiles > 127) * scale)


@pytest.mark.parametrize("values", [np.nan, np.inf, 1j, "text", -7.0], ids=str)
def test_values_without_a_conversion_are_one_line(values: object, tmp_path: Path) -> None:
    np.save(tmp_path / "odd.npy", np.full((4, 8, 8, 3), values))
    refusal(tmp_path / "odd.npy")


LAYOUTS = {
    "NHWC": lambda x: x,
    "NCHW": lambda x: x.transpose(0, 3, 1, 2),
    "Fortran order": np.asfortranarray,
    "one channel": lambda x: x[..., :1],
    "one channel first": lambda x: x[..., :1].transpose(0, 3, 1, 2),
    "grey": lambda x: x[..., 0],
    "one grey picture": lambda x: x[:1, ..., 0],
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts_with_one_reading(
    kind: str, tiles: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grey = tiles.copy()
    grey[..., 1:] = grey[..., :1]
    images = LAYOUTS[kind](grey)
    np.save(tmp_path / "images.npy", images)
    with caplog.at_level(logging.INFO, logger="gfmn"):
        dataset = open_dataset("images", tmp_path / "images.npy")
    assert np.array_equal(dataset.images, grey[: len(images)])
    assert ("is read as" in caplog.text) == (kind not in ("NHWC", "Fortran order")), "the layout that was taken is said"


@pytest.mark.parametrize(
    "shape",
    [(5, 3, 32, 3), (5, 3, 3, 3), (5, 1, 32, 1), (3, 32, 32), (32, 40, 3), (32, 40, 1), (32, 40, 4), (28, 28, 600)],
    ids=str,
)
def test_shapes_with_two_readings_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    np.save(tmp_path / "two.npy", np.zeros(shape, np.uint8))
    assert str(list(shape)) in refusal(tmp_path / "two.npy")


FOREIGN = {
    "RGBA": lambda x: np.concatenate([x, x[..., :1]], axis=3),
    "RGBA first": lambda x: np.concatenate([x, x[..., :1]], axis=3).transpose(0, 3, 1, 2),
    "number last": lambda x: np.moveaxis(x, 0, -1),
    "rows of channels": lambda x: x.transpose(0, 3, 1, 2).reshape(len(x), -1),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_the_remedy_for_a_shape_works(kind: str, tiles: np.ndarray, tmp_path: Path) -> None:
    images = FOREIGN[kind](tiles)
    path = tmp_path / "foreign.npz"
    np.savez(path, images=images)
    np.savez(path, images=advised(refusal(path), images))
    assert np.array_equal(open_dataset("images", path).images, tiles)


@pytest.mark.parametrize(
    "shape", [(), (32,), (0, 32, 32, 3), (4, 0, 32, 3), (4, 32, 32, 2), (2, 2, 32, 32, 3), (9, 77)]
)
def test_shapes_without_a_reading_are_one_line(shape: tuple[int, ...], tmp_path: Path) -> None:
    np.save(tmp_path / "none.npy", np.zeros(shape, np.uint8))
    assert str(list(shape)) in refusal(tmp_path / "none.npy")


LABELS = {
    "too few": np.array([0, 1]),
    "absurd": np.array([0, 1, 2**40]),
    "past int64": np.array([0, 1, 2**64 - 1], np.uint64),
    "negative": np.array([0, -1, 2]),
    "floats": np.array([0.0, 1.0, 2.0]),
    "texts": np.array(["a", "b", "c"]),
    "columns": np.zeros((3, 1), int),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_that_are_no_classes_are_one_line(kind: str, tiles: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "labels.npz", images=tiles[:3], labels=LABELS[kind])
    refusal(tmp_path / "labels.npz")
