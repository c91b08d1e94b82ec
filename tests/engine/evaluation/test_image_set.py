"""Images in memory and in folders: what is read, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.judging import digits, write_folder
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
    write_folder(folder / "below", digits(0, 2))
    in_memory, in_files = ImageSet(images, "digits"), ImageSet(folder)
    assert (in_memory.count, in_memory.size) == (in_files.count, in_files.size) == (12, (16, 14))
    assert (in_memory.name, in_memory.argument) == ("digits", "digits")
    assert (in_files.name, in_files.argument) == (str(folder), folder)
    assert torch.equal(torch.stack([in_memory.source[index] for index in range(12)]), images)
    read = np.stack([np.asarray(Image.open(file)) for file in in_files.files()])
    np.testing.assert_array_equal(read.transpose(0, 3, 1, 2), images)
    assert in_memory.files() == []


def test_the_first_damaged_file_is_found(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", digits(0, 5))
    assert ImageSet(folder).damaged_file() is None
    for name in ("00002.png", "00003.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:120])
    assert ImageSet(folder).damaged_file() == str(folder / "00002.png")


@pytest.mark.parametrize("case", ["missing", "empty", "tree", "mixed", "fake"])
def test_what_is_wrong_with_a_folder_is_named(tmp_path: Path, case: str) -> None:
    folder = wrong = tmp_path / case
    if case != "missing":
        folder.mkdir()
    if case == "tree":
        write_folder(folder / "below", digits(0, 2))
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
