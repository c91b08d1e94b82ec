"""`engine.sample --encode`: pictures beside what the generator makes of their codes, and one line for bad input."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import command, untrained
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.transforms import v2

from engine import sample
from engine.configuration.inputs import load_run_sampler
from engine.generation.networks import build_generator
from engine.generation.priors import Gaussian
from engine.generation.sampling import Sampler
from engine.generation.saved import load_sampler, save_sampler
from engine.representation.encoders import Encoder, build_encoder
from pipelines import open_dataset, read_pixels

NZ = 8
KINDS = {"codes": {}, "bounded": {"bounded": True}, "gaussian": {"gaussian": True}}


def networks(kind: str) -> tuple[Sampler, Encoder]:
    """A generator and an encoder that have never learnt; running statistics are not those that they begin with."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        generator = build_generator("dcgan", image_size=32, nz=NZ)
        encoder = build_encoder("dcgan", image_size=32, nz=NZ, **KINDS[kind])
        with torch.no_grad():
            generator(torch.randn(6, NZ))
            encoder(torch.randn(6, 3, 32, 32))
    return Sampler(Gaussian(NZ), generator, encoder=encoder), encoder


def run_of(folder: Path, kind: str) -> Path:
    untrained(folder, nz=NZ, method="vae", dataset="images", data="elsewhere", center_crop=40)
    save_sampler(folder / "generator.safetensors", networks(kind)[0], 17)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("runs") / "run", "gaussian")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three pictures of three sizes, one of them grey."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for index, (height, width) in enumerate([(40, 61), (64, 48), (45, 45)]):
        smooth = Image.fromarray(random.integers(0, 256, (5, 6, 3), np.uint8)).resize((width, height))
        (smooth.convert("L") if index == 2 else smooth).save(folder / f"{index}.png")
    return [str(path) for path in sorted(folder.iterdir())]


