"""Settings of how gradients change weights."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from engine.configuration.options import Settings, option, require
from engine.methods.gradient_step import OPTIMIZERS
from engine.training.rates import DECAYS


def read_decays(text: str) -> float | tuple[float, ...]:
    """For argparse: a number, or several as in .99,.999."""
    try:
        numbers = tuple(map(float, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor several, as in .99,.999") from None
    return numbers[0] if len(numbers) == 1 else numbers


def one_or_several(decays: float | tuple[float, ...] | None) -> float | tuple[float, ...] | None:
    """`decays` with a number in place of a list of one; InputError if it is empty or has a number twice."""
    if not isinstance(decays, tuple):
        return decays
    require(len(decays) > 0, "generator_ema", "is an empty list; give null for none")
    require(len(set(decays)) == len(decays), "generator_ema", "has the same decay twice")
    return decays if len(decays) > 1 else decays[0]


def all_of(decays: float | tuple[float, ...] | None) -> tuple[float, ...]:
    """The moving averages' decays, in the order that they were given in."""
    return decays if isinstance(decays, tuple) else () if decays is None else (decays,)


@dataclass(kw_only=True)
class UpdatesConfig(Settings):
    """How gradients change the generator's weights."""

    optimizer: str = option(
        "adam", "Adam, AdamW with its weight decay, or RMSprop", choices=tuple(OPTIMIZERS), since="0.2"
    )
    weight_decay: float | None = option(
        None,
        "share of a weight that a step of AdamW takes away, in units of the learning rate (0.01 by default); of "
        "every network that has AdamW; but the map of --method glann always has AdamW with 1e-5",
        at_least=0,
        at_most=1e6,
        metavar="X",
        since="0.2",
    )
    lr_schedule: str = option(
        "constant",
        "what becomes of --lr after the warm-up: it stays, or falls to --lr-final in a line or along half a cosine; "
        "one that falls needs all --steps at the start, and a resumed run cannot change them",
        choices=tuple(DECAYS),
        since="0.2",
    )
    warmup_steps: int = option(
        0, "steps in which the rate rises in a line from 0 to --lr", at_least=0, metavar="N", since="0.2"
    )
    lr_final: float = option(
        0.0,
        "rate after the last step of a falling --lr-schedule",
        at_least=0,
        at_most=1e30,
        metavar="X",
        since="0.2",
    )
    clip_grad: float | None = option(
        None,
        "scale the gradients of the generator (and encoder) down if their norm, over all weights together, is larger",
        above=0,
        at_most=1e30,
        metavar="NORM",
        since="0.2",
    )
    max_skipped: int = option(
        20,
        "stop when more steps in a row have a NaN or infinite gradient; each is skipped, with the weights as they "
        "were, and fp16 skips up to 16 at first to find its scale",
        at_least=0,
        metavar="N",
        resumable=True,
        since="0.2",
    )
    sample_ema: float | None = option(
        None,
        "which of several --generator-ema is sampled, evaluated and saved (default: the first)",
        above=0,
        below=1,
        metavar="DECAY",
        since="0.2",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        falls = self.lr_schedule != "constant"
        require(falls or self.lr_final == 0, "lr_final", "needs a --lr-schedule that falls: linear or cosine")
