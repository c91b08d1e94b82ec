"""A sampler in a file: the generator's weights, and what is needed to build it and its prior again."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.generation.learnt import noise_name, read_prior
from engine.generation.networks import build_generator
from engine.generation.sampling import Sampler
from engine.support.errors import InputError
from engine.support.files import read_safetensors, save_safetensors

_FORMAT = "gfmn-generator-1"
_MOST_STEPS = 10**12
_PRIOR, _UPSAMPLING = "gaussian", "transposed"  # of files that name none
_OF_PRIOR = "prior."
"""Tensors whose names begin so are the prior's, all others the generator's."""


@dataclass(frozen=True)
class SavedSampler(Sampler):
    """A sampler read from a file.

    Attributes:
        step: training steps that its generator has taken.
    """

    step: int = 0


def save_sampler(path: Path, sampler: Sampler, step: int) -> None:
    """Write the generator's weights with what is needed to build the sampler again, whole or not at all."""
    spec, prior = sampler.generator.spec, sampler.prior
    metadata = {"format": _FORMAT, "name": spec.name, "image_size": str(spec.image_size), "nz": str(spec.nz)}
    metadata["step"] = str(step)
    if spec.upsampling != _UPSAMPLING:
        metadata["upsampling"] = spec.upsampling
    if prior.name != _PRIOR:
        metadata["prior"] = prior.name
    if noise := noise_name(prior):
        metadata["prior_noise"] = noise
    if sampler.batch_statistics:
        metadata["bn"] = "batch"
    of_prior = {_OF_PRIOR + name: tensor for name, tensor in prior.state_dict().items()}
    save_safetensors(path, {**sampler.generator.state_dict(), **of_prior}, metadata)


def load_sampler(path: Path) -> SavedSampler:
    """Read a file that `save_sampler` wrote; InputError that names the file if it is damaged or something else."""
    every, metadata = read_safetensors(path, _FORMAT, "a generator of this engine")
    tensors = {name: tensor for name, tensor in every.items() if not name.startswith(_OF_PRIOR)}
    of_prior = {name[len(_OF_PRIOR) :]: every[name] for name in every.keys() - tensors.keys()}
    try:
        size, nz = int(metadata["image_size"]), int(metadata["nz"])
        make = functools.partial(
            build_generator,
            metadata["name"],
            image_size=size,
            nz=nz,
            upsampling=metadata.get("upsampling", _UPSAMPLING),
        )
        with torch.device("meta"):  # no memory for what the file only claims
            expected = make().state_dict()
        prior = read_prior(metadata.get("prior", _PRIOR), nz, of_prior, metadata.get("prior_noise", ""))
        step = int(metadata["step"])
        if not 0 <= step <= _MOST_STEPS:
            raise ValueError(f"step {step}")
    except (InputError, KeyError, ValueError) as error:
        raise InputError(path, f"is not a generator that this version can build ({error})") from None
    if _kinds(tensors) != _kinds(expected):
        raise InputError(path, f"its weights are not those of the generator {metadata['name']}")
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise InputError(path, "holds weights that are not finite")
    generator = make()
    generator.load_state_dict(tensors)
    return SavedSampler(prior, generator, metadata.get("bn") == "batch", step)


def _kinds(state: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
