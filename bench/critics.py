"""`python -m bench.critics`: a step of WGAN-GP and of SN-GAN for 32×32 images, beside torch-mimicry's.

Both have the same networks and weights, and the same real images, which lie ready. A step is 5 of the critic, each on
other images, and one of the generator. Before anything is timed, losses and gradients of both networks are compared
with theirs in float64; nothing is printed of a step that computes something else. All variants take turns in another
order every time. AMP is ours alone, where no penalty is differentiated twice: on a CPU theirs has none.

It needs torch-mimicry, which nothing else does: pip install --no-deps torch-mimicry==0.1.16
"""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    from engine.training.stopping import exit_on_interrupt

    exit_on_interrupt()

import argparse
import copy
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.mimicry import BETAS, LR, NZ, SIZE, Pair, Theirs, networks_like
from bench.precisions import Precision, full_precisions, low_precision
from bench.rows import Row, RowFile, environment, percentiles, print_rows, rounds, seconds
from engine.comparison.games import GAMES
from engine.comparison.games.penalties import PENALTIES
from engine.configuration.command import Parser, output_file, run_command
from engine.configuration.inputs import choose_device
from engine.generation.priors import Gaussian, Noise, Prior
from engine.methods.adversarial import Adversarial, CriticSteps
from pipelines import Batch

EXACT = 1e-9
"""Relative error in float64 above which a step is another one."""
CHECKED = 4
"""Images of the comparison in float64."""
POOL = 4
"""Real minibatches that lie ready."""
THEIRS, OURS = "torch-mimicry", "ours"


@dataclass(frozen=True)
class Model:
    """A published method: its name in torch-mimicry, and its parts here."""

    theirs: str
    game: str
    penalty: str | None = None


MODELS = {"wgan-gp": Model("wgan_gp", "wasserstein", "gradient"), "sngan": Model("sngan", "hinge")}


@dataclass(frozen=True, kw_only=True)
class CriticRow(Row):
    """One variant's step.

    Attributes:
        model, variant, dtype: what was timed.
        minibatch, critic_steps: N, and the critic's steps in a step.
        p20, p50, p80: seconds a step.
        images_per_second: real images, of which a step reads critic_steps · minibatch, by p50.
        speedup: their p50 in the same precision, or in float32, over this one.
        loss_error, gradient_error: the larger of the two networks', relative to theirs in float64.
    """

    model: str
    variant: str
    dtype: str
    minibatch: int
    critic_steps: int
    p20: float
    p50: float
    p80: float
    images_per_second: float
    speedup: float
    loss_error: float
    gradient_error: float

    def cells(self) -> dict[str, object]:
        """Seconds, images/s, how many times faster than theirs, and the errors."""
        return {
            "model": self.model,
            "variant": self.variant,
            "dtype": self.dtype,
            "p20, s": f"{self.p20:.3f}",
            "p50": f"{self.p50:.3f}",
            "p80": f"{self.p80:.3f}",
            "images/s": f"{self.images_per_second:.0f}",
            "times theirs": f"{self.speedup:.2f}",
            "loss error": f"{self.loss_error:.1e}",
            "gradient error": f"{self.gradient_error:.1e}",
        }


@dataclass(frozen=True)
class Given:
    """What one step of each network is computed from, the same for all variants.

    Attributes:
        real: [N, 3, 32, 32].
        z: [N, nz] for the critic's step, and for the generator's.
        mixtures: [N, 1] in [0, 1), how much of a real image a penalty's mixture has.
    """

    real: Tensor
    z: tuple[Tensor, Tensor]
    mixtures: Tensor

    @classmethod
    def drawn(cls, count: int, device: str) -> Given:
        """Random ones, in float64."""
        random = torch.Generator().manual_seed(3)
        draw = partial(torch.randn, generator=random, dtype=torch.float64)
        real = draw(count, 3, SIZE, SIZE).tanh()
        mixtures = torch.rand(count, 1, generator=random, dtype=torch.float64)
        z = draw(count, NZ), draw(count, NZ)
        return cls(real.to(device), (z[0].to(device), z[1].to(device)), mixtures.to(device))

    def to(self, dtype: torch.dtype) -> Given:
        """The same numbers, rounded."""
        return Given(self.real.to(dtype), (self.z[0].to(dtype), self.z[1].to(dtype)), self.mixtures.to(dtype))


