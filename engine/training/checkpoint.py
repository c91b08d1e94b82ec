"""Checkpoints: one safetensors file each, written atomically, and nothing in it can execute code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.generation.networks import build_generator
from engine.support.errors import InputError
from engine.support.files import save_safetensors

_CHECKPOINT = "gfmn-checkpoint-1"
_GENERATOR = "gfmn-generator-1"


@dataclass
class Checkpoint:
    """All that a run needs to go on after `step` steps.

    Attributes:
        step: training steps taken.
        parts: state dicts by name: "generator", "optimizer", "objective", "ema", "random".
        fingerprint: of extractor, precision and dataset, as in the target.
    """

    step: int
    parts: dict[str, dict[str, Tensor]]
    fingerprint: dict[str, str]

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        tensors = {f"{part}/{name}": tensor for part, state in self.parts.items() for name, tensor in state.items()}
        metadata = {"format": _CHECKPOINT, "step": str(self.step), "fingerprint": json.dumps(self.fingerprint)}
        save_safetensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a file that `save` wrote; InputError that names it if it is damaged or something else."""
        tensors, metadata = read_safetensors(path, _CHECKPOINT, "a checkpoint of this engine")
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, key = name.split("/", 1)
            parts.setdefault(part, {})[key] = tensor
        return cls(int(metadata["step"]), parts, json.loads(metadata["fingerprint"]))


def read_safetensors(path: Path, kind: str, description: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file whose metadata say `format: kind`; InputError that names the file otherwise."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != kind:
                raise InputError(f"{path}: is not {description}")
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(f"{path}: does not exist") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: is truncated or damaged ({error}); delete it to go on from an older one") from None


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's per-parameter state as tensors named `<parameter>.<entry>`."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value) for index, entry in state.items() for name, value in entry.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `flatten_optimizer`; rates stay as the optimizer was made.

    What has a parameter's shape also gets its memory format: the fused Adam walks both in memory order.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        index, entry = name.split(".", 1)
        parameter = parameters[int(index)]
        same_shape = tensor.shape == parameter.shape
        state.setdefault(int(index), {})[entry] = torch.empty_like(parameter).copy_(tensor) if same_shape else tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_generator(path: Path, generator: nn.Module, *, name: str, image_size: int, nz: int, step: int) -> None:
    """Write the generator's weights with what is needed to build it again."""
    metadata = {"format": _GENERATOR, "name": name, "image_size": str(image_size), "nz": str(nz), "step": str(step)}
    save_safetensors(path, generator.state_dict(), metadata)


@dataclass
class SavedGenerator:
    """A generator read from a file, and how it was made."""

    module: nn.Module
    name: str
    image_size: int
    nz: int
    step: int


def load_generator(path: Path) -> SavedGenerator:
    """Read a file that `save_generator` wrote."""
    tensors, metadata = read_safetensors(path, _GENERATOR, "a generator of this engine")
    size, nz = int(metadata["image_size"]), int(metadata["nz"])
    module = build_generator(metadata["name"], image_size=size, nz=nz)
    try:
        module.load_state_dict(tensors)
    except RuntimeError:
        raise InputError(f"{path}: its weights are not those of the generator {metadata['name']}") from None
    return SavedGenerator(module, metadata["name"], size, nz, int(metadata["step"]))
