"""How a setting is declared, and the one check of its value: type, choices and range, wherever the value came from."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import os
import reprlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.support.errors import InputError

_LARGEST = 2**31 - 1
"""Of every whole number that declares no limit of its own."""
MOST_IMAGES = 1_000_000
"""More than anybody trains with at once: what is larger is a slip, and would be allocated before anything else refused
it."""
MOST_SEED = 2**32 - 1
"""PyTorch's generator on a CPU drops the bits above, so that larger seeds repeat smaller ones."""
_KINDS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that a setting may have; None is no bound."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )

    def __str__(self) -> str:
        bounds = ((entry.name.replace("_", " "), getattr(self, entry.name)) for entry in dataclasses.fields(self))
        named = (
            f"{name} {bound if isinstance(bound, int) else f'{bound:g}'}" for name, bound in bounds if bound is not None
        )
        return " and ".join("positive" if bound == "above 0" else bound for bound in named)


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
    resumable: bool = False,
    since: str | None = None,
    methods: tuple[str, ...] = (),
) -> Any:
    """A field with the values that it may have (choices or a range; the type is its annotation), and what its flag
    needs: the help text, and how to read its text.

    A `resumable` one may change when a run is resumed: it says where and how a run computes, never what. One that is
    new `since` a version is the default in the files of older ones. One with `methods` belongs to these alone, as all
    of a group may.
    """
    bounds = Range(at_least=at_least, above=above, below=below, at_most=at_most)
    metadata: dict[str, Any] = {
        "help": help,
        "choices": choices,
        "range": bounds if str(bounds) else None,
        "metavar": metavar,
    }
    metadata |= {"parse": parse, "resumable": resumable, "since": since, "methods": methods}
    return field(default=default, metadata=metadata)


def require(condition: bool, name: str, message: str) -> None:
    """InputError on the field `name` unless `condition`."""
    if not condition:
        raise InputError(name, message)


class Settings:
    """Base of the groups: every field is checked against its declaration whenever a group is made."""

    def __post_init__(self) -> None:
        for name, value in checked(type(self), vars(self)).items():
            setattr(self, name, value)


def checked(group: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` of fields of `group`, with tuples for lists and floats where whole numbers stand for them; InputError
    that names the first field whose value is none that it may have."""
    result = {}
    for entry in dataclasses.fields(group):
        if entry.name in values:
            result[entry.name] = _checked(entry, type_hints(group)[entry.name], values[entry.name])
    return result


@functools.cache
def type_hints(group: type) -> dict[str, Any]:
    """Field → its annotation."""
    return typing.get_type_hints(group)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types that a field may have, None's left out."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return tuple(kind for kind in (typing.get_args(hint) if union else (hint,)) if kind is not type(None))


def _checked(entry: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    optional = type(None) in typing.get_args(hint)
    if value is None and optional:
        return None
    for kind in alternatives(hint):
        converted = _converted(kind, value)
        if converted is not None:
            break
    else:
        expected = [*map(_described, alternatives(hint)), *(["null"] if optional else [])]
        raise InputError(entry.name, f"must be {' or '.join(expected)}, got {reprlib.repr(value)}")
    choices = entry.metadata["choices"]
    if choices and converted not in choices:
        raise InputError(entry.name, f"{converted!r} is not one of {', '.join(choices)}")
    for part in converted if isinstance(converted, tuple) else (converted,):
        if isinstance(part, str):
            require(part != "", entry.name, "must not be empty")
            require("\0" not in part, entry.name, "must not hold a null character")
        elif not isinstance(part, bool):
            _check_number(entry, part)
    return converted


def _check_number(entry: dataclasses.Field[Any], value: float) -> None:
    allowed = entry.metadata["range"] or Range()
    finite = not isinstance(value, float) or math.isfinite(value)
    require(finite, entry.name, f"must be a finite number, got {value}")
    require(value in allowed, entry.name, f"must be {allowed}, got {reprlib.repr(value)}")
    if isinstance(value, int) and allowed.at_most is None and allowed.below is None:
        require(value <= _LARGEST, entry.name, f"must be at most {_LARGEST}, got {reprlib.repr(value)}")


def _converted(kind: Any, value: Any) -> Any:
    """`value` as `kind`; None if it is none."""
    if typing.get_origin(kind) is tuple:
        parts = (
            [_converted(typing.get_args(kind)[0], part) for part in value] if isinstance(value, list | tuple) else []
        )
        return None if None in parts or not isinstance(value, list | tuple) else tuple(parts)
    if isinstance(value, bool):
        return value if kind is bool else None
    if kind is int and isinstance(value, numbers.Integral):
        return int(value)
    if kind is float and isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    if kind is str and isinstance(value, str | os.PathLike):
        return os.fspath(value)
    return None


def _described(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return f"a list, each {_KINDS[typing.get_args(kind)[0]]}"
    return _KINDS[kind]
