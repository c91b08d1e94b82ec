"""`python -m engine.precompute`: what a method knows of the real images (the target), once, in a file."""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    from engine.training.stopping import exit_on_interrupt

    exit_on_interrupt()

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engine.comparison.reference.cache import found_or_made, job_at, put_in_cache, write_bad_images
from engine.comparison.reference.protocols import Kind, Reference
from engine.comparison.reference.statistics_pass import compute_reference, fingerprint
from engine.configuration.build import make_extractor, pass_images, reference_arguments
from engine.configuration.command import Parser, memory_advice, run_command
from engine.configuration.config import Config
from engine.configuration.flags import add_flags, given_flags
from engine.configuration.inputs import amp_dtype, check_precision, check_whole_batches, choose_device, open_data
from engine.configuration.objectives import check_features, reference_kind
from engine.configuration.presets import PRESETS
from engine.representation.extractor import Extractor
from engine.support.errors import InputError
from engine.support.files import check_output, expanded
from engine.training.job import job
from engine.training.ranks import Ranks
from pipelines import ImageLoader

log = logging.getLogger("gfmn")


@memory_advice("--chunk-size N with a small N, or a smaller --batch-size, needs less")
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, stream the dataset, write."""
    parser = Parser(
        prog="python -m engine.precompute",
        description="Stream a dataset once through the extractor and write the moments of every feature "
        "(or what else the method compares with), for engine.train --target FILE. Takes the flags of engine.train, of "
        "which those on steps, rates, output and evaluation change nothing; precision (--amp, --amp-dtype, --float32) "
        "has to be that of the training. After Ctrl-C or a kill the same command resumes from its last saved "
        "state, at most 30 seconds old. "
        "Several processes: torchrun --nproc-per-node N -m engine.precompute ...",
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), help="settings to start from (default: as in training)")
    parser.add_argument("--out", required=True, metavar="FILE", help="file to write, such as target.safetensors")
    add_flags(parser)
    arguments = parser.parse_args(argv)
    out = expanded(arguments.out)
    with job() as ranks:
        check_output(out, "out", example="target.safetensors", plain=True)
        config = Config.build(arguments.preset, given_flags(arguments))
        if not config.needs.features:
            raise InputError("method", f"{config.method.method} compares with no target, so there is none to compute")
        if config.matching.target is not None:
            raise InputError("target", "is what this command writes; name the file with --out")
        check_whole_batches(config, ranks)
        with job_at(out, ranks):
            _precompute(config, out, ranks)


def _precompute(config: Config, out: Path, ranks: Ranks) -> None:
    device = ranks.device(choose_device(config.training.device, config.training.threads, config.training.float32))
    dtype = amp_dtype(config)
    check_precision(dtype, device)
    # Rank 0 first: it downloads, digests and pretrains, and the others find the results in the cache.
    kind, extractor, images, entries = ranks.first("prepared", lambda: _prepare(config, device, dtype, ranks))

    def find() -> Reference | None:
        """What `out` holds, if that is a target of exactly this; any other file is about to be replaced."""
        try:
            found = kind.load(out) if out.exists() else None
        except InputError:
            return None
        if found is None or found.fingerprint != entries:
            return None
        log.info("%s: holds exactly this target already", out)
        return found

    def make(partial: Path) -> Reference:
        with reference_arguments():
            target = compute_reference(
                kind, extractor, images, amp_dtype=dtype, kernels=config.matching.backend, partial=partial, ranks=ranks
            )
        if ranks.rank == 0:
            # First what `out` depends on: once `out` is there, nothing is left to do.
            write_bad_images(out.with_suffix(".bad_images.txt"), target)
            put_in_cache(target, fingerprint(kind, extractor, images, dtype))
            target.save(out)
            log.info("%s: %d features of %d images", out, extractor.num_features, target.count)
        return target

    found_or_made(out, find, make, ranks)


def _prepare(
    config: Config, device: torch.device, dtype: torch.dtype | None, ranks: Ranks
) -> tuple[Kind[Any], Extractor, ImageLoader, dict[str, str]]:
    """The kind of reference, the extractor, this rank's images, and the fingerprint of what comes of them."""
    dataset = open_data(config)
    extractor = make_extractor(config, dataset, device, ranks=ranks)
    check_features(config, extractor, len(dataset))
    kind, images = reference_kind(config, extractor), pass_images(config, extractor, dataset, ranks)
    return kind, extractor, images, fingerprint(kind, extractor, images, dtype)


if __name__ == "__main__":
    run_command(main)
