"""A training engine for generators that learn by comparing features (dos Santos et al., ICCV 2019, arXiv 1904.02762).

The public names are loaded at their first use, so `import engine` costs nothing and imports no PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.comparison.averagers import AMA, MovingAverage, NoAverage
    from engine.comparison.distances.moments import Moments
    from engine.comparison.moment_matching import MomentMatching
    from engine.comparison.on_features import OnFeatures
    from engine.generation.networks import build_generator
    from engine.representation.build import build_extractor

__version__ = "0.2.0"

_HOMES = {
    "AMA": "engine.comparison.averagers",
    "Moments": "engine.comparison.distances.moments",
    "MomentMatching": "engine.comparison.moment_matching",
    "MovingAverage": "engine.comparison.averagers",
    "NoAverage": "engine.comparison.averagers",
    "OnFeatures": "engine.comparison.on_features",
    "build_extractor": "engine.representation.build",
    "build_generator": "engine.generation.networks",
}
__all__ = [
    "AMA",
    "MomentMatching",
    "Moments",
    "MovingAverage",
    "NoAverage",
    "OnFeatures",
    "__version__",
    "build_extractor",
    "build_generator",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
