"""The networks that judge: Inception-v3, or a network of ours, as a feature extractor that torch-fidelity knows."""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine.evaluation.fidelity import fidelity
from engine.representation.extractor import Normalisation
from engine.representation.weights import copy_weights, read_state_dict, state_digest
from engine.representation.zoo import Network, make_network
from engine.support.errors import InputError
from engine.support.files import open_safetensors
from engine.support.pixels import to_float
from pipelines.errors import one_line

if TYPE_CHECKING:
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

VGG16 = "vgg16"
"""torch-fidelity's name of the network whose features give Inception's precision and recall."""
_INCEPTION = "inception-v3-compat"
_LAYERS = ("features", "scores")

Head = nn.Linear | nn.Conv2d


@dataclass
class EvaluationNetwork:
    """An image network registered with torch-fidelity, under a name that carries its weights' fingerprint.

    Attributes:
        name: as torch-fidelity knows it.
        label: for people: "Inception-v3", or as given to `evaluation_network`.
        is_inception: whether the numbers may be called FID, KID and Inception score.
        digest: of the weights; "" for those that torch-fidelity downloads.
        has_classifier: whether its outputs are scores of classes, which the metric "is" needs.
        num_features: F.
        image_size: H = W of the images that it takes; None for any.
    """

    name: str
    label: str
    is_inception: bool
    digest: str
    has_classifier: bool
    num_features: int
    image_size: int | None

    @torch.no_grad()
    def features(self, images: Tensor, *, device: str | torch.device, batch_size: int = 128) -> Tensor:
        """Features float32 [N, F] on the CPU of `images` uint8 [N, 3, H, W]: those that FID and KID compare."""
        layer = fidelity().registry.FEATURE_EXTRACTORS_REGISTRY[self.name].get_default_feature_layer_for_metric("kid")
        with torch.random.fork_rng(devices=[]):
            extractor = _create(self.name, layer).to(device)
        return torch.cat([extractor(part.to(device))[0].cpu() for part in images.split(batch_size)])


def evaluation_network(name: str | None, *, weights: str | Path | None = None, image_size: int) -> EvaluationNetwork:
    """The network whose features the metrics compare, ready to use.

    Args:
        name: None for torch-fidelity's Inception-v3; otherwise a network of `engine.representation.zoo.make_network`.
        weights: a file. None is torch-fidelity's download of Inception, or the ImageNet weights of a network that
            has them.
        image_size: H = W of the images. Inception resizes, as torch-fidelity does; other networks see them as they are.

    A network's features are what its last layer (the classifier) reads, averaged over positions if it has any; the
    output of a network of timm that has no classifier.

    Raises InputError: "name" for an unknown network or one that cannot take the images, "weights" if there are none
    or the download fails, the file's path if it does not fit the network.
    """
    with torch.random.fork_rng(devices=[]):
        return _inception(weights) if name is None else _network(name, weights, image_size)


def download_judges(network: EvaluationNetwork, metrics: Collection[str]) -> None:
    """Download what `metrics` need besides `network`, unless it is in torch.hub's folder already.

    Inception's precision and recall ("prc") need VGG16, 528 MB. Raises InputError that names `metrics` if the
    download fails.
    """
    if network.is_inception and "prc" in metrics:
        _download_vgg16()


def _inception(weights: str | Path | None) -> EvaluationNetwork:
    name, digest = _INCEPTION, ""
    if weights is not None:
        state = read_state_dict(weights)
        digest = state_digest(state)
        name = f"{_INCEPTION}-{digest}"
        _register(name, _inception_with(state, Path(weights)))
    file = fidelity().feature_extractor_inceptionv3.URL_INCEPTION_V3.rpartition("/")[2]
    try:
        _create(name, "2048")
    except (OSError, RuntimeError) as error:  # no network (URLError is an OSError), or a damaged download
        raise InputError(
            "weights",
            f"torch-fidelity's Inception-v3 could not be downloaded ({one_line(error)}); give its file "
            f"{file}, or choose another network",
        ) from None
    return EvaluationNetwork(name, "Inception-v3", True, digest, True, 2048, None)


def _inception_with(state: dict[str, Tensor], file: Path) -> type[FeatureExtractorBase]:
    """torch-fidelity's Inception with the weights `state` of `file`."""

    base = fidelity().feature_extractor_inceptionv3.FeatureExtractorInceptionV3

    class Inception(base):  # type: ignore[misc, valid-type]
        def __init__(self, name: str, features_list: list[str], **options: Any):
            # torch-fidelity would unpickle a file without any restriction: it gets tensors that were read safely.
            buffer = io.BytesIO()
            torch.save(state, buffer)
            buffer.seek(0)
            super().__init__(name, features_list, **{**options, "feature_extractor_weights_path": buffer})

        def load_state_dict(self, given: dict[str, Tensor], *_: Any, **__: Any) -> None:
            own = self.state_dict(keep_vars=True)
            _copy(own, own, given, "torch-fidelity's Inception-v3", file)

    return Inception


def _network(name: str, weights: str | Path | None, image_size: int) -> EvaluationNetwork:
    if "+" in name:
        raise InputError("name", f"{name!r} is several networks; choose one")
    try:
        network = make_network(name, image_size)
    except InputError as error:
        raise InputError("name", error.message) from None
    module = network.module if network.whole is None else network.whole
    try:
        head, num_features = _find_head(module, image_size)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InputError("name", f"{name} cannot take images of {image_size} pixels ({one_line(error)})") from None
    digest, has_classifier = _load(network, head, weights)
    function = hashlib.sha256(repr((digest, network.mean, network.std, has_classifier)).encode()).hexdigest()[:16]
    registered = f"{name.replace('/', '_')}-{function}"
    _register(registered, _adapter(_Judge(module, network, head)))
    return EvaluationNetwork(registered, name, False, digest, has_classifier, num_features, image_size)


