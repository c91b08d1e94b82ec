"""From a name, or from a network of one's own, to a frozen extractor with its weights."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from engine.representation.architectures import fitting_size
from engine.representation.extractor import Extractor, Normalisation, Normalised
from engine.representation.tokens import Tokens
from engine.representation.tracing.folding import freeze
from engine.representation.tracing.tap import NoMatch, WrongSize, tap_network
from engine.representation.weights import copy_weights, read_state_dict, state_digest
from engine.representation.zoo import Network, is_fixed, make_network, network_of
from engine.support.errors import InputError

_LAYERS_IN_A_PAIR = 16


def build_extractor(
    name: str,
    *,
    image_size: int,
    weights: str | Path | Sequence[str | Path] | None = None,
    layers: int | None = None,
    layers_from: str = "bottom",
    taps: str | None = None,
    bn: str = "running",
    module: nn.Module | None = None,
) -> Extractor:
    """Build a frozen extractor, taps at every activation, BatchNorm folded into the convolutions.

    The paper's networks at 32×32: `vgg19` has 16 taps and 303,104 features (its 296K), `resnet18` 17 and 557,056
    (544K), `vgg19+resnet18` 851,968 (832K, of the first 16 taps each), `dcgan-encoder` 5 and 61,440 (60K).

    Args:
        name: a network, or several joined by "+": "vgg19", "resnet18", "vgg19+resnet18", "dcgan-encoder", "vgg-small",
            "efficientnet-lite0", "torchvision:NAME", "timm:NAME", "pixels", "opponent" (colours, see `zoo.Opponent`).
            With `module`, the name of your own network.
        image_size: H = W.
        weights: None for random weights; otherwise for each network that learns a path to safetensors (or to a plain
            state dict, loaded with `weights_only=True`), or "imagenet" (torchvision's, with its own download and cache,
            timm's, or those of an installed package), which alone stands for all networks.
        layers: match min(layers, its taps) taps of each network; None is all of them, or 16 in a pair.
        layers_from: count `layers` from the "bottom" (the images) or the "top". From the bottom, 1, 3, 5, 7, 9, 11,
            13, 15 and 16 layers of VGG19 have the 64K, 160K, 208K, 240K, 264K, 280K, 290K, 294K and 296K features of
            the paper's Table 3: the first layers after the images, in forward order.
        taps: glob over the names of activations ("layer1.*"), or several separated by commas; None is all of them.
            `layers` counts those that match. The one tap of "pixels" or "opponent" beside other networks always counts.
        bn: "running" statistics (the paper's fixed networks) or "batch" (the authors' code).
        module: your own network, in place of a named one. It takes images [N, 3, H, W] in [-1, 1], has ReLU, ReLU6,
            SiLU or GELU activations, and can be traced by torch.fx. The extractor holds a frozen float32 copy, with the
            module's weights unless `weights` names a file. The fingerprint covers the name, the weights and the taps,
            not the code: give another network another name.

    Raises InputError for an unknown name, an image size the network cannot take, a pattern that matches nothing,
    weights that do not fit, or a module without weights or activations.
    """
    names = [name] if module is not None else name.split("+")
    sources = one_source_each(name, names, weights)
    _check_options(name, image_size, layers, layers_from, bn)
    if layers is None and len(names) > 1:
        layers = _LAYERS_IN_A_PAIR
    extractor = Extractor(name, image_size, batch_statistics=bn == "batch")
    digests, normalisations = [], []
    for part, source in zip(names, sources, strict=True):
        network = make_network(part, image_size) if module is None else network_of(part, module)
        tap = functools.partial(
            tap_network,
            network.module,
            prefix=network.name,
            first_index=len(extractor.sites),
            pattern=None if is_fixed(part) and len(names) > 1 else taps,
            layers=layers,
            layers_from=layers_from,
            fold=False,
            leaves=network.leaves,
        )
        with _errors_about("name" if module is None else "module"):
            try:
                graph, sites = tap(example=torch.zeros(2, 3, image_size, image_size))
            except WrongSize as error:
                network.module.to("meta")
                size = fitting_size(image_size, functools.partial(_fits, tap))
                raise ValueError(f"{error}; " + (f"it takes {size}×{size}" if size else "give another one")) from None
        digests.append(load_weights(network, graph, source))
        if bn == "batch":
            _use_batch_statistics(graph)
        graph = freeze(graph, fold=bn == "running")
        normalisations.append(f"{network.mean} {network.std}" if network.mean else "none")
        if network.mean is not None and network.std is not None:
            extractor.networks.append(Normalised(Normalisation(network.mean, network.std), graph))
        else:
            extractor.networks.append(graph)
        extractor.sites += tuple(sites)
        extractor.tokens |= isinstance(network.module, Tokens)
    extractor.measure_taps()
    extractor.fingerprint = {
        "extractor": name,
        "extractor_weights": " ".join(digests),
        "taps": hashlib.sha256(repr([(tap.name, tap.shape) for tap in extractor.taps]).encode()).hexdigest()[:16],
        "image_size": str(image_size),
        "extractor_bn": bn,
        "normalisation": "; ".join(normalisations),
    }
    return extractor.to(memory_format=torch.channels_last)


def one_source_each(
    name: str, names: Sequence[str], weights: str | Path | Sequence[str | Path] | None
) -> Sequence[str | Path | None]:
    """Where the weights of each network come from; raise InputError if there are too many or too few.

    Networks with nothing to learn need none, and may be left out.
    """
    if weights is None or weights == "imagenet":
        return [weights] * len(names)
    sources = [weights] if isinstance(weights, str | Path) else list(weights)
    if len(sources) == len(names):
        return sources
    learned = [part for part in names if not is_fixed(part)]
    if len(sources) != len(learned):
        raise InputError("weights", f"{name} needs {len(learned)} files, one for each network, got {len(sources)}")
    files = iter(sources)
    return [None if is_fixed(part) else next(files) for part in names]


def _check_options(name: str, image_size: int, layers: int | None, layers_from: str, bn: str) -> None:
    """Raise InputError for the first option that no network could take."""
    if not name:
        raise InputError("name", "must not be empty")
    if image_size < 1:
        raise InputError("image_size", f"must be at least 1, got {image_size}")
    if bn not in ("running", "batch"):
        raise InputError("bn", f"{bn!r} is not one of running, batch")
    if layers_from not in ("bottom", "top"):
        raise InputError("layers_from", f"{layers_from!r} is not one of bottom, top")
    if layers is not None and layers < 1:
        raise InputError("layers", f"must be at least 1, got {layers}")


@contextlib.contextmanager
def _errors_about(argument: str) -> Iterator[None]:
    """Turn `tap_network`'s errors into InputErrors: about `taps` if it is the pattern, about `argument` otherwise."""
    try:
        yield
    except NoMatch as error:
        raise InputError("taps", str(error)) from None
    except ValueError as error:
        raise InputError(argument, str(error)) from None


def _fits(tap: Callable[..., object], image_size: int) -> bool:
    """Whether a network on the meta device takes images of this size; ValueError if it could not be tapped at any."""
    try:
        tap(example=torch.empty(2, 3, image_size, image_size, device="meta"))
    except WrongSize:
        return False
    return True


def load_weights(network: Network, kept: nn.Module, source: str | Path | None) -> str:
    """Load `source` into those tensors of `network` that `kept`, a part of it, has; return their digest."""
    own = {id(tensor) for tensor in kept.state_dict(keep_vars=True).values()}
    needed = {key: tensor for key, tensor in network.state.items() if id(tensor) in own}
    if source == "imagenet":
        if network.imagenet is None:
            known = "vgg19, efficientnet-lite0, torchvision:NAME or timm:NAME"
            raise InputError("weights", f"there are no ImageNet weights of {network.name}; use {known}, or give a file")
        copy_weights(network.state, needed, network.imagenet(), f"imagenet, {network.name}", argument="weights")
        if network.imagenet_normalisation is not None:
            network.mean, network.std = network.imagenet_normalisation
    elif source is not None:
        file = Path(source)
        copy_weights(network.state, needed, read_state_dict(file), f"for {network.name}", argument=file)
    return state_digest(needed)


def _use_batch_statistics(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
