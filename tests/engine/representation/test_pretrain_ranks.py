"""Pretraining on W ranks is pretraining on one (float64, gloo), and so is the command, stopped and resumed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pretrain_worker
from helpers.jobs import ends, start_job, start_ranks
from helpers.marks import slow
from helpers.pretrain_worker import CASES, COUNT, Tiny, make_data, open_data, signalled
from oracle import relative_error
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from engine import pretrain
from engine.generation.batch_norm import share_batches
from engine.representation.pretraining import training
from engine.representation.pretraining.shares import Rows
from engine.representation.pretraining.tasks import Rotate
from engine.support.errors import InputError, Interrupted
from engine.training.ranks import ALONE, Ranks

pytestmark = pytest.mark.usefixtures("own_cache")

SIZES = (2, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretraining")
    make_data(folder)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path, own_cache) -> dict[tuple[str, int], list[dict[str, Tensor]]]:
    """(case, W) → what every rank has at the end."""
    for size in SIZES:
        for status, errors in ends(start_job(size, [pretrain_worker.__file__, str(folder), *CASES])):
            assert status == 0, errors
    return {
        (case, size): [torch.load(folder / f"{case}.{size}.{rank}.pt") for rank in range(size)]
        for case in CASES
        for size in SIZES
    }


@pytest.fixture(scope="module")
def alone(folder: Path, own_cache) -> dict[str, dict[str, Tensor]]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_READING_BATCH", "IN_MEMORY_BYTES"):  # which the worker sets
            patch.setattr(pretrain_worker.sources, name, getattr(pretrain_worker.sources, name))
        return {case: pretrain_worker.run(case, folder, ALONE) for case in CASES}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_ranks_pretrain_the_network_of_one(case: str, size: int, found, alone) -> None:
    expected = alone[case]
    first, *others = found[case, size]
    assert first.keys() == expected.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            assert relative_error(first[name], value) <= 1e-10, name
        else:
            assert torch.equal(first[name], value), name
        for other in others:
            assert torch.equal(other[name], first[name]), f"{name} differs between ranks"


def test_the_cases_are_what_they_say(alone) -> None:
    """Twelve of the files are left out, and the history ends with the last step."""
    assert len(alone["classify"]["pictures"]) == COUNT
    assert len(alone["files"]["pictures"]) == COUNT - 12
    assert all(int(alone[case]["history"][-1, 1]) == CASES[case][2]["steps"] for case in CASES)


@pytest.mark.parametrize(("count", "size"), [(8, 3), (6, 5), (2, 3), (17, 4)])
def test_the_quarters_that_are_turned_are_those_of_the_minibatch(count: int, size: int) -> None:
    images = torch.rand(count, 3, 4, 4)
    turned, classes = Rotate.posed(None, images, None, Rows.all_of(images))
    shares = [Ranks(rank, size).share(count) for rank in range(size)]
    parts = [Rotate.posed(None, images[own], None, Rows(own.start, own.stop, count)) for own in shares]
    assert torch.equal(torch.cat([images for images, _ in parts]), turned)
    assert torch.equal(torch.cat([classes for _, classes in parts]), classes)


def test_shared_batches_keep_every_name_and_parameter() -> None:
    network = Tiny(2)
    before, parameters = {name: value.clone() for name, value in network.state_dict().items()}, [*network.parameters()]
    share_batches(network, ALONE)
    assert not any(type(module) is nn.BatchNorm2d for module in network.modules())
    assert [*network.state_dict()] == [*before]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(own is old for own, old in zip(network.parameters(), parameters, strict=True))


def test_a_minibatch_smaller_than_the_job_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="a minibatch of 2 is too small for 3 processes") as error:
        training.pretrain("vgg-small", open_data(folder, "arrays"), batch_size=2, ranks=Ranks(0, 3))
    assert error.value.argument == "batch_size"


class Told(Ranks):
    """The first of two ranks, of which the other always says 7."""

    def __init__(self) -> None:
        super().__init__(0, 2)

    def counts(self, own: int) -> list[int]:
        return [own, 7]

    def meet(self, name: str, message: Any, give_up: Callable[[], bool] = lambda: False) -> list[Any]:
        return [message, 7]


def test_other_images_or_another_checkpoint_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="process 1 has other images or settings than process 0"):
        training.pretrain("vgg-small", open_data(folder, "arrays"), ranks=Told())
    with pytest.raises(InputError, match="process 1 would go on from step 7, process 0 from step 3") as error:
        training._check_begun(Told(), 3, Path("weights.checkpoint"))
    assert error.value.argument == Path("weights.checkpoint")
    training._check_begun(Told(), 7, None)


def flags(folder: Path, out: Path, *more: str) -> list[str]:
    own = ["--data", str(folder / "arrays.npz"), "--arch", "vgg-small", "--image-size", "32", "--device", "cpu"]
    return [*own, "--steps", "6", "--batch-size", "13", "--lr", "0.001", "--out", str(out), *more]


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return {name: value for name, value in opened.metadata().items() if name not in ("accuracy", "crc32")}


def close(one: Path, other: Path) -> None:
    assert metadata(one) == metadata(other)
    ours, theirs = load_file(one), load_file(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4, msg=name)


def error_lines(found: Sequence[tuple[int, str]]) -> list[str]:
    return [line for _, errors in found for line in errors.splitlines() if line.startswith("error:")]


@pytest.fixture(scope="module")
def whole(folder: Path, own_cache) -> Path:
    out = folder / "whole.safetensors"
    pretrain.main(flags(folder, out))
    return out


@pytest.mark.slow
def test_the_command_writes_one_file_for_all(folder: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "weights.safetensors"
    for status, errors in ends(start_job(3, ["-m", "engine.pretrain", *flags(folder, out)])):
        assert status == 0, errors
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    close(out, whole)


@pytest.mark.parametrize("sent", [signal.SIGTERM, slow(signal.SIGUSR1)], ids=lambda s: s.name)
def test_a_signal_to_one_stops_all_and_any_number_resumes(
    sent: signal.Signals, folder: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "weights.safetensors"
    found = ends(start_job(2, [pretrain_worker.__file__, str(int(sent)), "1", "2", *flags(folder, out)]), within=60)
    assert {status for status, _ in found} == {128 + sent}
    (said,) = [line for _, errors in found for line in errors.splitlines() if "--resume" in line]
    assert "interrupted at step 2 of 6" in said
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors.checkpoint"]
    pretrain.main(flags(folder, out, "--resume"))
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    close(out, whole)


@pytest.mark.slow
def test_what_one_process_began_two_end(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "weights.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(training, "one_cycle", signalled(signal.SIGTERM, 3))
        with pytest.raises(Interrupted, match="step 3 of 6"):
            pretrain.main(flags(folder, out))
    for status, errors in ends(start_job(2, ["-m", "engine.pretrain", *flags(folder, out, "--resume")])):
        assert status == 0, errors
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    close(out, whole)


@pytest.mark.slow
def test_other_flags_are_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    own = ["-m", "engine.pretrain", *flags(folder, tmp_path / "weights.safetensors")]
    found = ends(start_ranks([own, [*own, "--crop-padding", "2"]]))
    assert {status for status, _ in found} == {2}
    (line,) = error_lines(found)
    assert "process 1 was started otherwise than process 0, with crop_padding 2, not None" in line
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_a_loss_that_is_lost_is_one_line(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "weights.safetensors"
    found = ends(start_job(2, ["-m", "engine.pretrain", *flags(folder, out, "--lr", "1e30")]))
    assert {status for status, _ in found} == {2}
    (line,) = error_lines(found)
    assert "--lr: the loss became" in line
    assert not [*tmp_path.iterdir()]
