"""`python -m engine.precompute`: the target moments of a dataset, once, in a file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from engine.assembly import make_extractor, open_data
from engine.cli import Parser, run_command
from engine.config import PRESETS, Config, add_flags, given_flags
from engine.devices import choose_device
from engine.errors import InputError
from engine.target import compute_target, target_loader
from engine.trainer import amp_dtype

log = logging.getLogger("gfmn")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, stream the dataset, write."""
    parser = Parser(
        prog="python -m engine.precompute",
        description="Stream a dataset once through the extractor and write the moments of every feature, for "
        "engine.train --target FILE. Flags as for engine.train.",
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="digits", help="settings to start from")
    parser.add_argument("--out", required=True, metavar="FILE", help="target.safetensors")
    add_flags(parser)
    arguments = parser.parse_args(argv)
    if Path(arguments.out).is_dir():
        raise InputError(f"--out: {arguments.out} is a folder; name a file, such as {arguments.out}/target.safetensors")
    config = Config.build(arguments.preset, given_flags(arguments))
    device = choose_device(config.training.device, config.training.threads)
    dataset = open_data(config)
    extractor = make_extractor(config, dataset, device)
    images = target_loader(
        extractor,
        dataset,
        batch_size=config.training.batch_size,
        seed=config.training.seed,
        loader=config.data.loader,
    )
    target = compute_target(extractor, images, amp_dtype=amp_dtype(config), kernels=config.matching.backend)
    target.save(arguments.out)
    log.info("%s: moments of %d features over %d images", arguments.out, target.num_features, target.count)


if __name__ == "__main__":
    run_command(main)
