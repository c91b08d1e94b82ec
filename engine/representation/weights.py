"""Weights from files: read without executing anything, and checked against the network they are loaded into."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from engine.support.errors import InputError, one_line
from engine.support.files import check_file, read_tensors

_UNUSED = "num_batches_tracked"


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file or of a plain state dict; nothing in the file is executed.

    Raises InputError about `weights` if there is no such file or it may not be read, and about the file if it is
    damaged or holds something else.
    """
    path = Path(path)
    try:
        check_file(path)
    except InputError as error:
        raise InputError("weights", f"{path} {error.message}") from None
    try:
        state = read_tensors(path)[0] if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(path, f"is not a readable file of weights ({one_line(error)})") from None
    except Exception as error:  # pickle.UnpicklingError and whatever else a foreign file provokes
        raise InputError(path, f"is not a plain state dict ({type(error).__name__})") from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(path, "is not a plain state dict: expected names and tensors only")
    return dict(state)


def copy_weights(
    own: Mapping[str, Tensor],
    needed: Collection[str],
    state: Mapping[str, Tensor],
    what: str,
    *,
    argument: str | Path = "",
) -> None:
    """Copy `state` into the tensors `own` that are `needed`, in place. Other tensors (those of a classifier above the
    last tap, say) are ignored.

    Args:
        own: the network's parameters and buffers by name.
        needed: names of those that must be in `state`, of the same shape and finite.
        state: the weights by name.
        what: the start of an error's message: whose weights, or for which network.
        argument: the argument or the file that an error is about.

    Raises InputError that names the first keys that are missing, of another shape, or unknown.
    """
    needed = [key for key in needed if not key.endswith(_UNUSED)]
    missing = [key for key in needed if key not in state]
    shapes = [key for key in needed if key in state and state[key].shape != own[key].shape]
    # Tensors of parts that are needed, yet unknown: the file is of a larger network of the same family.
    parts = {_part(key) for key in needed}
    unknown = [key for key in state if key not in own and _part(key) in parts and not key.endswith(_UNUSED)]
    reasons = [
        f"{reason} {', '.join(keys[:3])}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        for reason, keys in (("lacks", missing), ("has another shape for", shapes), ("has", unknown))
        if keys
    ]
    if reasons:
        raise InputError(argument, f"{what}: these are weights of another network: the file {'; it '.join(reasons)}")
    with torch.no_grad():
        for key in needed:
            if not state[key].isfinite().all():
                raise InputError(argument, f"{what}: {key} holds values that are not finite")
            own[key].copy_(state[key])


def state_digest(tensors: Mapping[str, Tensor]) -> str:
    """First 16 hex digits of the SHA-256 over names and values."""
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        if not key.endswith(_UNUSED):
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _part(key: str) -> str:
    return key.partition(".")[0]
