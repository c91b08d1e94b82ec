"""`python -m engine.precompute`: what a method knows of the real images (the target), once, in a file."""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    from engine.training.stopping import exit_on_interrupt

    exit_on_interrupt()

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.comparison.reference.cache import exclusive, put_in_cache, write_bad_images
from engine.comparison.reference.protocols import Kind
from engine.comparison.reference.saved_pass import forget_partial
from engine.comparison.reference.statistics_pass import compute_reference, fingerprint, reference_loader
from engine.configuration.build import make_extractor, pass_batch_size, reference_kind
from engine.configuration.command import Parser, memory_advice, run_command
from engine.configuration.config import Config
from engine.configuration.flags import add_flags, given_flags
from engine.configuration.inputs import amp_dtype, check_precision, choose_device, open_data
from engine.configuration.presets import PRESETS
from engine.support.errors import InputError, Interrupted
from engine.support.files import check_output
from engine.training.ranks import EndedElsewhere, Ranks

log = logging.getLogger("gfmn")


@memory_advice("--chunk-size N with a small N, or a smaller --batch-size, needs less")
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, stream the dataset, write."""
    parser = Parser(
        prog="python -m engine.precompute",
        description="Stream a dataset once through the extractor and write the moments of every feature "
        "(or what else the method compares with), for engine.train --target FILE. Takes the flags of engine.train, of "
        "which those on training change nothing. After Ctrl-C or a kill the same command resumes from its last saved "
        "state, at most 30 seconds old. "
        "Several processes: torchrun --nproc-per-node N -m engine.precompute ...",
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), help="settings to start from (default: as in training)")
    parser.add_argument("--out", required=True, metavar="FILE", help="file to write, such as target.safetensors")
    add_flags(parser)
    arguments = parser.parse_args(argv)
    out = Path(arguments.out)
    ranks = Ranks.join()
    try:
        check_output(out, "out", example="target.safetensors", plain=True)
        config = Config.build(arguments.preset, given_flags(arguments))
        if config.matching.target is not None:
            raise InputError("target", "is what this command writes; name the file with --out")
        _precompute(config, out, ranks)
    except EndedElsewhere:
        ranks.leave()
        sys.exit(2)
    except BaseException as error:
        if ranks.fail():
            raise
        if isinstance(error, Interrupted):
            sys.exit(error.status)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)
    finally:
        ranks.close()


def _precompute(config: Config, out: Path, ranks: Ranks) -> None:
    device = ranks.device(choose_device(config.training.device, config.training.threads, config.training.float32))
    dtype, kind = amp_dtype(config), reference_kind(config)
    check_precision(dtype, device)

    def prepare():
        dataset = open_data(config)
        extractor = make_extractor(config, dataset, device)
        images = reference_loader(
            extractor,
            dataset,
            batch_size=pass_batch_size(config),
            seed=config.training.seed,
            loader=config.data.loader,
            shard=ranks.rank,
            num_shards=ranks.size,
        )
        return extractor, images, fingerprint(kind, extractor, images, dtype)

    with exclusive(_own(out, ranks)):
        # Rank 0 first: it downloads, digests and pretrains, and the others find the results in the cache.
        extractor, images, entries = ranks.first("prepared", prepare)
        done = ranks.rank == 0 and _is_done(kind, out, entries)
        if any(ranks.meet("done", done)):
            log.info("%s: holds exactly this target already", out)
            forget_partial(_partial(out, ranks), ranks)
            return
        target = compute_reference(
            kind,
            extractor,
            images,
            amp_dtype=dtype,
            kernels=config.matching.backend,
            partial=_partial(out, ranks),
            ranks=ranks,
        )
        if ranks.rank == 0:
            # First what `out` depends on: once `out` is there, nothing is left to do.
            write_bad_images(out.with_suffix(".bad_images.txt"), target)
            put_in_cache(target, fingerprint(kind, extractor, images, dtype))
            target.save(out)
            log.info("%s: %d features of %d images", out, extractor.num_features, target.count)
        forget_partial(_partial(out, ranks), ranks)


def _own(out: Path, ranks: Ranks) -> Path:
    """`out`, or on further ranks the name beside it that stands for their share."""
    return out if ranks.rank == 0 else out.with_name(f"{out.name}.{ranks.rank}")


def _partial(out: Path, ranks: Ranks) -> Path:
    """Where this rank keeps the state of its pass, beside `out`."""
    own = _own(out, ranks)
    return own.with_name(f"{own.name}.partial")


def _is_done(kind: Kind[Any], out: Path, entries: dict[str, str]) -> bool:
    """Whether `out` holds a target of exactly this; any other file is about to be replaced."""
    if not out.exists():
        return False
    try:
        return kind.load(out).fingerprint == entries
    except InputError:
        return False


if __name__ == "__main__":
    run_command(main)
