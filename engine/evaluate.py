"""How close images are to real ones: python -m engine.evaluate --run DIR --metrics fid,kid

The numbers are torch-fidelity's. Evaluation knows the generator and its images, never what it was trained for.
"""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    from engine.training.stopping import exit_on_interrupt

    exit_on_interrupt()

import dataclasses
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.configuration.command import Parser, arguments_as, check_two_files, memory_advice, output_file, run_command
from engine.configuration.config import Config
from engine.configuration.flags import add_flags, given_flags
from engine.configuration.groups import DataConfig
from engine.configuration.inputs import check_seed, choose_device, load_run_sampler, open_data
from engine.configuration.presets import PRESETS
from engine.configuration.provenance import was_trained_on
from engine.evaluation.fidelity import fidelity
from engine.evaluation.image_set import DrawnImages, ImageSet
from engine.evaluation.judges import EvaluationNetwork, download_judges, evaluation_network
from engine.evaluation.metrics import (
    KID_SUBSET,
    METRICS,
    SEED,
    check_metrics,
    check_names,
    check_sizes,
    compute_metrics,
)
from engine.generation.saved import SavedSampler
from engine.support.errors import InputError
from engine.support.files import expanded, write_atomically
from engine.training.job import job
from engine.training.run_folder import RunFolder
from pipelines import DataError, ImageDataset, open_dataset, read_pixels
from pipelines.dataset import EncodedDataset
from pipelines.memory import memory_limit
from pipelines.sources.arrays import ARRAY_SUFFIXES, read_pictures
from pipelines.sources.paths import is_file, is_folder

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
_MOST = {"samples": 10**9, "real_samples": 10**9, "batch_size": 4096}
_DIGITS = {"kernel_distance": 6}


def parser() -> Parser:
    """The flags of `python -m engine.evaluate`."""
    parser = Parser(
        prog="python -m engine.evaluate",
        description="Judge a run's samples, or given images, by torch-fidelity's FID, KID, Inception score, and "
        "precision and recall.",
    )
    add = parser.add_argument
    judged = parser.add_mutually_exclusive_group(required=True)
    judged.add_argument("--run", metavar="DIR", help="judge samples of this training run")
    judged.add_argument("--images", metavar="PATH", help="judge these: a folder of pictures, .zip, .npy or .npz")
    add("--best", action="store_true", help="with --run: the generator that --evaluate-every found best")
    add("--samples", type=int, metavar="N", help="with --run: how many samples (default: 5000)")
    add("--against", metavar="PATH", help="the real images: a folder, .zip, .npy or .npz (default: the run's data set)")
    add(
        "--plain-reading",
        action="store_true",
        help="read folders as the command fidelity does: nothing below them, 16 bits clipped, transparency and "
        "orientation ignored (default: as training reads them)",
    )
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
    add("--json", type=output_file, metavar="FILE", help="write the numbers, and all that they depend on")
    add_flags(parser, "data")
    return parser


@memory_advice("fewer --samples or --real-samples, or a smaller --batch-size, need less")
def main(argv: Sequence[str] | None = None) -> None:
    """Check everything that costs nothing, then compare samples or images with real ones, and print."""
    arguments = parser().parse_args(argv)
    with job() as ranks:
        if ranks.size > 1:
            raise InputError("", "engine.evaluate runs in one process; start it without torchrun")
        _main(arguments)


def _main(arguments: Any) -> None:
    _check(arguments)
    for name in ("images", "against", "weights"):
        check_two_files(arguments, name, "json")
    fidelity()  # rather missing now than after the samples have been drawn
    metrics = tuple(dict.fromkeys(name.strip() for name in arguments.metrics.split(",") if name.strip()))
    device = choose_device(arguments.device, arguments.threads)
    check_names(metrics)
    judged = _Judged.open(arguments, device)
    real = _real(arguments, judged.config, unary=metrics == ("is",))
    network = _judge(arguments, judged.images.size[0])
    check_sizes(network, judged.images, real)
    _check_room(arguments.samples, network)
    check_metrics(
        metrics, network, judged.images.count, None if real is None else real.count, arguments.kid_subset_size
    )
    download_judges(network, metrics)
    if judged.config is not None and was_trained_on(judged.config, arguments.feature_extractor, arguments.weights):
        log.warning(
            "warning: the run learnt by the features of %s; by these its samples look better than they are",
            network.label,
        )
    if judged.step is not None:
        log.info("%s: drawing %d samples of step %d", judged.images.name, judged.images.count, judged.step)
    values = compute_metrics(
        judged.images,
        real,
        network,
        metrics,
        device=device,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        kid_subset_size=arguments.kid_subset_size,
        progress=sys.stderr.isatty(),
    )
    if arguments.json is not None:
        report = _report(arguments, values, network, judged, real, device)
        write_atomically(arguments.json, (json.dumps(report, indent=2) + "\n").encode())
    print(table(values, network, judged.images, real, judged.step))


@dataclass
class _Judged:
    """What is judged: given images, or samples of a run's generator, which are drawn while they are judged.

    Attributes:
        sampler, config: of the run; None for given images.
    """

    images: ImageSet
    sampler: SavedSampler | None = None
    config: Config | None = None

    @classmethod
    def open(cls, arguments: Any, device: torch.device) -> _Judged:
        if arguments.run is None:
            return cls(_open(arguments, "images"))
        sampler = load_run_sampler(arguments.run, best=arguments.best)
        sampler.to(device)
        count, side = arguments.samples or 5000, sampler.generator.spec.image_size
        samples = DrawnImages(lambda: sampler.pixel_batches(count, arguments.seed), count, side)
        config = Config.load(RunFolder(arguments.run).config)
        return cls(ImageSet(samples, Path(arguments.run)), sampler, config)

    @property
    def step(self) -> int | None:
        return None if self.sampler is None else self.sampler.step


