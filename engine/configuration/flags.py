"""The command line, built from the groups of settings."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import typing
from typing import Any

from engine.configuration.groups import GROUPS
from engine.configuration.methods import METHODS
from engine.configuration.options import alternatives, type_hints

log = logging.getLogger("gfmn")


def add_flags(parser: argparse.ArgumentParser, *names: str) -> None:
    """One flag for every field of the named groups, or of all. Only flags that were given appear in the result."""
    for name in names or GROUPS:
        group = GROUPS[name]
        of = getattr(group, "methods", ())
        only = f" Only with --method {' or '.join(of)}." if of else ""
        section = parser.add_argument_group(name, (group.__doc__ or "").strip() + only)
        for entry in dataclasses.fields(group):
            flag = "--" + entry.name.replace("_", "-")
            default = "" if entry.default in (None, ()) else f"default: {_shown(entry.default)}"
            comparing = set(entry.metadata["methods"] or METHODS) != set(METHODS)
            whose = "only with methods that compare features" if comparing else ""
            details = "; ".join(filter(None, (default, str(entry.metadata["range"] or ""), whose)))
            help_text = (entry.metadata["help"] + (f" ({details})" if details else "")).replace("%", "%%")
            kind = alternatives(type_hints(group)[entry.name])[0]
            if kind is bool:
                action: Any = argparse.BooleanOptionalAction
                section.add_argument(flag, action=action, default=argparse.SUPPRESS, help=help_text)
                continue
            several = typing.get_origin(kind) is tuple
            base = typing.get_args(kind)[0] if several else kind
            section.add_argument(
                flag,
                type=entry.metadata["parse"] or base,
                nargs="+" if several else None,
                choices=entry.metadata["choices"],
                metavar=entry.metadata["metavar"],
                default=argparse.SUPPRESS,
                help=help_text,
            )
    if not names:
        _add_renamed(parser)


def _add_renamed(parser: argparse.ArgumentParser) -> None:
    """The names that version 0.1 had for two flags; they leave with the next version."""
    hidden: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS, "action": _Renamed}
    parser.add_argument("--checkpoint", dest="recompute", choices=("none", "stages"), new="--recompute", **hidden)
    for prefix, value in (("--", True), ("--no-", False)):
        parser.add_argument(
            f"{prefix}checkpoint-generator",
            dest="recompute_generator",
            nargs=0,
            const=value,
            new=f"{prefix}recompute-generator",
            **hidden,
        )


class _Renamed(argparse.Action):
    def __init__(self, *args: Any, new: str, **options: Any):
        super().__init__(*args, **options)
        self.new = new

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        log.warning("warning: %s is now called %s; the old name leaves with the next version", option, self.new)
        setattr(namespace, self.dest, self.const if self.nargs == 0 else values)


def given_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """The configuration's fields among parsed arguments: those that were given."""
    names = {entry.name for group in GROUPS.values() for entry in dataclasses.fields(group)}
    return {name: value for name, value in vars(arguments).items() if name in names}


def _shown(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, tuple) else value
