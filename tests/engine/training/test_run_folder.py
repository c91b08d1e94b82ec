"""Whose a run's folder is, and what resuming does with one that is damaged, incomplete or finished."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.runs import command, metrics, same_run

from engine import precompute, pretrain, train
from engine.configuration.command import output_file
from engine.configuration.config import Config
from engine.support import files
from engine.support.errors import InputError
from engine.support.files import locked
from engine.training.run_folder import RunFolder, saved_step

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def half(flags: list[str], finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has taken four steps of six; checkpoints of steps 2 and 4. Not to be changed; copy it."""
    out = tmp_path_factory.mktemp("runs") / "half"
    train.main([*flags, "--steps", "4", "--out", str(out)])
    return out


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that takes long must not begin."""
    for opens in ("train.open_data", "precompute.open_data", "pretrain.open_dataset"):
        monkeypatch.setattr(f"engine.{opens}", None)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuse() -> None:
    raise BlockingIOError


def fails(call: Callable[[], object], error: OSError) -> Callable[..., object]:
    def wrapped(path, *arguments, **options):
        if "denied" in str(path):
            raise error
        return call(path, *arguments, **options)

    return wrapped


@pytest.mark.parametrize("argv", [[], ["--resume"], ["--resume", "--steps", "9"]], ids=["new", "resume", "longer"])
def test_a_second_process_is_refused_before_any_work(argv, half: Path, tmp_path: Path, no_work, capsys) -> None:
    out = tmp_path / "run"
    shutil.copytree(half, out)
    with RunFolder(out).owned():
        before = contents(out)
        code, errors = command(train.main, [*argv, "--out", str(out)], capsys)
        assert (code, errors.count("\n")) == (2, 1)
        assert str(out) in errors
        assert contents(out) == before


def test_a_second_pretraining_of_one_file_is_refused(tmp_path: Path, no_work, capsys) -> None:
    with locked(tmp_path / ".extractor.safetensors.lock", refuse):
        code, errors = command(pretrain.main, ["--out", str(tmp_path / "extractor.safetensors")], capsys)
    assert (code, errors.count("\n")) == (2, 1)
    assert "--out" in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", ["a file", "below a file", "not to be made", "not to be written"])
@pytest.mark.parametrize("main", [train.main, pretrain.main, precompute.main], ids=["train", "pretrain", "precompute"])
def test_out_that_cannot_be_written_is_found_before_any_work(
    main, case: str, tmp_path, no_work, monkeypatch, capsys
) -> None:
    (tmp_path / "file").write_text("precious")
    folder = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "run"}.get(case, tmp_path / "denied")
    denied = PermissionError(errno.EACCES, "Permission denied")
    if case == "not to be made":
        monkeypatch.setattr(os, "mkdir", fails(os.mkdir, denied))
    if case == "not to be written":
        monkeypatch.setattr(os, "open", fails(os.open, denied))
    out = folder if main is train.main else folder / "x.safetensors"
    code, errors = command(main, ["--out", str(out)], capsys)
    assert (code, errors.count("\n")) == (2, 1)
    assert str(folder) in errors
    assert (tmp_path / "file").read_text() == "precious"


def test_runs_of_the_same_second_have_their_own_folders(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "20260101-000000")
    with train.own_folder(None, "digits") as one, train.own_folder(None, "digits") as other:
        assert one.path != other.path
        assert one.path.is_dir()
        assert other.path.is_dir()
    assert list((tmp_path / "runs").iterdir()) == [], "nothing was written into them"


def test_the_lock_of_a_dead_process_is_free_though_its_child_lives(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    reading, writing = os.pipe()
    owner = os.fork()
    if owner == 0:
        with locked(lock, refuse):
            child = os.fork()
            if child:
                os.write(writing, str(child).encode())
                os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()
    os.waitpid(owner, 0)
    try:
        assert lock.exists()
        with locked(lock, refuse), pytest.raises(BlockingIOError), locked(lock, refuse):
            pass
        assert not lock.exists()
    finally:
        os.kill(int(os.read(reading, 20)), signal.SIGKILL)


def test_the_home_folder_is_known_behind_an_equals_sign(tmp_path: Path, monkeypatch) -> None:
    """Where no shell expands it: --out=~/run."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder("~/run").path == tmp_path / "run"
    assert output_file("~/rows.json") == tmp_path / "rows.json"