def _judge(arguments: Any, image_size: int) -> EvaluationNetwork:
    with arguments_as(name="feature_extractor"):
        return evaluation_network(arguments.feature_extractor, weights=arguments.weights, image_size=image_size)


def _report(
    arguments: Any,
    values: Mapping[str, float],
    network: EvaluationNetwork,
    judged: _Judged,
    real: ImageSet | None,
    device: torch.device,
) -> dict[str, Any]:
    """What `--json` writes: the numbers, and all that they depend on."""
    import torchvision  # here: a command that is refused does without its two seconds

    generated = judged.images
    return {
        "metrics": named(values, network),
        "network": {"label": network.label, "digest": network.digest, "weights": arguments.weights},
        "precision_recall_network": "VGG16" if network.is_inception else network.label,
        "generated": {
            "source": generated.name,
            "images": generated.count,
            "step": judged.step,
            "best": arguments.best,
        },
        "real": None if real is None else {"source": real.name, "images": real.count},
        "image_size": list(generated.size),
        "plain_reading": arguments.plain_reading,
        "seed": arguments.seed,
        "kid_subset_size": (arguments.kid_subset_size or KID_SUBSET) if "kernel_distance" in values else None,
        "batch_size": arguments.batch_size,
        "device": str(device),
        "versions": {
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "torch-fidelity": fidelity().__version__,
        },
    }


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


def _check(arguments: Any) -> None:
    """Refuse what argparse lets pass and needs no file to be seen."""
    if arguments.run is None:
        for name, given in (("samples", arguments.samples is not None), ("best", arguments.best)):
            if given:
                raise InputError(name, "belongs to --run; of --images all are judged")
    if arguments.plain_reading:
        given = [expanded(path) for path in (arguments.images, arguments.against) if path is not None]
        if not any(map(is_folder, given)):
            raise InputError("plain_reading", "is for folders that --images or --against names")
    for name, most in _MOST.items():
        value = getattr(arguments, name)
        if value is not None and not 1 <= value <= most:
            raise InputError(name, f"must be from 1 to {most}, got {value}")
    check_seed(arguments.seed)


def _check_room(samples: int | None, network: EvaluationNetwork) -> None:
    """InputError on `samples` if their features alone are more than this machine holds."""
    size = (samples or 0) * network.num_features * 4
    if size > memory_limit() / 2:
        raise InputError("samples", f"the features of {samples} take {size / 2**30:.0f} GiB; take fewer")


def _open(arguments: Any, argument: str) -> ImageSet:
    """The images at the path that `argument`, "images" or "against", gives."""
    path = getattr(arguments, argument)
    file = expanded(path)
    try:
        if is_folder(file):
            return _open_folder(file, plain=arguments.plain_reading)
        if file.suffix.lower() in ARRAY_SUFFIXES and is_file(file):
            pictures, _ = read_pictures(file)
            return ImageSet(torch.from_numpy(pictures).permute(0, 3, 1, 2), Path(path))
        dataset = open_dataset("images", file)
    except DataError as error:
        raise InputError(argument, str(error)) from None
    assert isinstance(dataset, EncodedDataset)
    return ImageSet(dataset.files, Path(path))


def _open_folder(folder: Path, *, plain: bool) -> ImageSet:
    images = ImageSet(folder, plain=plain)
    if images.read_otherwise:
        log.warning(
            "%s: of %d pictures, the command fidelity would read some otherwise (%s); --plain-reading does as it",
            folder,
            images.count,
            ", ".join(f"{count} {kind}" for kind, count in images.read_otherwise.items()),
        )
    return images


def _real(arguments: Any, of_run: Config | None, *, unary: bool) -> ImageSet | None:
    """The real images; None if no metric needs any."""
    names = {entry.name for entry in dataclasses.fields(DataConfig)}
    given = {name: value for name, value in given_flags(arguments).items() if name in names}
    asked = [name for name in ("preset", "real_samples") if getattr(arguments, name) is not None]
    if unary:
        if idle := [*(() if arguments.against is None else ("against",)), *asked, *given]:
            raise InputError(idle[0], "is of real images, and --metrics is compares with none; leave it out")
        return None
    if arguments.against is not None:
        if contradicting := [*asked, *given]:
            raise InputError(contradicting[0], "contradicts --against, whose images are taken as they are")
        return _open(arguments, "against")
    if arguments.preset is not None or (of_run is None and given.keys() & {"dataset", "data"}):
        config = Config.build(arguments.preset, given)
    elif of_run is not None:
        config = of_run.replaced(given)
    else:
        raise InputError("images", "say what they are compared with: --against PATH, --preset, or --dataset and --data")
    # Mirrored images are for training; what others compare with is the data set itself.
    dataset = open_data(config.replaced({"horizontal_flip": given.get("horizontal_flip", False)}))
    where = dataset.name if config.data.data is None else f"{dataset.name} ({config.data.data})"
    return ImageSet(_pixels(dataset, config.data.loader, arguments.real_samples, arguments.seed), where)


def _pixels(dataset: ImageDataset, backend: str, limit: int | None, seed: int) -> Tensor:
    """The images of `dataset`, uint8 [N, 3, H, W]; only `limit` of them, at random, if there are more."""
    count = len(dataset) if limit is None else min(limit, len(dataset))
    size = count * 3 * dataset.image_size**2
    if size > memory_limit() / 3:
        raise InputError("real_samples", f"{count} images of {dataset.name} take {size / 2**30:.1f} GiB; take fewer")
    return read_pixels(dataset, limit=limit, seed=seed, backend=backend)


if __name__ == "__main__":
    run_command(main)
