"""Extractors: frozen networks, side by side, whose every activation is a tap."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx, nn

from engine.representation.tracing.convolutions import can_fuse, fuse, leave_biases
from engine.representation.tracing.stages import cut
from engine.representation.tracing.tap import TapSite, Visitor, is_visit
from engine.support.errors import InputError

_ACTIVATIONS = {"relu": torch.relu, "relu6": nn.functional.relu6, "none": lambda x: x}


@dataclass(frozen=True)
class Tap:
    """One matched activation's output.

    Attributes:
        name: network and layer.
        shape: (C, H, W).
    """

    name: str
    shape: tuple[int, int, int]

    @property
    def num_features(self) -> int:
        """Features of one image at this tap, d_j = C·H·W."""
        channels, height, width = self.shape
        return channels * height * width


class Normalisation(nn.Module):
    """From images in [-1, 1] to what a network was trained on: `((x + 1)/2 − mean)/std`, per channel."""

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        scale = torch.tensor([0.5 / s for s in std], dtype=torch.float64).view(1, 3, 1, 1)
        shift = torch.tensor([(0.5 - m) / s for m, s in zip(mean, std, strict=True)], dtype=torch.float64)
        self.register_buffer("scale", scale.float())
        self.register_buffer("shift", shift.view(1, 3, 1, 1).float())

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [N, 3, H, W], in its dtype."""
        return x * self.scale + self.shift


class Extractor(nn.Module):
    """Frozen networks side by side.

    Attributes:
        name: as given to `build_extractor`.
        image_size: H = W of the images.
        taps: tuple of `Tap`, in forward order, network by network.
        sites: tuple of `TapSite`, one per tap: how the graph may treat the activation.
        num_features: D = Σ d_j.
        tokens: whether a network is a transformer, whose taps are tokens and no maps.
        batch_statistics: whether BatchNorm uses the batch's statistics, so that images depend on each other.
        fingerprint: str → str, everything of the extractor that decides the features of an image.
    """

    def __init__(self, name: str, image_size: int, *, batch_statistics: bool):
        super().__init__()
        self.name = name
        self.image_size = image_size
        self.batch_statistics = batch_statistics
        self.networks = nn.ModuleList()
        self.taps: tuple[Tap, ...] = ()
        self.sites: tuple[TapSite, ...] = ()
        self.tokens = False
        self.fingerprint: dict[str, str] = {}

    @property
    def num_features(self) -> int:
        """Features of one image at all taps, D = Σ d_j."""
        return sum(tap.num_features for tap in self.taps)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and so of the arithmetic."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device that the weights are on."""
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> Extractor:
        """Do nothing: an extractor is frozen, and its networks stay in evaluation mode."""
        return self

    def forward(self, images: Tensor, visit: Visitor) -> None:
        """Run all networks on `images` [N, 3, H, W] in [-1, 1]; `visit` sees every tap (see `tracing.tap`)."""
        for network in self.networks:
            network(images, visit)

    def prepared(self) -> Extractor:
        """The extractor as it runs fastest on its device, with the same weights (see `tracing.convolutions`)."""
        rewrite = fuse if can_fuse(next(self.parameters())) else leave_biases
        twin = Extractor(self.name, self.image_size, batch_statistics=self.batch_statistics)
        twin.taps, twin.fingerprint = self.taps, self.fingerprint
        sites = list(self.sites)
        for network in self.networks:
            graph, normalised = _unwrapped(network)
            rewritten, changed = rewrite(graph, sites)
            twin.networks.append(normalised(rewritten))
            for index, site in changed.items():
                sites[index] = site
        twin.sites = tuple(sites)
        return twin

    def taps_of_networks(self) -> list[range]:
        """Which taps are whose, network by network, in the order in which they run."""
        counts = [sum(is_visit(node) for node in _unwrapped(network)[0].graph.nodes) for network in self.networks]
        bounds = itertools.accumulate(counts, initial=0)
        return [range(begin, end) for begin, end in itertools.pairwise(bounds)]

    def stages(self) -> list[list[nn.Module]]:
        """Every network as stages `(x, visit) -> y` that run one after the other (see `tracing.stages`)."""
        sizes = [tap.num_features for tap in self.taps]
        found: list[list[nn.Module]] = []
        for network in self.networks:
            graph, normalised = _unwrapped(network)
            first, *others = cut(graph, sizes)
            found.append([normalised(first), *others])
        return found

    @torch.no_grad()
    def measure_taps(self) -> None:
        """Fill in `taps` from `sites`, by running the networks on two black images."""
        shapes: list[tuple[int, int, int]] = []

        def visit(index: int, x: Tensor, residual: Tensor | None) -> Tensor:
            shapes.append((x.shape[1], x.shape[2], x.shape[3]))
            return x

        self(torch.zeros(2, 3, self.image_size, self.image_size), visit)
        self.taps = tuple(Tap(site.name, shape) for site, shape in zip(self.sites, shapes, strict=True))

    def features(self, x: Tensor) -> Tensor:
        """Every feature of every image, `[N, D]`: taps in order, each flattened (C, H, W).

        The slow, obvious path, differentiable by autograd, in x's dtype (which must be the extractor's).
        """
        self.check_images(x)
        taps: list[Tensor] = []

        def visit(index: int, x: Tensor, residual: Tensor | None) -> Tensor:
            site = self.sites[index]
            x = x if site.bias is None else x + site.bias.view(1, -1, 1, 1)
            y = _ACTIVATIONS[site.activation](x if residual is None else x + residual)
            taps.append(y.flatten(1))
            return y

        self(x, visit)
        return torch.cat(taps, dim=1)

    def check_images(self, images: Tensor) -> None:
        """Raise InputError unless `images` is [N, 3, image_size, image_size] on the extractor's device."""
        size = self.image_size
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise InputError("images", f"expected [N, 3, {size}, {size}], got {list(images.shape)}")
        if images.device != self.device:
            raise InputError("images", f"are on {images.device}, the extractor is on {self.device}")


class Normalised(nn.Module):
    """A network with its normalisation in front."""

    def __init__(self, normalisation: Normalisation, network: nn.Module):
        super().__init__()
        self.normalisation = normalisation
        self.network = network

    def forward(self, images: Tensor, visit: Visitor) -> Tensor:
        """Normalise `images`, then run the network, whose taps `visit` sees."""
        return self.network(self.normalisation(images), visit)


def _unwrapped(network: nn.Module) -> tuple[fx.GraphModule, Callable[[nn.Module], nn.Module]]:
    """The graph of one of an extractor's networks, and a function that puts its normalisation before another graph."""
    normalised: Callable[[nn.Module], nn.Module]
    if isinstance(network, Normalised):
        graph, normalised = network.network, partial(Normalised, network.normalisation)
    else:
        graph, normalised = network, lambda other: other
    assert isinstance(graph, fx.GraphModule)
    return graph, normalised


def feature_fingerprint(extractor: Extractor, amp_dtype: torch.dtype | None) -> dict[str, str]:
    """What of extractor and precision decides the features; a reference must have been computed with the same."""
    precision = str(amp_dtype or extractor.dtype).removeprefix("torch.")
    if precision == "float32" and extractor.device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        precision = "tf32"  # what cuDNN makes of float32 unless it is told otherwise
    return {**extractor.fingerprint, "precision": precision}
