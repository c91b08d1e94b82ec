"""Published recipes of adversarial methods: presets that say their papers' settings, and what the digits need of them.

Where a paper leaves something open, its authors' code decides; sizes of networks are this engine's (DCGAN's, or the
residual ones of SN-GAN). Learning rates and β are of both networks unless the critic's are given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OFTEN = {"sample_every": 1000, "checkpoint_every": 5000, "log_every": 100}
_WGAN: dict[str, Any] = {
    "optimizer": "rmsprop",
    "lr": 5e-5,
    "critic_steps": 5,
    "critic_warmup": 25,
    "critic_every": 500,
    "critic_many": 100,
    "penalty": ("clip",),
    "penalty_weight": (0.01,),
}
_MMD: dict[str, Any] = {"method": "mmd-gan", "lr": 1e-4, "beta1": 0.5, "beta2": 0.9, "critic_steps": 5}
_SMMD: dict[str, Any] = {
    **_MMD,
    "kernel": "rbf",
    "kernel_bandwidths": (1.0,),
    "scaled": True,
    "critic_outputs": 1,
    "critic_warmup": 20,
    "critic_every": 100,
    "critic_many": 10,
    "nz": 128,
    "steps": 150_000,
}
_WITNESS: dict[str, Any] = {
    **_MMD,
    "penalty": ("witness", "activations"),
    "penalty_weight": (1.0, 1.0),
    "critic_outputs": 16,
    "steps": 150_000,
}

PUBLISHED: dict[str, dict[str, Any]] = {
    # Radford et al. 2016: Adam at 2e-4 with β1 .5, minibatch 128, z uniform, BatchNorm in both networks.
    "dcgan": {
        "method": "gan",
        "game": "nonsaturating",
        "critic_norm": "batch",
        "batch_size": 128,
        "prior": "uniform",
        "lr": 2e-4,
        "steps": 100_000,
    },
    # Mao et al. 2017: least squares, Adam at 1e-3 with β1 .5, minibatch 64.
    "lsgan": {"method": "gan", "game": "least-squares", "critic_norm": "batch", "lr": 1e-3, "steps": 100_000},
    # Hjelm et al. 2018: DCGAN's networks and rates, the generator drawn to the critic's boundary.
    "bgan": {"method": "gan", "game": "boundary-seeking", "critic_norm": "batch", "lr": 2e-4, "steps": 100_000},
    # Arjovsky et al. 2017: RMSprop at 5e-5, weights clipped to ±.01, 5 critic steps, 100 in the first 25 and every
    # 500th step of the generator.
    "wgan": {"method": "gan", "game": "wasserstein", "critic_norm": "batch", **_WGAN, "steps": 200_000},
    # Gulrajani et al. 2017: λ 10, Adam at 1e-4 with β (.5, .9), 5 critic steps, no BatchNorm in the critic.
    "wgan-gp": {
        "method": "gan",
        "game": "wasserstein",
        "penalty": ("gradient",),
        "penalty_weight": (10.0,),
        "lr": 1e-4,
        "beta1": 0.5,
        "beta2": 0.9,
        "critic_steps": 5,
        "generator": "resnet",
        "critic": "resnet",
        "steps": 200_000,
    },
    # Miyato et al. 2018: hinge, spectral norm, Adam at 2e-4 with β (0, .9), 5 critic steps, z of 128 dimensions, the
    # rate falling in a line to 0.
    "sngan": {
        "method": "gan",
        "game": "hinge",
        "critic_norm": "spectral",
        "lr": 2e-4,
        "beta1": 0.0,
        "beta2": 0.9,
        "critic_steps": 5,
        "nz": 128,
        "generator": "resnet",
        "critic": "resnet",
        "lr_schedule": "linear",
        "steps": 100_000,
    },
    # Mescheder et al. 2018: γ 10, RMSprop at 1e-4, one critic step, weights averaged at .999.
    "r1": {
        "method": "gan",
        "game": "nonsaturating",
        "penalty": ("r1",),
        "penalty_weight": (10.0,),
        "optimizer": "rmsprop",
        "lr": 1e-4,
        "generator": "resnet",
        "critic": "resnet",
        "generator_ema": 0.999,
        "steps": 500_000,
    },
    # Zhang et al. 2020 (CR-GAN): λ 10, flips and shifts of at most an eighth, Adam at 2e-4 with β (.5, .999), spectral
    # norm, minibatch 64.
    "cr-gan": {
        "method": "gan",
        "game": "nonsaturating",
        "penalty": ("consistency",),
        "penalty_weight": (10.0,),
        "critic_norm": "spectral",
        "lr": 2e-4,
        "steps": 100_000,
    },
    # Zhao et al. 2021 (bCR-GAN): the same of generated images besides, with the same weight.
    "bcr-gan": {
        "method": "gan",
        "game": "nonsaturating",
        "penalty": ("balanced-consistency",),
        "penalty_weight": (10.0,),
        "critic_norm": "spectral",
        "lr": 2e-4,
        "steps": 100_000,
    },
    # Berthelot et al. 2017: γ .5, λ 1e-3, Adam at 1e-4, minibatch 16, z uniform with 64 dimensions.
    "began": {
        "method": "began",
        "critic": "autoencoder",
        "began_gamma": 0.5,
        "began_rate": 1e-3,
        "lr": 1e-4,
        "batch_size": 16,
        "prior": "uniform",
        "nz": 64,
        "upsampling": "nearest",
        "steps": 200_000,
    },
    # Li et al. 2017: √MMD² with five Gaussians, 8 times the autoencoder's error, RMSprop at 5e-5, weights clipped to
    # ±.01, critic steps as of WGAN, BatchNorm; z and the critic's outputs have 128 dimensions for CIFAR10.
    "mmd-gan-rbf": {
        "method": "mmd-gan",
        "kernel": "rbf",
        "estimate": "root",
        "critic": "encoder-decoder",
        "critic_norm": "batch",
        "critic_outputs": 128,
        "nz": 128,
        **_WGAN,
        "penalty": ("clip", "autoencode"),
        "penalty_weight": (0.01, 8.0),
        "steps": 100_000,
    },
    # Bińkowski et al. 2018: rational quadratics α .2 to 5, witness penalty λ 1 and L2 of the features, 16 of them, Adam
    # at 1e-4 with β (.5, .9), 5 critic steps. Their test that lowers the rates is `lr_adapt`, which needs a judge.
    "mmd-gan-rq": {**_WITNESS, "kernel": "rq"},
    # The same with x·y added to the kernel.
    "mmd-gan-rq-star": {**_WITNESS, "kernel": "rq*"},
    # Arbel et al. 2018: MMD² divided by the critic's mean squared gradient, λ 10, one output, Adam at 1e-4 with
    # β (.5, .9), 5 critic steps, 10 in the first 20 and every 100th step of the generator, z of 128 dimensions.
    "smmd": _SMMD,
    # The same with spectral parametrisation, γ · W / σ(W).
    "sn-smmd": {**_SMMD, "critic_norm": "spectral-scaled"},
    # Mroueh & Sercu 2017: ρ 1e-6, Adam at 2e-4 with β1 .5, 2 critic steps.
    "fisher-gan": {
        "method": "fisher-gan",
        "fisher_rho": 1e-6,
        "critic_norm": "batch",
        "lr": 2e-4,
        "critic_steps": 2,
        "steps": 100_000,
    },
    # Mroueh et al. 2017: means in the 2-norm, RMSprop at 5e-5, weights clipped to ±.01, 5 critic steps.
    "mcgan": {"method": "mcgan", "match": "mean", "critic_norm": "batch", **_WGAN, "steps": 100_000},
    # The same paper's covariances: 16 directions.
    "mcgan-covariance": {"method": "mcgan", "match": "covariance", "critic_norm": "batch", **_WGAN, "steps": 100_000},
    # Salimans et al. 2016: features of the critic's last layer matched, Adam at 3e-4 with β1 .5.
    "improved-gan": {"method": "improved-gan", "critic_norm": "batch", "lr": 3e-4, "steps": 100_000},
    # Warde-Farley & Bengio 2017: Adam at 1e-4 with β1 .5, a denoiser of 10 layers with 1,024 units, noise of deviation
    # 1, weights .03/h of denoising and 1 of the game.
    "dfm": {
        "method": "dfm",
        "critic_norm": "batch",
        "denoise_weight": 0.03,
        "adversarial_weight": 1.0,
        "denoise_deviation": 1.0,
        "denoiser_width": 1024,
        "denoiser_layers": 10,
        "lr": 1e-4,
        "beta1": 0.5,
        "steps": 100_000,
    },
    # Ravuri et al. 2018: activations and weight gradients, the network trained again for every objective, moments of
    # the whole data set. Numbers of steps and weights are this engine's.
    "molm": {
        "method": "molm",
        "moment_every": 100,
        "moment_steps": 100,
        "moment_images": 50_000,
        "moment_penalty": 0.01,
        "moment_scale": 0.1,
        "lr": 1e-4,
        "beta1": 0.5,
        "batch_size": 256,
        "steps": 200_000,
    },
}
"""Without data of one's own these are trained on the digits, with `ON_DIGITS` and `OF_DIGITS` in place of theirs."""
PUBLISHED = {_name: {**_values, **_OFTEN} for _name, _values in PUBLISHED.items()}