def test_a_file_system_without_locks_is_said_once(tmp_path: Path, monkeypatch, caplog) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    files._warn_of_no_locks.cache_clear()
    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):
        with locked(tmp_path / "lock", refuse), locked(tmp_path / "lock", refuse):
            pass
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "argv",
    [["--weights", "nothing.safetensors"], ["--image-size", "36"], ["--profile", "5"]],
    ids=["weights", "size", "profile"],
)
def test_a_run_that_took_no_step_does_not_block_the_next(argv, flags, finished: Path, tmp_path: Path, capsys) -> None:
    for out in (tmp_path / "made", tmp_path / "there"):
        if out.name == "there":
            out.mkdir()
        assert command(train.main, [*flags, *argv, "--out", str(out)], capsys)[0] == 2
    train.main([*flags, "--out", str(out)])
    assert same_run(finished, out)


def damage(*names: str) -> Callable[[Path], None]:
    def cut(out: Path) -> None:
        for name in names:
            path = out / name
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut


def change(name: str, place: float) -> Callable[[Path], None]:
    """One bit of a file, that far behind its start."""

    def flip(out: Path) -> None:
        data = bytearray((out / name).read_bytes())
        data[int(place * len(data))] ^= 1
        (out / name).write_bytes(data)

    return flip


def another_rate(out: Path) -> None:
    text = (out / "config.json").read_text()
    assert '"lr": 0.001' in text
    (out / "config.json").write_text(text.replace('"lr": 0.001', '"lr": 0.002'))


def remove(*patterns: str) -> Callable[[Path], None]:
    def unlink(out: Path) -> None:
        for pattern in patterns:
            for path in out.glob(pattern):
                path.unlink()

    return unlink


def a_folder_for(name: str) -> Callable[[Path], None]:
    def replace(out: Path) -> None:
        (out / name).unlink()
        (out / name).mkdir()

    return replace


def garble_metrics(out: Path) -> None:
    (out / "metrics.jsonl").write_bytes(b'\xff\x00{"step": 1\n[]\n' + (out / "metrics.jsonl").read_bytes())


ALL, OLD, NEW = "checkpoints/*", "checkpoints/step_00000002.safetensors", "checkpoints/step_00000004.safetensors"
# What happened to a run of four steps; the exit status of resuming it; what the line names.
HAPPENED = {
    "no checkpoints": (remove(ALL), 2, ""),
    "no checkpoints, metrics or samples": (remove(ALL, "metrics.jsonl", "samples/*"), 2, ""),
    "all checkpoints damaged": (damage(OLD, NEW), 2, Path(NEW).name),
    "newest checkpoint damaged": (damage(NEW), 2, "step 2"),
    "no configuration": (remove("config.json"), 2, "config.json"),
    "configuration damaged": (damage("config.json"), 2, "config.json"),
    "newest checkpoint removed": (remove(NEW), 0, ""),
    "older checkpoint removed": (remove(OLD), 0, ""),
    "generator removed": (remove("generator.safetensors"), 0, ""),
    "generator damaged": (damage("generator.safetensors"), 0, ""),
    "target damaged": (damage("target.safetensors"), 0, ""),
    "a bit of the newest checkpoint": (change(NEW, 0.5), 2, "step 2"),
    "a bit of the target": (change("target.safetensors", 0.5), 0, ""),
    "a bit of the generator": (change("generator.safetensors", 0.5), 0, ""),
    "a setting changed": (another_rate, 2, "lr"),
    "metrics garbled": (garble_metrics, 0, ""),
    "a folder for metrics": (a_folder_for("metrics.jsonl"), 2, "metrics.jsonl"),
    "a folder for the older checkpoint": (a_folder_for(OLD), 0, ""),
    "nothing": (remove(), 0, ""),
}


@pytest.mark.parametrize("case", HAPPENED, ids=str)
def test_resume_never_goes_back_in_silence(case: str, half, finished, tmp_path, capsys, caplog) -> None:
    happened, status, named = HAPPENED[case]
    out = tmp_path / "run"
    shutil.copytree(half, out)
    happened(out)
    before = contents(out)
    argv = ["--resume", "--out", str(out), "--steps", "6"]
    if status:
        code, errors = command(train.main, argv, capsys)
        assert (code, errors.count("\n")) == (status, 1)
        assert str(out) in errors
        assert named in errors
        assert contents(out) == before
        return
    train.main(argv)
    assert same_run(finished, out)
    went_back = case == "newest checkpoint removed"
    assert any("trained again" in record.getMessage() for record in caplog.records) == went_back


