"""FID, KID, Inception score, precision and recall, all by torch-fidelity, on Inception or on a network of ours.

network = evaluation_network(None, image_size=32)                    # torch-fidelity's Inception-v3
compute_metrics(generated, real, network, ("fid", "kid"), device="cuda")  # uint8 [N, 3, 32, 32], or folders

Nothing here knows what a generator is trained for.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import Dataset

from engine.representation.extractor import Normalisation
from engine.representation.weights import copy_weights, read_state_dict, state_digest
from engine.representation.zoo import Network, make_network
from engine.support.errors import InputError, require

if TYPE_CHECKING:
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

log = logging.getLogger("gfmn")

METRICS = ("fid", "kid", "is", "prc")
SEED = 2020
"""torch-fidelity's own default: with it, numbers are those of the command `fidelity`."""

_INCEPTION, _VGG16 = "inception-v3-compat", "vgg16"
KID_SUBSET = 1000
"""Images in each of KID's subsets, as torch-fidelity has them."""
_IS_SPLITS, _NEIGHBOURS = 10, 3
_LAYERS = ("features", "scores")
_SUFFIXES = "png,jpg,jpeg"
_KEYS = {
    "frechet_inception_distance": "frechet_distance",
    "kernel_inception_distance_mean": "kernel_distance",
    "kernel_inception_distance_std": "kernel_distance_std",
    "inception_score_mean": "classifier_score",
    "inception_score_std": "classifier_score_std",
    "precision": "precision",
    "recall": "recall",
}


def _fidelity() -> ModuleType:
    """torch-fidelity; InputError if it is missing."""
    return require("torch_fidelity", "evaluation")


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
        layer = _fidelity().registry.FEATURE_EXTRACTORS_REGISTRY[self.name].get_default_feature_layer_for_metric("kid")
        with torch.random.fork_rng(devices=[]):
            extractor = _create(self.name, layer).to(device)
        return torch.cat([extractor(part.to(device))[0].cpu() for part in images.split(batch_size)])


class ImageSet:
    """Images of one size: a tensor uint8 [N, 3, H, W], or the PNG and JPEG files of a folder.

    InputError that names the folder or file if there are none, one cannot be read, or sizes differ.

    Attributes:
        source: what torch-fidelity is given, a dataset or the folder's path.
        name: for messages.
        count: N.
        size: (H, W).
    """

    def __init__(self, images: Tensor | str | Path, name: str = "images"):
        self.source: Dataset[Tensor] | str
        if isinstance(images, Tensor):
            if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
                raise ValueError(f"{name}: expected uint8 [N, 3, H, W], got {images.dtype} {list(images.shape)}")
            self.source, self.name = _Pixels(images), name
            self.count, self.size = len(images), (images.shape[2], images.shape[3])
            return
        path = Path(images)
        if not path.is_dir():
            raise InputError(f"{path}: is not a folder of images")
        self.source, self.name = str(path), str(path)
        files = self.files()
        if not files:
            raise InputError(f"{path}: holds no PNG or JPEG images (folders below it do not count)")
        self.count, self.size = len(files), _size(files[0])
        for file in files:
            if (size := _size(file)) != self.size:
                raise InputError(
                    f"{path}: holds images of different sizes: {Path(files[0]).name} is {_shown(self.size)}, "
                    f"{Path(file).name} is {_shown(size)}"
                )

    def files(self) -> list[str]:
        """The files that torch-fidelity reads, in its order; none of a tensor."""
        if not isinstance(self.source, str):
            return []
        return _fidelity().utils.glob_samples_paths(self.source, False, _SUFFIXES, None, False)


