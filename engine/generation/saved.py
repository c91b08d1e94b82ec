"""A sampler in a file: its networks' weights, and what is needed to build them and its prior again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.generation.learnt import noise_name, read_prior
from engine.generation.networks import build_generator
from engine.generation.sampling import ImageEncoder, Sampler
from engine.support.errors import InputError
from engine.support.files import read_safetensors, save_safetensors

_FORMAT = "gfmn-generator-1"
_MOST_STEPS = 10**12
_PRIOR, _UPSAMPLING = "gaussian", "transposed"  # of files that name none
_GAUSSIAN, _BOUNDED = "gaussians", "bounded codes"  # what an encoder has for an image
_OF_PRIOR, _OF_ENCODER, _CODES = "prior.", "encoder.", "codes"
"""Tensors whose names begin so, or are called so, are the prior's, the encoder's and the codes, all others the
generator's."""

Encoders = Callable[..., ImageEncoder]
"""From a name, and by keyword `image_size`, `nz`, `gaussian` and `bounded`, to an encoder."""


@dataclass(frozen=True)
class SavedSampler(Sampler):
    """A sampler read from a file.

    Attributes:
        step: training steps that its generator has taken.
        codes_of: the digest of the pictures that `codes` are of; None if the file does not tell.
    """

    step: int = 0
    codes_of: str | None = None


def save_sampler(path: Path, sampler: Sampler, step: int, codes_of: str | None = None) -> None:
    """Write the weights with what is needed to build the sampler again, whole or not at all.

    An encoder without a name could not be built again, and is left out.

    Args:
        codes_of: the digest of the pictures that the sampler's codes are of ("content_sha256" in the fingerprint of
            their data set), where it has any.
    """
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
    others = {_OF_PRIOR + name: tensor for name, tensor in prior.state_dict().items()}
    if sampler.codes is not None:
        others[_CODES] = sampler.codes
        if codes_of is not None:
            metadata["codes_of"] = codes_of
    if (encoder := sampler.encoder) is not None and encoder.name:
        metadata["encoder"] = encoder.name
        metadata["encoder_outputs"] = _GAUSSIAN if encoder.gaussian else _BOUNDED if encoder.bounded else "codes"
        others |= {_OF_ENCODER + name: tensor for name, tensor in encoder.state_dict().items()}
    save_safetensors(path, {**sampler.generator.state_dict(), **others}, metadata)


def load_sampler(path: Path, encoders: Encoders | None = None) -> SavedSampler:
    """Read a file that `save_sampler` wrote; InputError that names the file if it is damaged or something else.

    Args:
        encoders: builds the encoder; None to leave it out.
    """
    tensors, metadata = read_safetensors(path, _FORMAT, "a generator of this engine")
    of_prior, of_encoder = (_taken(tensors, prefix) for prefix in (_OF_PRIOR, _OF_ENCODER))
    codes = tensors.pop(_CODES, None)
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
        encoder = None
        if encoders is not None and "encoder" in metadata:
            encoder = _read_encoder(encoders, metadata, size, nz, of_encoder)
        if codes is not None:
            _check_codes(codes, nz)
        step = int(metadata["step"])
        if not 0 <= step <= _MOST_STEPS:
            raise ValueError(f"step {step}")
    except (InputError, KeyError, ValueError) as error:
        raise InputError(path, f"is not a generator that this version can build ({error})") from None
    if _kinds(tensors) != _kinds(expected):
        raise InputError(path, f"its weights are not those of the generator {metadata['name']}")
    if not _are_finite(tensors):
        raise InputError(path, "holds weights that are not finite")
    generator = make()
    generator.load_state_dict(tensors)
    return SavedSampler(prior, generator, metadata.get("bn") == "batch", encoder, codes, step, metadata.get("codes_of"))


def _taken(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin with `prefix`, without it; they are no longer in `tensors`."""
    return {name[len(prefix) :]: tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}


def _read_encoder(
    encoders: Encoders, metadata: Mapping[str, str], size: int, nz: int, state: dict[str, Tensor]
) -> ImageEncoder:
    """ValueError unless `state` is that of the encoder that `metadata` tell of; InputError if it is none."""
    outputs = metadata["encoder_outputs"]
    options = {"image_size": size, "nz": nz, "gaussian": outputs == _GAUSSIAN, "bounded": outputs == _BOUNDED}
    with torch.device("meta"):
        expected = encoders(metadata["encoder"], **options).state_dict()
    if _kinds(state) != _kinds(expected) or not _are_finite(state):
        raise ValueError(f"its encoder's weights are not those of {metadata['encoder']}")
    encoder = encoders(metadata["encoder"], **options)
    encoder.load_state_dict(state)
    return encoder


def _check_codes(codes: Tensor, nz: int) -> None:
    if codes.dim() != 2 or codes.shape[1] != nz or codes.dtype != torch.float32 or not _are_finite({"codes": codes}):
        raise ValueError(f"its codes are not numbers [M, {nz}]")


def _are_finite(tensors: Mapping[str, Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def _kinds(state: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
