"""Extractors: frozen networks, side by side, whose every activation is a tap."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from engine.convolutions import can_fuse, fuse
from engine.errors import InputError
from engine.folding import freeze
from engine.networks import Network, make_network
from engine.stages import cut
from engine.tapping import NoMatch, TapSite, Visitor, tap_network
from engine.weights import copy_weights, read_state_dict, state_digest

_ACTIVATIONS = {"relu": torch.relu, "relu6": nn.functional.relu6, "none": lambda x: x}
_LAYERS_IN_A_PAIR = 16


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
        """d_j = C·H·W."""
        channels, height, width = self.shape
        return channels * height * width


class Normalisation(nn.Module):
    """Images in [-1, 1] to what a network was trained on: `((x + 1)/2 − mean)/std`, per channel."""

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        scale = torch.tensor([0.5 / s for s in std], dtype=torch.float64).view(1, 3, 1, 1)
        shift = torch.tensor([(0.5 - m) / s for m, s in zip(mean, std, strict=True)], dtype=torch.float64)
        self.register_buffer("scale", scale.float())
        self.register_buffer("shift", shift.view(1, 3, 1, 1).float())

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W], in x's dtype."""
        return x * self.scale + self.shift


class Extractor(nn.Module):
    """Frozen networks side by side.

    Attributes:
        name: as given to `build_extractor`.
        image_size: H = W of the images.
        taps: tuple of `Tap`, in forward order, network by network.
        sites: tuple of `TapSite`, one per tap: how the graph may treat the activation.
        num_features: D = Σ d_j.
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
        self.fingerprint: dict[str, str] = {}

    @property
    def num_features(self) -> int:
        """D = Σ d_j."""
        return sum(tap.num_features for tap in self.taps)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> Extractor:
        """Does nothing: an extractor is frozen."""
        return self

    def forward(self, images: Tensor, visit: Visitor) -> None:
        """Run all networks on `images` [N, 3, H, W] in [-1, 1]; `visit` sees every tap (see `engine.tapping`)."""
        for network in self.networks:
            network(images, visit)

    def prepared(self) -> Extractor:
        """The same extractor, of the same weights, as it runs fastest on its device; itself where nothing is faster."""
        if not can_fuse(next(self.parameters())):
            return self
        twin = copy.copy(self)
        twin._modules = {**self._modules, "networks": nn.ModuleList()}
        sites = list(self.sites)
        for network in self.networks:
            graph, normalised = _unwrapped(network)
            fused, changed = fuse(graph, sites)
            twin.networks.append(normalised(fused))
            for index, site in changed.items():
                sites[index] = site
        twin.sites = tuple(sites)
        return twin

    def stages(self) -> list[list[nn.Module]]:
        """Every network as stages `(x, visit) -> y` that run one after the other (see `engine.stages`)."""
        sizes = [tap.num_features for tap in self.taps]
        found: list[list[nn.Module]] = []
        for network in self.networks:
            graph, normalised = _unwrapped(network)
            first, *others = cut(graph, sizes)
            found.append([normalised(first), *others])
        return found

    @torch.no_grad()
    def _measure(self) -> None:
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
            y = _ACTIVATIONS[self.sites[index].activation](x if residual is None else x + residual)
            taps.append(y.flatten(1))
            return y

        self(x, visit)
        return torch.cat(taps, dim=1)

    def check_images(self, images: Tensor) -> None:
        """ValueError unless `images` is [N, 3, image_size, image_size] on the extractor's device."""
        size = self.image_size
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise ValueError(f"images: expected [N, 3, {size}, {size}], got {list(images.shape)}")
        if images.device != self.device:
            raise ValueError(f"images: are on {images.device}, the extractor is on {self.device}")


