"""The report's section on codes, with a generator and codes so plain that every image in it is known."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from engine.generation.networks import Generator, GeneratorSpec
from engine.generation.priors import Gaussian
from engine.generation.saved import SavedSampler
from engine.reporting.codes import codes_section
from engine.reporting.pictures import Picture
from engine.reporting.real import RealImages
from engine.representation.encoders import Encoder
from engine.support.pixels import to_uint8
from pipelines import open_dataset

IMAGES, SIDE, SEED = 32, 8, 3


class Levels(Generator):
    """z [N, 2] → images whose upper half has the level tanh z_0, the lower tanh z_1."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = GeneratorSpec("levels", SIDE, 2)
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, z: Tensor) -> Tensor:
        return z.tanh()[:, None, :, None].repeat_interleave(SIDE // 2, 2).expand(len(z), 3, SIDE, SIDE)


class Measure(nn.Module):
    """The codes of such images."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0, [0, -1], 0].clamp(-0.9999, 0.9999).atanh()


def codes() -> Tensor:
    return torch.randn(IMAGES, 2, generator=torch.Generator().manual_seed(0)) * 0.7


def sampler(**known: object) -> SavedSampler:
    return SavedSampler(Gaussian(2), Levels(), step=1, **known)  # type: ignore[arg-type]


@pytest.fixture
def real(tmp_path: Path) -> RealImages:
    np.save(tmp_path / "levels.npy", to_uint8(Levels()(codes())).numpy())
    return RealImages(open_dataset("images", tmp_path / "levels.npy", image_size=SIDE))


def levels(picture: Picture | None) -> np.ndarray:
    """Both levels of every image of a grid, [rows, columns, 2]."""
    assert picture is not None
    array = np.asarray(Image.open(io.BytesIO(picture.png))).astype(int)
    pitch = SIDE + 2
    rows, columns = (length // pitch for length in array.shape[:2])
    first, last = (
        array[offset : offset + rows * pitch : pitch, 3 : 3 + columns * pitch : pitch, 0] for offset in (2, SIDE + 1)
    )
    return np.stack((first, last), axis=2)


def as_levels(z: np.ndarray) -> np.ndarray:
    return (np.tanh(z) + 1) * 127.5


@pytest.mark.parametrize("kind", ["learnt", "encoded"])
def test_the_section_shows_what_codes_say(kind: str, real: RealImages) -> None:
    """Images come in another order than the data set's; codes keep to theirs."""
    numbers = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(5))
    pixels = to_uint8(Levels()(codes()[numbers])).permute(0, 3, 1, 2)
    known = {"codes": codes()} if kind == "learnt" else {"encoder": Encoder(Measure(), 2, name="measure")}
    found = codes_section(sampler(**known), real, pixels, numbers, SEED)
    assert found is not None
    assert found.unchecked == (kind == "learnt")  # nothing tells which pictures these codes were learnt from
    assert (found.missing, found.learnt, found.coded) == (None, kind == "learnt", IMAGES)
    own = codes()[numbers].double().numpy()

    shown = levels(found.reconstructions)
    assert shown.shape == (4, 8, 2)
    chosen = own[::2].reshape(2, 8, 2)  # every second of 32
    np.testing.assert_allclose(shown[::2], as_levels(chosen), atol=0.51)
    np.testing.assert_allclose(shown[1::2], as_levels(chosen), atol=1.01)

    z = Gaussian(2).draw(16, SEED).double().numpy()
    shown = levels(found.nearest)
    np.testing.assert_allclose(shown[::2], as_levels(z).reshape(2, 8, 2), atol=0.51)
    nearest = own[((z[:, None] - own) ** 2).sum(axis=2).argmin(axis=1)]
    np.testing.assert_allclose(shown[1::2], as_levels(nearest).reshape(2, 8, 2), atol=0.51)

    shown = levels(found.paths)
    ends = own[::4].reshape(4, 2, 2)
    t = np.linspace(0, 1, 8)[None, :, None]
    np.testing.assert_allclose(shown, as_levels((1 - t) * ends[:, :1] + t * ends[:, 1:]), atol=1.01)


def test_a_run_without_codes_has_no_section(real: RealImages) -> None:
    pixels = to_uint8(Levels()(codes())).permute(0, 3, 1, 2)
    assert codes_section(sampler(), real, pixels, torch.arange(IMAGES), SEED) is None


def test_without_real_images_a_line_says_why() -> None:
    found = codes_section(sampler(codes=codes()), RealImages(missing="the folder is gone"), None, None, SEED)
    assert found is not None
    assert found.missing == "the folder is gone"


@pytest.mark.parametrize("told_by", ["the generator's file", "the newest checkpoint"])
@pytest.mark.parametrize("case", ["fewer", "others"])
def test_codes_of_other_images_are_not_shown(case: str, told_by: str, real: RealImages, tmp_path: Path) -> None:
    assert real.dataset is not None
    digest = str(real.dataset.fingerprint()["content_sha256"])
    trained = {"data_content_sha256": digest} if told_by == "the newest checkpoint" else {}
    codes_of = None if trained else digest
    images = np.load(tmp_path / "levels.npy")
    np.save(tmp_path / "changed.npy", images[1:] if case == "fewer" else images[::-1])
    dataset = open_dataset("images", tmp_path / "changed.npy", image_size=SIDE)
    pixels = torch.from_numpy(images[: len(dataset)]).permute(0, 3, 1, 2)
    found = codes_section(
        sampler(codes=codes(), codes_of=codes_of),
        RealImages(dataset, trained=trained),
        pixels,
        torch.arange(len(dataset)),
        SEED,
    )
    assert found is not None
    said = {
        "fewer": "codes of 32 images were learnt, and the data set has 31 now",
        "others": "the data set's pictures have changed since the codes were learnt",
    }
    assert found.missing == said[case]
    assert found.paths is None
