"""Ranks that were started otherwise than the first one, or that see another folder: the line says who and what."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.configuration.config import Config
from engine.configuration.inputs import check_ranks, check_same_step
from engine.support.errors import InputError
from engine.training import run_folder
from engine.training.ranks import Ranks
from engine.training.run_folder import RunFolder


class Told(Ranks):
    """Rank 0 of three; the others' messages are `change(rank, own)`."""

    def __init__(self, change: Callable[[int, Any], Any]):
        super().__init__(0, 3)
        self.change = change

    def meet(self, name: str, message: Any, give_up: Callable[[], bool] = lambda: False) -> list[Any]:
        return [message, *(self.change(rank, message) for rank in (1, 2))]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"chunk_size": "2"}, "chunk_size 2, not None"),
        ({"lr": "0.5"}, "lr 0.5, not "),
        ({"version": "0.0"}, "version 0.0, not "),
        ({"PyTorch": "1.0"}, "PyTorch 1.0, not "),
        ({"out": "elsewhere"}, "out elsewhere, not runs/a"),
        ({"resume": "True"}, "resume True, not False"),
        ({"a_new_setting": "1"}, "a_new_setting 1, not None"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_the_line_says_which_rank_and_what(changed: dict[str, str], named: str) -> None:
    config = Config.build("digits", {"batch_size": 6})
    arguments = {"out": "runs/a", "resume": False}
    check_ranks(config, Told(lambda rank, own: own), arguments)
    with pytest.raises(InputError) as refused:
        check_ranks(config, Told(lambda rank, own: {**own, **changed} if rank == 2 else own), arguments)
    assert f"process 2 was started otherwise than process 0, with {named}" in str(refused.value)
    assert "process 1" not in str(refused.value)
    with pytest.raises(InputError, match=r"process 1 was started .*; process 2 was started"):
        check_ranks(config, Told(lambda rank, own: {**own, **changed}), arguments)


def test_ranks_that_found_other_checkpoints() -> None:
    check_same_step(4, Told(lambda rank, own: own))
    with pytest.raises(InputError, match=r"process 2 found the checkpoint of step 3 .* process 0 that of step 4"):
        check_same_step(4, Told(lambda rank, own: own - rank // 2))


class TestSharedFolder:
    def test_a_machine_that_does_not_see_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(run_folder, "_SLOW", 0.3)
        run, asked = RunFolder(tmp_path / "run"), []
        with run.owned():
            mark = run.mark()
            RunFolder(tmp_path / "run").check_shared(mark, lambda: None)
            with pytest.raises(InputError, match="on a file system that they share") as refused:
                RunFolder(tmp_path / "other").check_shared(mark, lambda: asked.append(1))
        assert refused.value.argument == tmp_path / "other"
        assert asked
        assert not run.path.exists()

    def test_a_folder_of_the_same_name_that_a_kill_left(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(run_folder, "_SLOW", 0.0)
        other = RunFolder(tmp_path / "other")
        other.path.mkdir()
        other.mark()
        with RunFolder(tmp_path / "run").owned(), pytest.raises(InputError, match="file system that they share"):
            other.check_shared(RunFolder(tmp_path / "run").mark(), lambda: None)

    def test_a_file_system_that_is_slow(self, tmp_path: Path) -> None:
        slow = RunFolder(tmp_path / "slow")
        slow.path.mkdir()
        later = threading.Timer(0.4, slow.lock.write_text, ["a mark"])
        later.start()
        slow.check_shared("a mark", lambda: None)
        later.join()
