"""`engine.sample`: what it writes, that memory does not grow with the number of images, and what it refuses."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import command, untrained
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchvision.utils import make_grid

from engine import evaluate, report, sample
from engine.configuration.inputs import load_run_sampler
from engine.generation.sampling import Sampler
from engine.support.errors import InputError
from engine.support.pixels import to_uint8

# What a process needed at most, in MiB, after each of some numbers of samples of 128 pixels, by a network so small that
# its images are nearly all there is.
PEAKS = """
import resource, sys
import torch
from engine.generation import networks
from engine.generation.priors import Gaussian
from engine.generation.sampling import Sampler
from engine.support.errors import InputError
from engine.generation.saved import save_sampler
from pathlib import Path

class Tiny(networks.Generator):
    def __init__(self, image_size, nz, upsampling="transposed"):
        super().__init__()
        self.spec = networks.GeneratorSpec("dcgan", image_size, nz)
        self.linear = torch.nn.Linear(nz, 12)

    def forward(self, z):
        image = self.linear(z).view(-1, 3, 2, 2).tanh()
        return torch.nn.functional.interpolate(image, size=self.spec.image_size)

networks.GENERATORS["dcgan"] = Tiny
save_sampler(Path("run/generator.safetensors"), Sampler(Gaussian(4), Tiny(128, 4)), 1)
from engine.sample import main

for count in sys.argv[1:]:
    main(["--run", "run", "--out", "samples.npy", "--count", count])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("runs") / "run")


def peaks(folder: Path, *counts: int) -> list[float]:
    found = subprocess.run(
        [sys.executable, "-c", PEAKS, *map(str, counts)], cwd=folder, stdout=subprocess.PIPE, text=True, check=True
    )
    return [float(line) for line in found.stdout.split()]


def test_array_and_picture_hold_the_samplers_images(run: Path, tmp_path: Path) -> None:
    expected = to_uint8(load_run_sampler(run).draw(300, 5))
    buffer = io.BytesIO()
    np.save(buffer, expected.numpy())
    flags = ["--run", str(run), "--count", "300", "--seed", "5", "--out"]
    sample.main([*flags, str(tmp_path / "a.npy")])
    assert (tmp_path / "a.npy").read_bytes() == buffer.getvalue()
    sample.main([*flags, str(tmp_path / "a.png")])
    with Image.open(tmp_path / "a.png") as picture:
        grid = make_grid(expected.permute(0, 3, 1, 2), nrow=18, padding=2, pad_value=64).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(np.asarray(picture), grid)


def test_the_best_generator_is_there_before_the_first_checkpoint(run: Path, tmp_path: Path) -> None:
    own = shutil.copytree(run, tmp_path / "run")
    with pytest.raises(InputError, match="was not evaluated"):
        load_run_sampler(own, best=True)
    (own / "generator.safetensors").rename(own / "generator_best.safetensors")
    assert load_run_sampler(own, best=True).step == 17


def test_paths_are_cut_to_the_number_that_is_asked_for(run: Path, tmp_path: Path) -> None:
    sample.main(["--run", str(run), "--interpolate", "--count", "11", "--out", str(tmp_path / "a.npy")])
    expected = to_uint8(load_run_sampler(run).draw_paths(2, 8, 0))
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), expected[:11].numpy())


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    count = 4000
    few, many = peaks(tmp_path, 64, count)
    array = count * 128 * 128 * 3 / 2**20
    assert (tmp_path / "samples.npy").stat().st_size > array * 2**20
    assert many - few < 0.1 * array


@pytest.mark.slow
def test_fifty_thousand_images_of_128_pixels_in_one_gibibyte(tmp_path: Path) -> None:
    (peak,) = peaks(tmp_path, 50_000)
    assert peak < 1024
    assert np.load(tmp_path / "samples.npy", mmap_mode="r").shape == (50_000, 128, 128, 3)


