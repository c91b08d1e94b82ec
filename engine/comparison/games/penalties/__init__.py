"""What keeps a critic smooth: pure functions of a critic step; nothing here knows a network.

Several penalties are applied one after the other: `scaled` first, as it divides the game's loss, and the others add to
the quotient.
"""

from collections.abc import Callable
from functools import partial

from engine.comparison.games.penalties.gradients import R1, GradientPenalty, Scaled, WitnessPenalty
from engine.comparison.games.penalties.of_outputs import Activations, Autoencoding, Consistency
from engine.comparison.games.penalties.protocols import PENALTY, SCALE, Penalty, Play
from engine.comparison.games.penalties.weights import Clip, NoPenalty

# What a penalty is called → what makes it, in the order in which several are applied. All but `none` and `clip` take a
# `weight`; `clip` a `limit`; `scaled` and `witness` the game's `kernel`.
PENALTIES: dict[str, Callable[..., Penalty]] = {
    "none": NoPenalty,
    "scaled": Scaled,
    "clip": Clip,
    "gradient": GradientPenalty,
    "r1": R1,
    "consistency": Consistency,
    "balanced-consistency": partial(Consistency, balanced=True),
    "witness": WitnessPenalty,
    "activations": Activations,
    "autoencode": Autoencoding,
}

__all__ = ["PENALTIES", "PENALTY", "SCALE", "Penalty", "Play"]
