"""torch-mimicry's SN-GAN and WGAN-GP for 32×32 images, and networks of the engine with the same weights.

torch-mimicry (Lee and Town 2020) is needed here alone. Its package asks for TensorFlow, which only its metrics use: it
is installed without what it asks for, and its metrics are never imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from engine.generation.batch_norm import BatchNorm2d
from engine.generation.networks import FirstLayer, Generator, GeneratorSpec, ResNetGenerator, UpsamplingBlock
from engine.representation.critics import Critic, build_critic
from engine.representation.critics.convolutional import DownsamplingBlock
from engine.support.errors import InputError

PACKAGE, VERSION = "torch_mimicry", "0.1.16"
SIZE, NZ = 32, 128
_WIDTH, _BLOCKS = 256, 3
_POSITIONS = 8 * 8
LR, BETAS = 2e-4, (0.0, 0.9)
"""Of both optimizers, as in their examples."""


def is_installed() -> bool:
    """Whether torch-mimicry can be imported, by `import_nets`."""
    return importlib.util.find_spec(PACKAGE) is not None


def import_nets(model: str) -> ModuleType:
    """torch-mimicry's networks of "sngan" or "wgan_gp". InputError says how to install it if it is missing."""
    if not is_installed():
        line = f"pip install --no-deps torch-mimicry=={VERSION}"
        raise InputError("", f"the comparison needs torch-mimicry, which is not installed: {line}")
    if PACKAGE not in sys.modules:
        # Without running its own __init__, which imports the metrics.
        spec = importlib.util.find_spec(PACKAGE)
        assert spec is not None
        sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{PACKAGE}.nets.{model}")


class Unlogged(dict[str, float]):
    """In place of their log: the last value of each metric."""

    def add_metric(self, name: str, value: Any, **_: Any) -> None:
        """What their steps call."""
        self[name] = float(value.detach() if isinstance(value, Tensor) else value)


class Theirs:
    """Their two networks, optimizers and step.

    Attributes:
        generator, critic: theirs, which hold the step as well.
    """

    def __init__(self, model: str, device: str = "cpu", dtype: torch.dtype = torch.float32):
        nets, prefix = import_nets(model), {"sngan": "SNGAN", "wgan_gp": "WGANGP"}[model]
        self.model, self.device = model, device
        self.generator: Any = getattr(nets, f"{prefix}Generator32")(nz=NZ, ngf=_WIDTH).to(device, dtype)
        self.critic: Any = getattr(nets, f"{prefix}Discriminator32")().to(device, dtype)
        self.optimizers = [
            torch.optim.Adam(network.parameters(), LR, betas=BETAS) for network in (self.generator, self.critic)
        ]

    def step(self, batches: Iterator[Tensor], critic_steps: int) -> None:
        """As their trainer has it: steps of the critic, each on other real images, then one of the generator."""
        of_generator, of_critic = self.optimizers
        for _ in range(critic_steps):
            real = (next(batches), None)
            self.critic.train_step(real, self.generator, of_critic, Unlogged(), device=self.device)
        self.generator.train_step(real, self.critic, of_generator, Unlogged(), device=self.device)

    def losses(self, real: Tensor, z: Sequence[Tensor], mixtures: Tensor) -> tuple[float, float]:
        """The critic's loss, its penalty included, and the generator's, of one step of each; no weight changes.

        Gradients of the critic's loss are `critic_gradients` afterwards, those of the generator's in its weights.

        Args:
            z: what the generator draws from for the critic, and for itself.
            mixtures: [N, 1], how much of a real image is in the mixture that a penalty looks at.
        """
        still, log, draws, penalties = mock.Mock(), Unlogged(), iter(z), []

        def drawn(**_: Any) -> Tensor:
            return self.generator(next(draws))

        def penalty(**given: Any) -> Tensor:
            found = type(self.critic).compute_gradient_penalty_loss(self.critic, **given)
            penalties.append(float(found.detach()))
            return found

        with (
            mock.patch.object(self.generator, "generate_images", side_effect=drawn),
            mock.patch.object(self.critic, "compute_gradient_penalty_loss", penalty, create=True),
            mock.patch("torch.rand", return_value=mixtures),
        ):
            self.critic.train_step((real, None), self.generator, still, log, device=self.device)
            self.critic_gradients = {name: w.grad.clone() for name, w in self.critic.named_parameters()}
            self.generator.train_step((real, None), self.critic, still, log, device=self.device)
        return log["errD"] + sum(penalties), log["errG"]


