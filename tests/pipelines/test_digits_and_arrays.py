"""The embedded digits, array files and what identifies them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from pipelines import DataError, open_dataset


def area_average(images: np.ndarray, factor: int) -> np.ndarray:
    """[N, H, W] → [N, H/factor, W/factor]."""
    count, height, width = images.shape
    return images.reshape(count, height // factor, factor, width // factor, factor).mean((2, 4))


def test_digits_are_the_real_ones_enlarged_and_centred() -> None:
    dataset = open_dataset("digits")
    real = load_digits()
    assert (dataset.name, len(dataset), dataset.image_size, dataset.num_classes) == ("digits", 1797, 32, 10)
    assert dataset.images.shape == (1797, 32, 32, 3)
    assert dataset.images.dtype == np.uint8
    assert dataset.labels.dtype == np.int64
    assert np.array_equal(dataset.labels, real.target)
    assert (dataset.images == dataset.images[..., :1]).all(), "the three channels are equal"
    border = dataset.images.copy()
    border[:, 4:28, 4:28] = 0
    assert border.max() == 0
    assert dataset.images[:, 4:28, 4:28].max() == 255

    back = area_average(dataset.images[:, 4:28, 4:28, 0].astype(np.float64), 3) * 16 / 255
    error = np.abs(back - real.images)
    shifted = np.abs(np.roll(back, 1, axis=2) - real.images)
    # Measured: mean 0.70, 99% below 2.6, at most 4.4 of 16 (the bicubic filter smooths); one pixel off: mean 4.0.
    assert error.mean() < 0.75
    assert np.quantile(error, 0.99) < 2.7
    assert error.max() < 4.5
    assert shifted.mean() > 5 * error.mean(), "the check would see a digit that is one pixel off"
    judge = SVC().fit(real.data[:900], real.target[:900])
    accuracy = judge.score(back[900:].reshape(-1, 64), real.target[900:])
    assert accuracy > judge.score(real.data[900:], real.target[900:]) - 0.01, "a classifier sees no difference"


@pytest.mark.parametrize(("size", "side"), [(64, 48), (28, 21), (11, 8)])
def test_digits_scale_with_the_image(size: int, side: int) -> None:
    images = open_dataset("digits", image_size=size).images
    start = (size - side) // 2
    inside = images[:, start : start + side, start : start + side]
    assert images.shape[1:] == (size, size, 3)
    assert images.sum(dtype=np.int64) == inside.sum(dtype=np.int64)
    assert inside[:, 0].any(), "the digits reach the upper edge of their square"
    assert inside[:, -1].any(), "and the lower one"


def test_a_flip_doubles_the_length_and_the_labels(tiles: np.ndarray, tmp_path: Path) -> None:
    labels = np.arange(len(tiles)) % 7
    np.savez(tmp_path / "tiles.npz", images=tiles, labels=labels)
    dataset = open_dataset("images", tmp_path / "tiles.npz", horizontal_flip=True)
    assert len(dataset) == 2 * len(tiles)
    assert dataset.num_classes == 7
    assert np.array_equal(dataset.labels, np.concatenate([labels, labels]))


@pytest.mark.parametrize("form", ["NHWC", "NCHW", "grey", "one channel", "npz arr_0", "npz single"])
def test_array_files(form: str, tiles: np.ndarray, tmp_path: Path) -> None:
    grey = np.asarray(tiles[..., 1])
    expected = tiles
    path = tmp_path / ("tiles.npz" if "npz" in form else "tiles.npy")
    if form == "NHWC":
        np.save(path, tiles)
    elif form == "NCHW":
        np.save(path, tiles.transpose(0, 3, 1, 2))
    elif form == "npz arr_0":
        np.savez_compressed(path, tiles, np.arange(len(tiles)))
    elif form == "npz single":
        np.savez(path, pictures=tiles)
    else:
        np.save(path, grey if form == "grey" else grey[..., None])
        expected = np.stack([grey] * 3, axis=-1)
    dataset = open_dataset("images", path)
    assert np.array_equal(dataset.images, expected)
    assert (dataset.labels is not None) == (form == "npz arr_0")


def test_arrays_of_another_size_are_resized_with_pils_filter(photos: list[np.ndarray], tmp_path: Path) -> None:
    np.save(tmp_path / "photos.npy", np.stack(photos[:2]))
    dataset = open_dataset("images", tmp_path / "photos.npy", image_size=48)
    for image, photo in zip(dataset.images, photos, strict=False):
        reference = Image.fromarray(photo).resize((48 * 640 // 427, 48), Image.Resampling.BILINEAR)
        left = round((reference.width - 48) / 2)
        assert np.array_equal(image, np.asarray(reference.crop((left, 0, left + 48, 48))))


def test_the_fingerprint_knows_content_and_preprocessing_but_not_the_path(tiles: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", tiles)
    np.save(tmp_path / "b.npy", tiles)
    changed = tiles.copy()
    changed[-1, -1, -1, -1] ^= 1
    np.save(tmp_path / "c.npy", changed)
    np.save(tmp_path / "d.npy", tiles[::-1])
    first = open_dataset("images", tmp_path / "a.npy").fingerprint()
    assert all(isinstance(value, str | int | float | bool) for value in first.values())
    assert open_dataset("images", tmp_path / "b.npy").fingerprint() == first
    others = [
        open_dataset("images", tmp_path / "c.npy"),
        open_dataset("images", tmp_path / "d.npy"),
        open_dataset("images", tmp_path / "a.npy", horizontal_flip=True),
        open_dataset("images", tmp_path / "a.npy", image_size=16),
        open_dataset("images", tmp_path / "a.npy", center_crop=24),
        open_dataset("digits"),
    ]
    prints = [first, *(other.fingerprint() for other in others)]
    assert len({tuple(sorted(map(repr, p.items()))) for p in prints}) == len(prints)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a readable array file"),
        (b"hello", "not a readable array file"),
        (np.zeros((3, 32, 32, 3), np.float32), "float32"),
        (np.zeros((3, 32, 32, 4), np.uint8), "shape"),
        (np.zeros((0, 32, 32, 3), np.uint8), "no images"),
        (np.array([{"a": 1}], dtype=object), "not a readable array file"),
        ("cut", "not a readable array file"),
        ("lie", "not a readable array file"),
    ],
    ids=["empty", "text", "float", "rgba", "no images", "pickled", "cut short", "header lies"],
)
def test_a_bad_array_file_is_one_line(content: object, says: str, tiles: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "bad.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        np.save(path, tiles)
        data = path.read_bytes()
        lie = b"(9999999999, 32, 32, 3), }"
        cut, lying = data[: len(data) // 2], data.replace(b"(97, 32, 32, 3), }".ljust(len(lie)), lie)
        assert lying != data
        assert len(lying) == len(data)
        path.write_bytes(cut if content == "cut" else lying)
    with pytest.raises(DataError) as error:
        open_dataset("images", path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "mnist"}, "choose one of"),
        ({"name": "images"}, "needs a path"),
        ({"name": "images", "path": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"name": "digits", "image_size": 0}, "image_size"),
        ({"name": "digits", "image_size": 8}, "at least 11"),
        ({"name": "digits", "center_crop": 8}, "center_crop"),
        ({"name": "digits", "path": "somewhere"}, "built in"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value.values())),
)
def test_bad_arguments_are_one_line(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(DataError, match=says) as error:
        open_dataset(**arguments)
    assert "\n" not in str(error.value)
