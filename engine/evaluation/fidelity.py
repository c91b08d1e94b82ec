"""torch-fidelity, which computes the metrics: an extra that is imported when it is first needed."""

from __future__ import annotations

from types import ModuleType

from engine.support.errors import require


def fidelity() -> ModuleType:
    """The package; InputError that says how to install it if it is missing."""
    return require("torch_fidelity", "evaluation")
