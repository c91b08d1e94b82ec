"""`python -m bench.throughput`: training steps per second, beside the naive implementation and the convolutions alone.

Every variant trains the same DCGAN generator against the same extractor and target, and its ∂L/∂images is compared with
float64 autograd before anything is timed. All variants take turns in another order every time. The *convolution floor*
is what must be computed in any case: the folded convolutions, forward and input gradient, in the layout and dtype of
the engine; to it and to the generator's own step everything else is overhead.
"""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    from engine.training.stopping import exit_on_interrupt

    exit_on_interrupt()

import argparse
import copy
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.naive import NaiveMatching
from bench.rows import Row, interleaved, percentiles, print_rows, seconds, table, write_json
from bench.scenario import DTYPE_NAMES, RECOMPUTE_GENERATOR, Problem, Scenario, Step, engine_step, plain_step
from engine.comparison.moment_matching import MomentMatching
from engine.configuration.command import Parser, output_file, run_command
from engine.representation.extractor import Extractor

# Relative error of ∂L/∂images against float64: masks and pooling ties flip in float32; bfloat16 has 8 bits.
TOLERANCE = {None: 5e-3, torch.bfloat16: 0.2, torch.float16: 0.05}
# Minibatches of `--scale`, in chunks.
SCALE = (1, 2, 8, 64)


@dataclass(frozen=True)
class StepRow(Row):
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

    def cells(self) -> dict[str, object]:
        """Seconds, images/s, and the gradient's error where there is one."""
        return {
            "variant": self.variant,
            "dtype": self.dtype,
            "p20, s": f"{self.p20:.3f}",
            "p50": f"{self.p50:.3f}",
            "p80": f"{self.p80:.3f}",
            "images/s": f"{self.images_per_second:.0f}",
            "gradient error": "" if np.isnan(self.gradient_error) else f"{self.gradient_error:.1e}",
        }


def step_row(
    variant: str,
    dtype: torch.dtype | None,
    problem: Problem,
    minibatch: int,
    times: Sequence[float],
    gradient_error: float = float("nan"),
) -> StepRow:
    """The row of a variant whose steps took `times`, in seconds."""
    p20, p50, p80 = percentiles(times)
    return StepRow(
        variant, DTYPE_NAMES[dtype], problem.extractor, problem.image_size, minibatch, p20, p50, p80, minibatch / p50,
        gradient_error,
    )  # fmt: skip


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


def gradient_of(loss: Callable[[Tensor], Tensor], images: Tensor, dtype: torch.dtype | None) -> Tensor:
    """∂L/∂images, of a scaled loss where float16 would underflow."""
    scale = 2.0**16 if dtype is torch.float16 else 1.0
    leaf = images.clone().requires_grad_()
    (loss(leaf) * scale).backward()
    assert leaf.grad is not None
    return leaf.grad / scale


def naive_gradient(objective: NaiveMatching, images: Tensor, v: Tensor, dtype: torch.dtype | None) -> Tensor:
    """∂L/∂images of the naive objective for the direction `v` [2, D], which it keeps."""
    with torch.no_grad():
        objective.v_mean.copy_(v[0])
        objective.v_variance.copy_(v[1])
    groups = [adam.param_groups[0] for adam in (objective.adam_mean, objective.adam_variance)]
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = 0.0  # so that v stays
    gradient = gradient_of(objective, images, dtype)
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    return gradient


def engine_gradient(objective: MomentMatching, images: Tensor, v: Tensor, dtype: torch.dtype | None) -> Tensor:
    """∂L/∂images of the engine's objective for the direction `v` [2, D], which it keeps."""
    objective.load_state_dict({**objective.state_dict(), "averager.v": v})
    objective.eval()
    gradient = gradient_of(objective, images, dtype)
    objective.train()
    return gradient


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
        """Run every convolution forward, then every one backward."""
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