def prepared(files: list[str]) -> Tensor:
    """torchvision's crop and resize, uint8 [N, 3, 32, 32]."""
    fit = v2.Compose([v2.CenterCrop(40), v2.Resize(32), v2.CenterCrop(32), v2.PILToTensor()])
    return torch.stack([fit(Image.open(file).convert("RGB")) for file in files])


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_stand_beside_what_is_made_of_their_codes(kind: str, files: list[str], tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", kind)
    picture, codes = tmp_path / "a.png", tmp_path / "codes.npy"
    sample.main(["--run", str(folder), "--encode", *files, "--out", str(picture), "--codes", str(codes)])
    sampler, encoder = networks(kind)
    pixels = prepared(files)
    with torch.no_grad():
        outputs = encoder.network.eval()(pixels.double().sub(127.5).div(127.5).float())
        expected = {"codes": outputs, "bounded": outputs.tanh(), "gaussian": outputs[:, :NZ]}[kind]
        drawn = ((sampler.generator.eval()(expected) + 1) * 127.5).round().clamp(0, 255)
    found = np.load(codes)
    assert (found.shape, found.dtype) == ((3, NZ), np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    cells = np.asarray(Image.open(picture)).astype(int)
    assert cells.shape == (2 * 34 + 2, 4 * 34 + 2, 3)  # two pairs in a row
    for index in range(3):
        top, left = 34 * (index // 2) + 2, 68 * (index % 2) + 2
        for place, image in ((left, pixels[index]), (left + 34, drawn[index])):
            cell = cells[top : top + 32, place : place + 32]
            assert np.abs(cell - image.permute(1, 2, 0).numpy()).max() <= 1
    assert np.ptp(drawn.numpy()) > 2  # not all grey


def test_an_array_holds_what_was_drawn_alone(run: Path, files: list[str], tmp_path: Path) -> None:
    flags = ["--run", str(run), "--encode", *files, "--out"]
    sample.main([*flags, str(tmp_path / "a.npy")])
    sample.main([*flags, str(tmp_path / "a.png")])
    array, picture = np.load(tmp_path / "a.npy"), np.asarray(Image.open(tmp_path / "a.png"))
    assert (array.shape, array.dtype) == ((3, 32, 32, 3), np.uint8)
    np.testing.assert_array_equal(array[1], picture[2:34, 104:136])


def test_a_digit_gets_the_margin_of_the_real_ones(tmp_path: Path) -> None:
    """Of an 8×8 picture and a larger one with a stripe on each side; an image of the run's size has its margin."""
    folder = untrained(tmp_path / "run", nz=NZ, method="vae")
    save_sampler(folder / "generator.safetensors", networks("codes")[0], 17)
    small = (load_digits().images[5] * (255 / 16)).round().astype(np.uint8)
    real = read_pixels(open_dataset("digits"))[5].permute(1, 2, 0)
    wide = np.pad(small, ((0, 0), (3, 3)), constant_values=255)
    for name, picture in (("small", small), ("wide", wide), ("whole", real.numpy())):
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    files = [str(tmp_path / f"{name}.png") for name in ("small", "wide", "whole")]
    sample.main(["--run", str(folder), "--encode", *files, "--out", str(tmp_path / "a.png")])
    cells = np.asarray(Image.open(tmp_path / "a.png")).astype(int)
    for top, left in ((2, 2), (2, 70), (36, 2)):
        assert np.abs(cells[top : top + 32, left : left + 32] - real.numpy()).max() <= 1


def test_an_image_of_the_run_s_size_may_be_smaller_than_the_crop(run: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "drawn.png")
    sample.main(["--run", str(run), "--encode", str(tmp_path / "drawn.png"), "--out", str(tmp_path / "a.png")])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png"))[2:34, 2:34], pixels)


BAD: dict[str, tuple[str, str]] = {
    "missing": ("--encode nothing.png --out a.png", "--encode: nothing.png: no such file or directory"),
    "no picture": ("--encode text.png --out a.png", "--encode: text.png: not an image that can be read"),
    "small": (
        "--encode small.png --out a.png",
        "--encode: small.png: 30×50 pixels are smaller than the centre crop 40",
    ),
    "a folder": ("--encode . --out a.png", "--encode: .: not a regular file"),
    "a count as well": ("--encode small.png --count 3 --out a.png", "--count: is that of random z"),
    "a seed as well": ("--encode small.png --seed 0 --out a.png", "--seed: is that of random z"),
    "a path as well": ("--encode small.png --interpolate --out a.png", "--interpolate: is that of random z"),
    "codes of nothing": ("--codes c.npy --out a.png", "--codes: are those of --encode IMAGE"),
    "codes as text": ("--encode small.png --codes c.txt --out a.png", "--codes: c.txt must end in .npy"),
    "codes over images": ("--encode small.png --codes a.npy --out a.npy", "--codes: a.npy is the file of --out"),
    "nothing": ("--out a.png --encode", "argument --encode: expected at least one argument"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case: str, run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (30, 50)).save("small.png")
    Path("text.png").write_text("no picture")
    flags, said = BAD[case]
    code, errors = command(sample.main, ["--run", str(run), *flags.split()], capsys)
    assert (code, errors.count("\n")) == (2, 1), errors
    assert said in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.png", "text.png"]


def test_a_run_without_an_encoder_says_so(files: list[str], tmp_path: Path, capsys) -> None:
    folder = untrained(tmp_path / "run")
    flags = ["--run", str(folder), "--encode", *files, "--out", str(tmp_path / "a.png")]
    code, errors = command(sample.main, flags, capsys)
    assert (code, errors.count("\n")) == (2, 1)
    assert f"--encode: {folder} has no encoder, as runs of --method ae or vae or wae or gmmn-ae have" in errors


def test_a_generator_alone_is_read_from_the_same_file(run: Path) -> None:
    """Who builds no encoders draws the same images."""
    sampler, whole = load_sampler(run / "generator.safetensors"), load_run_sampler(run)
    assert (sampler.encoder, sampler.knows_codes, whole.knows_codes, whole.step) == (None, False, True, 17)
    assert torch.equal(sampler.draw(3, 0), whole.draw(3, 0))


def test_learnt_codes_are_saved(tmp_path: Path) -> None:
    codes = torch.randn(11, NZ, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "generator.safetensors"
    sampler = Sampler(Gaussian(NZ), networks("codes")[0].generator, codes=codes)
    save_sampler(path, sampler, 1, "0123abcd")
    found = load_sampler(path)
    assert found.codes is not None
    assert torch.equal(found.codes, codes)
    assert found.codes_of == "0123abcd"
    save_sampler(path, sampler, 1)
    assert load_sampler(path).codes_of is None


def renamed(name: str, text: str) -> Callable[[dict, dict], None]:
    return lambda tensors, metadata: metadata.update({name: text})


DAMAGED: dict[str, Callable[[dict, dict], object]] = {
    "an unknown network": renamed("encoder", "nothing"),
    "another network": renamed("encoder", "resnet"),
    "other outputs": renamed("encoder_outputs", "codes"),
    "a tensor less": lambda tensors, metadata: tensors.pop(next(name for name in tensors if "encoder." in name)),
    "not finite": lambda tensors, metadata: tensors.update(
        {name: tensor / 0 for name, tensor in tensors.items() if name.startswith("encoder.") and "weight" in name}
    ),
    "codes of another length": lambda tensors, metadata: tensors.update({"codes": torch.zeros(3, NZ + 1)}),
    "codes that are one row": lambda tensors, metadata: tensors.update({"codes": torch.zeros(NZ)}),
    "codes that are one number": lambda tensors, metadata: tensors.update({"codes": torch.zeros(())}),
    "codes that are not finite": lambda tensors, metadata: tensors.update({"codes": torch.zeros(3, NZ) / 0}),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_one_line(case: str, run: Path, tmp_path: Path, capsys) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    path = folder / "generator.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    del metadata["crc32"]
    DAMAGED[case](tensors, metadata)
    save_file(tensors, path, metadata)
    code, errors = command(sample.main, ["--run", str(folder), "--out", str(tmp_path / "a.npy")], capsys)
    assert (code, errors.count("\n")) == (2, 1), errors
    assert str(path) in errors