class GivenNoise(Noise):
    """In place of a run's random numbers: the given ones."""

    def __init__(self, given: Given):
        super().__init__(0, given.real.device)
        self.z, self.mixtures = iter(given.z), given.mixtures

    def draw(self, prior: Prior, count: int) -> Tensor:
        """The next z; of the uniform law, what becomes the mixtures."""
        return next(self.z) if isinstance(prior, Gaussian) else 2 * self.mixtures - 1


@dataclass(frozen=True)
class Results:
    """Of one step: the losses [2] and all gradients in a row, of the critic and of the generator."""

    losses: Tensor
    gradients: tuple[Tensor, Tensor]

    def errors(self, exact: Results) -> tuple[float, float]:
        """Of the losses and of the gradients, the larger of the two networks', relative to `exact`."""
        losses = (self.losses.double() - exact.losses).abs() / exact.losses.abs()
        found = [
            (own.double() - other).norm() / other.norm()
            for own, other in zip(self.gradients, exact.gradients, strict=True)
        ]
        return float(losses.max()), max(map(float, found))


def method_of(model: Model, networks: Sequence[Any], minibatch: int, lr: float, **options: Any) -> Adversarial:
    """The engine's method for the published one, with `networks`: a generator and a critic in training mode."""
    penalties = [] if model.penalty is None else [PENALTIES[model.penalty]()]
    generator, critic = networks
    return Adversarial(
        generator,
        critic,
        Gaussian(NZ),
        GAMES[model.game](),
        penalties,
        batch_size=minibatch,
        lr=lr,
        betas=BETAS,
        **options,
    )


def their_results(theirs: Theirs, given: Given, pairs: tuple[Sequence[Pair], Sequence[Pair]]) -> Results:
    """Of theirs, with gradients in the order of our parameters: `pairs` of the generator and of the critic."""
    losses = torch.tensor(theirs.losses(given.real, given.z, given.mixtures), dtype=torch.float64)
    in_generator = {name: weight.grad for name, weight in theirs.generator.named_parameters()}
    found = [
        torch.cat([pair.gradient(gradients[pair.theirs]).flatten() for pair in own])
        for own, gradients in ((pairs[1], theirs.critic_gradients), (pairs[0], in_generator))
    ]
    return Results(losses.to(theirs.device), (found[0], found[1]))


def our_results(
    model: Model,
    networks: Sequence[Any],
    given: Given,
    pairs: tuple[Sequence[Pair], Sequence[Pair]],
    amp: torch.dtype | None,
) -> Results:
    """Of ours, by a step of both networks at the rate 0: Adam's first moment is the gradient, since β1 is 0."""
    method = method_of(model, networks, len(given.real), 0.0, amp_dtype=amp)
    batch = Batch(given.real, torch.arange(len(given.real)))
    scalars = method.step(iter([batch]), GivenNoise(given))
    states = [method.optimizers[name].state for name in ("critic", "generator")]
    found = [
        torch.cat([state[pair.ours]["exp_avg"].flatten() for pair in own])
        for own, state in zip(reversed(pairs), states, strict=True)
    ]
    return Results(torch.stack((scalars["critic_loss"], scalars["loss"])), (found[0], found[1]))


