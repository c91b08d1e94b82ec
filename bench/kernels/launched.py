"""Every launch of the Triton kernels that a run makes, from the engine's own steps on tensors without memory.

The engine's parts are built as a run builds them. They take a step, evaluate, and pass over a data set on fake tensors
(PyTorch's FakeTensorMode: shapes and strides, no data), while the Triton backend's launches are recorded instead of
done. So the audit compiles what is launched, and not only what somebody thought of.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from bench.kernels.workloads import Call, Recorder, triton_backend
from engine.comparison.averagers import AMA
from engine.comparison.moment_matching import MomentMatching
from engine.comparison.on_features import OnFeatures
from engine.comparison.reference.bank import BankKind
from engine.comparison.reference.protocols import Kind
from engine.comparison.reference.target import MomentsKind, fake_target
from engine.configuration.build import bare_extractor, make_generator, make_method
from engine.configuration.config import Config
from engine.configuration.inputs import amp_dtype
from engine.configuration.presets import COMPARING_PRESETS
from engine.configuration.running import make_schedule
from engine.methods.matching import Matching
from engine.representation.build import build_extractor
from engine.representation.extractor import Extractor
from engine.representation.feature_pass import FeaturePass
from engine.representation.zoo import network_names
from engine.training.planner import FakeMode, fake_copy
from engine.training.run_folder import RunFolder
from engine.training.trainer import Trainer

PRECISIONS = (None, "bf16", "fp16")
# Multiprocessors of the devices that the audit compiles for (A100, H100, B200): they decide how wide a program is.
PROCESSORS = (108, 132, 148)
# What of the settings has a say in what is launched, one by one: averagers, small and partial minibatches, other ways
# through the extractor.
_AVERAGERS: tuple[dict[str, Any], ...] = (
    {"averager": "ama"}, {"averager": "ama", "ama_variant": "authors"},
    {"averager": "ama", "ama_variant": "authors-0.3"}, {"averager": "ma"},
    {"averager": "ma", "ma_variant": "authors"}, {"averager": "none"},
)  # fmt: skip
_WAYS: tuple[dict[str, Any], ...] = (
    {"batch_size": 8}, {"chunk_size": 48}, {"recompute": "stages"}, {"extractor_bn": "batch"}, {"correction": 0},
    {"layers": 3, "layers_from": "top"},
)  # fmt: skip
# Extractors on images of 64×64, and torchvision's: ReLU6, SiLU and GELU, maps that are not channels_last, bottlenecks.
_LARGE = ("efficientnet-lite0", "torchvision:efficientnet_b0")
_TORCHVISION = ("torchvision:mobilenet_v2", "torchvision:convnext_tiny", "torchvision:resnet50")


class OwnNetwork(nn.Module):
    """What nobody's architecture has: odd numbers of features, a single one, and addresses that are not aligned."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(n, 7, 3, padding=1) for n in (3, 7, 7))
        self.conv4, self.conv5 = nn.Conv2d(7, 5, 3, padding=1), nn.Conv2d(5, 16, 3, padding=1)
        self.conv6 = nn.Conv2d(16, 1, 9)

    def forward(self, x: Tensor) -> Tensor:
        """Images of 9×9."""
        x = F.relu(self.conv1(x))
        y = F.relu6(self.conv2(x))
        y = F.silu(self.conv4(F.relu(self.conv3(y) + x)))
        return F.relu(self.conv6(F.relu(self.conv5(y))))


@dataclass
class Listener:
    """The Triton backend, whose launches are recorded as every device would get them.

    Attributes:
        calls: the launches.
    """

    calls: list[Call] = field(default_factory=list)

    def backend(self) -> Any:
        """What the engine takes for a backend: the operators' own functions, which fake tensors see into."""
        ops = triton_backend()
        names = [name for name in kernels.__all__ if inspect.isfunction(getattr(ops, name, None))]
        return SimpleNamespace(__name__="triton", **{name: self._listening(ops, name) for name in names})

    def _listening(self, ops: Any, name: str) -> Callable[..., Any]:
        function = getattr(ops, name).__wrapped__

        def call(*args: Any, **kwargs: Any) -> Any:
            result = None
            for processors in PROCESSORS:
                with Recorder(processors) as recorder:
                    result = function(*args, **kwargs)
                self.calls += recorder.calls
            return result

        return call


