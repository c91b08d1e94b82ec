"""Data that cannot be used, or that could mean two things, ends in one line that names what is wrong."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import engine.precompute
from engine.configuration.command import run_command
from pipelines import DataError, ImageLoader, open_dataset

PNG = (lambda file: (Image.new("RGB", (40, 40), "teal").save(file, "PNG"), file.getvalue())[1])(io.BytesIO())
Make = Callable[[Path], "str | Path"]


def tree(root: Path, *names: str, **texts: object) -> Path:
    """A folder of equal pictures, and of JSON files."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(PNG)
    for name, content in texts.items():
        (root / f"{name}.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return root


def packed(root: Path, *names: str, compression: int = zipfile.ZIP_STORED, **texts: object) -> Path:
    """The same as a zip archive."""
    folder = tree(root / "packed", *names, **texts)
    with zipfile.ZipFile(root / "data.zip", "w", compression) as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, file.relative_to(folder))
    return root / "data.zip"


def edited(path: Path, edit: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(edit(path.read_bytes()))
    return path


def encrypt(data: bytes) -> bytes:
    """Set the bit that says so in every entry of a zip's directory and before every entry."""
    for mark, place in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        start = 0
        while (start := data.find(mark, start)) >= 0:
            data = data[: start + place] + bytes([data[start + place] | 1]) + data[start + place + 1 :]
            start += 1
    return data


def claim(size: int) -> Callable[[bytes], bytes]:
    """The first entry of a zip's directory says that it is so many bytes large."""

    def edit(data: bytes) -> bytes:
        start = data.index(b"PK\1\2") + 24
        return data[:start] + size.to_bytes(4, "little") + data[start + 4 :]

    return edit


def parquet(root: Path, rows: int = 3, name: str = "data.parquet", **columns: list[object]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (root / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns or {"image": [PNG] * rows}), root / name)
    return root / name


def folder_of_parquet(root: Path, *names: str) -> Path:
    for name in names:
        parquet(root / "tables", name=name)
    return root / "tables"


def other_columns(root: Path) -> Path:
    parquet(root / "tables", name="a.parquet")
    parquet(root / "tables", name="b.parquet", text=["a"])
    return root / "tables"


def pipe(root: Path) -> Path:
    os.mkfifo(root / "data.npy")
    return root / "data.npy"


def text(root: Path, name: str) -> Path:
    (root / name).write_text("I am something else.\n" * 99)
    return root / name


def cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


SPLITS = ("train/cat/1.png", "train/dog/1.png", "val/cat/1.png", "val/dog/1.png")
ROWS: dict[str, tuple[Make, str]] = {
    "splits": (lambda p: tree(p, *SPLITS), "/train"),
    "splits beside loose pictures": (lambda p: tree(p, *SPLITS, "x.png"), "train and val"),
    "splits beside another folder": (lambda p: tree(p, *SPLITS, "masks/1.png"), "train and val"),
    "splits below one folder": (
        lambda p: tree(p, "images/Train2017/1.png", "images/test2017/1.png"),
        "images/Train2017",
    ),
    "splits of CycleGAN": (lambda p: tree(p, "trainA/1.png", "trainB/1.png", "testA/1.png"), "testA and trainB"),
    "splits in a zip": (lambda p: packed(p, *SPLITS), "data.zip"),
    "splits of Parquet files": (lambda p: folder_of_parquet(p, "train-0.parquet", "test-0.parquet"), "test-0"),
    "splits of Parquet folders": (lambda p: folder_of_parquet(p, "train/0.parquet", "test/0.parquet"), "test and"),
    "labels: no JSON": (lambda p: tree(p, "0.png", dataset=b"{'labels'"), "dataset.json"),
    "labels: deep JSON": (lambda p: tree(p, "0.png", dataset=b"[" * 10**6), "dataset.json"),
    "labels: one missing": (lambda p: tree(p, "0.png", "1.png", dataset={"labels": [["0.png", 1]]}), "1.png"),
    "labels: not a list": (lambda p: tree(p, "0.png", dataset={"labels": 7}), "dataset.json"),
    "labels: not pairs": (lambda p: tree(p, "0.png", dataset={"labels": [1, 2]}), "dataset.json"),
    "labels: negative": (lambda p: tree(p, "0.png", dataset={"labels": [["0.png", -1]]}), "dataset.json"),
    "labels: absurd": (lambda p: tree(p, "0.png", dataset={"labels": [["0.png", 10**30]]}), "dataset.json"),
    "labels: too many": (lambda p: packed(p, "0.png", dataset={"labels": [["0.png", 10**9]]}), "dataset.json"),
    "labels: fractions": (lambda p: packed(p, "0.png", dataset={"labels": [["0.png", 0.5]]}), "dataset.json"),
    "zip: text": (lambda p: text(p, "data.zip"), "data.zip"),
    "zip: empty file": (lambda p: edited(text(p, "data.zip"), lambda _: b""), "data.zip"),
    "zip: cut short": (lambda p: edited(packed(p, "0.png", "1.png"), cut), "data.zip"),
    "zip: encrypted": (lambda p: edited(packed(p, "0.png"), encrypt), "data.zip"),
    "zip: no pictures": (lambda p: packed(p, "notes.txt"), ".txt"),
    "zip: damaged inside": (lambda p: edited(packed(p, "0.png"), lambda d: d.replace(b"IDAT", b"TADI")), "0.png"),
    "zip: an entry larger than it is": (lambda p: edited(packed(p, "0.png"), claim(10**9)), "0.png"),
    "zip: an entry smaller than it is": (lambda p: edited(packed(p, "0.png"), claim(10)), "0.png"),
    "zip: an entry of more than 1 GiB": (lambda p: edited(packed(p, "0.png"), claim(2**30 + 1)), "too large"),
    "Parquet: text": (lambda p: text(p, "data.parquet"), "data.parquet"),
    "Parquet: cut short": (lambda p: edited(parquet(p), cut), "data.parquet"),
    "Parquet: damaged inside": (lambda p: edited(parquet(p), lambda d: d[:20] + bytes(40) + d[60:]), "data.parquet"),
    "Parquet: no rows": (lambda p: parquet(p, image=[PNG][:0]), "data.parquet"),
    "Parquet: no pictures": (lambda p: parquet(p, a=[1], text=["b"]), "data.parquet"),
    "Parquet: two columns": (lambda p: parquet(p, left=[PNG], right=[PNG]), "left, right"),
    "Parquet: a row without a picture": (lambda p: parquet(p, image=[PNG, None]), "data.parquet[1]"),
    "Parquet: a struct without a picture": (
        lambda p: parquet(p, image=[{"bytes": PNG, "path": "a"}, {"bytes": None, "path": "b"}]),
        "data.parquet[1]",
    ),
    "Parquet: no struct": (lambda p: parquet(p, image=[{"bytes": PNG, "path": "a"}, None]), "data.parquet[1]"),
    "Parquet: a row of something else": (lambda p: parquet(p, image=[PNG, b"hello"]), "data.parquet[1]"),
    "Parquet: files with other columns": (other_columns, "b.parquet"),
    "nothing but HEIC": (lambda p: text(p, "photo.heic").parent, ".heic"),
    "an LMDB": (lambda p: text(p, "data.mdb").parent, "lsun"),
    "another kind of file": (lambda p: text(p, "data.tar"), "data.tar"),
    "a pipe": (pipe, "data.npy"),
    "a picture that is none": (lambda p: text(p, "data.jpg"), "data.jpg"),
    "an empty path": (lambda p: "", "empty"),
    "a null byte": (lambda p: f"{p}/a\0b", "null"),
    "a name that is too long": (lambda p: p / ("x" * 300), "too long"),
    "an unknown user": (lambda p: "~nobody-of-this-name/data", "~nobody-of-this-name"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_data_that_cannot_be_used(kind: str, tmp_path: Path, backend: str) -> None:
    make, named = ROWS[kind]
    path = make(tmp_path)
    with pytest.raises(DataError) as error:
        list(ImageLoader(open_dataset("images", path), 4, backend=backend))
    message = str(error.value)
    assert named in message
    assert "\n" not in message
    assert len(message) < len(str(path)) + 330


@pytest.mark.parametrize(
    ("kind", "good"),
    [("zip: damaged inside", 0), ("Parquet: a row without a picture", 1), ("Parquet: a row of something else", 1)],
)
def test_bad_pictures_of_every_source_can_be_skipped(kind: str, good: int, tmp_path: Path, backend: str) -> None:
    path = ROWS[kind][0](tmp_path)
    dataset, fresh = (open_dataset("images", path, skip_bad_images=True) for _ in range(2))
    before = dataset.fingerprint()
    loader = ImageLoader(dataset, 4, backend=backend)
    assert sum(len(batch.indices) for batch in loader) == good
    assert [ROWS[kind][1] in bad.path for bad in loader.bad_images] == [True]
    assert dataset.fingerprint() == before == fresh.fingerprint()


@pytest.mark.parametrize(
    "names",
    [("train/1.png", "car/1.png"), ("valley/1.png", "testament/1.png"), ("device/1.png", "trainer/1.png")],
    ids=" ".join,
)
def test_words_that_only_begin_like_splits_are_classes(names: tuple[str, ...], tmp_path: Path) -> None:
    assert open_dataset("images", tree(tmp_path, *names)).num_classes == 2


def lsun_zip(root: Path) -> Path:
    with zipfile.ZipFile(root / "church_train_lmdb.zip", "w") as archive:
        archive.writestr("church_train_lmdb/data.mdb", b"")
    return root / "church_train_lmdb.zip"


@pytest.mark.parametrize("inside", [False, True], ids=["the archive", "its folder"])
def test_lsuns_own_zip_is_to_be_unpacked(tmp_path: Path, inside: bool) -> None:
    path = lsun_zip(tmp_path)
    with pytest.raises(DataError, match="unpack") as error:
        open_dataset("lsun", tmp_path if inside else path)
    assert "church_train_lmdb.zip" in str(error.value)


CLOSED = {
    "images": ["closed/photos", "closed/x.zip", "closed/x.npy", "closed/x.parquet", "closed/x.png"],
    "celeba": ["closed/celeba"],
    "cifar10": ["closed/cifar10"],
    "fashion": ["closed/fashion"],
    "stl10": ["closed/stl10"],
    "lsun": ["closed/bedroom_train_lmdb"],
}


@pytest.mark.parametrize(("name", "path"), [(name, path) for name, paths in CLOSED.items() for path in paths])
def test_a_path_below_a_closed_folder(name: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not "does not exist": nobody knows whether it does."""
    close(monkeypatch, tmp_path / "closed", os.stat)
    with pytest.raises(DataError) as error:
        open_dataset(name, tmp_path / path)
    assert str(error.value).startswith(f"{tmp_path / path}")
    assert "permission denied" in str(error.value)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".zip", ".parquet", ".png"])
def test_a_file_that_may_not_be_read(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = text(tmp_path, f"data{suffix}")
    close(monkeypatch, path, os.open)
    with pytest.raises(DataError) as error:
        open_dataset("images", path)
    assert str(error.value).startswith(f"{path}: permission denied")


def close(monkeypatch: pytest.MonkeyPatch, place: Path, function: Callable) -> None:
    """Refuse a system call for everything at or below `place`, as the system does for all but root."""

    def refused(path: object, *arguments: object, **options: object) -> object:
        if isinstance(path, str | os.PathLike) and Path(os.fspath(path)).is_relative_to(place):
            raise PermissionError(13, "Permission denied", str(path))
        return function(path, *arguments, **options)

    monkeypatch.setattr(os, function.__name__, refused)


def test_any_bytes_that_a_file_system_allows(tmp_path: Path, backend: str) -> None:
    root = tmp_path / os.fsdecode(b"\xff new\nline\x1b[31m ' \"\xe2\x82\xac")
    names = [os.fsdecode(name) for name in (b"a\xfe/1.png", b"a\xfe/2.png", b"b\n/\xe9.png")]
    dataset = open_dataset("images", tree(root, *names))
    assert sum(len(batch.indices) for batch in ImageLoader(dataset, 2, backend=backend)) == 3
    assert dataset.num_classes == 2
    assert dataset.fingerprint()["count"] == 3
    for array in (packed(tmp_path / "z", "1.png"), parquet(tmp_path / "q")):
        moved = array.rename(root / array.name)
        assert len(list(ImageLoader(open_dataset("images", moved), 2, backend=backend))) > 0
    np.save(root / "x.npy", np.zeros((3, 8, 8, 3), np.uint8))
    assert len(open_dataset("images", root / "x.npy")) == 3
    (root / names[0]).write_bytes(b"bad")
    with pytest.raises(DataError) as error:
        list(ImageLoader(dataset, 2, backend=backend))
    assert str(error.value).isprintable()


@pytest.mark.parametrize("kind", ["splits", "zip: encrypted", "Parquet: no pictures", "a pipe"])
def test_a_command_ends_with_2_and_one_line(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, named = ROWS[kind]
    arguments = ["--data", str(make(tmp_path)), "--out", str(tmp_path / "target.safetensors")]
    with pytest.raises(SystemExit) as ended:
        run_command(engine.precompute.main, [*arguments, "--extractor", "vgg-small"])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2
    assert len(lines) == 1
    assert named in lines[0]
    assert not (tmp_path / "target.safetensors").exists()


def array(root: Path, name: str, save: Callable[..., None]) -> Path:
    save(root / name, images=np.zeros((3, 9, 9, 3), np.uint8), labels=np.arange(3))
    return root / name


FUZZED: dict[str, Callable[[Path], Path]] = {
    "zip": lambda p: packed(p, "a/0.png", "b/1.png", dataset={"labels": [["a/0.png", 1], ["b/1.png", 0]]}),
    "zip, deflated": lambda p: packed(p, "a/0.png", "b/1.png", compression=zipfile.ZIP_DEFLATED),
    "Parquet": lambda p: parquet(p, image=[{"bytes": PNG, "path": "a"}] * 3, label=["a", "b", "a"]),
    "npz": lambda p: array(p, "data.npz", np.savez),
    "npz, deflated": lambda p: array(p, "data.npz", np.savez_compressed),
}


@pytest.mark.parametrize("kind", FUZZED)
def test_random_damage_ends_in_one_line_or_does_no_harm(kind: str, tmp_path: Path) -> None:
    path = FUZZED[kind](tmp_path)
    good = path.read_bytes()
    random = np.random.default_rng(sorted(FUZZED).index(kind))
    refusals: list[str] = []
    for _ in range(80):
        data = bytearray(good)
        for place in random.integers(len(data), size=random.integers(1, 9)):
            data[place] = random.integers(256)
        path.write_bytes(data[: random.integers(len(data))] if random.random() < 0.2 else data)
        try:
            list(ImageLoader(open_dataset("images", path, image_size=8), 4, backend="torch", workers=0))
        except DataError as error:
            refusals.append(str(error))
    assert len(refusals) > 20
    assert all(str(path) in line and "\n" not in line for line in refusals)
