"""Memory that is refused, and numbers that would need it: one line, status 2, and nothing is lost or allocated."""

from __future__ import annotations

import errno
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import command, same_run, untrained
from torch import nn

from engine import evaluate, precompute, pretrain, report, sample, train
from engine.configuration import planning, running
from engine.configuration.command import Parser, run_command
from engine.configuration.inputs import choose_device, most_threads
from engine.generation.sampling import Sampler
from engine.representation.architectures import ARCHITECTURES
from engine.support.errors import InputError, out_of_memory
from engine.training import planner
from engine.training.trainer import Trainer
from pipelines import DataError, memory, open_dataset

pytestmark = pytest.mark.usefixtures("own_cache")

CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 15.77 GiB of which 14.21 GiB is "
    "free.\nProcess 1 has 1.5 GiB memory in use."
)


def raise_(error: BaseException) -> None:
    raise error


REFUSED: dict[str, Callable[[], object]] = {
    "PyTorch's memory": lambda: torch.empty(2**59),
    "a size beyond all numbers": lambda: torch.empty(2**40, 2**40),
    "a layer": lambda: nn.Linear(2**30, 2**30),
    "NumPy's memory": lambda: np.empty(2**57),
    "Python's memory": lambda: bytearray(2**62),
    "the GPU's memory": lambda: raise_(torch.OutOfMemoryError(CUDA)),
    "a library on the GPU": lambda: raise_(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublas")),
    "the system's": lambda: raise_(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))),
    "a loader's process": lambda: raise_(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")),
}


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_refused_memory_is_one_line(case: str, capsys) -> None:
    code, errors = command(lambda argv: REFUSED[case](), [], capsys)
    assert (code, errors.count("\n")) == (2, 1)
    assert "out of memory" in errors
    assert ("GPU" in errors) == ("GPU" in case)


@pytest.mark.parametrize("wrapped", [RuntimeError("while executing %relu"), InputError("extractor", "cannot take it")])
def test_memory_that_another_error_hides_is_found(wrapped: Exception, capsys) -> None:
    def main(argv) -> None:
        try:
            torch.empty(2**59)
        except RuntimeError:
            raise wrapped from None

    code, errors = command(main, [], capsys)
    assert (code, errors.count("\n")) == (2, 1)
    assert "out of memory" in errors