@torch.no_grad()
def _find_head(module: nn.Module, image_size: int) -> tuple[Head | None, int]:
    """The last linear or convolutional layer that runs, and how many features it reads; None, and how many features the
    network returns, if timm made it without a classifier."""
    layers: list[tuple[Head, Tensor]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs: layers.append((layer, inputs[0])))
        for layer in module.modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    try:
        output = module(torch.zeros(1, 3, image_size, image_size))
    finally:
        for hook in hooks:
            hook.remove()
    if not layers or not isinstance(output, Tensor):
        raise ValueError("it has no last layer")
    if getattr(module, "num_classes", None) == 0:
        return None, output.shape[1]
    head, x = layers[-1]
    return head, _averaged(x, head).shape[1]


def _averaged(x: Tensor, head: Head) -> Tensor:
    """What `head` reads, [N, F], averaged over positions: [N, F, H, W] of a convolution, else [N, ..., F]."""
    if isinstance(head, nn.Conv2d):
        return x.mean(dim=(2, 3))
    return x.flatten(1, -2).mean(dim=1) if x.dim() > 2 else x


def _load(network: Network, head: Head | None, weights: str | Path | None) -> tuple[str, bool]:
    """Load the weights; return their digest, and whether they make the network a classifier."""
    task = None
    if weights is not None:
        state = read_state_dict(weights)
        task = _task(weights)
    elif network.imagenet is None:
        raise InputError("weights", f"{network.name} has none of its own; give a file, as engine.pretrain writes it")
    else:
        state = network.imagenet()
        if network.imagenet_normalisation is not None:
            network.mean, network.std = network.imagenet_normalisation
    of_head = [] if head is None else list(head.parameters())
    keys = {key for key, tensor in network.state.items() if any(tensor is own for own in of_head)}
    has_head = any(key in state for key in keys)
    for key in keys & state.keys():
        # As many classes as the file has.
        own, given = network.state[key], state[key]
        if own.shape[1:] == given.shape[1:] and own.shape != given.shape:
            own.data = torch.empty_like(given)
    needed = [key for key in network.state if has_head or key not in keys]
    _copy(network.state, needed, state, network.name, "weights" if weights is None else Path(weights))
    if task is None:
        task = "autoencode" if any(key.startswith("latent.") for key in keys) else "classify"
    return state_digest({key: network.state[key] for key in needed}), has_head and task == "classify"


def _copy(
    own: dict[str, Tensor], needed: Collection[str], state: dict[str, Tensor], network: str, source: str | Path
) -> None:
    """Copy `state` into `own`; InputError that names the `source` and the network if it does not fit."""
    try:
        copy_weights(own, needed, state, f"for {network}")
    except InputError as error:
        raise InputError(source, error.message) from None


def _task(weights: str | Path) -> str | None:
    """What `engine.pretrain` trained the file for, if it was that."""
    if Path(weights).suffix != ".safetensors":
        return None
    with open_safetensors(weights) as file:
        return (file.metadata() or {}).get("task")


class _Judge(nn.Module):
    """Images uint8 [N, 3, H, W] to (features [N, F], scores [N, K]), float32; both are the output without a head."""

    def __init__(self, module: nn.Module, network: Network, head: Head | None):
        super().__init__()
        self.network = module
        normalised = network.mean is not None and network.std is not None
        self.normalisation = Normalisation(network.mean, network.std) if normalised else nn.Identity()  # type: ignore[arg-type]
        self.features: Tensor | None = None
        if head is not None:
            head.register_forward_pre_hook(self._read)

    def _read(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(head, Head)
        self.features = _averaged(inputs[0], head)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.network(self.normalisation(to_float(images)))
        features, self.features = self.features, None
        return scores if features is None else features, scores


def _adapter(module: nn.Module) -> type[FeatureExtractorBase]:
    """A class as torch-fidelity wants one, whose instances all run `module`."""

    base = fidelity().feature_extractor_base.FeatureExtractorBase

    class Adapter(base):  # type: ignore[misc, valid-type]
        def __init__(self, name: str, features_list: list[str], **_: Any):
            super().__init__(name, features_list)
            self.module = module

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            layers = dict(zip(_LAYERS, self.module(images)))
            return tuple(layers[name] for name in self.features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return _LAYERS

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "scores" if metric == "isc" else "features"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

    return Adapter


def _register(name: str, kind: type[FeatureExtractorBase]) -> None:
    # The name says all that decides the features, so a network that has it already is the same one.
    registry = fidelity().registry
    if name not in registry.FEATURE_EXTRACTORS_REGISTRY:
        registry.register_feature_extractor(name, kind)


def _create(name: str, layer: str) -> FeatureExtractorBase:
    return fidelity().utils.create_feature_extractor(name, [layer], cuda=False, verbose=False)


@functools.cache
def _download_vgg16() -> None:
    try:
        with torch.random.fork_rng(devices=[]):
            _create(VGG16, "fc2_relu")
    except (OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise InputError(
            "metrics",
            "prc is computed on VGG16's features, as torch-fidelity does, and torchvision's weights could not be "
            f"downloaded ({one_line(error)}); put vgg16-397923af.pth into {folder}, leave out prc, or choose another "
            "network",
        ) from None
