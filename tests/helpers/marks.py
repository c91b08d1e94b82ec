"""Helper: which of a test's parameters are left to the slow tests."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow(*value: Any) -> Any:
    """For `parametrize`: one set of arguments whose test is a slow one."""
    return pytest.param(*value, marks=pytest.mark.slow)


def quick(values: Iterable[Any], always: Collection[Any]) -> list[Any]:
    """For `parametrize`: `values` (a tuple is a set of arguments); all but those in `always` make slow tests."""
    return [value if value in always else slow(*value) if isinstance(value, tuple) else slow(value) for value in values]
