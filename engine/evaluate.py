"""How close images are to real ones: python -m engine.evaluate --run DIR --metrics fid,kid

The numbers are torch-fidelity's. Evaluation knows the generator and its images, never what it was trained for.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from engine.configuration.command import Parser, run_command
from engine.configuration.config import PRESETS, Config, DataConfig, add_flags, given_flags
from engine.configuration.data import open_data
from engine.configuration.devices import choose_device
from engine.evaluation.metrics import (
    KID_SUBSET,
    METRICS,
    SEED,
    EvaluationNetwork,
    ImageSet,
    check_metrics,
    check_sizes,
    compute_metrics,
    evaluation_network,
)
from engine.generation.sampling import RunSampler
from engine.representation.weights import read_state_dict, state_digest
from engine.representation.zoo import brings_weights
from engine.support.errors import InputError, require
from engine.support.files import write_atomically
from engine.training.run_folder import RunFolder
from pipelines import ImageDataset, read_pixels
from pipelines.arrays import read_pictures
from pipelines.datasets import ARRAY_SUFFIXES

log = logging.getLogger("gfmn")

# Only numbers of Inception's features may bear these names. Digits after the point for each.
_INCEPTION_KEYS = {
    "frechet_distance": "fid",
    "kernel_distance": "kid",
    "kernel_distance_std": "kid_std",
    "classifier_score": "is",
    "classifier_score_std": "is_std",
}
_LABELS = {"fid": "FID", "kid": "KID", "is": "Inception score"}
_DIGITS = {"kernel_distance": 6}
# The same ImageNet weights under two names.
_ALIASES = {"vgg19": "torchvision:vgg19_bn", "timm:tf_efficientnet_lite0": "efficientnet-lite0"}


def parser() -> Parser:
    """The command line."""
    arguments = Parser(
        prog="python -m engine.evaluate",
        description="Judge a run's samples, or given images, by torch-fidelity's FID, KID, Inception score, and "
        "precision and recall.",
    )
    add = arguments.add_argument
    judged = arguments.add_mutually_exclusive_group(required=True)
    judged.add_argument("--run", metavar="DIR", help="judge samples of this training run")
    judged.add_argument("--images", metavar="PATH", help="judge these: a folder of PNG or JPEG files, .npy or .npz")
    add("--best", action="store_true", help="with --run: the generator that --evaluate-every found best")
    add("--samples", type=int, metavar="N", help="with --run: how many samples (default: 5000)")
    add("--against", metavar="PATH", help="the real images: a folder, .npy or .npz (default: the run's data set)")
    add("--preset", choices=tuple(PRESETS), help="the real images: those of this preset; or give data flags")
    add("--real-samples", type=int, metavar="N", help="of a data set take only N images at random (default: all)")
    add("--metrics", default="fid,kid", metavar="NAMES", help=f"some of {','.join(METRICS)} (default: fid,kid)")
    add("--feature-extractor", metavar="NAME", help="another network than Inception-v3, such as efficientnet-lite0")
    add("--weights", metavar="FILE", help="of the evaluating network (default: Inception is downloaded)")
    add("--kid-subset-size", type=int, metavar="N", help="images in each of KID's 100 subsets (default: 1000)")
    add(
        "--seed",
        type=int,
        default=SEED,
        metavar="N",
        help=f"of samples and subsets (default: {SEED}, torch-fidelity's)",
    )
    add("--batch-size", type=int, default=64, metavar="N", help="images at a time (default: 64, torch-fidelity's)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    add("--json", type=Path, metavar="FILE", help="write the numbers, and all that they depend on")
    add_flags(arguments, "data")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, gather both sets of images, compare, print."""
    arguments = parser().parse_args(argv)
    metrics = tuple(dict.fromkeys(name.strip() for name in arguments.metrics.split(",") if name.strip()))
    _check(arguments)
    fidelity = require("torch_fidelity", "evaluation")
    device = choose_device(arguments.device, arguments.threads)
    config, sampler, step = None, None, None
    if arguments.run is not None:
        sampler = RunSampler.load(arguments.run, best=arguments.best)
        config, step = Config.load(RunFolder(arguments.run).config), sampler.saved.step
        count, side = arguments.samples or 5000, sampler.saved.image_size
        generated = ImageSet(torch.zeros(1, 3, side, side, dtype=torch.uint8), arguments.run)
    else:
        generated = _open(arguments.images, "--images")
        count, side = generated.count, generated.size[0]
    network = evaluation_network(arguments.feature_extractor, weights=arguments.weights, image_size=side)
    real = _real(arguments, config, unary=metrics == ("is",))
    check_sizes(network, generated, real)
    check_metrics(metrics, network, count, None if real is None else real.count, arguments.kid_subset_size)
    if config is not None and was_trained_on(config, arguments.feature_extractor, arguments.weights):
        log.warning(
            "warning: the run was trained to match the features of %s; by these its samples look better than they are",
            network.label,
        )
    if sampler is not None:
        log.info("%s: drawing %d samples of step %d", arguments.run, count, sampler.saved.step)
        generated = ImageSet(sampler.draw_pixels(count, arguments.seed, device), arguments.run)
    values = compute_metrics(
        generated,
        real,
        network,
        metrics,
        device=device,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        kid_subset_size=arguments.kid_subset_size,
        progress=sys.stderr.isatty(),
    )
    print(table(values, network, generated, real, step))
    if arguments.json is not None:
        report = {
            "metrics": named(values, network),
            "network": {"label": network.label, "digest": network.digest, "weights": arguments.weights},
            "precision_recall_network": "VGG16" if network.is_inception else network.label,
            "generated": {"source": generated.name, "images": generated.count, "step": step, "best": arguments.best},
            "real": None if real is None else {"source": real.name, "images": real.count},
            "image_size": list(generated.size),
            "seed": arguments.seed,
            "kid_subset_size": arguments.kid_subset_size or KID_SUBSET,
            "batch_size": arguments.batch_size,
            "device": str(device),
            "versions": {
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "torch-fidelity": fidelity.__version__,
            },
        }
        write_atomically(arguments.json, (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())


def named(values: Mapping[str, float], network: EvaluationNetwork) -> dict[str, float]:
    """`compute_metrics`' numbers under the names that they may bear: "fid" of Inception, else "...[network]"."""
    if network.is_inception:
        return {_INCEPTION_KEYS.get(key, key): value for key, value in values.items()}
    return {f"{key}[{network.label}]": value for key, value in values.items()}


def table(
    values: Mapping[str, float],
    network: EvaluationNetwork,
    generated: ImageSet,
    real: ImageSet | None,
    step: int | None = None,
) -> str:
    """What is printed: a heading that says what was compared by which network, then a line for each number."""
    heading = f"{generated.count} images of {generated.name}" + ("" if step is None else f", step {step}")
    heading += "" if real is None else f", against {real.count} of {real.name}"
    if network.is_inception:
        origin = f"weights {network.digest}" if network.digest else "torch-fidelity's weights"
        by = f"by Inception-v3 ({origin})" + ("; precision and recall by VGG16" if "precision" in values else "")
    else:
        by = (
            f"by {network.label} (weights {network.digest}), which is not Inception-v3: "
            "not comparable with published numbers"
        )
    rows = []
    for (key, value), name in zip(values.items(), named(values, network)):
        if key.endswith("_std"):
            continue
        digits = _DIGITS.get(key, 4)
        spread = f" ± {values[key + '_std']:.{digits}f}" if key + "_std" in values else ""
        rows.append((_LABELS.get(name, name), f"{value:.{digits}f}{spread}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join([heading, by, *(f"{name:{width}}  {value}" for name, value in rows)])


def was_trained_on(config: Config, name: str | None, weights: str | Path | None) -> bool:
    """Whether a run of `config` matched the features of the network `name` with `weights`, as far as can be told.

    Weights that a run pretrained for itself count as those of any file of the same architecture.
    """
    if name is None:
        return False
    parts, sources = config.networks.extractor.split("+"), config.networks.weights
    for part, source in zip(parts, sources if len(sources) == len(parts) else sources[:1] * len(parts)):
        if _ALIASES.get(part, part) != _ALIASES.get(name, name) or source == "random":
            continue
        if source == "imagenet" or (source == "pretrain" and brings_weights(part)):
            if weights is None:
                return True
        elif source == "pretrain" or (weights is not None and _same_weights(source, weights)):
            return True
    return False


def _same_weights(trained_on: str, weights: str | Path) -> bool:
    if not Path(trained_on).is_file():
        return False
    return state_digest(read_state_dict(trained_on)) == state_digest(read_state_dict(weights))


def _check(arguments: Any) -> None:
    if arguments.run is None:
        for flag, given in (("samples", arguments.samples is not None), ("best", arguments.best)):
            if given:
                raise InputError(f"--{flag}: belongs to --run; of --images all are judged")
    for flag in ("samples", "real_samples", "batch_size"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise InputError(f"--{flag.replace('_', '-')}: must be at least 1, got {value}")
    if not 0 <= arguments.seed < 2**32:
        raise InputError(f"--seed: must be from 0 to {2**32 - 1}, got {arguments.seed}")
    if arguments.json is not None and arguments.json.is_dir():
        raise InputError(f"--json: {arguments.json} is a folder; name a file")


def _open(path: str, flag: str) -> ImageSet:
    """The images of `--images` or `--against`."""
    file = Path(path).expanduser()
    if not file.exists():
        raise InputError(f"{flag}: {path} does not exist")
    if file.is_dir():
        return ImageSet(file)
    if file.suffix.lower() not in ARRAY_SUFFIXES:
        raise InputError(f"{flag}: {path} is neither a folder of images nor a .npy or .npz file")
    pictures, _ = read_pictures(file)
    return ImageSet(torch.from_numpy(pictures).permute(0, 3, 1, 2), str(path))


def _real(arguments: Any, of_run: Config | None, *, unary: bool) -> ImageSet | None:
    """The real images; None if no metric needs any."""
    names = {entry.name for entry in dataclasses.fields(DataConfig)}
    given = {name: value for name, value in given_flags(arguments).items() if name in names}
    if arguments.against is not None:
        other = ["preset"] * (arguments.preset is not None) + ["real-samples"] * (arguments.real_samples is not None)
        for flag in [*other, *given]:
            raise InputError(f"--{flag.replace('_', '-')}: contradicts --against, whose images are taken as they are")
        return None if unary else _open(arguments.against, "--against")
    if unary:
        return None
    if arguments.preset is not None or (of_run is None and given):
        config = Config.build(arguments.preset or "digits", given)
    elif of_run is not None:
        if "data" in given and of_run.data.dataset == "digits":
            given.setdefault("dataset", "images")
        config = of_run.replaced(given)
    else:
        raise InputError("--images: say what they are compared with: --against PATH, --preset, or --dataset and --data")
    # Mirrored images are for training; what others compare with is the data set itself.
    dataset = open_data(config.replaced({"horizontal_flip": given.get("horizontal_flip", False)}))
    where = dataset.name if config.data.data is None else f"{dataset.name} ({config.data.data})"
    return ImageSet(_pixels(dataset, config.data.loader, arguments.real_samples, arguments.seed), where)


def _pixels(dataset: ImageDataset, backend: str, limit: int | None, seed: int) -> Tensor:
    """The images of `dataset`, uint8 [N, 3, H, W]; only `limit` of them, at random, if there are more."""
    count = len(dataset) if limit is None else min(limit, len(dataset))
    size = count * 3 * dataset.image_size**2
    if size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 3:
        raise InputError(f"--real-samples: {count} images of {dataset.name} take {size / 2**30:.1f} GiB; take fewer")
    return read_pixels(dataset, limit=limit, seed=seed, backend=backend)


if __name__ == "__main__":
    run_command(main)
