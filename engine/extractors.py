"""Extractors: frozen networks, side by side, whose every activation is a tap."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.architectures import ARCHITECTURES, Architecture, find_architecture
from engine.errors import InputError
from engine.tapping import TapSite, Visitor, tap_network

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
    bn: str = "running",
) -> Extractor:
    """Build a frozen extractor, taps at every ReLU, BatchNorm folded into the convolutions.

    Args:
        name: an architecture, or several joined by "+": "vgg19", "resnet18", "vgg19+resnet18", "vgg-small".
        image_size: H = W.
        weights: None for random weights; otherwise one path for each network, to safetensors (or a plain state dict,
            loaded with `weights_only=True`).
        layers: match min(layers, its taps) taps of each network; None is all of them, or 16 in a pair (the paper's
            count of 832K features for VGG19 + ResNet18).
        layers_from: count `layers` from the "bottom" (the images) or the "top".
        bn: "running" statistics (the paper's fixed networks) or "batch" (the authors' code).

    Raises InputError for an unknown name, an image size the network cannot take, or weights that do not fit.
    """
    names = name.split("+")
    if weights is None:
        paths: list[str | Path | None] = [None] * len(names)
    else:
        paths = [weights] if isinstance(weights, str | Path) else list(weights)
    if len(paths) != len(names):
        raise InputError(f"--weights: {name} needs {len(names)} files, one for each network, got {len(paths)}")
    if bn not in ("running", "batch"):
        raise InputError(f"--extractor-bn: {bn!r} is not one of running, batch")
    if layers_from not in ("bottom", "top"):
        raise InputError(f"--layers-from: {layers_from!r} is not one of bottom, top")
    if layers is not None and layers < 1:
        raise InputError(f"--layers: must be at least 1, got {layers}")
    if layers is None and len(names) > 1:
        layers = 16
    extractor = Extractor(name, image_size, batch_statistics=bn == "batch")
    sites: list[TapSite] = []
    digests = []
    for part, path in zip(names, paths, strict=True):
        architecture = find_architecture(part, image_size)
        network = _load(part, architecture, image_size, path)
        digests.append(state_digest(network, architecture.head))
        network.eval().requires_grad_(False)
        if bn == "batch":
            _use_batch_statistics(network)
        # Folding in float64 keeps the folded weights correctly rounded.
        graph, found = tap_network(
            network.double(),
            prefix=part,
            first_index=len(sites),
            layers=layers,
            layers_from=layers_from,
            fold=bn == "running",
        )
        graph.float().requires_grad_(False)
        if architecture.mean is not None and architecture.std is not None:
            extractor.networks.append(_Normalised(Normalisation(architecture.mean, architecture.std), graph))
        else:
            extractor.networks.append(graph)
        sites += found
    extractor.sites = tuple(sites)
    extractor._measure()
    extractor.fingerprint = {
        "extractor": name,
        "extractor_weights": " ".join(digests),
        "taps": hashlib.sha256(repr([(tap.name, tap.shape) for tap in extractor.taps]).encode()).hexdigest()[:16],
        "image_size": str(image_size),
        "extractor_bn": bn,
    }
    return extractor.to(memory_format=torch.channels_last)


class _Normalised(nn.Module):
    def __init__(self, normalisation: Normalisation, network: nn.Module):
        super().__init__()
        self.normalisation = normalisation
        self.network = network

    def forward(self, images: Tensor, visit: Visitor) -> Tensor:
        return self.network(self.normalisation(images), visit)


def state_digest(network: nn.Module, head: str) -> str:
    """First 16 hex digits of the SHA-256 over the network's parameters and buffers, those under `head` left out."""
    digest = hashlib.sha256()
    for key, tensor in sorted(network.state_dict().items()):
        if key.startswith(head) or key.endswith("num_batches_tracked"):
            continue
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _load(name: str, architecture: Architecture, image_size: int, path: str | Path | None) -> nn.Module:
    network = architecture.make(10, image_size)
    if path is None:
        return network
    state = read_state_dict(path)
    own = network.state_dict()
    features = {key: tensor for key, tensor in own.items() if not key.startswith(architecture.head)}
    missing = [key for key in features if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own and not key.startswith(architecture.head)]
    shapes = [key for key in features if key in state and state[key].shape != features[key].shape]
    for reason, keys in (("lacks", missing), ("has", unexpected), ("has another shape for", shapes)):
        if keys:
            listed = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise InputError(f"{path}: these are not weights of {name}: the file {reason} {listed}")
    network.load_state_dict({key: state[key] for key in features if key in state}, strict=False)
    return network


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file or of a plain state dict; nothing in the file is executed.

    Raises InputError that names the file if it is missing, damaged, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"--weights: {path} does not exist")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: is not a readable file of weights ({str(error).splitlines()[0]})") from None
    except Exception as error:  # pickle.UnpicklingError and whatever else a foreign file provokes
        raise InputError(f"{path}: is not a plain state dict ({type(error).__name__})") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path}: is not a plain state dict: expected names and tensors only")
    return state


def _use_batch_statistics(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None


@functools.cache
def extractor_names() -> tuple[str, ...]:
    """Names of single architectures, for help texts."""
    return tuple(ARCHITECTURES)