def test_an_end_in_the_middle_leaves_what_was_there(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupted(self, count, seed):
        yield torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
        raise KeyboardInterrupt

    monkeypatch.setattr(Sampler, "pixel_batches", interrupted)
    (tmp_path / "a.npy").write_bytes(b"old")
    code, _ = command(sample.main, ["--run", str(run), "--out", str(tmp_path / "a.npy")], capsys)
    assert code == 130
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--count 0", "--count"),
        ("--count -5", "--count"),
        (f"--count {10**12}", "--count"),
        (f"--count {10**400}", "--count"),
        (f"--count {10**12} --interpolate", "--count"),
        ("--count 2000000 --out a.png", "--count"),
        ("--count 2000000 --interpolate --out a.png", "--count"),
        ("--seed -1", "--seed"),
        (f"--seed {2**32}", "--seed"),
        (f"--seed {2**64}", "--seed"),
        ("--out a.txt", "--out"),
        ("--out .", "--out"),
    ],
)
def test_absurd_numbers_are_refused(flags: str, named: str, run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    code, errors = command(sample.main, ["--run", str(run), "--out", "a.npy", *flags.split()], capsys)
    assert (code, errors.count("\n")) == (2, 1)
    assert named in errors
    assert not list(tmp_path.iterdir())


def test_where_it_draws(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """As everywhere: the GPU if there is one, and one line if it is asked for and is not there."""
    moved = []
    monkeypatch.setattr(Sampler, "to", lambda sampler, device: moved.append(device))
    sample.main(["--run", str(run), "--count", "1", "--out", str(tmp_path / "auto.npy")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    sample.main(["--run", str(run), "--count", "1", "--out", str(tmp_path / "auto.npy")])
    assert moved == [torch.device("cpu"), torch.device("cuda")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "cuda.npy"
    code, errors = command(sample.main, ["--run", str(run), "--device", "cuda", "--out", str(out)], capsys)
    assert (code, errors.count("\n"), out.exists()) == (2, 1, False)
    assert "--device" in errors


def test_a_disk_without_room_is_noticed_first(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    argv = ["--run", str(run), "--out", str(tmp_path / "new" / "a.npy"), "--count"]
    code, errors = command(sample.main, [*argv, "4"], capsys)
    assert (code, errors.count("\n")) == (2, 1)
    assert "--count" in errors
    sample.main([*argv, "3"])


BROKEN = {
    "a side of gigapixels": {"image_size": str(10**9)},
    "a negative side": {"image_size": "-32"},
    "z of a billion": {"nz": str(10**9)},
    "no z": {"nz": "0"},
    "a number that Python won't read": {"nz": "9" * 5000},
    "other z than the weights'": {"nz": "16"},
    "a negative step": {"step": "-1"},
    "a step beyond numbers": {"step": "1" * 400},
    "an unknown network": {"name": "nothing"},
    "an unknown prior": {"prior": "nothing"},
    "another format": {"format": "nothing"},
    "half precision": torch.Tensor.half,
    "complex weights": lambda tensor: tensor.to(torch.complex64),
    "weights that are not finite": lambda tensor: tensor / 0,
    "a header of exabytes": (2**62).to_bytes(8, "little") + b"{}",
    "tensors of terabytes": lambda file: file[:8] + file[8:].replace(b'"F32"', b'"F64"'),
    "nothing": b"",
}


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_a_damaged_or_foreign_generator_is_one_line(case: str, run: Path, tmp_path: Path, capsys) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    path, change = folder / "generator.safetensors", BROKEN[case]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    if isinstance(change, dict):
        save_file(load_file(path), path, metadata | change)
    elif isinstance(change, bytes):
        path.write_bytes(change)
    elif case == "tensors of terabytes":
        path.write_bytes(change(path.read_bytes()))
    else:
        floating = {name: tensor for name, tensor in load_file(path).items() if tensor.is_floating_point()}
        save_file(load_file(path) | {name: change(tensor) for name, tensor in floating.items()}, path, metadata)
    for main, flags in (
        (sample.main, ["--out", str(tmp_path / "a.npy")]),
        (evaluate.main, ["--device", "cpu"]),
        (report.main, ["--device", "cpu"]),
    ):
        code, errors = command(main, ["--run", str(folder), *flags], capsys)
        assert (code, errors.count("\n")) == (2, 1), errors
        assert str(path) in errors