def test_an_array_that_claims_petabytes_is_damaged(tmp_path: Path, capsys) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": (10**12, 32, 32, 3)}
    with (tmp_path / "claims.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
    argv = ["--data", str(tmp_path / "claims.npy"), "--weights", "random", "--out", str(tmp_path / "run")]
    code, errors = command(train.main, argv, capsys)
    assert (code, errors.count("\n")) == (2, 1)
    assert str(tmp_path / "claims.npy") in errors
    assert "out of memory" not in errors


@pytest.mark.parametrize("error", [RuntimeError("shapes [2, 3] and [4] don't match"), OSError(errno.EIO, "input")])
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert out_of_memory(error) is None
    assert out_of_memory(InputError("lr", "CUDA out of memory")) is None
    with pytest.raises((type(error), SystemExit)) as raised:
        run_command(lambda argv: raise_(error), [])
    assert raised.type is type(error) or raised.value.code == 2


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("train", "--chunk-size auto"),
        ("precompute", "--chunk-size"),
        ("pretrain", "--batch-size"),
        ("evaluate", "--samples"),
        ("report", "--neighbours-of"),
        ("sample", ".npy"),
    ],
)
def test_every_command_says_what_needs_less(name: str, flag: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(Parser, "parse_args", lambda *_: raise_(MemoryError()))
    code, errors = command(importlib.import_module(f"engine.{name}").main, [], capsys)
    assert (code, errors.count("\n")) == (2, 1)
    assert flag in errors


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images, labels beyond all classes, and weights of a judge; a run that never trained."""
    folder = tmp_path_factory.mktemp("data")
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    np.save(folder / "images.npy", images)
    for name, label in (("billion", 10**9), ("unsigned", 2**63 + 5)):
        np.savez(folder / f"{name}.npz", images=images, labels=np.array([0] * 39 + [label], np.uint64))
    torch.save(ARCHITECTURES["vgg-small"].make(3, 32).state_dict(), folder / "judge.pth")
    untrained(folder / "run", data=str(folder / "images.npy"), loader="torch")
    return folder


TRAIN = """--data images.npy --weights random --batch-size 4 --steps 4 --layers 1 --nz 8 --kernels reference
    --loader torch --log-every 1 --checkpoint-every 2 --threads 1 --device cpu"""
PRETRAIN = "--data images.npy --task rotate --arch vgg-small --steps 1 --loader torch --device cpu --out w.safetensors"
EVALUATE = "--run run --feature-extractor vgg-small --weights judge.pth --metrics fid --device cpu"


def test_a_run_out_of_memory_resumes(data: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(data)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train.main([*TRAIN.split(), "--out", str(whole)])
    step = Trainer.train_step

    def limited(trainer: Trainer) -> object:
        return torch.empty(2**59) if trainer.step == 3 else step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", limited)
        code, errors = command(train.main, [*TRAIN.split(), "--out", str(stopped)], capsys)
    assert code == 2
    assert sum("error" in line for line in errors.splitlines()) == 1
    assert "--chunk-size" in errors.splitlines()[-1]
    train.main(["--resume", "--out", str(stopped), "--chunk-size", "4"])
    assert same_run(whole, stopped)


BIG = 10**9
ABSURD = [
    *((train.main, TRAIN, f"--image-size {value}") for value in (0, 100_000, 10**400)),
    *((train.main, TRAIN, f"--nz {value}") for value in (-1, BIG)),
    *((train.main, TRAIN, f"--batch-size {value}") for value in (BIG, 2**63, 10**6)),
    *((train.main, TRAIN, f"--steps {value}") for value in (0, 10**400)),
    *((train.main, TRAIN, f"--seed {value}") for value in (-1, 2**64)),
    *((train.main, TRAIN, f"--threads {value}") for value in (0, 100_000)),
    (train.main, TRAIN, f"--evaluate-samples {BIG} --evaluate-every 2"),
    (train.main, TRAIN, f"--memory-budget {10**400}GB --chunk-size auto"),
    (train.main, TRAIN, f"--mmd-images {10**30} --method mmd"),
    (train.main, TRAIN, f"--mmd-degree {10**30} --mmd-kernel polynomial --method mmd"),
    (train.main, TRAIN, "--data billion.npz --weights pretrain"),
    (train.main, TRAIN, "--data unsigned.npz --weights pretrain"),
    (precompute.main, TRAIN + " --out target.safetensors", "--threads 100000"),
    (precompute.main, TRAIN + " --out target.safetensors", f"--batch-size {BIG}"),
    (pretrain.main, PRETRAIN, f"--crop-padding {BIG}"),
    (pretrain.main, PRETRAIN, f"--crop-padding {2**63}"),
    (pretrain.main, PRETRAIN, f"--batch-size {BIG}"),
    (pretrain.main, PRETRAIN, "--threads 100000"),
    (pretrain.main, PRETRAIN, "--image-size 100000"),
    (pretrain.main, PRETRAIN + " --task classify", "--data billion.npz"),
    *((evaluate.main, EVALUATE, f"--samples {value}") for value in (0, BIG, 10**400)),
    *((evaluate.main, EVALUATE, f"--batch-size {value}") for value in (0, BIG)),
    *((evaluate.main, EVALUATE, f"--seed {value}") for value in (-1, 2**32)),
    (evaluate.main, EVALUATE, f"--kid-subset-size {BIG} --metrics kid"),
    (evaluate.main, EVALUATE, f"--real-samples {10**400}"),
    (evaluate.main, EVALUATE, "--threads 100000"),
    *((report.main, "--run run --device cpu", f"--neighbours-of {value}") for value in (1, 10**12)),
    *((report.main, "--run run --device cpu", f"--seed {value}") for value in (-1, 2**64)),
    (sample.main, "--run run --out a.npy", f"--count {10**12}"),
]
NAMED = {"--data": "labels", "--kid-subset-size": "--metrics"}
"""What the line names where it isn't the flag."""


@pytest.mark.parametrize(
    ("main", "flags", "absurd"), ABSURD, ids=[f"{row[0].__module__} {row[2]:.40}" for row in ABSURD]
)
def test_absurd_numbers_are_refused(main, flags: str, absurd: str, data: Path, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(data)
    before = sorted(data.rglob("*"))
    out = ["--out", str(tmp_path / "out")] if main is train.main else []
    code, errors = command(main, [*flags.split(), *out, *absurd.split()], capsys)
    assert code == 2, errors
    lines = [line for line in errors.splitlines() if "error" in line]
    assert len(lines) == 1, errors
    flag = absurd.split()[0]
    assert NAMED.get(flag, flag) in lines[0]
    assert sorted(data.rglob("*")) == before


def test_samples_are_judged_without_being_held(data: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(data)
    for name in ("images", "draw", "draw_pixels"):
        monkeypatch.delattr(Sampler, name)
    evaluate.main([*EVALUATE.split(), "--samples", "40"])
    assert "40 images of run" in capsys.readouterr().out


def test_as_many_threads_as_make_sense() -> None:
    before = torch.get_num_threads()
    try:
        choose_device("cpu", most_threads())
    finally:
        torch.set_num_threads(before)
    assert most_threads() >= (os.cpu_count() or 1)
    with pytest.raises(InputError) as error:
        choose_device("cpu", most_threads() + 1)
    assert error.value.argument == "threads"


def test_a_report_of_a_run_with_more_threads_than_there_are(data: Path, tmp_path: Path, monkeypatch) -> None:
    settings = {"data": str(data / "images.npy"), "loader": "torch", "weights": ("random",), "layers": 1}
    run = untrained(tmp_path / "run", **settings, threads=4096)
    monkeypatch.setattr(report, "most_threads", lambda: 1)
    before = torch.get_num_threads()
    try:
        report.main(["--run", str(run), "--device", "cpu"])
    finally:
        torch.set_num_threads(before)
    assert (run / "report.html").exists()


def test_a_control_groups_limit_counts(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    whole = memory.memory_limit()
    for text, limit in (("max\n", whole), ("1000000\n", 1_000_000), (f"{2**62}\n", whole)):
        (tmp_path / "memory.max").write_text(text)
        assert memory.memory_limit() == limit


def test_data_that_no_container_holds_are_refused(data: Path, tmp_path: Path, monkeypatch) -> None:
    """By the control group's limit, where the machine itself would have room."""
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000\n")
    with pytest.raises(DataError, match=r"images.npy: needs 0.0 GiB of memory, this machine has 0.0 GiB"):
        open_dataset("images", data / "images.npy")


def test_real_images_that_do_not_fit_beside_training(data: Path, tmp_path: Path, monkeypatch, capsys, caplog) -> None:
    monkeypatch.chdir(data)
    monkeypatch.setattr(running, "memory_limit", lambda: 2**16)
    judge = [
        "--evaluate-every",
        "1",
        "--evaluate-extractor",
        "vgg-small",
        "--evaluate-weights",
        "judge.pth",
        "--evaluate-samples",
        "40",
    ]
    argv = [*TRAIN.split(), *judge, "--steps", "1", "--out", str(tmp_path / "run")]
    code, errors = command(train.main, argv, capsys)
    assert code == 2
    assert "--evaluate-every: the 40 real images and their features take" in errors.splitlines()[-1]
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    monkeypatch.chdir(data)
    train.main(argv)
    monkeypatch.setattr(running, "memory_limit", lambda: 2**16)
    train.main(["--resume", "--out", str(tmp_path / "run"), "--steps", "2"])  # whose flags cannot be taken away
    assert "warning: --evaluate-every: the 40 real images" in caplog.text


@pytest.mark.parametrize(("memory", "fits"), [(2**30, True), (2**24, False)])
def test_a_step_that_cannot_fit_a_machine_is_refused(
    memory: int, fits: bool, data: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """The system would kill the process instead of refusing memory."""
    monkeypatch.chdir(data)
    monkeypatch.setattr(planning, "memory_limit", lambda: memory)
    argv = [*TRAIN.split(), "--batch-size", "40", "--steps", "1", "--out", str(tmp_path / "run")]
    if fits:
        train.main(argv)
        assert json.loads((tmp_path / "run" / "config.json").read_text())["training"]["batch_size"] == 40
        return
    code, errors = command(train.main, argv, capsys)
    assert (code, errors.count("\n")) == (2, 1)
    assert "--batch-size" in errors
    assert not (tmp_path / "run").exists()


def test_files_in_memory_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A control group counts what it has read of files as used, until somebody else needs the room."""
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    monkeypatch.setattr(planner, "_available", lambda: 10_000)
    assert planner.available_memory() == 10_000
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4000\n")
    assert planner.available_memory() == 1000
    (tmp_path / "memory.stat").write_text("anon 700\ninactive_file 2500\nactive_file 300\n")
    assert planner.available_memory() == 3500
    (tmp_path / "memory.max").write_text("max\n")
    assert planner.available_memory() == 10_000