def measure_variants(
    problem: Problem, minibatch: int, device: str, repetitions: int, low: torch.dtype
) -> list[StepRow]:
    """All variants, in float32 and `low`; RuntimeError if one of them computes something else than float64 does."""
    scenario = Scenario.calibrated(problem, device)
    torch.manual_seed(2)
    images = (torch.rand(minibatch, 3, problem.image_size, problem.image_size) * 2 - 1).to(device)
    v, exact = exact_gradient(scenario, images)

    steps: dict[tuple[str, torch.dtype | None], Step] = {}
    errors: dict[tuple[str, torch.dtype | None], float] = {}

    def check(variant: str, dtype: torch.dtype | None, gradient: Tensor) -> None:
        error = float((gradient.double() - exact).norm() / exact.norm())
        print(f"{variant}, {DTYPE_NAMES[dtype]}: gradient within {error:.1e} of float64's", file=sys.stderr)
        if not error <= TOLERANCE[dtype]:
            raise RuntimeError(f"{variant}, {DTYPE_NAMES[dtype]}: gradient off by {error:.1e}; not worth timing")
        errors[variant, dtype] = error

    naives: list[tuple[str, torch.dtype | None, dict[str, Any]]] = [
        ("naive", None, {}),
        ("naive, frozen", None, {"frozen": True}),
        ("naive, frozen, compiled", None, {"frozen": True, "compiled": True}),
        ("naive, frozen, compiled, autocast", low, {"frozen": True, "compiled": True, "autocast": low}),
    ]
    for variant, dtype, switches in naives:
        naive = scenario.naive(**switches)
        check(variant, dtype, naive_gradient(naive, images, v, dtype))
        steps[variant, dtype] = plain_step(scenario.generator(), naive, minibatch, dtype)
    for dtype in (None, low):
        ours = scenario.parts(minibatch, dtype)
        check("ours", dtype, engine_gradient(ours.objective, images, v, dtype))
        steps["ours", dtype] = engine_step(ours)
        steps["convolution floor", dtype] = Convolutions(ours.objective.extractor, minibatch)
        steps["generator alone", dtype] = plain_step(scenario.generator(), _Pass.apply, minibatch, dtype)
    gc.collect()
    return [
        step_row(variant, dtype, problem, minibatch, taken, errors.get((variant, dtype), float("nan")))
        for (variant, dtype), taken in interleaved(steps, repetitions, seconds, warmup=2).items()
    ]


def measure_scale(
    problem: Problem, minibatches: Sequence[int], chunk: int, device: str, repetitions: int, low: torch.dtype
) -> list[StepRow]:
    """`ours --amp` at several minibatches, the first of them one chunk, the others chunks of the same size."""
    scenario = Scenario.calibrated(problem, device)
    steps = {
        minibatch: engine_step(scenario.parts(minibatch, low, chunk_size=chunk, **RECOMPUTE_GENERATOR))
        for minibatch in minibatches
    }
    variant = f"ours, chunks of {chunk}, generator checkpointed"
    times = interleaved(steps, repetitions, seconds, warmup=1)
    return [step_row(variant, low, problem, minibatch, taken) for minibatch, taken in times.items()]


def scale_table(rows: Sequence[StepRow]) -> str:
    """Time per image, and its ratios to the first row's (one chunk) and the second's (two)."""
    headings = ("minibatch", "step p20, s", "p50", "p80", "ms/image", "/ one chunk", f"/ minibatch {rows[1].minibatch}")
    per_image = [row.p50 / row.minibatch for row in rows]
    return table(headings, [[
        row.minibatch, f"{row.p20:.2f}", f"{row.p50:.2f}", f"{row.p80:.2f}", f"{1e3 * own:.2f}",
        f"{own / per_image[0]:.2f}", f"{own / per_image[1]:.2f}",
    ] for row, own in zip(rows, per_image, strict=True)])  # fmt: skip


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


def ratios_table(rows: Sequence[StepRow]) -> str:
    """The ratios, a line each."""
    return table(("ratio of medians", ""), [[name, f"{value:.2f}"] for name, value in ratios(rows).items()])


def parser() -> Parser:
    """The flags of `python -m bench.throughput`."""
    arguments = Parser(
        prog="python -m bench.throughput", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = arguments.add_argument
    add("--extractor", default="vgg19+resnet18", metavar="NAME")
    add("--image-size", type=int, default=32, metavar="PIXELS")
    add("--batch-size", type=int, default=64, metavar="N")
    add("--scale", action="store_true", help="instead: larger minibatches in chunks of --batch-size")
    add("--repetitions", type=int, default=10, metavar="N", help="timed steps (default: %(default)s)")
    add("--amp-dtype", choices=("bf16", "fp16"), default="bf16")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", type=output_file, metavar="FILE", help="write the rows there too")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write what --json asks for, print the tables."""
    arguments = parser()
    args = arguments.parse_args(argv)
    if args.repetitions < 1:
        arguments.error(f"--repetitions: must be at least 1, got {args.repetitions}")
    if args.batch_size < 2:
        arguments.error(f"--batch-size: must be at least 2, got {args.batch_size}")
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}[args.amp_dtype]
    problem, chunk = Problem(args.extractor, args.image_size), args.batch_size
    if args.scale:
        minibatches = [factor * chunk for factor in SCALE]
        rows = measure_scale(problem, minibatches, chunk, args.device, args.repetitions, low)
    else:
        rows = measure_variants(problem, args.batch_size, args.device, args.repetitions, low)
    if args.json is not None:
        write_json(args.json, rows)
    if args.scale:
        print(scale_table(rows))
    else:
        print_rows(rows)
        print(f"\n{ratios_table(rows)}")


if __name__ == "__main__":
    run_command(main)
