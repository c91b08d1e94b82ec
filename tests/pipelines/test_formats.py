"""The readers of CIFAR10, STL10, CelebA and LSUN, on tiny real datasets in their formats."""

from __future__ import annotations

import logging
import pickle
import socket
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_datasets import make_celeba, make_cifar10, make_fashion, make_lsun, make_stl10, md5
from PIL import Image

import pipelines
from pipelines import DataError, ImageLoader, open_dataset, read_files
from pipelines.decoding.pil import decode
from pipelines.decoding.preprocessing import Preprocessing
from pipelines.sources.downloads import fetching


def pixels(loader: ImageLoader) -> np.ndarray:
    """One epoch in the dataset's order, float64 [N, H, W, 3] in 0..255."""
    images = torch.cat([batch.images for batch in loader])
    return (images.permute(0, 2, 3, 1).double().numpy() + 1) * 127.5


def reference(image: Image.Image, crop: int | None, size: int) -> np.ndarray:
    if crop:
        left, top = (image.width - crop) // 2, (image.height - crop) // 2
        image = image.crop((left, top, left + crop, top + crop))
    wide = size * image.width // image.height
    image = image.resize((wide, size), Image.Resampling.BILINEAR)
    left = round((wide - size) / 2)
    return np.asarray(image.crop((left, 0, left + size, size)), dtype=np.float64)


@pytest.mark.parametrize("where", ["root", "folder"])
def test_cifar10(
    photos: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, where: str
) -> None:
    images, labels = make_cifar10(tmp_path, photos, monkeypatch)
    dataset = open_dataset("cifar10", tmp_path if where == "root" else tmp_path / "cifar-10-batches-py")
    assert np.array_equal(dataset.images, images)
    assert dataset.labels.tolist() == labels
    assert dataset.num_classes == 10
    np.testing.assert_allclose(pixels(ImageLoader(dataset, 8, backend=backend)), images, atol=1e-4)


def test_cifar10_without_a_path_is_in_the_cache(
    photos: list[np.ndarray], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, _ = make_cifar10(own_cache / "cifar10", photos, monkeypatch)
    assert np.array_equal(open_dataset("cifar10").images, images)


def test_cifar10_is_unpacked_from_its_archive(
    photos: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR10

    images, _ = make_cifar10(tmp_path / "made", photos, monkeypatch)
    (tmp_path / "data").mkdir()
    archive = tmp_path / "data" / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "made" / CIFAR10.base_folder, CIFAR10.base_folder)
    with pytest.raises(DataError) as error:
        open_dataset("cifar10", tmp_path / "data")
    assert str(error.value).startswith(f"{archive}: its checksum is wrong")
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive))
    assert np.array_equal(open_dataset("cifar10", tmp_path / "data").images, images)


def test_one_process_unpacks_and_the_others_wait_for_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Threads stand for processes: each has opened the folder for itself."""
    root, begun, log = tmp_path / "new", threading.Event(), []

    def fetch(name: str) -> None:
        if name != "first":
            begun.wait(10)
        with fetching(root, lambda: not (root / "whole").exists()):
            log.append(f"{name} begins")
            if not (root / "whole").exists():
                begun.set()
                time.sleep(0.3)
                (root / "whole").touch()
                log.append(f"{name} has fetched")

    with caplog.at_level(logging.INFO, logger="gfmn"), ThreadPoolExecutor() as threads:
        list(threads.map(fetch, ("first", "second", "third")))
    assert log[:2] == ["first begins", "first has fetched"]
    assert sorted(log[2:]) == ["second begins", "third begins"]
    assert "another process is at it; waiting" in caplog.text
    assert [file.name for file in root.iterdir()] == ["whole"]


def test_a_folder_that_cannot_be_locked_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no locks")

    monkeypatch.setattr("fcntl.flock", refuse)
    for root in (tmp_path, tmp_path / "a file"):
        (tmp_path / "a file").touch()
        with fetching(root, lambda: False):
            pass


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_cifar10_file_with_a_wrong_checksum_is_never_unpickled(
    photos: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    make_cifar10(tmp_path, photos, monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / file
    mark = tmp_path / "executed"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return (open, (str(mark), "w"))

    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError) as error:
        open_dataset("cifar10", tmp_path)
    assert str(error.value).startswith(f"{path}: its checksum is wrong")
    assert not mark.exists()


@pytest.mark.parametrize("where", [".", "FashionMNIST", "FashionMNIST/raw"])
def test_fashion(photos: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Unpacked from its archives, on black, in three equal channels; the second time from the unpacked files."""
    images, labels = make_fashion(tmp_path, photos, monkeypatch)
    for _ in range(2):
        dataset = open_dataset("fashion", tmp_path / where)
        assert dataset.images.shape == (21, 32, 32, 3)
        assert np.array_equal(dataset.images[:, 2:30, 2:30], np.stack([images] * 3, axis=3))
        assert dataset.images.sum() == 3 * images.sum(dtype=np.int64)
        assert (dataset.labels.tolist(), dataset.num_classes, dataset.is_grey()) == (labels, 10, True)
    assert open_dataset("fashion", tmp_path, image_size=64).images.shape == (21, 64, 64, 3)