class _Pixels(Dataset[Tensor]):
    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def compute_metrics(
    generated: Tensor | str | Path | ImageSet,
    real: Tensor | str | Path | ImageSet | None,
    network: EvaluationNetwork,
    metrics: Sequence[str] = ("fid", "kid"),
    *,
    device: str | torch.device,
    batch_size: int = 128,
    seed: int = SEED,
    kid_subset_size: int | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """The metrics of `generated` against `real` images: uint8 [N, 3, H, W] each, or the path of a folder.

    Everything is torch-fidelity's, with its defaults. As there, Inception's precision and recall come from VGG16's
    features; any other network computes all metrics. The caller's random numbers are left alone.

    Args:
        generated: the images that are judged.
        real: what they are compared with; the metric "is" alone needs none.
        network: from `evaluation_network`.
        metrics: some of `METRICS`.
        device: where the network runs.
        batch_size: images at a time; it may change the last bits of features, and nothing else.
        seed: of KID's subsets and of the shuffling before the splits of "is".
        kid_subset_size: images in each of KID's 100 subsets; None is torch-fidelity's 1,000.
        progress: show progress on stderr.

    Returns what was asked for: frechet_distance ("fid"), kernel_distance and kernel_distance_std ("kid"),
    classifier_score and classifier_score_std ("is"), precision and recall ("prc"), whatever the network.

    Raises InputError if there are too few images, their sizes differ, or the network has no classifier for "is".
    """
    generated = generated if isinstance(generated, ImageSet) else ImageSet(generated, "generated")
    if real is not None and not isinstance(real, ImageSet):
        real = ImageSet(real, "real")
    counts = (generated.count, None if real is None else real.count)
    check_metrics(metrics, network, *counts, kid_subset_size)
    check_sizes(network, generated, real)
    _warn_of_few(metrics, network, *counts)
    device = torch.device(device)
    inputs = [generated] if real is None or set(metrics) == {"is"} else [generated, real]
    # Images in memory need no processes that read them; distances between very many images need the sparing way.
    in_memory = any(not isinstance(entry.source, str) for entry in inputs)
    options: dict[str, Any] = {
        **{f"input{number}": entry.source for number, entry in enumerate(inputs, start=1)},
        "cuda": device.type == "cuda",
        "batch_size": batch_size,
        "kid_subset_size": KID_SUBSET if kid_subset_size is None else kid_subset_size,
        "rng_seed": seed,
        "save_cpu_ram": in_memory or not _distances_fit(max(entry.count for entry in inputs)),
        "cache": False,
        "verbose": progress,
    }
    calls = [(network.name, tuple(metrics))]
    if network.is_inception and "prc" in metrics:
        calls = [(network.name, tuple(metric for metric in metrics if metric != "prc")), (_VGG16, ("prc",))]
    found: dict[str, float] = {}
    with _quiet(device):
        for extractor, names in calls:
            if names:
                wanted = {("isc" if metric == "is" else metric): metric in names for metric in METRICS}
                found |= _calculate(inputs, extractor, options | wanted)
    return common_names(found)


def common_names(found: Mapping[str, float]) -> dict[str, float]:
    """torch-fidelity's numbers under names that say nothing of Inception; others are left out."""
    return {name: found[key] for key, name in _KEYS.items() if key in found}


def check_metrics(
    metrics: Sequence[str],
    network: EvaluationNetwork,
    generated: int,
    real: int | None,
    kid_subset_size: int | None = None,
) -> None:
    """InputError unless `metrics` can be had of so many `generated` and `real` images (None: there are none)."""
    for metric in metrics:
        if metric not in METRICS:
            raise InputError(f"--metrics: {metric!r} is not one of {', '.join(METRICS)}")
    if not metrics:
        raise InputError(f"--metrics: name at least one of {', '.join(METRICS)}")
    if "is" in metrics and not network.has_classifier:
        raise InputError(f"--metrics: is needs a classifier, which {network.label} with these weights is not")
    if "kid" in metrics and kid_subset_size is not None and kid_subset_size < 2:
        raise InputError(f"--kid-subset-size: must be at least 2, got {kid_subset_size}")
    subset = KID_SUBSET if kid_subset_size is None else kid_subset_size
    needed = {"fid": 2, "kid": subset, "is": _IS_SPLITS, "prc": _NEIGHBOURS + 1}
    for metric in metrics:
        counts = [(generated, "generated")]
        if metric != "is":
            if real is None:
                raise InputError(f"--metrics: {metric} compares with real images, and there are none")
            counts.append((real, "real"))
        for count, kind in counts:
            if count < needed[metric]:
                hint = "; a smaller --kid-subset-size is another metric, but possible" if metric == "kid" else ""
                raise InputError(
                    f"--metrics: {metric} needs at least {needed[metric]} {kind} images, there are {count}{hint}"
                )
    if network.is_inception and "prc" in metrics:
        _check_vgg16()


def check_sizes(network: EvaluationNetwork, generated: ImageSet, real: ImageSet | None) -> None:
    """InputError unless all images have one size, and one that `network` takes."""
    if real is not None and generated.size != real.size:
        raise InputError(
            f"{generated.name}: images are {_shown(generated.size)} pixels, but those of {real.name} are "
            f"{_shown(real.size)}; bring both to one size first"
        )
    expected = (network.image_size, network.image_size)
    if network.image_size is not None and generated.size != expected:
        raise InputError(
            f"{generated.name}: images are {_shown(generated.size)} pixels, but {network.label} was made for "
            f"{_shown((network.image_size, network.image_size))}"
        )


def evaluation_network(name: str | None, *, weights: str | Path | None = None, image_size: int) -> EvaluationNetwork:
    """The network whose features the metrics compare, ready to use.

    Args:
        name: None for torch-fidelity's Inception-v3; otherwise a network of `engine.representation.zoo.make_network`.
        weights: a file. None is torch-fidelity's download of Inception, or the ImageNet weights of a network that
            has them.
        image_size: H = W of the images. Inception resizes, as torch-fidelity does; other networks see them as they are.

    A network's features are what its last layer (the classifier) reads, averaged over positions if it has any.

    Raises InputError for an unknown name, weights that do not fit, or a download that fails.
    """
    with torch.random.fork_rng(devices=[]):
        return _inception(weights) if name is None else _network(name, weights, image_size)


def _inception(weights: str | Path | None) -> EvaluationNetwork:
    name, digest = _INCEPTION, ""
    if weights is not None:
        state = read_state_dict(weights)
        digest = state_digest(state)
        name = f"{_INCEPTION}-{digest}"
        _register(name, _inception_of(state, f"{weights}: for torch-fidelity's Inception-v3"))
    file = _fidelity().feature_extractor_inceptionv3.URL_INCEPTION_V3.rpartition("/")[2]
    try:
        _create(name, "2048")
    except InputError:
        raise
    except (OSError, RuntimeError) as error:  # no network (URLError is an OSError), or a damaged download
        raise InputError(
            f"torch-fidelity's Inception-v3 could not be downloaded ({_one_line(error)}): give its file "
            f"{file} with --weights FILE, or another network with --feature-extractor NAME"
        ) from None
    return EvaluationNetwork(name, "Inception-v3", True, digest, True, 2048, None)


def _inception_of(state: dict[str, Tensor], what: str) -> type[FeatureExtractorBase]:
    base = _fidelity().feature_extractor_inceptionv3.FeatureExtractorInceptionV3

    class Inception(base):  # type: ignore[misc, valid-type]
        def __init__(self, name: str, features_list: list[str], **options: Any):
            # torch-fidelity would unpickle a file without any restriction: it gets tensors that were read safely.
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            super().__init__(name, features_list, **{**options, "feature_extractor_weights_path": file})

        def load_state_dict(self, given: dict[str, Tensor], *_: Any, **__: Any) -> None:
            own = self.state_dict(keep_vars=True)
            copy_weights(own, own, given, what)

    return Inception


def _network(name: str, weights: str | Path | None, image_size: int) -> EvaluationNetwork:
    flag = "--feature-extractor"
    if "+" in name:
        raise InputError(f"{flag}: {name!r} is several networks; choose one")
    try:
        network = make_network(name, image_size)
    except InputError as error:
        text = str(error).replace("--extractor", flag, 1).replace(", or join several with +", "")
        raise InputError(text) from None
    try:
        head, num_features = _find_head(network.module, image_size)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InputError(f"{flag}: {name} cannot take images of {image_size} pixels ({_one_line(error)})") from None
    digest, has_classifier = _load(network, head, weights)
    function = hashlib.sha256(repr((digest, network.mean, network.std, has_classifier)).encode()).hexdigest()[:16]
    registered = f"{name.replace('/', '_')}-{function}"
    _register(registered, _adapter(_Pooled(network, head)))
    return EvaluationNetwork(registered, name, False, digest, has_classifier, num_features, image_size)


@torch.no_grad()
def _find_head(module: nn.Module, image_size: int) -> tuple[nn.Linear | nn.Conv2d, int]:
    """The last linear or convolutional layer that runs, and how many features it reads."""
    layers: list[tuple[nn.Linear | nn.Conv2d, Tensor]] = []
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
    head, x = layers[-1]
    return head, _average(x, head).shape[1]


def _average(x: Tensor, head: nn.Linear | nn.Conv2d) -> Tensor:
    """What `head` reads, [N, F], averaged over positions: [N, F, H, W] of a convolution, else [N, ..., F]."""
    if isinstance(head, nn.Conv2d):
        return x.mean(dim=(2, 3))
    return x.flatten(1, -2).mean(dim=1) if x.dim() > 2 else x


def _load(network: Network, head: nn.Linear | nn.Conv2d, weights: str | Path | None) -> tuple[str, bool]:
    """Load the weights; return their digest, and whether they make the network a classifier."""
    task = None
    if weights is not None:
        state, what = read_state_dict(weights), f"{weights}: for {network.name}"
        task = _task(weights)
    elif network.imagenet is None:
        raise InputError(
            f"--feature-extractor: {network.name} has no weights of its own; give --weights FILE (from python -m "
            "engine.pretrain)"
        )
    else:
        state, what = network.imagenet(), f"--weights: imagenet, {network.name}"
        if network.imagenet_normalisation is not None:
            network.mean, network.std = network.imagenet_normalisation
    keys = {key for key, tensor in network.state.items() if any(tensor is own for own in head.parameters())}
    has_head = any(key in state for key in keys)
    for key in keys & state.keys():
        # As many classes as the file has.
        own, given = network.state[key], state[key]
        if own.shape[1:] == given.shape[1:] and own.shape != given.shape:
            own.data = torch.empty_like(given)
    needed = [key for key in network.state if has_head or key not in keys]
    copy_weights(network.state, needed, state, what)
    if task is None:
        task = "autoencode" if any(key.startswith("latent.") for key in keys) else "classify"
    return state_digest({key: network.state[key] for key in needed}), has_head and task == "classify"


def _task(weights: str | Path) -> str | None:
    """What `engine.pretrain` trained the file for, if it was that."""
    if Path(weights).suffix != ".safetensors":
        return None
    with safe_open(weights, framework="pt") as file:
        return (file.metadata() or {}).get("task")


class _Pooled(nn.Module):
    """Images uint8 [N, 3, H, W] to (features [N, F], scores [N, K]), float32."""

    def __init__(self, network: Network, head: nn.Linear | nn.Conv2d):
        super().__init__()
        self.network = network.module
        normalised = network.mean is not None and network.std is not None
        self.normalisation = Normalisation(network.mean, network.std) if normalised else nn.Identity()  # type: ignore[arg-type]
        self._head = [head]  # not a second time among the modules
        self._read: list[Tensor] = []
        head.register_forward_pre_hook(lambda _, inputs: self._read.append(inputs[0]))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self._read.clear()
        scores = self.network(self.normalisation(images.float().sub(127.5).div(127.5)))
        return _average(self._read.pop(), self._head[0]), scores


def _adapter(module: nn.Module) -> type[FeatureExtractorBase]:
    base = _fidelity().feature_extractor_base.FeatureExtractorBase

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
    # The name says all that decides the features, so what is there under that name is the same.
    registry = _fidelity().registry
    if name not in registry.FEATURE_EXTRACTORS_REGISTRY:
        registry.register_feature_extractor(name, kind)


def _create(name: str, layer: str) -> FeatureExtractorBase:
    return _fidelity().utils.create_feature_extractor(name, [layer], cuda=False, verbose=False)


@functools.cache
def _check_vgg16() -> None:
    try:
        with torch.random.fork_rng(devices=[]):
            _create(_VGG16, "fc2_relu")
    except (OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise InputError(
            f"--metrics: prc is computed on VGG16's features, as torch-fidelity does, and torchvision's weights could "
            f"not be downloaded ({_one_line(error)}): put vgg16-397923af.pth into {folder}, leave out prc, or give "
            "another network with --feature-extractor NAME"
        ) from None


def _calculate(images: list[ImageSet], extractor: str, options: dict[str, Any]) -> dict[str, float]:
    try:
        return _fidelity().calculate_metrics(feature_extractor=extractor, **options)
    except OSError as error:
        bad = next((file for entry in images for file in entry.files() if not _decodes(file)), None)
        if bad is None:
            raise
        raise InputError(f"{bad}: cannot be decoded ({_last_line(error)}); replace or remove it") from None


@contextlib.contextmanager
def _quiet(device: torch.device) -> Iterator[None]:
    """Nothing of torch-fidelity's on stdout, the caller's random numbers untouched, its CUDA device the one given."""
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with (
        contextlib.redirect_stdout(sys.stderr),
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
        on_device,
    ):
        # It reads files in four processes, however few cores there are.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        yield


def _warn_of_few(metrics: Sequence[str], network: EvaluationNetwork, generated: int, real: int | None) -> None:
    fewest = min(generated, generated if real is None else real)
    if "fid" in metrics and fewest <= network.num_features:
        _warn_once(
            f"a Fréchet distance of {fewest} images with {network.num_features} features is biased upwards (their "
            "covariance is singular): compare it only with others of as many images"
        )


@functools.cache
def _warn_once(text: str) -> None:
    log.warning(text)


def _distances_fit(count: int) -> bool:
    """Whether all distances between as many images, as precision and recall need them, fit into half of the memory."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 4 * 4 * count**2 < total / 2


def _size(file: str) -> tuple[int, int]:
    try:
        with Image.open(file) as image:
            return image.height, image.width
    except OSError as error:
        raise InputError(f"{file}: is not a readable image ({_last_line(error)}); replace or remove it") from None


def _decodes(file: str) -> bool:
    try:
        with Image.open(file) as image:
            image.load()
    except OSError:
        return False
    return True


def _shown(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
