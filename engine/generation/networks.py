"""Generators `G(z; θ)`: noise z [N, nz] to images [N, 3, H, W] in [-1, 1]."""

from __future__ import annotations

import contextlib
import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from engine.generation.batch_norm import BatchNorm2d
from engine.generation.priors import check_nz
from engine.support.errors import InputError
from engine.support.initialise import initialise_normal

_BASE_WIDTH = 64
_MAX_WIDTH = 512
_FIRST_SIDE = 4
GENERATOR_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class GeneratorSpec:
    """What a generator is built from.

    Attributes:
        name: as in `GENERATORS`.
        image_size: side of its images.
        nz: length of z.
        upsampling: of "dcgan", as in `UPSAMPLINGS`; "resnet" has its own, nearest.
    """

    name: str
    image_size: int
    nz: int
    upsampling: str = "transposed"


class Generator(nn.Module):
    """G(z; θ): z [N, nz] to images [N, 3, H, W] in [-1, 1].

    Attributes:
        spec: what it was built from; `build_generator` makes the same network again.
    """

    spec: GeneratorSpec

    @abstractmethod
    def stages(self) -> list[nn.Sequential]:
        """The generator as modules that run one after the other, none of which holds many activations."""

    def forward(self, z: Tensor) -> Tensor:
        """z [N, nz] to images [N, 3, H, W] in [-1, 1]."""
        return run_generator(self, z)

    def count_batch(self) -> None:
        """One batch more for BatchNorm's counters, in training, all of them at once."""
        if self.training:
            counters = [module.num_batches_tracked for module in self.modules() if isinstance(module, BatchNorm2d)]
            torch._foreach_add_([counter for counter in counters if counter is not None], 1)


class FirstLayer(nn.Module):
    """z [N, nz] to [N, C, 4, 4]: the 4×4 transposed convolution of a 1×1 image, which is one matrix product.

    Its rows are in the order (H, W, C), so the result is channels_last without a copy.
    """

    def __init__(self, nz: int, width: int, *, bias: bool):
        super().__init__()
        self.nz, self.width = nz, width
        self.linear = nn.Linear(nz, _FIRST_SIDE * _FIRST_SIDE * width, bias=bias)

    def forward(self, z: Tensor) -> Tensor:
        """ValueError unless z is [N, nz]."""
        if z.dim() != 2 or z.shape[1] != self.nz:
            raise ValueError(f"z: expected [N, {self.nz}], got {list(z.shape)}")
        if torch.is_autocast_enabled(z.device.type):  # which converts for operators, not for a function of our own
            return self.linear(z).view(len(z), _FIRST_SIDE, _FIRST_SIDE, self.width).permute(0, 3, 1, 2)
        return _Rows.apply(z, self.linear.weight, self.linear.bias, self.width)


class _Rows(torch.autograd.Function):
    """`FirstLayer`'s product, with three views a step in place of autograd's seven: z W [N, 16·C] as [N, C, 4, 4]."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor, bias: Tensor | None, width: int) -> Tensor:
        ctx.save_for_backward(z, weight)
        ctx.has_bias = bias is not None
        rows = torch.mm(z, weight.t()) if bias is None else torch.addmm(bias, z, weight.t())
        images = (len(z), width, _FIRST_SIDE, _FIRST_SIDE)
        return rows.as_strided(images, (rows.shape[1], 1, _FIRST_SIDE * width, width))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None]:
        z, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        rows = grad.as_strided((len(z), weight.shape[0]), (weight.shape[0], 1))
        of_z = torch.mm(rows, weight) if ctx.needs_input_grad[0] else None
        return of_z, torch.mm(rows.t(), z), rows.sum(dim=0) if ctx.has_bias else None, None


def _transposed(channels: int, width: int, *, bias: bool) -> nn.Module:
    return nn.ConvTranspose2d(channels, width, 4, 2, padding=1, bias=bias)


def _interpolated(mode: str, channels: int, width: int, *, bias: bool) -> nn.Module:
    return nn.Sequential(nn.Upsample(scale_factor=2, mode=mode), nn.Conv2d(channels, width, 3, padding=1, bias=bias))


UPSAMPLINGS: dict[str, Callable[..., nn.Module]] = {
    "transposed": _transposed,
    "nearest": partial(_interpolated, "nearest"),
    "bilinear": partial(_interpolated, "bilinear"),
}
"""Layers that double the side. A transposed convolution reaches neighbouring pixels with different weights, which shows
as a checkerboard; interpolation and a 3×3 convolution don't (Odena, Dumoulin and Olah 2016)."""


