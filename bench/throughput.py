"""`python -m bench.throughput`: training steps per second, beside the naive implementation and the convolutions alone.

Every variant trains the same DCGAN generator against the same extractor and target, and its ∂L/∂images is compared with
float64 autograd before anything is timed. All variants take turns in another order every time. The *convolution floor*
is what must be computed in any case: the folded convolutions, forward and input gradient, in the layout and dtype of
the engine; to it and to the generator's own step everything else is overhead.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.rows import environment, interleaved, table, write_json
from bench.scenario import Scenario
from engine.configuration.command import Parser, run_command
from engine.representation.extractor import Extractor

# Relative error of ∂L/∂images against float64: masks and pooling ties flip in float32; bfloat16 has 8 bits.
TOLERANCE = {None: 5e-3, torch.bfloat16: 0.2, torch.float16: 0.05}
# Minibatches of `--scale`, in chunks.
SCALE = (1, 2, 8, 64)
NAMES = {None: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class StepRow:
    """One variant's training step.

    Attributes:
        variant, dtype: what was timed, and the dtype of the extractor's arithmetic.
        p20, p50, p80: seconds a step.
        images_per_second: by p50.
        gradient_error: ‖∂L/∂images − float64's‖ / ‖float64's‖, NaN where there is none to compare.
    """

    variant: str
    dtype: str
    extractor: str
    image_size: int
    minibatch: int
    p20: float
    p50: float
    p80: float
    images_per_second: float
    gradient_error: float
    environment: dict[str, Any] = field(default_factory=environment, repr=False)


def exact_gradient(scenario: Scenario, images: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, by autograd: v = Δ [2, D] of these images (public order), and ∂L/∂images for that v."""
    extractor = copy.deepcopy(scenario.extractor).double()
    leaf = images.double().requires_grad_()
    features = extractor.features(leaf)
    target = scenario.target
    difference_mean = target.mean.to(images.device) - features.mean(0)
    difference_variance = target.variance().to(images.device) - features.var(0)
    v = torch.stack((difference_mean, difference_variance)).detach()
    loss = v[0] @ difference_mean + v[1] @ difference_variance
    return v.float(), torch.autograd.grad(loss, leaf)[0]


def _gradient(objective: Callable[[Tensor], Tensor], images: Tensor, scale: float = 1.0) -> Tensor:
    leaf = images.clone().requires_grad_()
    (objective(leaf) * scale).backward()
    assert leaf.grad is not None
    return leaf.grad / scale


