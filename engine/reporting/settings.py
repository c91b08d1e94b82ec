"""The configuration of a run for people: every value, those of its preset where it differs, and the versions here."""

from __future__ import annotations

import dataclasses
import platform
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from engine.configuration.config import Config
from engine.configuration.groups import owners

_PACKAGES = ("torch", "torchvision", "triton", "nvidia-dali-cuda130", "numpy", "pillow", "gfmn-engine")


@dataclass(frozen=True)
class ConfigurationLine:
    """One value of the configuration; `default` is the preset's value where the run has another one."""

    name: str
    value: str
    default: str | None


def configuration_lines(config: Config) -> dict[str, list[ConfigurationLine]]:
    """All values of `config` that are not other methods' alone, group by group."""
    method = config.method.method
    usual = config.usual()
    groups = {}
    for name, group in config.groups().items():
        defaults = dataclasses.asdict(getattr(usual, name))
        groups[name] = [
            ConfigurationLine(key, _as_text(value), _as_text(defaults[key]) if defaults[key] != value else None)
            for key, value in dataclasses.asdict(group).items()
            if not owners(key) or method in owners(key)
        ]
    return groups


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == ():
        return "–"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers, as far as they are installed."""
    found = {"Python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