class DCGANGenerator(Generator):
    """The DCGAN-like generator (paper, section 5.1; Radford et al. 2016), with two extra layers before the last.

    z → 4×4, then 4×4 stride-2 transposed convolutions that double the side and halve the width down to 64 channels at
    half the image's side, two 3×3 convolutions of 64, one last transposed convolution, tanh. BatchNorm and ReLU after
    all but the last. Widths are 256, 128, 64 for 32 pixels; 64 pixels start at 512, and so do 128 with one stage more.
    Weights start N(0, 0.02), BatchNorm's scales N(1, 0.02). `upsampling` puts another layer in place of the transposed
    convolutions.
    """

    def __init__(self, image_size: int, nz: int, upsampling: str):
        super().__init__()
        self.spec = GeneratorSpec("dcgan", image_size, nz, upsampling)
        upsample = UPSAMPLINGS[upsampling]
        # From the last stage back: 64 at half the side, doubling up to 512 on the way to 4×4.
        stages = (image_size // _FIRST_SIDE).bit_length() - 1
        widths = [min(_BASE_WIDTH << (stages - 1 - stage), _MAX_WIDTH) for stage in range(stages)]
        self.first = FirstLayer(nz, widths[0], bias=False)
        layers: list[nn.Module] = [BatchNorm2d(widths[0]), nn.ReLU()]
        for width, following in itertools.pairwise(widths):
            layers += _normalised(upsample(width, following, bias=False), following)
        for _ in range(2):
            layers += _normalised(nn.Conv2d(_BASE_WIDTH, _BASE_WIDTH, 3, padding=1, bias=False), _BASE_WIDTH)
        self.layers = nn.Sequential(*layers)
        self.last = upsample(_BASE_WIDTH, 3, bias=True)
        self.apply(initialise_normal)

    def stages(self) -> list[nn.Sequential]:
        """The generator as modules that run one after the other, none of which holds many activations."""
        layers = list(self.layers)
        groups = [[self.first, *layers[:2]], *(layers[n : n + 3] for n in range(2, len(layers), 3))]
        return [nn.Sequential(*group) for group in (*groups, [self.last, nn.Tanh()])]


class UpsamplingBlock(nn.Module):
    """Residual block that doubles the side (Gulrajani et al. 2017): BatchNorm, ReLU, nearest upsampling, 3×3,
    BatchNorm, ReLU, 3×3, plus an upsampled 1×1 shortcut.

    The shortcut's 1×1 convolution goes before its upsampling: the same numbers at a quarter of the work.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.shortcut = nn.Conv2d(channels, width, 1)
        self.bn1 = BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] to [N, width, 2H, 2W]."""
        out = self.conv1(self.upsample(self.bn1(x).relu()))
        return self.conv2(self.bn2(out).relu()) + self.upsample(self.shortcut(x))


class ResNetGenerator(Generator):
    """The residual generator of Gulrajani et al. 2017 (paper, section 5.1).

    z → 4×4×512, one `UpsamplingBlock` per doubling (512 → 256 → 128 → 64 for 32 pixels; one more of 512 → 512 for 64,
    two for 128), BatchNorm, ReLU, 3×3 convolution to 3, tanh. Xavier initialisation, zero biases.
    """

    def __init__(self, image_size: int, nz: int, upsampling: str):
        super().__init__()
        self.spec = GeneratorSpec("resnet", image_size, nz, upsampling)
        blocks = (image_size // _FIRST_SIDE).bit_length() - 1
        widths = [min(_BASE_WIDTH << (blocks - block), _MAX_WIDTH) for block in range(blocks + 1)]
        self.first = FirstLayer(nz, widths[0], bias=True)
        self.blocks = nn.Sequential(
            *(UpsamplingBlock(width, following) for width, following in itertools.pairwise(widths))
        )
        self.bn = BatchNorm2d(widths[-1])
        self.last = nn.Conv2d(widths[-1], 3, 3, padding=1)
        self.apply(_initialise_xavier)

    def stages(self) -> list[nn.Sequential]:
        """The generator as modules that run one after the other, none of which holds many activations."""
        return [
            nn.Sequential(self.first),
            *map(nn.Sequential, self.blocks),
            nn.Sequential(self.bn, nn.ReLU(), self.last, nn.Tanh()),
        ]


GENERATORS: dict[str, Callable[[int, int, str], Generator]] = {
    "dcgan": DCGANGenerator,
    "resnet": ResNetGenerator,
}


def build_generator(name: str, *, image_size: int, nz: int = 100, upsampling: str = "transposed") -> Generator:
    """A generator of image_size × image_size images, in channels_last, initialised from torch's default random state.

    Args:
        name: "dcgan" or "resnet".
        image_size: 32, 64 or 128.
        nz: length of z, 1 to `priors.MAX_NZ`.
        upsampling: how "dcgan" doubles the side: "transposed" (the paper's), "nearest" or "bilinear". "resnet" has one
            way only, and ignores it.

    Raises InputError for an unknown name, or a size the networks cannot make.
    """
    if name not in GENERATORS:
        raise InputError("generator", f"{name!r} is not known; choose one of {', '.join(GENERATORS)}")
    if image_size not in GENERATOR_SIZES:
        sizes = ", ".join(map(str, GENERATOR_SIZES))
        raise InputError("generator", f"{name} makes images of {sizes} pixels, not {image_size}")
    check_nz(nz)
    if upsampling not in UPSAMPLINGS:
        raise InputError("upsampling", f"{upsampling!r} is not one of {', '.join(UPSAMPLINGS)}")
    return GENERATORS[name](image_size, nz, upsampling).to(memory_format=torch.channels_last)


def run_generator(
    generator: Generator, z: Tensor, *, recompute: bool = False, weights: Mapping[int, Tensor] | None = None
) -> Tensor:
    """Images of `z`; with `recompute`, z alone is kept for backward, which computes the inputs of `stages()` again when
    its turn comes, and then each stage from its input: three forward passes, and no activations in between.

    Gradients, and BatchNorm's running statistics, are those of the plain call: the other computations use the batch's
    statistics but don't count it again.

    Args:
        weights: by the `id` of a parameter, what is used in its place.
    """
    generator.count_batch()
    again = recompute and torch.is_grad_enabled()
    run = partial(_run_stages, generator, recompute=again, weights=weights)
    return _checkpoint(run, z, generator) if again else run(z)


def _run_stages(generator: Generator, z: Tensor, *, recompute: bool, weights: Mapping[int, Tensor] | None) -> Tensor:
    x = z
    for stage in generator.stages():
        call: Callable[[Tensor], Tensor] = stage
        if weights:
            own = {name: weights[id(own)] for name, own in stage.named_parameters() if id(own) in weights}
            call = partial(torch.func.functional_call, stage, own)
        x = _checkpoint(call, x, stage) if recompute else call(x)
    return x


def _checkpoint(call: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module) -> Tensor:
    found: Tensor = torch.utils.checkpoint.checkpoint(
        call, x, use_reentrant=False, preserve_rng_state=False, context_fn=partial(_contexts, module)
    )
    return found


def _contexts(stage: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the first computation, and for the second."""
    return contextlib.nullcontext(), _statistics_left_alone(stage)


@contextlib.contextmanager
def _statistics_left_alone(module: nn.Module) -> Iterator[None]:
    """Once, inside, BatchNorm updates copies of its running statistics, which nobody sees again."""
    norms = [child for child in module.modules() if isinstance(child, nn.BatchNorm2d)]
    buffers = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        norm._buffers.update((name, value if value is None else value.clone()) for name, value in norm._buffers.items())
    try:
        yield
    finally:
        for norm, own in zip(norms, buffers, strict=True):
            norm._buffers.update(own)


def _normalised(layer: nn.Module, width: int) -> list[nn.Module]:
    return [layer, BatchNorm2d(width), nn.ReLU()]


def _initialise_xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