class Convolutions:
    """The extractor's convolutions on inputs of their own, forward and input gradient, and nothing else."""

    def __init__(self, extractor: Extractor, minibatch: int):
        self.work: list[tuple[nn.Conv2d, Tensor, Tensor]] = []
        hooks = [
            module.register_forward_hook(self._record)
            for module in extractor.modules()
            if isinstance(module, nn.Conv2d)
        ]
        size = extractor.image_size
        images = torch.randn(minibatch, 3, size, size, device=extractor.device, dtype=extractor.dtype)
        with torch.no_grad():
            extractor(images.contiguous(memory_format=torch.channels_last), lambda index, x, residual: x)
        for hook in hooks:
            hook.remove()

    def _record(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        self.work.append((module, torch.randn_like(inputs[0]), torch.randn_like(output)))

    @torch.no_grad()
    def __call__(self) -> None:
        """All of them once."""
        for conv, x, _ in self.work:
            conv(x)
        for conv, x, grad in reversed(self.work):
            torch.ops.aten.convolution_backward(
                grad, x, conv.weight, None, conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups,
                [True, False, False],
            )  # fmt: skip


class _Pass(torch.autograd.Function):
    """A loss that costs nothing, with a constant gradient."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        ctx.shape = images
        return images.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.full_like(ctx.shape, 1e-4)


def measure(
    name: str, image_size: int, minibatch: int, device: str, repetitions: int, low: torch.dtype
) -> list[StepRow]:
    """All variants; RuntimeError if one of them computes something else than float64 does."""
    scenario = Scenario.build(name, image_size, minibatch, device)
    torch.manual_seed(2)
    images = (torch.rand(minibatch, 3, image_size, image_size) * 2 - 1).to(device)
    v, exact = exact_gradient(scenario, images)

    steps: dict[tuple[str, torch.dtype | None], Callable[[], object]] = {}
    errors: dict[tuple[str, torch.dtype | None], float] = {}

    def add(variant: str, objective: Any, dtype: torch.dtype | None, gradient: Tensor) -> None:
        error = float((gradient.double() - exact).norm() / exact.norm())
        print(f"{variant}, {NAMES[dtype]}: gradient within {error:.1e} of float64's", file=sys.stderr)
        if not error <= TOLERANCE[dtype]:
            raise RuntimeError(f"{variant}, {NAMES[dtype]}: gradient off by {error:.1e}; not worth timing")
        steps[variant, dtype] = scenario.trainer(objective, dtype)
        errors[variant, dtype] = error

    naives: list[tuple[str, torch.dtype | None, dict[str, Any]]] = [
        ("naive", None, {}),
        ("naive, frozen", None, {"frozen": True}),
        ("naive, frozen, compiled", None, {"frozen": True, "compiled": True}),
        ("naive, frozen, compiled, autocast", low, {"frozen": True, "compiled": True, "autocast": low}),
    ]
    for variant, dtype, switches in naives:
        naive = scenario.naive(**switches)
        with torch.no_grad():
            naive.v_mean.copy_(v[0])
            naive.v_variance.copy_(v[1])
        for adam in (naive.adam_mean, naive.adam_variance):
            adam.param_groups[0]["lr"] = 0.0  # v stays what it is
        gradient = _gradient(naive, images, 2**16 if dtype is torch.float16 else 1.0)
        for adam in (naive.adam_mean, naive.adam_variance):
            adam.param_groups[0]["lr"] = 1e-5
        add(variant, naive, dtype, gradient)
    for dtype in (None, low):
        ours = scenario.ours(dtype)
        state = ours.state_dict()
        ours.load_state_dict({**state, "averager.v": v})
        ours.eval()
        gradient = _gradient(ours, images, 2**16 if dtype is torch.float16 else 1.0)
        ours.train()
        add("ours", ours, dtype, gradient)
        steps["convolution floor", dtype] = Convolutions(ours.extractor, minibatch)
        steps["generator alone", dtype] = scenario.trainer(_Pass.apply, dtype)
    gc.collect()
    times = interleaved(steps, repetitions, warmup=2)
    rows = []
    for (variant, dtype), seconds in times.items():
        p20, p50, p80 = np.percentile(seconds, (20, 50, 80)).tolist()
        rows.append(StepRow(
            variant, NAMES[dtype], name, image_size, minibatch, p20, p50, p80, minibatch / p50,
            errors.get((variant, dtype), float("nan")),
        ))  # fmt: skip
    return rows


def measure_scale(
    name: str, image_size: int, minibatches: Sequence[int], chunk: int, device: str, repetitions: int, low: torch.dtype
) -> list[StepRow]:
    """`ours --amp` at several minibatches, the first of them one chunk, the others chunks of the same size."""
    scenario = Scenario.build(name, image_size, chunk, device)
    steps: dict[int, Callable[[], object]] = {}
    for minibatch in minibatches:
        objective = scenario.ours(low, chunk_size=chunk)
        sized = dataclasses.replace(scenario, minibatch=minibatch)
        steps[minibatch] = sized.trainer(objective, low, checkpoint_generator=True)
    rows = []
    for minibatch, seconds in interleaved(steps, repetitions, warmup=1).items():
        p20, p50, p80 = np.percentile(seconds, (20, 50, 80)).tolist()
        variant = f"ours, chunks of {chunk}, generator checkpointed"
        rows.append(StepRow(
            variant, NAMES[low], name, image_size, minibatch, p20, p50, p80, minibatch / p50, float("nan"),
        ))  # fmt: skip
    return rows


def print_scale(rows: Sequence[StepRow]) -> None:
    """The table: time per image against the first row's (one chunk) and the second's (two)."""
    headings = ("minibatch", "step p20, s", "p50", "p80", "ms/image", "/ one chunk", f"/ minibatch {rows[1].minibatch}")
    per_image = [row.p50 / row.minibatch for row in rows]
    print(table(headings, [[
        row.minibatch, f"{row.p20:.2f}", f"{row.p50:.2f}", f"{row.p80:.2f}", f"{1e3 * own:.2f}",
        f"{own / per_image[0]:.2f}", f"{own / per_image[1]:.2f}",
    ] for row, own in zip(rows, per_image, strict=True)]))  # fmt: skip


def ratios(rows: Sequence[StepRow]) -> dict[str, float]:
    """What the project promises: how many times faster than each naive variant, and how near the floor."""
    seconds = {(row.variant, row.dtype): row.p50 for row in rows}
    low = next(row.dtype for row in rows if row.variant.endswith("autocast"))
    amp = seconds["ours", low]
    full = seconds["ours", "float32"]
    floor = {
        dtype: seconds["convolution floor", dtype] + seconds["generator alone", dtype] for dtype in (low, "float32")
    }
    return {
        "naive / ours --amp": seconds["naive", "float32"] / amp,
        "naive compiled / ours --amp": seconds["naive, frozen, compiled", "float32"] / amp,
        "naive compiled autocast / ours --amp": seconds["naive, frozen, compiled, autocast", low] / amp,
        "naive compiled / ours float32": seconds["naive, frozen, compiled", "float32"] / full,
        "ours --amp / (convolution floor + generator)": amp / floor[low],
        "ours float32 / (convolution floor + generator)": full / floor["float32"],
    }


def print_rows(rows: Sequence[StepRow]) -> None:
    """The tables."""
    headings = ("variant", "dtype", "p20, s", "p50", "p80", "images/s", "gradient error")
    print(table(headings, [[
        row.variant, row.dtype, f"{row.p20:.3f}", f"{row.p50:.3f}", f"{row.p80:.3f}", f"{row.images_per_second:.0f}",
        "" if np.isnan(row.gradient_error) else f"{row.gradient_error:.1e}",
    ] for row in rows]))  # fmt: skip
    print()
    print(table(("ratio of medians", ""), [[name, f"{value:.2f}"] for name, value in ratios(rows).items()]))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    parser = Parser(
        prog="python -m bench.throughput", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--extractor", default="vgg19+resnet18", metavar="NAME")
    parser.add_argument("--image-size", type=int, default=32, metavar="PIXELS")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N")
    parser.add_argument("--scale", action="store_true", help="instead: larger minibatches in chunks of --batch-size")
    parser.add_argument("--repetitions", type=int, default=10, metavar="N", help="timed steps (default: %(default)s)")
    parser.add_argument("--amp-dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    args = parser.parse_args(argv)
    if args.repetitions < 1:
        parser.error(f"--repetitions: must be at least 1, got {args.repetitions}")
    if args.batch_size < 2:
        parser.error(f"--batch-size: must be at least 2, got {args.batch_size}")
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}[args.amp_dtype]
    if args.scale:
        minibatches = [factor * args.batch_size for factor in SCALE]
        rows = measure_scale(
            args.extractor, args.image_size, minibatches, args.batch_size, args.device, args.repetitions, low
        )
        print_scale(rows)
    else:
        rows = measure(args.extractor, args.image_size, args.batch_size, args.device, args.repetitions, low)
        print_rows(rows)
    if args.json is not None:
        write_json(args.json, rows)


if __name__ == "__main__":
    run_command(main)
