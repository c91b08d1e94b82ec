"""`python -m bench.throughput`: training steps per second, beside the naive implementation and the convolutions alone.

Every variant trains the same DCGAN generator against the same extractor and target, and its ∂L/∂images is compared with
float64 autograd before anything is timed. All variants take turns in another order every time. The *convolution floor*
is what must be computed in any case: the folded convolutions, forward and input gradient, in the layout and dtype of
the engine; to it and to the generator's own step everything else is overhead.

On CUDA a time is a share of the time between two events around 20 steps, none of which waits for another; beside it
stands the time that the host needs to hand over one step. float32 is IEEE there, and TF32 a variant of its own. The
floor and the generator alone are replays of CUDA graphs: one launch each, and no bias, which the engine adds elsewhere.
"""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    from engine.training.stopping import exit_on_interrupt

    exit_on_interrupt()

import argparse
import copy
import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.cuda import StepTime, cuda_of, step_time
from bench.naive import NaiveMatching
from bench.precisions import Precision, full_precisions, low_precision
from bench.rows import Row, RowFile, environment, percentiles, print_rows, rounds, table
from bench.scenario import RECOMPUTE_GENERATOR, Problem, Scenario, Step, engine_step, plain_step
from engine.comparison.moment_matching import MomentMatching
from engine.configuration.command import Parser, output_file, run_command
from engine.configuration.inputs import choose_device
from engine.representation.extractor import Extractor

Variant = tuple[str, Precision]
NAIVE = ("naive", "naive, frozen", "naive, frozen, compiled")
OURS = ("ours", "convolution floor", "generator alone")
# Minibatches of `--scale`, in chunks.
SCALE = (1, 2, 8, 64)