def build_extractor(
    name: str,
    *,
    image_size: int,
    weights: str | Path | Sequence[str | Path] | None = None,
    layers: int | None = None,
    layers_from: str = "bottom",
    taps: str | None = None,
    bn: str = "running",
) -> Extractor:
    """Build a frozen extractor, taps at every activation, BatchNorm folded into the convolutions.

    The paper's networks at 32×32: `vgg19` has 16 taps and 303,104 features (its 296K), `resnet18` 17 and 557,056
    (544K), `vgg19+resnet18` 851,968 (832K, of the first 16 taps each), `dcgan-encoder` 5 and 61,440 (60K).

    Args:
        name: a network, or several joined by "+": "vgg19", "resnet18", "vgg19+resnet18", "dcgan-encoder", "vgg-small",
            "efficientnet-lite0", "torchvision:NAME", "timm:NAME".
        image_size: H = W.
        weights: None for random weights; otherwise for each network a path to safetensors (or to a plain state dict,
            loaded with `weights_only=True`), or "imagenet" (torchvision's, with its own download and cache, timm's, or
            those of an installed package), which alone stands for all networks.
        layers: match min(layers, its taps) taps of each network; None is all of them, or 16 in a pair.
        layers_from: count `layers` from the "bottom" (the images) or the "top". From the bottom, 1, 3, 5, 7, 9, 11,
            13, 15 and 16 layers of VGG19 have the 64K, 160K, 208K, 240K, 264K, 280K, 290K, 294K and 296K features of
            the paper's Table 3: the first layers after the images, in forward order.
        taps: glob over the names of activations ("layer1.*"), or several separated by commas; None is all of them.
            `layers` counts those that match.
        bn: "running" statistics (the paper's fixed networks) or "batch" (the authors' code).

    Raises InputError for an unknown name, an image size the network cannot take, a pattern that matches nothing, or
    weights that do not fit.
    """
    names = name.split("+")
    sources: list[str | Path | None]
    if weights is None or weights == "imagenet":
        sources = [weights] * len(names)
    else:
        sources = [weights] if isinstance(weights, str | Path) else list(weights)
    if len(sources) != len(names):
        raise InputError(f"--weights: {name} needs {len(names)} files, one for each network, got {len(sources)}")
    if image_size < 1:
        raise InputError(f"--image-size: must be at least 1, got {image_size}")
    if bn not in ("running", "batch"):
        raise InputError(f"--extractor-bn: {bn!r} is not one of running, batch")
    if layers_from not in ("bottom", "top"):
        raise InputError(f"--layers-from: {layers_from!r} is not one of bottom, top")
    if layers is not None and layers < 1:
        raise InputError(f"--layers: must be at least 1, got {layers}")
    if layers is None and len(names) > 1:
        layers = _LAYERS_IN_A_PAIR
    extractor = Extractor(name, image_size, batch_statistics=bn == "batch")
    digests, normalisations = [], []
    for part, source in zip(names, sources, strict=True):
        network = make_network(part, image_size)
        graph, sites = _tap(network, image_size, len(extractor.sites), layers, layers_from, taps)
        digests.append(_set_weights(network, graph, source))
        if bn == "batch":
            _use_batch_statistics(graph)
        graph = freeze(graph, fold=bn == "running")
        normalisations.append(f"{network.mean} {network.std}" if network.mean else "none")
        if network.mean is not None and network.std is not None:
            extractor.networks.append(_Normalised(Normalisation(network.mean, network.std), graph))
        else:
            extractor.networks.append(graph)
        extractor.sites += tuple(sites)
    extractor._measure()
    extractor.fingerprint = {
        "extractor": name,
        "extractor_weights": " ".join(digests),
        "taps": hashlib.sha256(repr([(tap.name, tap.shape) for tap in extractor.taps]).encode()).hexdigest()[:16],
        "image_size": str(image_size),
        "extractor_bn": bn,
        "normalisation": "; ".join(normalisations),
    }
    return extractor.to(memory_format=torch.channels_last)


class _Normalised(nn.Module):
    def __init__(self, normalisation: Normalisation, network: nn.Module):
        super().__init__()
        self.normalisation = normalisation
        self.network = network

    def forward(self, images: Tensor, visit: Visitor) -> Tensor:
        return self.network(self.normalisation(images), visit)


def _unwrapped(network: nn.Module) -> tuple[fx.GraphModule, Callable[[nn.Module], nn.Module]]:
    """The graph of one of an extractor's networks, and what puts the network's normalisation before another graph."""
    normalised: Callable[[nn.Module], nn.Module]
    if isinstance(network, _Normalised):
        graph, normalised = network.network, partial(_Normalised, network.normalisation)
    else:
        graph, normalised = network, lambda other: other
    assert isinstance(graph, fx.GraphModule)
    return graph, normalised


def _tap(
    network: Network, image_size: int, first_index: int, layers: int | None, layers_from: str, pattern: str | None
) -> tuple[fx.GraphModule, list[TapSite]]:
    try:
        return tap_network(
            network.module,
            prefix=network.name,
            first_index=first_index,
            pattern=pattern,
            layers=layers,
            layers_from=layers_from,
            example=torch.zeros(2, 3, image_size, image_size),
            fold=False,
            leaves=network.leaves,
        )
    except NoMatch as error:
        raise InputError(f"--taps: {error}") from None
    except ValueError as error:
        raise InputError(f"--extractor: {error}") from None


def _set_weights(network: Network, graph: fx.GraphModule, source: str | Path | None) -> str:
    """Load `source` into what the taps need, and return its digest."""
    kept = {id(tensor) for tensor in graph.state_dict(keep_vars=True).values()}
    needed = {key: tensor for key, tensor in network.state.items() if id(tensor) in kept}
    if source == "imagenet":
        if network.imagenet is None:
            known = "vgg19, efficientnet-lite0, torchvision:NAME or timm:NAME"
            raise InputError(f"--weights: there are no ImageNet weights of {network.name}; use {known}, or give a file")
        copy_weights(network.state, needed, network.imagenet(), f"--weights: imagenet, {network.name}")
        if network.imagenet_normalisation is not None:
            network.mean, network.std = network.imagenet_normalisation
    elif source is not None:
        copy_weights(network.state, needed, read_state_dict(source), f"{source}: for {network.name}")
    return state_digest(needed)


def _use_batch_statistics(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
