"""One tiny real dataset per format, in the files that people have on disk, cut from photographs."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def cut(photos: list[np.ndarray], count: int, height: int, width: int) -> np.ndarray:
    """Different pieces of the photographs, uint8 [count, height, width, 3]."""
    pieces = []
    for n in range(count):
        photo = photos[n % len(photos)]
        top = 37 * n % (photo.shape[0] - height)
        left = 53 * n % (photo.shape[1] - width)
        pieces.append(photo[top : top + height, left : left + width])
    return np.stack(pieces)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def make_cifar10(root: Path, photos: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, list[int]]:
    """`cifar-10-batches-py` with 5 × 7 images, and its checksums in torchvision; returns (images, labels)."""
    from torchvision.datasets import CIFAR10

    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    images = cut(photos, 42, 32, 32)
    labels = [n * 3 % 10 for n in range(42)]
    files = {}
    for k, file in enumerate([*(name for name, _ in CIFAR10.train_list), CIFAR10.test_list[0][0]]):
        part = slice(7 * k, 7 * k + 7)
        entry = {"data": images[part].transpose(0, 3, 1, 2).reshape(7, 3072), "labels": labels[part]}
        (folder / file).write_bytes(pickle.dumps(entry))
        files[file] = md5(folder / file)
    meta = dict(CIFAR10.meta)
    (folder / meta["filename"]).write_bytes(pickle.dumps({"label_names": [str(n) for n in range(10)]}))
    monkeypatch.setattr(CIFAR10, "train_list", [[name, files[name]] for name, _ in CIFAR10.train_list])
    monkeypatch.setattr(CIFAR10, "test_list", [[name, files[name]] for name, _ in CIFAR10.test_list])
    monkeypatch.setattr(CIFAR10, "meta", meta | {"md5": md5(folder / meta["filename"])})
    return images[:35], labels[:35]


def make_fashion(root: Path, photos: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, list[int]]:
    """Archives in `FashionMNIST/raw` with 21 and 4 grey images, and their checksums in torchvision; returns (training
    images [21, 28, 28], labels)."""
    from torchvision.datasets import FashionMNIST

    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    images = cut(photos, 25, 28, 28)[..., 1]
    labels = [n * 3 % 10 for n in range(25)]
    checksums = []
    for name, part in (("train", slice(21)), ("t10k", slice(21, 25))):
        count = len(images[part])
        files = {
            "images-idx3": struct.pack(">iiii", 0x803, count, 28, 28) + images[part].tobytes(),
            "labels-idx1": struct.pack(">ii", 0x801, count) + bytes(labels[part]),
        }
        for kind, data in files.items():
            path = folder / f"{name}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(data))
            checksums.append((path.name, md5(path)))
    monkeypatch.setattr(FashionMNIST, "resources", checksums)
    return images[:21], labels[:21]


def make_stl10(root: Path, photos: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """`stl10_binary/unlabeled_X.bin` with 23 images, and its checksum in torchvision; returns the images."""
    from torchvision.datasets import STL10

    folder = root / STL10.base_folder
    folder.mkdir(parents=True)
    images = cut(photos, 23, 96, 96)
    images.transpose(0, 3, 2, 1).tofile(folder / "unlabeled_X.bin")
    checksums = [[name, md5(folder / name) if "unlabeled" in name else old] for name, old in STL10.train_list]
    monkeypatch.setattr(STL10, "train_list", checksums)
    return images


def make_celeba(root: Path, photos: list[np.ndarray]) -> list[Path]:
    """`img_align_celeba` with 19 JPEGs, 178×218."""
    folder = root / "img_align_celeba"
    folder.mkdir(parents=True)
    paths = []
    for n, image in enumerate(cut(photos, 19, 218, 178)):
        paths.append(folder / f"{n + 1:06d}.jpg")
        Image.fromarray(image).save(paths[-1], quality=90)
    (root / "list_attr_celeba.txt").write_text("not an image\n")
    return paths


def make_lsun(folder: Path, photos: list[np.ndarray], count: int = 17) -> list[bytes]:
    """An LMDB with WebP pictures whose shorter side is 256; returns the values in the order of the keys."""
    import lmdb

    values = {}
    for n, image in enumerate(cut(photos, count, 256, 341)):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "WEBP", quality=75)
        values[hashlib.sha1(bytes([n])).hexdigest().encode()] = file.getvalue()
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=2**26) as environment, environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)
    return [values[key] for key in sorted(values)]
