"""What settings become: the numbers of the method that a run trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers.small_steps import configuration, small_trainer

GAN = {"method": "gan", "penalty": ["none"]}
# Settings → where the method has them, and what it must have there.
NUMBERS: dict[str, tuple[dict[str, Any], Callable[[Any], Any], Any]] = {
    "batch statistics": ({**GAN, "sample_bn": "batch"}, lambda m: m.batch_statistics, True),
    "running statistics": (GAN, lambda m: m.batch_statistics, False),
    "a critic's rate": ({**GAN, "critic_lr": 0.25}, lambda m: m.critic_step.optimizer.param_groups[0]["lr"], 0.25),
    "a critic's betas": (
        {**GAN, "critic_beta1": 0.25, "critic_beta2": 0.75},
        lambda m: m.critic_step.optimizer.param_groups[0]["betas"],
        (0.25, 0.75),
    ),
    "a generator's betas": (
        {**GAN, "beta1": 0.25, "beta2": 0.75},
        lambda m: m.generator_step.optimizer.param_groups[0]["betas"],
        (0.25, 0.75),
    ),
    "a critic's steps": (
        {**GAN, "critic_steps": 3, "critic_many": 7, "critic_warmup": 2, "critic_every": 9},
        lambda m: (m.critic_steps.usual, m.critic_steps.more, m.critic_steps.warmup, m.critic_steps.every),
        (3, 7, 2, 9),
    ),
    "a penalty's weight": (
        {"method": "gan", "penalty": ["r1"], "penalty_weight": [3.5]},
        lambda m: [penalty.weight for penalty in m.penalties],
        [3.5],
    ),
    "a clip's limit": (
        {"method": "gan", "penalty": ["clip"], "penalty_weight": [0.125]},
        lambda m: [penalty.limit for penalty in m.penalties],
        [0.125],
    ),
    "BEGAN": ({"method": "began", "began_gamma": 0.25, "began_rate": 0.125}, lambda m: (m.game.gamma, m.game.rate),
              (0.25, 0.125)),
    "Fisher GAN": ({"method": "fisher-gan", "fisher_rho": 0.25}, lambda m: m.game.rho, 0.25),
    "MMD-GAN": (
        {"method": "mmd-gan", "kernel": "rbf", "kernel_bandwidths": (0.5, 3.0)},
        lambda m: m.game.kernel.bandwidths,
        (0.5, 3.0),
    ),
    "McGAN, means": ({"method": "mcgan", "match_norm": "inf"}, lambda m: m.game.order, float("inf")),
    "McGAN, covariances": (
        {"method": "mcgan", "match": "covariance", "match_directions": 3}, lambda m: m.game.components, 3
    ),
    "DFM": (
        {"method": "dfm", "adversarial_weight": 0.25, "denoise_weight": 0.75, "denoise_deviation": 0.5},
        lambda m: (m.weights, m.deviation),
        ({"adversarial": 0.25, "denoising": 0.75}, 0.5),
    ),
    "DFM's rate": (
        {"method": "dfm", "denoiser_lr": 0.25}, lambda m: m.denoiser_step.optimizer.param_groups[0]["lr"], 0.25
    ),
    "MoLM": (
        {"method": "molm", "moment_penalty": 0.25, "moment_scale": 0.75},
        lambda m: (m.penalty, m.network.scale),
        (0.25, 0.75),
    ),
    "VAE": ({"method": "vae", "code_weight": 0.25}, lambda m: (m.weight, m.divergence), (0.25, "kl")),
    "WAE": ({"method": "wae", "code_weight": 0.25}, lambda m: (m.weight, m.divergence), (0.25, "mmd")),
    "WAE-GAN": ({"method": "wae", "divergence": "gan"}, lambda m: m.divergence, "gan"),
    "GMMN-AE": (
        {"method": "gmmn-ae", "code_bandwidths": (0.5, 3.0), "autoencoder_steps": 3},
        lambda m: (m.bandwidths, m.autoencoder_steps),
        ((0.5, 3.0), 3),
    ),
    "GLO's ball": ({"method": "glo", "code_radius": 2.5}, lambda m: m.table.radius, 2.5),
    "IMLE's pool": ({"method": "imle", "pool_size": 9, "pool_every": 4}, lambda m: (m.pool.size, m.pool.every), (9, 4)),
    "GLANN's phases": (
        {"method": "glann", "pool_size": 9, "pool_every": 4, "glo_steps": 3},
        lambda m: (m.pool.size, m.pool.every, m.glo_steps),
        (9, 4, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", NUMBERS)
def test_a_method_has_the_numbers_that_are_given(what: str) -> None:
    given, found, expected = NUMBERS[what]
    assert found(small_trainer(configuration("digits", given)).method) == expected
