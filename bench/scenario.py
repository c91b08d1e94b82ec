"""One comparison's ingredients: the same networks, weights and target for the engine and for the naive version."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.naive import NaiveMatching
from engine.comparison.averagers import AMA
from engine.comparison.distances.moments import Moments
from engine.comparison.moment_matching import MomentMatching
from engine.generation.networks import build_generator, run_generator
from engine.representation.build import build_extractor
from engine.representation.extractor import Extractor
from engine.representation.zoo import make_network

NZ = 100


@dataclass
class Scenario:
    """What is trained against what.

    Attributes:
        networks: plain modules, in evaluation mode, with BatchNorm statistics of real activations.
        extractor: the engine's, of the same weights.
        target: moments of other images than the generator's; times and memory don't depend on them.
    """

    name: str
    image_size: int
    minibatch: int
    device: torch.device
    networks: list[nn.Module]
    extractor: Extractor
    target: Moments

    @classmethod
    def build(cls, name: str, image_size: int, minibatch: int, device: str, seed: int = 0) -> Scenario:
        """Random weights; BatchNorm's running statistics from smooth random images, so that no layer is dead."""
        torch.manual_seed(seed)
        networks: list[nn.Module] = []
        files: list[Path] = []
        with tempfile.TemporaryDirectory() as folder:
            for part in name.split("+"):
                network = make_network(part, image_size)
                _calibrate(network.module, image_size)
                files.append(Path(folder) / f"{len(files)}.safetensors")
                save_file({key: value.detach().contiguous() for key, value in network.state.items()}, files[-1])
                networks.append(network.module.to(device))
            extractor = build_extractor(name, image_size=image_size, weights=files)
        with torch.no_grad():
            features = extractor.features(smooth_images(64, image_size)).double()
        variance, mean = torch.var_mean(features, dim=0)
        target = Moments(len(features), mean, (len(features) - 1) * variance)
        return cls(name, image_size, minibatch, torch.device(device), networks, extractor.to(device), target)

    def ours(self, dtype: torch.dtype | None = None, **options: Any) -> MomentMatching:
        """The engine's objective, the extractor in `dtype` (float32 if None)."""
        return MomentMatching(self.extractor, self.target, AMA(), amp_dtype=dtype, **options)

    def naive(self, **switches: Any) -> NaiveMatching:
        """The naive objective, on networks of its own."""
        return NaiveMatching(copy.deepcopy(self.networks), self.target, **switches)

    def z(self) -> Tensor:
        """The generator's input, [minibatch, NZ]."""
        return torch.randn(self.minibatch, NZ, device=self.device)

    def trainer(
        self,
        objective: Callable[[Tensor], Tensor],
        dtype: torch.dtype | None = None,
        *,
        checkpoint_generator: bool = False,
    ) -> Callable[[], object]:
        """A function that does one training step of a new DCGAN generator, under autocast if `dtype` is given."""
        torch.manual_seed(1)
        generator = build_generator("dcgan", image_size=self.image_size, nz=NZ).to(self.device)
        adam = torch.optim.Adam(generator.parameters(), lr=5e-5, betas=(0.5, 0.999), fused=True)
        scaler = torch.amp.GradScaler(self.device.type, enabled=dtype is torch.float16)

        def step() -> None:
            adam.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                images = run_generator(generator, self.z(), checkpoint=checkpoint_generator)
            scaler.scale(objective(images.float())).backward()
            scaler.step(adam)
            scaler.update()

        return step


@torch.no_grad()
def _calibrate(module: nn.Module, image_size: int) -> None:
    norms = [child for child in module.modules() if isinstance(child, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over all batches
    module.train()
    for _ in range(2):
        module(smooth_images(64, image_size))
    module.eval()


def smooth_images(count: int, image_size: int) -> Tensor:
    """[count, 3, H, W] in [-1, 1]: blurred noise."""
    return nn.functional.interpolate(torch.rand(count, 3, 8, 8) * 2 - 1, size=image_size, mode="bilinear")