class BilinearGenerator(ResNetGenerator):
    """Their generator, made of the engine's parts: 256 channels throughout, and bilinear upsampling.

    The bias before BatchNorm, which theirs has and training does not see, is left out.
    """

    def __init__(self) -> None:
        Generator.__init__(self)
        self.spec = GeneratorSpec("resnet", SIZE, NZ)
        self.first = FirstLayer(NZ, _WIDTH, bias=True)
        self.blocks = nn.Sequential(*(UpsamplingBlock(_WIDTH, _WIDTH) for _ in range(_BLOCKS)))
        for block in self.blocks:
            assert isinstance(block, UpsamplingBlock)
            block.upsample = nn.Upsample(scale_factor=2, mode="bilinear")
        self.bn, self.last = BatchNorm2d(_WIDTH), nn.Conv2d(_WIDTH, 3, 3, padding=1)
        self.to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Pair:
    """A parameter of ours, and the one of theirs that it equals: ours = scale · arranged(theirs)."""

    ours: Tensor
    theirs: str
    arranged: Callable[[Tensor], Tensor] = lambda tensor: tensor
    scale: float = 1.0

    def gradient(self, theirs: Tensor) -> Tensor:
        """Of ours, from that of theirs."""
        return self.arranged(theirs) / self.scale


def networks_like(theirs: Theirs) -> tuple[BilinearGenerator, Critic, list[Pair], list[Pair]]:
    """Ours with their weights, in their precision, and which parameter is which: of the generator, of the critic.

    A block of theirs begins with ReLU in place, so its shortcut sees what is left; before ours there is one more ReLU.
    Spectral norms get the exact first singular vectors, which the power iteration leaves as they are.
    """
    spectral = theirs.model == "sngan"
    generator, critic = (
        BilinearGenerator(),
        build_critic("resnet", image_size=SIZE, norm="spectral" if spectral else "none"),
    )
    first, *others = critic.get_submodule("blocks").children()
    critic.set_submodule("blocks", nn.Sequential(first, *(nn.Sequential(nn.ReLU(), block) for block in others)))
    weight = next(theirs.critic.parameters())
    for network in (generator, critic):
        network.to(weight.device, weight.dtype)
    of_generator, of_critic = _pairs_of_generator(generator), _pairs_of_critic(critic, spectral)
    with torch.no_grad():
        for pairs, network in ((of_generator, theirs.generator), (of_critic, theirs.critic)):
            found = dict(network.named_parameters())
            for pair in pairs:
                pair.ours.copy_(pair.scale * pair.arranged(found[pair.theirs]))
        if spectral:
            _converge(critic, theirs.critic)
    return generator, critic, of_generator, of_critic


def _pairs_of_generator(generator: BilinearGenerator) -> list[Pair]:
    def rows(tensor: Tensor) -> Tensor:
        """Theirs in the order (C, H, W), ours in (H, W, C)."""
        return tensor.view(_WIDTH, 16, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)

    linear = generator.first.linear
    pairs = [Pair(linear.weight, "l1.weight", rows), Pair(linear.bias, "l1.bias", rows)]
    for number, block in enumerate(generator.blocks, 2):
        for ours, name in (("bn1", "b1"), ("conv1", "c1"), ("bn2", "b2"), ("conv2", "c2"), ("shortcut", "c_sc")):
            pairs += _pairs(block.get_submodule(ours), f"block{number}.{name}")
    return pairs + _pairs(generator.bn, "b5") + _pairs(generator.last, "c5")


def _pairs_of_critic(critic: Critic, spectral: bool) -> list[Pair]:
    pairs = []
    for layer, name in _layers(critic):
        pairs += _pairs(layer, name)
    *pairs, weight, bias = pairs
    # Their WGAN-GP has means over the positions where SN-GAN has sums.
    return [*pairs, weight if spectral else Pair(weight.ours, weight.theirs, scale=1 / _POSITIONS), bias]


def _pairs(module: nn.Module, name: str) -> list[Pair]:
    """Weight and bias, where there are any. A weight that is normalised has another name, in theirs and in ours."""
    own = dict(module.named_parameters())
    if "parametrizations.weight.original" in own:
        pairs = [Pair(own["parametrizations.weight.original"], f"{name}.weight_orig")]
    else:
        pairs = [Pair(own["weight"], f"{name}.weight")] if "weight" in own else []
    return pairs + ([Pair(own["bias"], f"{name}.bias")] if "bias" in own else [])


def _converge(critic: Critic, theirs: Any) -> None:
    for layer, name in _layers(critic):
        norm, weight = layer.parametrizations.weight[0], layer.parametrizations.weight.original
        # Of W Wᵀ, which has few rows: an SVD of W is many short parallel loops, and takes minutes on busy cores.
        matrix = weight.movedim(1, -1).flatten(1).double()
        u = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -1]
        v = nn.functional.normalize(u @ matrix, dim=0)
        norm.u.copy_(u)
        norm.v.copy_(v)
        other = theirs.get_submodule(name)
        other.weight_u.copy_(u)
        # Their columns are in the order (C, H, W), ours in (H, W, C).
        other.weight_v.copy_(v.view(-1, weight.shape[1]).t().flatten())


def _layers(critic: Critic) -> Iterator[tuple[Any, str]]:
    """Every convolution and linear layer, and what it is called in theirs."""
    blocks = [module for module in critic.modules() if isinstance(module, DownsamplingBlock)]
    for number, block in enumerate(blocks, 1):
        for ours, name in (("conv1", "c1"), ("conv2", "c2"), ("shortcut", "c_sc")):
            layer = block.get_submodule(ours)
            if not isinstance(layer, nn.Identity):
                yield layer, f"block{number}.{name}"
    yield critic.get_submodule("last"), "l5"