def test_a_picture_is_made_like_those_of_fashion(photos: list[np.ndarray], tmp_path: Path, monkeypatch) -> None:
    images, _ = make_fashion(tmp_path, photos, monkeypatch)
    Image.fromarray(images[4]).save(tmp_path / "4.png")
    for settings in ({}, {"image_size": 48}, {"center_crop": 30}):
        dataset = open_dataset("fashion", tmp_path, **settings)
        found = read_files([tmp_path / "4.png"], Preprocessing(**settings), "fashion")
        assert np.array_equal(found[0].permute(1, 2, 0).numpy(), dataset.images[4])


def test_fashion_without_a_path_is_in_the_cache(
    photos: list[np.ndarray], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_fashion(own_cache / "fashion", photos, monkeypatch)
    assert len(open_dataset("fashion").images) == 21


def test_damaged_fashion_is_one_line(photos: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_fashion(tmp_path, photos, monkeypatch)
    open_dataset("fashion", tmp_path)
    raw = tmp_path / "FashionMNIST/raw"
    file = raw / "train-images-idx3-ubyte"
    sound = file.read_bytes()
    file.write_bytes(sound[: len(sound) // 2])
    with pytest.raises(DataError, match=r"FashionMNIST is damaged \(.*\); delete its files \*-ubyte: they"):
        open_dataset("fashion", tmp_path)
    for unpacked in raw.glob("*-ubyte"):
        unpacked.unlink()
    assert len(open_dataset("fashion", tmp_path)) == 21
    archive = raw / "t10k-labels-idx1-ubyte.gz"
    archive.write_bytes(b"other")
    with pytest.raises(DataError, match="its checksum is wrong") as error:
        open_dataset("fashion", tmp_path)
    assert str(error.value).startswith(f"{archive}: ")


def test_cifar10_without_network_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from torchvision.datasets import CIFAR10

    with socket.socket() as taken:  # a port where nobody answers
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{taken.getsockname()[1]}/cifar.tar.gz")
        with pytest.raises(DataError) as error:
            open_dataset("cifar10", tmp_path / "new")
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'new'}: ")
    assert "cannot be downloaded" in message
    assert "\n" not in message
    assert capfd.readouterr() == ("", "")
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize(("size", "where"), [(32, "root"), (96, "folder")])
def test_stl10(
    photos: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, size: int, where: str
) -> None:
    images = make_stl10(tmp_path, photos, monkeypatch)
    path = tmp_path if where == "root" else tmp_path / "stl10_binary"
    dataset = open_dataset("stl10", path, image_size=size)
    assert dataset.labels is None
    expected = [reference(Image.fromarray(image), None, size) for image in images]
    np.testing.assert_allclose(pixels(ImageLoader(dataset, 5, backend=backend)), expected, atol=1e-4)


def test_stl10_files_that_are_missing_or_damaged(
    photos: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_stl10(tmp_path, photos, monkeypatch)
    file = tmp_path / "stl10_binary" / "unlabeled_X.bin"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError) as error:
        open_dataset("stl10", tmp_path)
    assert str(error.value).startswith(f"{file}: its checksum is wrong")
    file.unlink()
    with pytest.raises(DataError) as error:
        open_dataset("stl10", tmp_path)
    assert str(error.value).startswith(f"{file}: no such file")
    archive = tmp_path / "stl10_binary.tar.gz"
    archive.write_bytes(b"half a download")
    with pytest.raises(DataError) as error:
        open_dataset("stl10", tmp_path)
    assert str(error.value).startswith(f"{archive}: its checksum is wrong")


@pytest.mark.parametrize("size", [64, 128])
def test_celeba(photos: list[np.ndarray], tmp_path: Path, backend: str, size: int) -> None:
    paths = make_celeba(tmp_path, photos)
    for root in (tmp_path, tmp_path / "img_align_celeba"):
        dataset = open_dataset("celeba", root, image_size=size)
        assert (len(dataset), dataset.labels) == (19, None)
        assert dataset.fingerprint()["center_crop"] == 160
    images = pixels(ImageLoader(dataset, 4, backend=backend))
    for image, path in zip(images, paths, strict=True):
        assert np.abs(image - reference(Image.open(path), 160, size)).mean() <= 0.5


@pytest.mark.parametrize("workers", [0, 2])
def test_lsun(photos: list[np.ndarray], tmp_path: Path, backend: str, workers: int) -> None:
    pytest.importorskip("lmdb")
    values = make_lsun(tmp_path / "lsun" / "bedroom_train_lmdb", photos)
    (tmp_path / "lsun" / "bedroom_train_lmdb" / "lock.mdb").unlink()
    dataset = open_dataset("lsun", tmp_path / "lsun", image_size=64)
    assert (len(dataset), dataset.labels) == (17, None)
    loader = ImageLoader(dataset, 4, backend=backend, workers=workers)
    expected = [reference(decode(value), None, 64) for value in values]
    for images in (pixels(loader), pixels(loader)):
        assert (np.abs(images - expected).mean((1, 2, 3)) <= 0.5).all()
    assert not (tmp_path / "lsun" / "bedroom_train_lmdb" / "lock.mdb").exists(), "reading writes nothing"


def test_an_lsun_database_is_open_once_for_all_its_readers(photos: list[np.ndarray], tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    make_lsun(tmp_path / "a_lmdb", photos)
    first, second = (open_dataset("lsun", tmp_path / "a_lmdb") for _ in range(2))
    assert first.fingerprint() == second.fingerprint()
    again = pickle.loads(pickle.dumps(first))
    assert again.files.read(3) == second.files.read(3)
    for a, b in zip(ImageLoader(first, 5), ImageLoader(second, 5, backend="torch"), strict=True):
        assert a.indices.tolist() == b.indices.tolist()
    copies = [ImageLoader(first, 2, backend="torch", shard=n, num_shards=2) for n in range(2)]
    together = [batch for pair in zip(*copies, strict=False) for batch in pair]
    assert len(together) == 8


def test_bad_lsun_databases_are_one_line(photos: list[np.ndarray], tmp_path: Path) -> None:
    lmdb = pytest.importorskip("lmdb")
    folder = tmp_path / "a_lmdb"
    make_lsun(folder, photos, count=3)
    data = (folder / "data.mdb").read_bytes()
    with lmdb.open(str(tmp_path / "empty_lmdb")):
        pass

    def message(path: Path) -> str:
        with pytest.raises(DataError) as error:
            open_dataset("lsun", path)
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)
        return str(error.value)

    for content, says in ((data[: len(data) // 2], "cut short"), (b"hello" * 9999, "damaged"), (b"", "damaged")):
        (folder / "data.mdb").write_bytes(content)
        assert says in message(folder)
    (folder / "data.mdb").unlink()
    assert "without data.mdb" in message(folder)
    assert "empty" in message(tmp_path / "empty_lmdb")
    make_lsun(tmp_path / "b_lmdb", photos, count=3)
    assert "choose one" in message(tmp_path)


def test_a_bad_picture_in_an_lsun_database(photos: list[np.ndarray], tmp_path: Path, backend: str) -> None:
    lmdb = pytest.importorskip("lmdb")
    values = make_lsun(tmp_path / "a_lmdb", photos, count=5)
    with lmdb.open(str(tmp_path / "a_lmdb"), map_size=2**26) as environment, environment.begin(write=True) as writing:
        writing.put(b"0000", values[0][:1000])
    with pytest.raises(DataError) as error:
        list(ImageLoader(open_dataset("lsun", tmp_path / "a_lmdb"), 2, backend=backend))
    assert str(error.value).startswith(f"{tmp_path / 'a_lmdb'}[0000]: ")
    loader = ImageLoader(open_dataset("lsun", tmp_path / "a_lmdb", skip_bad_images=True), 2, backend=backend)
    assert [index for batch in loader for index in batch.indices.tolist()] == [1, 2, 3, 4, 5]
    assert len(loader.bad_images) == 1


def test_lsun_without_the_lmdb_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.mdb").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(DataError, match="needs lmdb"):
        open_dataset("lsun", tmp_path)


def test_lmdb_and_dali_are_imported_only_where_they_are_needed() -> None:
    code = (
        "import sys, pipelines as p\n"
        "list(p.ImageLoader(p.open_dataset('digits'), 999, backend='torch'))\n"
        "assert not {'lmdb', 'nvidia.dali'} & set(sys.modules)"
    )
    root = Path(pipelines.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=60)


@pytest.mark.parametrize("name", ["stl10", "celeba", "lsun", "images"])
def test_a_missing_path_is_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder") as error:
        open_dataset(name, tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(error.value)
    with pytest.raises(DataError, match="needs a path"):
        open_dataset(name)
