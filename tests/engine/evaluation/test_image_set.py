"""Images in memory and in folders: what is read, and what is refused."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from helpers.judging import digits, write_folder
from helpers.picture_kinds import all_files
from PIL import Image

from engine.evaluation.image_set import ImageSet
from engine.support.errors import InputError


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, 3, dtype=torch.uint8)])
def test_only_bytes_are_images(images):
    with pytest.raises(ValueError, match=r"^images: expected uint8 \[N, 3, H, W\]"):
        ImageSet(images)


def test_a_tensor_and_its_folder_are_the_same_set(tmp_path: Path) -> None:
    images = digits(0, 12, size=16)[:, :, :, :14]
    folder = write_folder(tmp_path / "a", images)
    (folder / "notes.txt").write_text("not an image")
    (folder / "._00003.png").write_text("what a system leaves behind")
    in_memory, in_files = ImageSet(images, "digits"), ImageSet(folder)
    assert (in_memory.count, in_memory.size) == (in_files.count, in_files.size) == (12, (16, 14))
    assert (in_memory.name, in_memory.argument) == ("digits", "digits")
    assert (in_files.name, in_files.argument) == (str(folder), folder)
    assert torch.equal(torch.stack([in_memory.source[index] for index in range(12)]), images)
    assert torch.equal(torch.stack([in_files.source[index] for index in range(12)]), images)
    assert (in_memory.in_memory, in_files.in_memory) == (True, False)
    assert not in_files.read_otherwise


# pytest puts its own warning filters above those of the code under test
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_a_folder_is_read_as_training_reads_it(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 24 * 32).reshape(24, 32).round().astype(np.uint8)
    photo = Image.fromarray(np.stack([ramp, ramp[::-1], ramp[:, ::-1]], axis=-1))
    files = {file.name: file for file in all_files(photo)}
    for turned in (False, True):
        part = {name: file for name, file in files.items() if (file.kind == "orientation") is turned}
        folder = tmp_path / str(turned)
        (folder / "below").mkdir(parents=True)
        for name, file in part.items():
            (folder / "below" / name).write_bytes(file.data)
        images = ImageSet(folder)
        assert images.count == len(part)
        for index, name in enumerate(sorted(part)):
            expected = np.asarray(part[name].reading(Image.open(io.BytesIO(part[name].data)))).transpose(2, 0, 1)
            assert np.abs(images.source[index].numpy().astype(int) - expected).max() <= 1, name


def test_a_folder_is_none_of_torch_fidelitys_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which it has one under this name, and would download it."""
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "cifar10-train", digits(0, 3))
    assert ImageSet("cifar10-train", plain=True).source == str(tmp_path / "cifar10-train")


def test_plain_reading_is_torch_fidelitys(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", digits(0, 3))
    write_folder(folder / "below", digits(3, 5))
    Image.new("RGB", (32, 32)).save(folder / "4.webp")
    Image.new("RGBA", (32, 32)).save(folder / "5.png")
    as_trained, plain = ImageSet(folder), ImageSet(folder, plain=True)
    assert (as_trained.count, plain.count) == (7, 4)
    assert plain.source == str(folder)
    assert as_trained.read_otherwise == {"left out": 3, "transparent": 1}
    assert not plain.read_otherwise


@pytest.mark.parametrize("plain", [False, True])
def test_a_decompression_bomb_is_named(tmp_path: Path, plain: bool) -> None:
    folder = write_folder(tmp_path / "a", digits(0, 2))
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", crc32(chunk)) for chunk in (header, b"IDAT")
    ]
    (folder / "9.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    with pytest.raises(InputError, match="decompression bomb") as error:
        ImageSet(folder, plain=plain)
    assert error.value.argument == folder / "9.png"


def test_the_first_damaged_file_is_found(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", digits(0, 5))
    assert ImageSet(folder).damaged_file() is None
    for name in ("00002.png", "00003.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:120])
    assert ImageSet(folder).damaged_file().path == str(folder / "00002.png")


@pytest.mark.parametrize("case", ["missing", "empty", "junk", "mixed", "fake"])
def test_what_is_wrong_with_a_folder_is_named(tmp_path: Path, case: str) -> None:
    folder = wrong = tmp_path / case
    if case != "missing":
        folder.mkdir()
    if case == "junk":
        write_folder(folder / "__MACOSX", digits(0, 2))
    elif case == "mixed":
        Image.new("RGB", (32, 32)).save(folder / "0.png")
        Image.new("RGB", (30, 20)).save(folder / "1.png")
    elif case == "fake":
        wrong = folder / "0.png"
        wrong.write_text("not a PNG")
    with pytest.raises(InputError) as error:
        ImageSet(folder)
    assert error.value.argument == wrong
    if case == "mixed":
        assert "0.png is 32×32, 1.png is 20×30" in error.value.message
