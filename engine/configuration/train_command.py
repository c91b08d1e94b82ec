"""The command lines that repeat a run, and that resume one."""

from __future__ import annotations

import shlex
from pathlib import Path

from engine.configuration.config import Config, dropped
from engine.configuration.groups import owners
from engine.configuration.idle import idle


def resume_command(run: Path) -> str:
    """The command that resumes the run in the folder `run`."""
    return shlex.join(["python", "-m", "engine.train", "--resume", "--out", str(run)])


def train_command(config: Config) -> str:
    """The command that trains with `config` again: its preset, and a flag for every value that is not the preset's.

    A value that no flag can give (None, an empty list) needs the run's config.json.
    """
    words = ["python", "-m", "engine.train", "--preset", config.preset]
    method, own = config.method.method, config.flat()
    preset = Config.build(config.preset, {}).flat()
    # But for what decides the other usual values: that has to be given.
    usual = config.usual().flat() | {name: preset[name] for name in ("method", "dataset", "data", "population")}
    usual |= dropped(own, usual)
    unused = idle(config)
    for name, value in own.items():
        # What belongs to other methods decides nothing, and would be refused.
        if (owners(name) and method not in owners(name)) or usual[name] == value:
            continue
        if name in unused:  # so would this
            continue
        flag = "--" + name.replace("_", "-")
        if value is None or value == ():
            return "python -m engine.train --config config.json"
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif name == "generator_ema" and isinstance(value, tuple):
            words += [flag, ",".join(map(str, value))]
        elif isinstance(value, tuple):
            words += [flag, *map(str, value)]
        else:
            words.append(f"{flag}={value}" if str(value).startswith("-") else flag)
            words += [] if str(value).startswith("-") else [str(value)]
    return shlex.join(words)