USUAL: dict[str, dict[str, Any]] = {
    "gan": {"lr": 2e-4},
    "mmd-gan": {
        name: value for name, value in PUBLISHED["mmd-gan-rq"].items() if name != "steps" and name not in _OFTEN
    },
    "began": {"critic": "autoencoder", "lr": 1e-4},
    "fisher-gan": {"lr": 2e-4, "critic_steps": 2},
    "mcgan": {name: value for name, value in _WGAN.items() if name not in ("critic_warmup", "critic_every")},
    "improved-gan": {"lr": 3e-4},
    "dfm": {"critic_norm": "batch", "lr": 1e-4},
    "molm": {"lr": 1e-4},
}
"""What a method has in place of a preset's values that are not its own."""

ON_DIGITS: dict[str, Any] = {
    "batch_size": 64,
    "steps": 1200,
    "critic_steps": 1,
    "generator": "dcgan",
    "generator_ema": 0.995,
    "lr_schedule": "constant",
    "critic_warmup": 0,
    "critic_every": None,
    "log_every": 20,
    "sample_every": 200,
    "checkpoint_every": 400,
}
"""Minutes on two cores. In so few steps one of the critic's for each of the generator's is what draws most."""
_KERNELS: dict[str, Any] = {"steps": 1300, "lr": 5e-4}
_SCALED: dict[str, Any] = {**_KERNELS, "critic_many": 100, "nz": 100}
_CLIPPED: dict[str, Any] = {"critic_steps": 3, "lr": 2e-4, "steps": 700}
OF_DIGITS: dict[str, dict[str, Any]] = {
    "dcgan": {"steps": 1500},
    "lsgan": {"steps": 1750, "lr": 5e-4},
    "wgan": _CLIPPED,
    "wgan-gp": {"steps": 1850, "optimizer": "rmsprop", "lr": 3e-4, "critic": "dcgan"},
    "sngan": {"steps": 1700, "lr": 4e-4, "beta1": 0.5, "critic": "dcgan"},
    "r1": {"steps": 1400, "lr": 2e-4, "critic": "dcgan"},
    "began": {"batch_size": 16, "steps": 600},
    "mmd-gan-rbf": _CLIPPED,
    "mmd-gan": _KERNELS,
    "mmd-gan-rq": _KERNELS,
    "mmd-gan-rq-star": _KERNELS,
    "smmd": _SCALED,
    "sn-smmd": _SCALED,
    "mcgan": _CLIPPED,
    "mcgan-covariance": _CLIPPED,
    "dfm": {"lr": 5e-4, "denoiser_width": 512, "denoiser_layers": 5},
    "molm": {"lr": 1e-3, "critic_lr": 5e-4, "steps": 600, "moment_every": 5, "moment_steps": 5, "moment_images": 256},
}
"""By recipe, or by method with the preset of the digits."""


def published(name: str, *, on_digits: bool) -> Mapping[str, Any]:
    """The values of a published recipe, on the digits or on images of one's own."""
    values = PUBLISHED[name]
    return {**values, **ON_DIGITS, **OF_DIGITS.get(name, {})} if on_digits else values