@dataclass(frozen=True)
class StepRow(Row):
    """One variant's training step.

    Attributes:
        variant, dtype: what was timed, and the precision of the extractor's arithmetic ("tf32" on CUDA, too).
        p20, p50, p80: seconds a step; on CUDA of the device, see `bench.cuda.StepTime`.
        images_per_second: by p50.
        gradient_error: ‖∂L/∂images − float64's‖ / ‖float64's‖, NaN where there is none to compare.
        host_p50: median seconds until the host had handed over a step; None on a CPU.
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
    host_p50: float | None = None

    def cells(self) -> dict[str, object]:
        """Seconds (on CUDA milliseconds, and the host's), images/s, and the gradient's error where there is one."""
        if self.host_p50 is None:
            times = {"p20, s": f"{self.p20:.3f}", "p50": f"{self.p50:.3f}", "p80": f"{self.p80:.3f}"}
        else:
            times = {"p20, ms": f"{1e3 * self.p20:.2f}", "p50": f"{1e3 * self.p50:.2f}", "p80": f"{1e3 * self.p80:.2f}"}
            times["host, ms"] = f"{1e3 * self.host_p50:.2f}"
        return {
            "variant": self.variant,
            "dtype": self.dtype,
            **times,
            "images/s": f"{self.images_per_second:.0f}",
            "gradient error": "" if np.isnan(self.gradient_error) else f"{self.gradient_error:.1e}",
        }


def step_row(
    variant: str,
    precision: Precision,
    problem: Problem,
    minibatch: int,
    times: Sequence[StepTime],
    gradient_error: float = float("nan"),
) -> StepRow:
    """The row of a variant whose steps took `times`."""
    p20, p50, p80 = percentiles([taken.seconds for taken in times])
    hosts = [taken.host for taken in times if taken.host is not None]
    return StepRow(
        variant, precision.name, problem.extractor, problem.image_size, minibatch, p20, p50, p80, minibatch / p50,
        gradient_error, float(np.median(hosts)) if hosts else None, environment=environment(precision.device),
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
    """The extractor's convolutions on inputs of their own, forward and input gradient, and nothing else.

    On CUDA without their bias, which would be a kernel of its own there; the engine adds it together with the ReLU.
    """

    def __init__(self, extractor: Extractor, minibatch: int):
        self.with_bias = extractor.device.type == "cpu"
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
            if self.with_bias:
                conv(x)
            else:
                conv._conv_forward(x, conv.weight, None)
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


class Variants:
    """Everything that is timed on one problem: built when it is asked for, and checked before.

    Attributes:
        errors: relative error of ∂L/∂images, by variant and precision, of those that were built and have one.
    """

    def __init__(self, problem: Problem, minibatch: int, device: str):
        self.minibatch, self.cuda = minibatch, cuda_of(device)
        self.scenario = Scenario.calibrated(problem, device)
        torch.manual_seed(2)
        self.images = (torch.rand(minibatch, 3, problem.image_size, problem.image_size) * 2 - 1).to(device)
        self.v, self.exact = exact_gradient(self.scenario, self.images)
        self.errors: dict[Variant, float] = {}

    def build(self, variant: str, precision: Precision) -> Step:
        """A step of the variant; RuntimeError if it computes something else than float64 does."""
        dtype, scenario = precision.dtype, self.scenario
        with precision.in_force():
            if variant.startswith("naive"):
                autocast = dtype if variant.endswith("autocast") else None
                naive = scenario.naive(frozen="frozen" in variant, compiled=is_compiled(variant), autocast=autocast)
                self._check(variant, precision, naive_gradient(naive, self.images, self.v, dtype))
                step = plain_step(scenario.generator(), naive, self.minibatch, dtype)
            elif variant == "ours":
                ours = scenario.parts(self.minibatch, dtype)
                self._check(variant, precision, engine_gradient(ours.objective, self.images, self.v, dtype))
                step = engine_step(ours)
            elif variant == "convolution floor":
                extractor = scenario.parts(self.minibatch, dtype).objective.extractor
                step = self._alone(Convolutions(extractor, self.minibatch))
            else:
                step = self._alone(plain_step(scenario.generator(), _Pass.apply, self.minibatch, dtype))
        return precision.applied(step)

    def _check(self, variant: str, precision: Precision, gradient: Tensor) -> None:
        error = float((gradient.double() - self.exact).norm() / self.exact.norm())
        print(f"{variant}, {precision.name}: gradient within {error:.1e} of float64's", file=sys.stderr)
        if not error <= precision.tolerance:
            raise RuntimeError(f"{variant}, {precision.name}: gradient off by {error:.1e}; not worth timing")
        self.errors[variant, precision] = error

    def _alone(self, step: Step) -> Step:
        """Without the host's part, where that can be taken away."""
        return step if self.cuda is None else self.cuda.capture(step)


def is_compiled(variant: str) -> bool:
    """Whether torch.compile takes its time for it."""
    return "compiled" in variant


def measure_variants(
    problem: Problem, minibatch: int, device: str, repetitions: int, low: torch.dtype
) -> Iterator[list[StepRow]]:
    """All variants in float32 (and TF32 on CUDA) and `low`; the rows so far, after every round.

    The first rows are of one round without the variants that have to be compiled: they are there soon.
    RuntimeError if a variant computes something else than float64 does.
    """
    variants = Variants(problem, minibatch, device)
    full, lower = full_precisions(device), low_precision(device, low)
    order = [(name, precision) for name in NAIVE for precision in full]
    order += [("naive, frozen, compiled, autocast", lower)]
    order += [(name, precision) for precision in (*full, lower) for name in OURS]

    def rows(steps: Mapping[Variant, Step], repetitions: int, warmup: int) -> Iterator[list[StepRow]]:
        gc.collect()
        for found in rounds(steps, repetitions, partial(step_time, cuda=variants.cuda), warmup):
            yield [
                step_row(*key, problem, minibatch, taken, variants.errors.get(key, float("nan")))
                for key, taken in found.items()
            ]

    steps = {key: variants.build(*key) for key in order if not is_compiled(key[0])}
    yield from rows(steps, repetitions=1, warmup=1)
    steps |= {key: variants.build(*key) for key in order if is_compiled(key[0])}
    yield from rows({key: steps[key] for key in order}, repetitions, warmup=2)


def measure_scale(
    problem: Problem, minibatches: Sequence[int], chunk: int, device: str, repetitions: int, low: torch.dtype
) -> Iterator[list[StepRow]]:
    """`ours --amp` at several minibatches, the first of them one chunk, the others chunks of the same size.

    The rows so far, after every round.
    """
    scenario = Scenario.calibrated(problem, device)
    precision = low_precision(device, low)
    steps = {
        minibatch: precision.applied(
            engine_step(scenario.parts(minibatch, low, chunk_size=chunk, **RECOMPUTE_GENERATOR))
        )
        for minibatch in minibatches
    }
    variant = f"ours, chunks of {chunk}, generator checkpointed"
    for found in rounds(steps, repetitions, partial(step_time, cuda=cuda_of(device)), warmup=1):
        yield [step_row(variant, precision, problem, minibatch, taken) for minibatch, taken in found.items()]


def scale_table(rows: Sequence[StepRow]) -> str:
    """Time per image, and its ratios to the first row's (one chunk) and the second's (two)."""
    headings = ("minibatch", "step p20, s", "p50", "p80", "ms/image", "/ one chunk", f"/ minibatch {rows[1].minibatch}")
    per_image = [row.p50 / row.minibatch for row in rows]
    return table(headings, [[
        row.minibatch, f"{row.p20:.2f}", f"{row.p50:.2f}", f"{row.p80:.2f}", f"{1e3 * own:.2f}",
        f"{own / per_image[0]:.2f}", f"{own / per_image[1]:.2f}",
    ] for row, own in zip(rows, per_image, strict=True)])  # fmt: skip


def ratios(rows: Sequence[StepRow]) -> dict[str, float]:
    """What the project promises: how many times faster than each naive variant, and how near the floor.

    Naive variants in float32 are those that PyTorch runs unasked: in TF32 on CUDA.
    """
    seconds = {(row.variant, row.dtype): row.p50 for row in rows}
    low = next(row.dtype for row in rows if row.variant.endswith("autocast"))
    full = "tf32" if ("ours", "tf32") in seconds else "float32"
    amp = seconds["ours", low]
    floor = {dtype: seconds["convolution floor", dtype] + seconds["generator alone", dtype] for dtype in (low, full)}
    return {
        "naive / ours --amp": seconds["naive", full] / amp,
        "naive compiled / ours --amp": seconds["naive, frozen, compiled", full] / amp,
        "naive compiled autocast / ours --amp": seconds["naive, frozen, compiled, autocast", low] / amp,
        f"naive compiled / ours {full}": seconds["naive, frozen, compiled", full] / seconds["ours", full],
        "ours --amp / (convolution floor + generator)": amp / floor[low],
        f"ours {full} / (convolution floor + generator)": seconds["ours", full] / floor[full],
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
    choose_device(args.device)  # refuses what is not there
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}[args.amp_dtype]
    problem, chunk = Problem(args.extractor, args.image_size), args.batch_size
    if args.scale:
        minibatches = [factor * chunk for factor in SCALE]
        measured = measure_scale(problem, minibatches, chunk, args.device, args.repetitions, low)
    else:
        measured = measure_variants(problem, args.batch_size, args.device, args.repetitions, low)
    with RowFile(args.json) as file:
        rows = file.keep_latest(measured)
    if args.scale:
        print(scale_table(rows))
    else:
        print_rows(rows)
        print(f"\n{ratios_table(rows)}")


if __name__ == "__main__":
    run_command(main)
