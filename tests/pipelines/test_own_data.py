"""Data as users have them: folders, zip archives, Parquet files and single pictures give the same images and labels."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import DataError, ImageLoader, open_dataset
from pipelines.device import usable_cpus

Files = dict[str, bytes]


def encoded(picture: np.ndarray, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, form)
    return file.getvalue()


@pytest.fixture(scope="session")
def files(tiles: np.ndarray) -> Files:
    """23 encoded pictures (a prime number) in three class folders, in sorted order."""
    kinds = ("PNG", "JPEG", "BMP")
    names = [f"{'abc'[n // 8]}/{n:02d}.{kinds[n % 3].lower()}" for n in range(23)]
    return {name: encoded(tiles[n], kinds[n % 3]) for n, name in enumerate(names)}


def as_folder(root: Path, files: Files) -> Path:
    for name, content in files.items():
        (root / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "folder" / name).write_bytes(content)
    return root / "folder"


def as_zip(root: Path, files: Files, compression: int = zipfile.ZIP_STORED) -> Path:
    path = root / "archive.zip"
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in reversed(files.items()):
            archive.writestr(name, content)
    return path


def as_parquet(root: Path, files: Files, parts: int = 1, row_group: int = 5, labels: str = "ClassLabel") -> Path:
    """Files as `datasets` writes them: structs of bytes and path, and what the columns mean in the schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (root / "table").mkdir()
    names = list(files)
    label = {"_type": "ClassLabel", "names": ["a", "b", "c"]}
    features = {"image": {"_type": "Image"}, "label": label, "mask": {"_type": "Value"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features if labels == "ClassLabel" else {}}})}
    for part in range(parts):
        chosen = names[part * len(names) // parts : (part + 1) * len(names) // parts]
        columns = {
            "mask": pa.array([b"\0"] * len(chosen)),
            "image": pa.array([{"bytes": files[name], "path": name} for name in chosen]),
            "label": pa.array(["abc".index(name[0]) for name in chosen]),
        }
        if labels in ("texts", "categories"):
            texts = pa.array([name[0] for name in chosen])
            columns["label"] = texts if labels == "texts" else texts.dictionary_encode()
        table = pa.table(columns).replace_schema_metadata(metadata)
        pq.write_table(table, root / "table" / f"train-{part:05d}-of-{parts:05d}.parquet", row_group_size=row_group)
    return root / "table" / "train-00000-of-00001.parquet" if parts == 1 else root / "table"


SOURCES: dict[str, Callable[[Path, Files], Path]] = {
    "zip": as_zip,
    "zip, deflated": lambda root, files: as_zip(root, files, zipfile.ZIP_DEFLATED),
    "zip, lzma": lambda root, files: as_zip(root, files, zipfile.ZIP_LZMA),
    "zip with a folder above": lambda root, files: as_zip(root, {f"mine/{name}": files[name] for name in files}),
    "zip from Windows": lambda root, files: as_zip(root, {name.replace("/", "\\"): files[name] for name in files}),
    "Parquet": as_parquet,
    "Parquet, several files": lambda root, files: as_parquet(root, files, parts=3),
    "Parquet, classes as texts": lambda root, files: as_parquet(root, files, labels="texts"),
    "Parquet, classes as pandas' categories": lambda root, files: as_parquet(root, files, parts=2, labels="categories"),
    "Parquet, plain numbers": lambda root, files: as_parquet(root, files, labels="numbers"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_images_and_labels_of_the_folder(
    tmp_path: Path, files: Files, backend: str, kind: str
) -> None:
    folder = open_dataset("images", as_folder(tmp_path, files))
    dataset = open_dataset("images", SOURCES[kind](tmp_path, files))
    assert dataset.name == folder.name == "images"
    assert dataset.num_classes == folder.num_classes == 3
    assert dataset.labels.tolist() == folder.labels.tolist() == [n // 8 for n in range(23)]
    loaders = [ImageLoader(one, 5, backend=backend, shuffle=True, seed=1) for one in (folder, dataset)]
    for expected, batch in zip(*loaders, strict=True):
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.indices, expected.indices)
    # A pass that resumes, on another shard, from a copy as a spawned process has it.
    copied = pickle.loads(pickle.dumps(dataset))
    loaders = [ImageLoader(one, 2, backend=backend, shard=1, num_shards=2, workers=1) for one in (folder, copied)]
    for expected, batch in zip(*(loader.batches(first=3) for loader in loaders), strict=True):
        assert torch.equal(batch.images, expected.images)


@pytest.mark.parametrize("kind", SOURCES)
def test_the_fingerprint_follows_the_content(tmp_path: Path, files: Files, kind: str) -> None:
    prints = []
    for place, one in (("first", files), ("second", files), ("third", files | {"a/00.png": files["a/03.png"]})):
        (tmp_path / place).mkdir()
        prints.append(open_dataset("images", SOURCES[kind](tmp_path / place, one)).fingerprint())
    assert prints[0] == prints[1]
    assert prints[0]["content_sha256"] != prints[2]["content_sha256"]


@pytest.mark.parametrize("make", [as_folder, as_zip, as_parquet])
def test_a_system_that_does_not_tell_what_cpus_a_process_may_use(
    tmp_path: Path, files: Files, backend: str, make: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As macOS, whose Python has no os.sched_getaffinity."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert usable_cpus() == 3
    dataset = open_dataset("images", make(tmp_path, files))
    assert len(dataset.fingerprint()["content_sha256"]) == 64
    assert sum(len(images) for images, _ in ImageLoader(dataset, 5, backend=backend)) == 23


def test_an_archive_has_the_fingerprint_of_its_folder(tmp_path: Path, files: Files) -> None:
    prints = [open_dataset("images", make(tmp_path, files)).fingerprint() for make in (as_folder, as_zip)]
    assert prints[0] == prints[1]


def test_one_picture_is_a_data_set(tmp_path: Path, tiles: np.ndarray, backend: str) -> None:
    (tmp_path / "One.PNG").write_bytes(encoded(tiles[3]))
    dataset = open_dataset("images", tmp_path / "One.PNG")
    ((images, _),) = ImageLoader(dataset, 4, backend=backend)
    expected = torch.from_numpy(tiles[3].astype(np.float64).transpose(2, 0, 1) / 127.5 - 1).float()
    torch.testing.assert_close(images[0], expected, rtol=0, atol=1e-6)
    assert dataset.labels is None


@pytest.mark.parametrize("make", [as_folder, as_zip])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param({}, {0: 5, 1: 0, 2: 2}, id="numbers"),
        pytest.param({"labels": None}, None, id="no labels"),
        pytest.param({"labels": [["00000/0.png", [0.5, 1.0]], ["00000/1.png", [0, 1]]]}, None, id="vectors"),
        pytest.param({"other": 1}, {0: 0, 1: 0, 2: 1}, id="another program's file"),
    ],
)
def test_stylegans_labels(
    tmp_path: Path, tiles: np.ndarray, make: Callable, given: dict, expected: dict | None
) -> None:
    names = ["00000/0.png", "00000/1.png", "00001/0.png"]
    if not given:
        given = {"labels": [[names[2], 2], [names[0], 5], [names[1], 0], ["absent.png", 9]]}
    elif isinstance(given.get("labels"), list):
        given = {"labels": [*given["labels"], [names[2], [0, 1]]]}
    pictures = {name: encoded(tiles[n]) for n, name in enumerate(names)}
    dataset = open_dataset("images", make(tmp_path, pictures | {"dataset.json": json.dumps(given).encode()}))
    found = None if dataset.labels is None else dict(enumerate(dataset.labels.tolist()))
    assert found == expected
    assert dataset.num_classes == (0 if expected is None else max(expected.values()) + 1)


@pytest.mark.parametrize("make", [as_folder, as_zip, as_parquet])
def test_the_log_says_how_many_classes_and_which(
    tmp_path: Path, files: Files, make: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="gfmn"):
        open_dataset("images", make(tmp_path, files))
    (line,) = [record.message for record in caplog.records if "classes" in record.message]
    assert "23" in line
    assert "3 classes" in line
    assert "a, b, c" in line


@pytest.mark.parametrize("make", [as_folder, as_zip])
def test_classes_below_a_shared_folder(tmp_path: Path, files: Files, make: Callable) -> None:
    names = {f"train/photos/{name}": content for name, content in files.items()}
    assert open_dataset("images", make(tmp_path, names)).labels.tolist() == [n // 8 for n in range(23)]


@pytest.mark.parametrize("make", [as_folder, as_zip])
def test_what_is_no_picture_is_counted_once_and_junk_never(
    tmp_path: Path, files: Files, make: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    png = files["a/00.png"]
    junk = ["__MACOSX/a/._00.png", "a/._00.png", "Thumbs.db", "a/@eaDir/00.png", ".git/x.png", "b/desktop.ini"]
    rest = ["readme.txt", "a/clip.mov", "a/other.mov"]
    path = make(tmp_path, files | {name: png for name in junk + rest})
    with caplog.at_level(logging.INFO, logger="gfmn"):
        datasets = [open_dataset("images", path) for _ in range(2)]
    assert [len(dataset) for dataset in datasets] == [23, 23]
    assert datasets[0].num_classes == 3
    (line,) = [record.message for record in caplog.records if "left out" in record.message]
    assert "3 files" in line
    assert "2 .mov" in line
    assert not any(word in line for word in ("Thumbs", "._", "eaDir", ".ini"))


FORMATS = ["GIF", "PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "PPM", "TGA", "JPEG2000", "ICO", "PCX", "DDS", "QOI"]


@pytest.mark.parametrize("make", [as_folder, as_zip])
def test_everything_that_pillow_opens_is_a_picture(
    tmp_path: Path, tiles: np.ndarray, backend: str, make: Callable
) -> None:
    Image.init()
    pictures = {}
    for form in FORMATS:
        for suffix in (suffix for suffix, owner in Image.EXTENSION.items() if owner == form):
            pictures[f"x{suffix.upper()}"] = encoded(tiles[1], form)
    dataset = open_dataset("images", make(tmp_path, pictures))
    assert len(dataset) == len(pictures) > 25
    images = torch.cat([batch.images for batch in ImageLoader(dataset, 7, backend=backend)])
    expected = np.asarray(tiles[1], dtype=np.float64).transpose(2, 0, 1)
    for image, name in zip(images, sorted(pictures), strict=True):
        bound = 12 if name.endswith((".GIF", ".JPG", ".AVIF", ".AVIFS", ".J2C")) else 9
        assert np.abs((image.double().numpy() + 1) * 127.5 - expected).mean() < bound, name


def test_a_folder_of_a_celeba_archive(tmp_path: Path, photos: list[np.ndarray]) -> None:
    pictures = {f"img_align_celeba/{n:06d}.jpg": encoded(photos[n][:218, :178], "JPEG") for n in range(3)}
    packed = open_dataset("celeba", as_zip(tmp_path, pictures))
    unpacked = open_dataset("celeba", as_folder(tmp_path, pictures))
    assert packed.labels is None
    for a, b in zip(ImageLoader(packed, 3), ImageLoader(unpacked, 3), strict=True):
        assert torch.equal(a.images, b.images)


@pytest.mark.slow
def test_a_parquet_file_of_more_than_two_gib(tmp_path: Path) -> None:
    """Of the hub's structs pyarrow reads no more at once; a repeated picture takes little of the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"bytes": bytes(2**20), "path": None}] * 100
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    group = pa.table({"image": pa.array(rows, kind)})
    with pq.ParquetWriter(tmp_path / "big.parquet", group.schema) as writer:
        for _ in range(21):
            writer.write_table(group)
    dataset = open_dataset("images", tmp_path / "big.parquet")
    assert len(dataset) == 2100
    assert len(dataset.files.read(2099)) == 2**20


def test_parquet_without_pyarrow_is_one_line(tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    path = as_parquet(tmp_path, files)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="pyarrow"):
        open_dataset("images", path)
