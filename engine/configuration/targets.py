"""Whether a target fits a run, and what makes it fit: another device has other decoders and another precision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from engine.comparison.distances.moments import check_fingerprint
from engine.configuration.config import Config
from engine.support.errors import InputError

_LOW = {"bfloat16": "--amp --amp-dtype bf16", "float16": "--amp --amp-dtype fp16"}


def check_target(
    config: Config,
    expected: Mapping[str, str],
    found: Mapping[str, str],
    what: Path | str,
    device: torch.device,
    *,
    resumed: bool = False,
) -> None:
    """InputError about `what` if its fingerprint `found` differs from what the run on `device` `expected`.

    Besides what differs, the line says what to change where only the device, the precision or the loader are others.

    Args:
        resumed: `found` is that of a run to be resumed, and not of a file that was given.
    """
    try:
        check_fingerprint(expected, found, what)
    except InputError as error:
        different = {name for name in expected if name in found and found[name] != expected[name]}
        advice = _advice(config, different, expected, found, device, resumed)
        raise InputError(error.argument, "; ".join([error.message, *advice])) from None


def _advice(
    config: Config,
    different: set[str],
    expected: Mapping[str, str],
    found: Mapping[str, str],
    device: torch.device,
    resumed: bool,
) -> list[str]:
    if different == {"extractor_weights"} and config.networks.weights == ("pretrain",) and not resumed:
        return ["two machines pretrain two networks: give both commands the same files of --weights"]
    if not different <= {"precision", "data_decoder"}:
        return []
    flags: list[str] = []
    others: list[str] = []
    if "precision" in different:
        was, now = found["precision"], expected["precision"]
        if was == "tf32" and device.type == "cpu":
            does = "resume it on a GPU" if resumed else "train on a GPU, or make the target with --float32 ieee"
            others.append(f"a CPU has no TF32: {does}")
        else:
            flags.append(_precision(was, now, device))
    if "data_decoder" in different:
        loaders = {"pil": "torch", f"dali-{device.type}": "dali"}
        if (loader := loaders.get(found["data_decoder"])) is not None:
            flags.append(f"--loader {loader}")
        elif resumed and config.needs.features:
            place = "GPU" if found["data_decoder"] == "dali-cuda" else "CPU"
            others.append(
                f"its folder has no target any more, and only DALI on a {place} makes the same: resume it there"
            )
        elif resumed:
            others.append("resume it where it was trained")
        else:
            others.append("make the target on the device that trains, or give both commands --loader torch")
    return [*([f"with {' '.join(flags)} they agree"] if flags and not others else []), *others]


def _precision(was: str, now: str, device: torch.device) -> str:
    """The flags that compute in `was` on `device`, where the run's own give `now`."""
    if was in _LOW:
        return _LOW[was]
    flags = ["--no-amp"] if now in _LOW else []
    if device.type == "cuda":
        flags.append("--float32 tf32" if was == "tf32" else "--float32 ieee")
    return " ".join(flags)
