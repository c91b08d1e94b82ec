"""Checkpoints: one safetensors file each, written atomically, and nothing in it can execute code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.support.errors import InputError, one_line
from engine.support.files import read_safetensors, save_safetensors

_FORMAT = "gfmn-checkpoint-2"


@dataclass
class Checkpoint:
    """All that a run needs to resume after `step` steps.

    Attributes:
        step: training steps taken.
        parts: state dicts by name: the method's modules ("generator", …), "optimizer.generator", …, "rates" of the
            optimizers, "method", "random", "images" (the place of the next minibatch), "ema" (of several
            "ema.0.99", …), "skipped" steps, "validation".
        fingerprint: of extractor, precision and dataset, as in the target, or of the dataset alone; and of settings.
    """

    step: int
    parts: dict[str, dict[str, Tensor]]
    fingerprint: dict[str, str]

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        tensors = {f"{part}/{name}": tensor for part, state in self.parts.items() for name, tensor in state.items()}
        metadata = {"format": _FORMAT, "step": str(self.step), "fingerprint": json.dumps(self.fingerprint)}
        metadata["parts"] = json.dumps(list(self.parts))  # of one without tensors the file has nothing else
        save_safetensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a file that `save` wrote; InputError that names it if it is damaged or something else."""
        tensors, metadata = read_safetensors(path, _FORMAT, "a checkpoint of this version of the engine", advice="")
        try:
            parts: dict[str, dict[str, Tensor]] = {part: {} for part in json.loads(metadata.get("parts", "[]"))}
            for name, tensor in tensors.items():
                part, key = name.split("/", 1)
                parts.setdefault(part, {})[key] = tensor
            return cls(int(metadata["step"]), parts, dict(json.loads(metadata["fingerprint"])))
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(path, f"is damaged ({one_line(error)})") from None


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