def launched() -> Iterator[Call]:
    """The launches of every run that is set up here; the same ones come many times."""
    for config in configurations():
        yield from of_run(config)
    own = build_extractor("own", image_size=9, module=OwnNetwork())
    for dtype in (None, torch.bfloat16, torch.float16):
        yield from _of_library(own, dtype)
    yield from _of_library(own.double(), None)


def configurations() -> Iterator[Config]:
    # Presets of the same networks and sizes launch the same.
    presets = [Config.build(name, {}) for name in COMPARING_PRESETS]
    distinct = {(preset.networks.extractor, preset.data.image_size): preset.preset for preset in reversed(presets)}
    in_presets = {name for extractor, _ in distinct for name in extractor.split("+")}
    others = [name for name in (*network_names(), *_TORCHVISION) if name not in in_presets]
    for precision in PRECISIONS:
        for preset in distinct.values():
            yield configuration(preset, precision)
        for extractor in filter(_is_installed, others):
            yield configuration("cifar10", precision, extractor=extractor)
        for extractor in filter(_is_installed, _LARGE):
            yield configuration("cifar10", precision, extractor=extractor, image_size=64)
        for way in _WAYS:
            yield configuration("digits", precision, **way)
    for averager in _AVERAGERS:
        for scale in ("none", "target-deviation"):
            yield configuration("digits", None, feature_scale=scale, **averager)


def configuration(preset: str, precision: str | None, **given: Any) -> Config:
    low = {} if precision is None else {"amp": True, "amp_dtype": precision}
    return Config.build(preset, {"weights": ("random",), **given, **low})


def _is_installed(extractor: str) -> bool:
    source = {"efficientnet-lite0": "timm"}.get(extractor, extractor.rpartition(":")[0])
    return not source or importlib.util.find_spec(source) is not None


def of_run(config: Config) -> list[Call]:
    """A training step, the loss of images without a gradient, and the statistics pass."""
    mode, listener = FakeMode(), Listener()
    generator = fake_copy(make_generator(config), mode)
    extractor = fake_copy(bare_extractor(config), mode, amp_dtype(config))
    with mode:
        weighted = config.gfmn.feature_scale != "none"
        weights = torch.empty(extractor.num_features, dtype=torch.float64) if weighted else None
        target = fake_target(extractor.num_features)
        method = make_method(config, generator, extractor, target, kernels=listener.backend(), weights=weights)
        Trainer(method, make_schedule(config), RunFolder("nowhere"), {}, kernels=listener.backend()).train_step()
        assert isinstance(method, Matching)
        assert isinstance(method.objective, MomentMatching)
        images = torch.empty(config.training.batch_size, 3, config.data.image_size, config.data.image_size)
        _look(images, method.objective, MomentsKind())
    return listener.calls


def _of_library(extractor: Extractor, dtype: torch.dtype | None) -> list[Call]:
    """The same of an extractor that only the library takes, and of an objective that knows every image."""
    mode, listener = FakeMode(), Listener()
    extractor = fake_copy(extractor, mode, dtype)
    size = extractor.image_size
    with mode:
        backend = listener.backend()
        images = torch.empty(8, 3, size, size, dtype=extractor.dtype)
        moments = MomentMatching(extractor, fake_target(extractor.num_features), AMA(), kernels=backend)
        distance = OnFeatures(extractor, lambda features: features.square().sum(), kernels=backend)
        for objective, kind in ((moments, MomentsKind()), (distance, BankKind("mean", 8))):
            objective(images.clone().requires_grad_()).backward()
            _look(images, objective, kind)
    return listener.calls


def _look(images: Tensor, objective: MomentMatching | OnFeatures, kind: Kind[Any]) -> None:
    with torch.no_grad():
        objective(images)
    feature_pass: FeaturePass = objective.feature_pass
    feature_pass.collect(images, kind.collector(feature_pass, len(images)))
