"""Small real data sets for the readers, made from photographs that dependencies ship."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pipelines.loading.loader


@pytest.fixture(scope="session")
def photos() -> list[np.ndarray]:
    """Three photographs, uint8 [H, W, 3]: a temple and a flower (427×640), and a portrait (600×512)."""
    import matplotlib.cbook
    from sklearn.datasets import load_sample_images

    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        portrait = np.asarray(Image.open(file).convert("RGB"))
    return [*load_sample_images().images, portrait]


@pytest.fixture(scope="session")
def tiles(photos: list[np.ndarray]) -> np.ndarray:
    """97 pieces of the photographs (a prime number), uint8 [97, 32, 32, 3]."""
    pieces = [
        photo[top : top + 32, left : left + 32]
        for photo in photos
        for top in range(0, photo.shape[0] - 32, 64)
        for left in range(0, photo.shape[1] - 32, 80)
    ]
    return np.stack(pieces[:97])


@pytest.fixture(params=["torch", "dali"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each of the two backends; the DALI one is skipped where DALI is not installed."""
    if request.param == "dali" and not pipelines.loading.loader.dali_is_importable():
        pytest.skip("NVIDIA DALI is not installed")
    return request.param


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("GFMN_CACHE", str(folder))
    return folder


@pytest.fixture
def photo_folder(photo_files: Path, tmp_path: Path) -> Path:
    """A copy of the files that a test may change."""
    return shutil.copytree(photo_files, tmp_path / "photos")


@pytest.fixture(scope="session")
def photo_files(photos: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of every format and kind, cut from the photographs: 3 × 12 files of odd sizes."""
    folder = tmp_path_factory.mktemp("photos")
    for number, photo in enumerate(photos):
        picture = Image.fromarray(photo)
        cut = picture.crop((3, 5, 3 + 301, 5 + 367))
        picture.save(folder / f"{number} photo.jpg", quality=92)
        cut.save(folder / f"{number} progressive.JPEG", quality=95, subsampling=0, progressive=True)
        picture.crop((11, 13, 11 + 178, 13 + 218)).save(folder / f"{number} aligned.jpg")
        cut.save(folder / f"{number} without YCbCr.jpg", keep_rgb=True, quality=90)
        cut.convert("L").save(folder / f"{number} grey.jpg")
        cut.convert("CMYK").save(folder / f"{number} inks.jpg")
        cut.save(folder / f"{number} colour.png")
        cut.convert("RGBA").save(folder / f"{number} alpha.png")
        Image.fromarray(np.asarray(cut.convert("L")).astype(np.uint16) * 257).save(folder / f"{number} deep.png")
        picture.save(folder / f"{number} web.webp", quality=90)
        picture.save(folder / f"{number} bitmap.bmp")
        exif = Image.Exif()
        exif[0x0112] = 6
        cut.save(folder / f"{number} turned.jpg", exif=exif)
    return folder