def test_a_finished_run_is_left_alone(finished: Path, tmp_path: Path, no_work, capsys, caplog) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = contents(out)
    with caplog.at_level("INFO", logger="gfmn"):
        train.main(["--resume", "--out", str(out)])
    assert len(caplog.records) == 1
    assert "--steps" in caplog.text
    code, errors = command(train.main, ["--resume", "--out", str(out), "--steps", "5"], capsys)
    assert (code, errors.count("\n")) == (2, 1)
    assert "--steps" in errors
    assert contents(out) == before


@pytest.mark.parametrize("product", ["generator.safetensors", "samples.png", "loss.png"])
def test_products_of_a_finished_run_are_made_again(product: str, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    whole = (out / product).read_bytes()
    (out / product).unlink()
    train.main(["--resume", "--out", str(out)])
    assert (out / product).read_bytes() == whole
    assert metrics(out) == metrics(finished)
    assert saved_step(out / "generator.safetensors") == 6


# Drafts of files that a run writes, and others: of its user, of other commands, and of a run below it.
OWN = (
    ".config.json",
    ".target.safetensors",
    ".metrics.jsonl",
    ".samples.png",
    ".generator.safetensors",
    "checkpoints/.step_00000004.safetensors",
    "checkpoints/.best.safetensors",
    "samples/.step_00000003.png",
    "extractor/.vgg-small.safetensors",
)
OTHERS = (
    ".config.json.mine",
    ".samples.npy",
    ".report.html",
    ".step_00000004.safetensors",
    "x/.generator.safetensors",
    "x/checkpoints/.step_00000004.safetensors",
)


def test_a_draft_of_a_killed_write_is_removed_by_the_next(tmp_path: Path) -> None:
    """Unless somebody still writes it, or another file: samples[1].npy is no pattern."""
    path = tmp_path / "samples[1].npy"
    names = [f".{name}.tmp" for name in ("samples[1].npy.dead_abc", "samples[1].npy.lockedab", "samples1.npy.otherone")]
    names.append(".samples[1].npy.freshabc.tmp")
    for name in names:
        (tmp_path / name).write_text("half")
        if "fresh" not in name:
            os.utime(tmp_path / name, (0, 0))
    with open(tmp_path / names[1], "r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        files.write_atomically(path, b"whole")
        with files.atomic_file(path) as file:
            file.write(b"again")
            files.write_atomically(path, b"between")
    assert path.read_bytes() == b"again"
    assert sorted(contents(tmp_path)) == sorted([path.name, *names[1:]])


def add_drafts(out: Path, *names: str) -> None:
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.k3b_9x0q.tmp").write_text("half")


def test_resuming_removes_the_runs_own_drafts_alone(half: Path, tmp_path: Path) -> None:
    """Not the samples that engine.sample is writing into the folder, nor the checkpoint of a run below it."""
    out = tmp_path / "run"
    shutil.copytree(half, out)
    add_drafts(out, *OWN, *OTHERS)
    train.main(["--resume", "--out", str(out), "--steps", "6"])
    left = {name.removesuffix(".k3b_9x0q.tmp") for name in contents(out) if name.endswith(".tmp")}
    assert left == set(OTHERS)


@pytest.mark.parametrize("case", ["the folder above a run", "another run"])
def test_a_folder_that_is_refused_keeps_all_drafts(case: str, half: Path, tmp_path: Path, no_work, capsys) -> None:
    out = tmp_path / "runs"
    shutil.copytree(half, out if case == "another run" else out / "x")
    add_drafts(out, *OWN, *OTHERS)
    before = contents(out)
    code, errors = command(train.main, ["--out", str(out)], capsys)
    assert (code, errors.count("\n")) == (2, 1)
    assert str(out) in errors
    assert contents(out) == before


CONFIG = Config.build("digits", {}).to_json()


def test_drafts_of_a_run_that_took_no_step_do_not_make_a_folder_used(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    add_drafts(tmp_path, ".config.json")
    run.check_new()
    assert contents(tmp_path) == {}
    add_drafts(tmp_path, ".generator.safetensors")
    with pytest.raises(InputError, match="not an empty folder"):
        run.check_new()
    run.config.write_text(CONFIG)
    run.check_new()
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("config", "file"),
    [
        (CONFIG, "thesis.tex"),
        (CONFIG, "extractor/mine.bin"),
        (CONFIG, "tensorboard/notes.txt"),
        ("{}", "tensorboard/events.out.tfevents.1"),
        ("{}", "target.safetensors"),
        ("half a", "extractor/vgg19.safetensors"),
    ],
)
def test_a_folder_of_something_else_is_refused(config: str, file: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("precious")
    before = contents(tmp_path)
    with pytest.raises(InputError):
        RunFolder(tmp_path).check_new()
    assert contents(tmp_path) == before