class Comparison:
    """One model's variants: built when they are asked for, and checked before.

    Attributes:
        errors: of the loss and of the gradient, by variant and precision.
    """

    def __init__(self, name: str, minibatch: int, critic_steps: int, device: str):
        self.name, self.model, self.device = name, MODELS[name], device
        self.minibatch, self.critic_steps = minibatch, critic_steps
        torch.manual_seed(1)
        self.theirs = Theirs(self.model.theirs, device)
        networks_like(self.theirs)  # their spectral norms converge
        images = torch.randn(POOL, minibatch, 3, SIZE, SIZE).tanh().to(device)
        self.pool = list(images)
        self.given = Given.drawn(CHECKED, device)
        self.errors: dict[tuple[str, Precision], tuple[float, float]] = {}
        exact = Theirs(self.model.theirs, device, torch.float64)
        exact.generator.load_state_dict(self.theirs.generator.state_dict())
        exact.critic.load_state_dict(self.theirs.critic.state_dict())
        *networks, of_generator, of_critic = networks_like(exact)
        pairs = of_generator, of_critic
        self.exact = their_results(exact, self.given, pairs)
        found = our_results(self.model, networks, self.given, pairs, None).errors(self.exact)
        if not max(found) <= EXACT:
            raise RuntimeError(f"{name}: losses {found[0]:.1e}, gradients {found[1]:.1e} off theirs in float64")

    def build(self, variant: str, precision: Precision) -> Callable[[], None]:
        """A step of the variant; RuntimeError if it computes something else than theirs in float64."""
        theirs, given = copy.deepcopy(self.theirs), self.given.to(torch.float32)
        *networks, of_generator, of_critic = networks_like(theirs)
        pairs = of_generator, of_critic
        with precision.in_force():
            if variant == THEIRS:
                found = their_results(theirs, given, pairs)
            else:
                found = our_results(self.model, networks, given, pairs, precision.dtype)
        errors = self.errors[variant, precision] = found.errors(self.exact)
        print(f"{self.name}, {variant}, {precision.name}: gradients within {errors[1]:.1e}", file=sys.stderr)
        if not max(errors) <= precision.tolerance:
            raise RuntimeError(f"{self.name}, {variant}, {precision.name}: off by {max(errors):.1e}; not worth timing")
        step = self._their_step(theirs) if variant == THEIRS else self._our_step(networks, precision.dtype)
        return precision.applied(step)

    def _their_step(self, theirs: Theirs) -> Callable[[], None]:
        batches = itertools.cycle(self.pool)
        return lambda: theirs.step(batches, self.critic_steps)

    def _our_step(self, networks: Sequence[Any], amp: torch.dtype | None) -> Callable[[], object]:
        steps = CriticSteps(usual=self.critic_steps)
        method = method_of(self.model, networks, self.minibatch, LR, critic_steps=steps, amp_dtype=amp)
        batches: Iterator[Batch] = itertools.cycle(Batch(images, torch.arange(self.minibatch)) for images in self.pool)
        noise = Noise(0, self.device)
        return lambda: method.step(batches, noise)


def measure(
    name: str, minibatch: int, critic_steps: int, device: str, repetitions: int, low: torch.dtype
) -> Iterator[list[CriticRow]]:
    """All variants of one model; the rows so far, after every round."""
    comparison = Comparison(name, minibatch, critic_steps, device)
    full = full_precisions(device)
    variants = [(variant, precision) for precision in full for variant in (THEIRS, OURS)]
    if comparison.model.penalty is None:
        variants.append((OURS, low_precision(device, low)))
    steps = {key: comparison.build(*key) for key in variants}
    for found in rounds(steps, repetitions, partial(seconds, device=device), warmup=1):
        times = {key: percentiles(taken) for key, taken in found.items()}
        yield [
            CriticRow(
                model=name,
                variant=variant,
                dtype=precision.name,
                minibatch=minibatch,
                critic_steps=critic_steps,
                p20=times[variant, precision][0],
                p50=times[variant, precision][1],
                p80=times[variant, precision][2],
                images_per_second=critic_steps * minibatch / times[variant, precision][1],
                speedup=times[THEIRS, precision if precision in full else full[-1]][1] / times[variant, precision][1],
                loss_error=comparison.errors[variant, precision][0],
                gradient_error=comparison.errors[variant, precision][1],
                environment=environment(device),
            )
            for variant, precision in variants
        ]


def parser() -> Parser:
    """The flags of `python -m bench.critics`."""
    arguments = Parser(
        prog="python -m bench.critics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = arguments.add_argument
    add("--only", nargs="+", choices=tuple(MODELS), default=tuple(MODELS), metavar="MODEL", help="wgan-gp, sngan")
    add("--batch-size", type=int, default=64, metavar="N")
    add("--critic-steps", type=int, default=5, metavar="N", help="in a step (default: %(default)s)")
    add("--repetitions", type=int, default=10, metavar="N", help="timed steps (default: %(default)s)")
    add("--amp-dtype", choices=("bf16", "fp16"), default="bf16")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", type=output_file, metavar="FILE", help="write the rows there too")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write what --json asks for, print the table."""
    arguments = parser()
    args = arguments.parse_args(argv)
    for name, least in (("repetitions", 1), ("critic_steps", 1), ("batch_size", 2)):
        if getattr(args, name) < least:
            flag = "--" + name.replace("_", "-")
            arguments.error(f"{flag}: must be at least {least}, got {getattr(args, name)}")
    choose_device(args.device)  # refuses what is not there
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}[args.amp_dtype]
    with RowFile(args.json) as file:
        rows: list[CriticRow] = []
        for name in args.only:
            measured = measure(name, args.batch_size, args.critic_steps, args.device, args.repetitions, low)
            rows += file.keep_latest(measured)
    print_rows(rows)


if __name__ == "__main__":
    run_command(main)
