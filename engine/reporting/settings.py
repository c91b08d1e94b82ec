"""The configuration of a run for people: what differs from its preset, and the command that does the same again."""

from __future__ import annotations

import dataclasses
import platform
import shlex
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from engine.configuration.config import Config
from engine.configuration.presets import PRESETS

_PACKAGES = ("torch", "torchvision", "triton", "nvidia-dali-cuda130", "numpy", "pillow", "gfmn-engine")


@dataclass(frozen=True)
class Setting:
    """A line of the configuration; `default` is the preset's value where the run has another one."""

    name: str
    value: str
    default: str | None


def settings(config: Config) -> dict[str, list[Setting]]:
    """The configuration by group."""
    usual = Config.build(config.preset, {}) if config.preset in PRESETS else config
    groups = {}
    for name, values in dataclasses.asdict(config).items():
        if isinstance(values, dict):
            defaults = dataclasses.asdict(getattr(usual, name))
            groups[name] = [
                Setting(key, _shown(value), _shown(defaults[key]) if defaults[key] != value else None)
                for key, value in values.items()
            ]
    return groups


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == ():
        return "–"
    return " ".join(value) if isinstance(value, tuple) else str(value)


def train_command(config: Config) -> str:
    """The command that trains the same again: the preset, and a flag for every value that is not the preset's."""
    words = ["python", "-m", "engine.train", "--preset", config.preset]
    usual, own = Config.build(config.preset, {}).flat() if config.preset in PRESETS else {}, config.flat()
    for name, value in own.items():
        if name in usual and usual[name] == value:
            continue
        flag = "--" + name.replace("_", "-")
        if value is None or value == ():
            return "python -m engine.train --config config.json"
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, tuple):
            words += [flag, *value]
        else:
            words.append(f"{flag}={value}" if str(value).startswith("-") else flag)
            words += [] if str(value).startswith("-") else [str(value)]
    return shlex.join(words)


def versions() -> dict[str, str]:
    """What is installed here, by name."""
    found = {"Python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
