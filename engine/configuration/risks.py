"""What a configuration is free to ask for, and seldom means."""

from __future__ import annotations

from engine.configuration.adversarial import missing_bounds
from engine.configuration.config import Config
from engine.configuration.methods import ADVERSARIAL


def risks(config: Config, images: int) -> list[str]:
    """A line for each; `images` is how many real ones there are."""
    found = []
    if config.method.method in ADVERSARIAL and (bounds := missing_bounds(config)):
        found.append(f"nothing bounds this critic, and its loss may grow without end; add {bounds}")
    steps, epoch = config.latent.glo_steps, -(-images // config.training.batch_size)
    if config.method.method == "glann" and steps < epoch:
        found.append(
            f"--glo-steps {steps} are less than an epoch, {epoch}: noise is mapped to codes never learnt as well"
        )
    return found
