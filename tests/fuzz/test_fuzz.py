"""Whatever happens to files, flags and permissions: a documented status, one line, and nothing good is lost.

A round that fails names its seed and number; `FUZZ_SEED=… FUZZ_ROUND=… pytest tests/fuzz` plays it again.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.fuzz_draws import JUNK, ODD_JUNK, ODD_WORDS, WORDS, Flags, as_file, as_flags, damage, flags_of, settings
from helpers.fuzzing import STEPS, Ended, World, contents, tensors, worth

ROUNDS = 30
SLOW_SECONDS = 600
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
RUNS = ("half", "finished")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("fuzz"))


class Round:
    """One command that meets the world after something has happened to it.

    Args:
        seed, number: decide everything.
    """

    def __init__(self, world: World, seed: str, number: int):
        self.world, self.draw = world, random.Random(f"{seed}/{number}")
        self.story = [f"FUZZ_SEED={seed} FUZZ_ROUND={number}"]
        world.renew()

    def play(self) -> None:
        kinds = (self.trains, self.trains, self.resumes, self.resumes, self.resumes, self.reads, self.reads, self.makes)
        try:
            self.draw.choice(kinds)()
        except AssertionError as error:
            raise AssertionError("\n".join([*self.story, str(error)])) from None

    def damages(self, *places: str, at_most: int = 1) -> None:
        """Something happens to files or folders in one of `places`."""
        for _ in range(self.draw.randint(0, at_most)):
            below = self.world.path / self.draw.choice(places)
            paths = sorted(path for path in below.rglob("*") if path.name != "aside") + [below]
            self.story.append(damage(self.draw, self.draw.choice(paths), self.draw.choice(paths)))

    def command(self, name: str, argv: list[str], **options) -> Ended:
        """Run it; its status is a documented one, with one line if it failed, and no run is worth less."""
        self.world.readable_again = False
        before = {run: worth(self.world.path / run) for run in RUNS}
        output = self.draw.choice((os.devnull,) * 8 + ("a closed pipe", "/dev/full"))
        self.story.append(f"{name} {argv}" + (f" > {output}" if output != os.devnull else ""))
        ended = self.world.run(name, argv, output=output, **options)
        self.world.readable()
        self.story.append(ended.said)
        assert "Traceback" not in ended.said
        assert "Warning" not in ended.said
        assert ended.status in (0, 2, *((128 + signal.SIGPIPE,) if output == "a closed pipe" else ())), ended.status
        assert len(ended.errors) == (ended.status == 2), ended.errors
        assert ended.errors == ended.said.splitlines()[-1:] or ended.status != 2
        after = {run: worth(self.world.path / run) for run in RUNS}
        for run in RUNS:
            assert all(now >= was for was, now in zip(before[run], after[run])), (before, after)
        return ended

    def settings(self, junk: tuple) -> dict:
        return settings(self.draw, junk, self.draw.choice((1.0, 1.0, 0.8, 0.3)))

    def trains(self) -> None:
        """A new run of random settings, by flags or a file."""
        out = self.draw.choice(
            ("new",) * 8 + ("half", "finished", "photos", "digits.npy", "new/er", "/dev/null", "\udcff")
        )
        kept = contents(self.world.path)
        if self.draw.random() < 0.6:
            values = self.settings((*WORDS, *ODD_WORDS))
            argv = [*self.world.flags, "--steps", "2", "--weights", "random", *as_flags(self.draw, values)]
        else:
            config = json.loads((self.world.path / "finished/config.json").read_text())
            config["training"]["steps"] = 2
            config["networks"]["weights"] = ["random"]
            file = self.world.path / "config.json"
            file.write_bytes(as_file(self.draw, self.settings((*JUNK, *ODD_JUNK)), config))
            argv = ["--config", str(file)]
        self.command("train", [*argv, "--out", out])
        now = contents(self.world.path)
        assert {name: now.get(name) for name in kept} == kept

    def resumes(self) -> None:
        """A run whose folder is damaged: refused, or the same end."""
        run = self.draw.choice(RUNS)
        self.damages(run, run, run, run, ".", at_most=2)
        kept, was = contents(self.world.path / run), worth(self.world.path / run)
        argv = ["--resume", "--out", run]
        if self.draw.random() < 0.4:
            argv += ["--steps", str(self.draw.randint(5, STEPS))]
        more = as_flags(self.draw, self.settings((*WORDS, *ODD_WORDS))) if self.draw.random() < 0.1 else []
        argv += more
        ended = self.command("train", argv)
        folder = self.world.path / run
        if ended.status == 0 and not more:
            step = worth(folder)[1]
            assert tensors(folder / "generator.safetensors") == self.world.generators.get(step), step
        elif ended.status and worth(folder) == was:
            assert contents(folder) == kept

    def reads(self) -> None:
        """A damaged run is looked at, and stays as it is."""
        run = self.draw.choice(RUNS)
        name, known, out = self.draw.choice(READERS)
        self.damages(run, run, run, ".", at_most=2)
        (self.world.path / "out.png").write_bytes(b"good")
        kept = contents(self.world.path)
        argv = ["--run", run, *EXTRA.get(name, []), *flags_of(self.draw, known)]
        file = self.draw.choice(out)
        ended = self.command(name, argv + (["--json" if name == "evaluate" else "--out", file] if file else []))
        now = contents(self.world.path)
        # Numbers are in their file before they are printed, which may fail.
        made = {file, f"{run}/report.html"} if ended.status == 0 or name == "evaluate" else set()
        assert {key: data for key, data in kept.items() if key not in made and not key.startswith("cache")} == {
            key: now.get(key) for key in kept if key not in made and not key.startswith("cache")
        }

    def makes(self) -> None:
        """Targets and extractors, into files that may be there already."""
        name, known = self.draw.choice(MAKERS)
        self.damages("cache", "cache", ".", at_most=1)
        out = self.draw.choice(("new.safetensors", "judge.safetensors", "half/target.safetensors", "new/er", "photos"))
        argv = [*known, "--out", out]
        if name != "env":
            kinds = self.settings((*WORDS, *ODD_WORDS))
            argv += as_flags(
                self.draw, {key: value for key, value in kinds.items() if name == "precompute" or key in DATA}
            )
        else:
            argv = flags_of(self.draw, {"--json": (), "--verbose": ()})
        self.command(name, argv)


NUMBERS = ("1", "2", "5")
DATA = ("dataset", "data", "image_size", "center_crop", "horizontal_flip", "skip_bad_images", "loader")
EXTRA = {
    "evaluate": "--samples 4 --feature-extractor vgg-small --weights judge.safetensors --batch-size 2 --threads 1 "
    "--kid-subset-size 2".split(),
}
READERS: tuple[tuple[str, Flags, tuple[str, ...]], ...] = (
    (
        "sample",
        {"--count": NUMBERS, "--seed": NUMBERS, "--interpolate": (), "--best": (), "--run": RUNS},
        ("out.png", "new.npy", "new/er.png", "photos", "judge.safetensors", "/dev/full", "photos/0.png/x.npy"),
    ),
    (
        "report",
        {"--seed": NUMBERS, "--neighbours-of": NUMBERS, "--title": ("a", "<b>"), "--device": ("cpu",)},
        ("", "", "new.html", "out.png", "photos", "/dev/full"),
    ),
    (
        "evaluate",
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
        ("", "new.json", "out.png", "photos", "/dev/full"),
    ),
)
MAKERS = (
    ("env", []),
    ("pretrain", "--preset digits --data photos --arch vgg-small --steps 2 --threads 1 --loader torch".split()),
    (
        "pretrain",
        "--resume --preset digits --data digits.npy --arch vgg-small --steps 2 --threads 1 --loader torch".split(),
    ),
    (
        "precompute",
        "--preset digits --data digits.npy --weights random --layers 1 --threads 1 --kernels reference --loader torch".split(),
    ),
)


def test_rounds(world: World) -> None:
    seed, only = os.environ.get("FUZZ_SEED", "0"), os.environ.get("FUZZ_ROUND")
    for number in range(ROUNDS) if only is None else [int(only)]:
        Round(world, seed, number).play()
