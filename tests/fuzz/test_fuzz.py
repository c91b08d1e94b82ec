"""Whatever happens to files, flags and permissions: a documented status, one line, and nothing good is lost.

A round that fails names its seed and number; `FUZZ_SEED=… FUZZ_ROUND=… pytest tests/fuzz` plays it again.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from helpers.fuzz_draws import JUNK, ODD_JUNK, ODD_WORDS, WORDS, Flags, as_file, as_flags, damage, flags_of, settings
from helpers.fuzzing import STEPS, Ended, World, contents, tensors, worth

from engine.configuration.groups import GROUPS, DataConfig

ROUNDS = 8
MINUTES = 10
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
RUNS = ("half", "finished")
FOR_FLAGS, FOR_FILES = (*WORDS, *ODD_WORDS), (*JUNK, *ODD_JUNK)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("fuzz"))


class Round:
    """One command that meets the world after something has happened to it; seed and number decide everything.

    Args:
        signals: whether commands are interrupted as well, at moments that no seed decides.
    """

    def __init__(self, world: World, seed: str, number: int, *, signals: bool = False):
        self.world, self.draw = world, random.Random(f"{seed}/{number}")
        self.story = [f"FUZZ_SEED={seed} FUZZ_ROUND={number}"]
        self.kinds = [self.trains, self.resumes, self.resumes, self.reads, self.makes]
        self.kinds += [self.is_interrupted] if signals else []

    def play(self) -> None:
        self.world.renew()
        try:
            self.draw.choice(self.kinds)()
        except AssertionError as error:
            raise AssertionError("\n".join([*self.story, str(error)])) from None

    def happens(self, *places: str, at_most: int) -> None:
        """Something is done to files or folders in one of `places`, up to so many times."""
        for _ in range(self.draw.randint(0, at_most)):
            below = self.world.path / self.draw.choice(places)
            if below.is_dir():
                paths = sorted(below.rglob("*")) + [below] * (below != self.world.path)
                self.story.append(damage(self.draw, self.draw.choice(paths), self.draw.choice(paths)))

    def command(self, name: str, argv: list[str], kill: tuple[float, signal.Signals] | None = None) -> Ended:
        """Run it: its status is a documented one, one line says what was wrong, and no run is worth less."""
        before = [worth(self.world.path / run) for run in RUNS]
        output = self.draw.choice((os.devnull,) * 8 + ("a closed pipe", "/dev/full"))
        self.story.append(f"{name} {argv} > {output}" + (f", {kill[1].name} after {kill[0]} s" if kill else ""))
        ended = self.world.run(name, argv, output=output, kill=kill)
        self.world.readable()
        self.story.append(ended.said)
        statuses = {0, 2} | ({128 + signal.SIGPIPE} if output == "a closed pipe" else set())
        if kill is not None:  # where nothing is to be resumed, most signals end a program as they end any
            statuses |= {128 + kill[1]} | ({-kill[1]} if kill[1] != signal.SIGINT else set())
        assert ended.status in statuses, f"status {ended.status}"
        assert "Traceback" not in ended.said
        assert "Warning" not in ended.said
        assert len(ended.errors) == (ended.status == 2)
        assert ended.status != 2 or ended.said.splitlines()[-1] == ended.errors[0]
        after = [worth(self.world.path / run) for run in RUNS]
        assert all(now >= was for one, other in zip(before, after) for was, now in zip(one, other)), (before, after)
        return ended

    def settings(self, junk: tuple[Any, ...]) -> dict[str, Any]:
        return settings(self.draw, junk, self.draw.choice((1.0, 1.0, 0.8, 0.3)))

    def assert_kept(self, before: dict[str, Any], *but: str) -> None:
        """Nothing has changed but the files, or those in the folders, that are named."""
        now = contents(self.world.path)
        changed = [name for name in before if now.get(name) != before[name] and not name.startswith(but)]
        assert not changed, changed

    def trains(self) -> None:
        """A new run of random settings, by flags or a file."""
        out = self.draw.choice(("new",) * 8 + (*RUNS, "photos", "digits.npy", "new/er", "/dev/null", "\udcff"))
        if self.draw.random() < 0.6:
            more = as_flags(self.draw, self.settings(FOR_FLAGS))
            argv = [*self.world.flags, "--steps", "2", "--weights", "random", *more]
        else:
            config = json.loads((self.world.path / "finished/config.json").read_text())
            config["training"]["steps"], config["networks"]["weights"] = 2, ["random"]
            (self.world.path / "config.json").write_bytes(as_file(self.draw, self.settings(FOR_FILES), config))
            argv = ["--config", "config.json"]
        before = contents(self.world.path)
        self.command("train", [*argv, "--out", out])
        self.assert_kept(before)

    def resumes(self) -> None:
        """A run whose folder is damaged: refused, or the same end."""
        run = self.draw.choice(RUNS)
        folder = self.world.path / run
        self.happens(run, run, run, run, "", at_most=2)
        before, was = contents(folder), worth(folder)
        argv = ["--resume", "--out", run]
        argv += ["--steps", str(self.draw.randint(5, STEPS))] if self.draw.random() < 0.4 else []
        # Of those that decide nothing, some change the last bits.
        more = as_flags(self.draw, self.settings(FOR_FLAGS)) if self.draw.random() < 0.1 else []
        ended = self.command("train", argv + more)
        if ended.status == 0 and not more:
            self.assert_same_end(folder)
        elif ended.status != 0 and worth(folder) == was:
            # What cannot be written is found when config.json may ask for more steps already.
            begun = {"config.json"} if "could not be written" in ended.said else set()
            now = contents(folder)
            assert {name for name in now.keys() | before.keys() if now.get(name) != before.get(name)} <= begun

    def assert_same_end(self, folder: Path) -> None:
        step = worth(folder)[1]
        assert tensors(folder / "generator.safetensors") == self.world.generators.get(step), f"step {step}"

    def reads(self) -> None:
        """A damaged run is looked at, and stays as it is."""
        run = self.draw.choice(RUNS)
        name, always, known, outs = self.draw.choice(READERS)
        self.happens(run, run, run, "", at_most=2)
        (self.world.path / "old.png").write_bytes(b"good")
        before = contents(self.world.path)
        out = self.draw.choice(outs)
        given = ["--json" if name == "evaluate" else "--out", out] if out else []
        status = self.command(name, ["--run", run, *always, *given, *flags_of(self.draw, known)]).status
        # Numbers are in their file before they are printed, which may fail.
        written = status == 0 or name == "evaluate"
        self.assert_kept(before, "cache", *([out or f"{run}/report.html"] if written else []))

    def makes(self) -> None:
        """Targets and extractors, into files that may be there already."""
        name, always, known = self.draw.choice(MAKERS)
        self.happens("cache", "photos", "", at_most=1)
        before = contents(self.world.path)
        more = {key: value for key, value in self.settings(FOR_FLAGS).items() if key in known}
        out = self.draw.choice(("new.safetensors", "judge.safetensors", "half/target.safetensors", "new/er", "photos"))
        given = [*always, "--out", out] if name != "env" else [*always]
        status = self.command(name, given + as_flags(self.draw, more)).status
        self.assert_kept(before, "cache", *([out] if status == 0 else []))

    def is_interrupted(self) -> None:
        """A signal, and another run of the command that comes to the same end."""
        name = self.draw.choice(("train", "train", "pretrain", "precompute", "sample", "report", "evaluate", "env"))
        argv = {
            "train": ["--resume", "--out", "half"],
            "pretrain": [*PRETRAIN, "--out", "new.safetensors"],
            "precompute": [*PRECOMPUTE, "--out", "new.safetensors"],
            "sample": ["--run", "half", "--out", "new.png"],
            "report": ["--run", "half"],
            "evaluate": ["--run", "half", *EVALUATE],
            "env": [],
        }[name]
        if name == "train" and self.draw.random() < 0.5:
            shutil.rmtree(self.world.path / "cache")
            shutil.rmtree(self.world.path / "half/extractor")
            (self.world.path / "half/target.safetensors").unlink()
        status = self.command(name, argv, (self.draw.uniform(0, 2), self.draw.choice(SIGNALS))).status
        resumes = ["--resume"] if name == "pretrain" and status != 0 else []
        if name != "pretrain" or resumes:
            assert self.command(name, argv + resumes).status in (0, 2, 128 + signal.SIGPIPE)
        if name == "train":
            self.assert_same_end(self.world.path / "half")


QUICKLY = ["--threads", "1", "--batch-size", "8"]
EVALUATE = [*QUICKLY, "--feature-extractor", "vgg-small", "--weights", "judge.safetensors"]
EVALUATE += ["--samples", "4", "--kid-subset-size", "2"]
PRETRAIN = [*QUICKLY, "--preset", "digits", "--steps", "2", "--loader", "torch"]
PRECOMPUTE = [*QUICKLY, "--preset", "digits", "--layers", "1", "--loader", "torch"]
PRECOMPUTE += ["--weights", "random", "--kernels", "reference"]
NUMBERS = ("1", "2", "5")
# A command, what it always gets, flags that it may get with values that are right, and outputs.
READERS: tuple[tuple[str, list[str], Flags, tuple[str, ...]], ...] = (
    (
        "sample",
        [],
        {"--count": NUMBERS, "--seed": NUMBERS, "--interpolate": (), "--best": (), "--run": RUNS},
        ("old.png", "new.npy", "new/er.png", "photos", "judge.safetensors", "/dev/full", "photos/0.png/x.npy"),
    ),
    (
        "report",
        [],
        {"--seed": NUMBERS, "--neighbours-of": NUMBERS, "--title": ("a", "<b>"), "--device": ("cpu",)},
        ("", "", "new.html", "old.png", "photos", "/dev/full"),
    ),
    (
        "evaluate",
        EVALUATE,
        {
            "--samples": NUMBERS,
            "--metrics": ("fid", "kid", "fid,kid", "prc", "is"),
            "--against": ("digits.npy", "photos"),
            "--real-samples": NUMBERS,
            "--seed": NUMBERS,
            "--best": (),
            "--plain-reading": (),
            "--batch-size": NUMBERS,
            "--kid-subset-size": NUMBERS,
            "--device": ("cpu", "auto"),
            "--image-size": ("32", "16"),
        },
        ("", "new.json", "old.png", "photos", "/dev/full"),
    ),
)
DATA = frozenset(entry.name for entry in fields(DataConfig))
ALL = frozenset(name for group in GROUPS.values() for name in (entry.name for entry in fields(group)))
# A command, what it always gets, and the settings that it may get.
MAKERS: tuple[tuple[str, list[str], frozenset[str]], ...] = (
    ("env", ["--json"], DATA),
    ("pretrain", [*PRETRAIN, "--task", "rotate", "--data", "photos"], DATA),
    ("pretrain", [*PRETRAIN, "--resume", "--task", "autoencode", "--data", "digits.npy"], DATA),
    ("precompute", [*PRECOMPUTE, "--data", "digits.npy"], ALL),
)


def test_a_few_rounds(world: World) -> None:
    seed, only = os.environ.get("FUZZ_SEED", "0"), os.environ.get("FUZZ_ROUND")
    for number in range(ROUNDS) if only is None else [int(only)]:
        Round(world, seed, number).play()


@pytest.mark.slow
def test_rounds_of_ten_minutes(world: World) -> None:
    """With another seed every time."""
    seed, until = os.environ.get("FUZZ_SEED", str(time.time_ns())), time.monotonic() + 60 * MINUTES
    for number in itertools.takewhile(lambda _: time.monotonic() < until, itertools.count()):
        Round(world, seed, number, signals=True).play()
