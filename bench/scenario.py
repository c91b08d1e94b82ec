"""What the benchmarks train, and the one place where they build the engine's parts.

The engine and the naive version get the same networks, weights and target. `Scenario.parts` builds what a training
step of the engine consists of, `engine_step` turns it into a function without arguments; `plain_step` does the same
for any loss, in the loop that everybody would write.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.naive import NaiveMatching
from engine.comparison.distances.moments import Moments
from engine.comparison.moment_matching import MomentMatching
from engine.comparison.reference.target import fake_target
from engine.configuration.build import make_method
from engine.configuration.command import arguments_as
from engine.configuration.config import Config
from engine.configuration.modelling import predict
from engine.configuration.objectives import blank_reference
from engine.configuration.running import make_machinery, make_schedule
from engine.generation.networks import Generator, build_generator
from engine.methods.matching import Matching
from engine.representation.build import build_extractor
from engine.representation.extractor import Extractor
from engine.representation.feature_pass import Activate, FeaturePass
from engine.representation.zoo import make_network
from engine.training.planner import FakeMode, Footprint, fake_copy, track
from engine.training.precision import repeatable
from engine.training.ranks import ALONE, Ranks
from engine.training.run_folder import RunFolder
from engine.training.trainer import Trainer

NZ = 100
DTYPE_NAMES = {None: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Flags of the engine's configuration that save memory.
RECOMPUTE_STAGES: Mapping[str, Any] = {"recompute": "stages"}
RECOMPUTE_GENERATOR: Mapping[str, Any] = {"recompute_generator": True}

Step = Callable[[], object]
Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """What is trained: extractor, side of the images, generator."""

    extractor: str
    image_size: int
    generator: str = "dcgan"


@dataclass(frozen=True)
class Parts:
    """What a training step of the engine consists of.

    Attributes:
        config: as `engine.train` would have it.
        method: its generator is in training mode, on the extractor's device; its averager is its own.
    """

    config: Config
    method: Matching

    @property
    def generator(self) -> Generator:
        return self.method.generator

    @property
    def objective(self) -> MomentMatching:
        assert isinstance(self.method.objective, MomentMatching)
        return self.method.objective


@dataclass(frozen=True)
class Scenario:
    """A problem's networks and target, for the engine and for the naive version.

    Attributes:
        networks: plain modules in evaluation mode, as the naive version uses them; empty if nobody wanted them.
        extractor: the engine's.
        target: moments of other images than the generator's; times and memory don't depend on them.
    """

    problem: Problem
    networks: list[nn.Module]
    extractor: Extractor
    target: Moments

    @classmethod
    def calibrated(cls, problem: Problem, device: str, seed: int = 0) -> Scenario:
        """Random weights, the same for networks and extractor, whose activations are like a trained network's.

        BatchNorm's running statistics, and the target, come from smooth random images, so that no layer is dead.
        """
        torch.manual_seed(seed)
        size = problem.image_size
        networks: list[nn.Module] = []
        files: list[Path] = []
        with tempfile.TemporaryDirectory() as folder:
            for part in problem.extractor.split("+"):
                with arguments_as(name="extractor"):
                    network = make_network(part, size)
                _calibrate(network.module, size)
                files.append(Path(folder) / f"{len(files)}.safetensors")
                save_file({key: value.detach().contiguous() for key, value in network.state.items()}, files[-1])
                networks.append(network.module.to(device))
            extractor = build_extractor(problem.extractor, image_size=size, weights=files)
        with torch.no_grad():
            features = extractor.features(smooth_images(64, size)).double()
        variance, mean = torch.var_mean(features, dim=0)
        target = Moments(len(features), mean, (len(features) - 1) * variance)
        return cls(problem, networks, extractor.to(device), target)

    @classmethod
    def shapes(cls, problem: Problem, device: torch.device | str = "cpu", *, naive: bool = False) -> Scenario:
        """For memory, which depends on shapes alone: any weights, a target of ones; plain networks if `naive`."""
        with arguments_as(name="extractor"):
            extractor = build_extractor(problem.extractor, image_size=problem.image_size).to(device)
        parts = problem.extractor.split("+") if naive else ()
        networks = [make_network(part, problem.image_size).module.to(device) for part in parts]
        ones = torch.ones(extractor.num_features, dtype=torch.float64)
        return cls(problem, networks, extractor, Moments(2, ones, ones))

    @property
    def device(self) -> torch.device:
        """The device on which all networks and the objective live."""
        return self.extractor.device

    def generator(self) -> Generator:
        """A new generator, always with the same weights."""
        torch.manual_seed(1)
        problem = self.problem
        return build_generator(problem.generator, image_size=problem.image_size, nz=NZ).to(self.device)

    @functools.cached_property
    def _looked_at(self) -> Generator:
        """A generator whose shapes alone count."""
        return self.generator()

    def config(self, minibatch: int, dtype: torch.dtype | None = None, **flags: Any) -> Config:
        """The engine's configuration: AMA, `dtype` for mixed precision, and other `flags`.

        A chunk larger than the minibatch becomes the minibatch.
        """
        if (flags.get("chunk_size") or 0) > minibatch:
            del flags["chunk_size"]
        if dtype is not None:
            flags |= {"amp": True, "amp_dtype": DTYPE_NAMES[dtype]}
        problem = self.problem
        given = {
            "weights": ("random",), "extractor": problem.extractor, "image_size": problem.image_size,
            "generator": problem.generator, "batch_size": minibatch, "nz": NZ,
        }  # fmt: skip
        return Config.build("cifar10", {**given, **flags})

    def parts(
        self,
        minibatch: int,
        dtype: torch.dtype | None = None,
        *,
        generator: Generator | None = None,
        ranks: Ranks = ALONE,
        images: int | None = None,
        max_chunks: int | None = None,
        **flags: Any,
    ) -> Parts:
        """Build a training step's parts; arguments as for `config`, and a new generator if none is given.

        `ranks` are the processes that share the minibatch. Another method than GFMN knows random features of `images`
        real images, None for as many as can matter. `max_chunks`: see `FeaturePass`.
        """
        config = self.config(minibatch, dtype, **flags)
        matches_moments = config.method.method == "gfmn"
        known = self.target if matches_moments else blank_reference(config, self.extractor, torch.rand, images)
        options: dict[str, Any] = {} if max_chunks is None else {"max_chunks": max_chunks}
        method = make_method(config, generator or self.generator(), self.extractor, known, ranks, **options)
        assert isinstance(method, Matching)
        return Parts(config, method)

    def naive(self, *, copied: bool = True, **switches: Any) -> NaiveMatching:
        """The naive objective with `switches` of `NaiveMatching`; on copies of the networks, unless told otherwise."""
        networks = copy.deepcopy(self.networks) if copied else self.networks
        return NaiveMatching(networks, self.target, **switches)

    def modelled(
        self, minibatch: int, dtype: torch.dtype | None = None, *, images: int | None = None, **flags: Any
    ) -> Footprint:
        """What a step of the engine needs, without allocating it. Arguments as for `parts`."""
        return predict(self.config(minibatch, dtype, **flags), self._looked_at, self.extractor, images=images)

    def modelled_naive(self, minibatch: int, **switches: Any) -> Footprint:
        """What a step of the naive version needs, without allocating it."""
        mode = FakeMode()
        generator, networks = fake_copy(self._looked_at, mode), fake_copy(nn.ModuleList(self.networks), mode)

        def build() -> Step:
            objective = NaiveMatching(list(networks), fake_target(self.extractor.num_features), **switches)
            return plain_step(generator, objective, minibatch, switches.get("autocast"))

        return track(build, mode, (generator, networks))


def engine_step(parts: Parts) -> Step:
    """One training step of the engine: the trainer's own, with the algorithms that a run is restricted to, and on a GPU
    replayed as a CUDA graph after a few."""
    machinery = make_machinery(parts.config, parts.method.device)
    trainer = Trainer(
        parts.method, make_schedule(parts.config), RunFolder("nowhere"), {}, ranks=parts.method.ranks, **machinery
    )

    def step() -> None:
        with repeatable():
            trainer.train_step()

    return step


def plain_step(generator: nn.Module, loss: Loss, minibatch: int, dtype: torch.dtype | None = None) -> Step:
    """One training step as one would write it, with Adam, for a loss of images; under autocast if `dtype` is given."""
    device = next(generator.parameters()).device
    on_gpu = device.type == "cuda"  # where the step may be captured in a graph
    adam = torch.optim.Adam(generator.parameters(), lr=5e-5, betas=(0.5, 0.999), fused=True, capturable=on_gpu)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

    def step() -> None:
        adam.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            images: Tensor = generator(torch.randn(minibatch, NZ, device=device))
        scaler.scale(loss(images.float())).backward()
        scaler.step(adam)
        scaler.update()

    return step


def activations_pass(extractor: Extractor) -> Callable[[Tensor], None]:
    """A function that runs the extractor on images, activations included, and does nothing at the taps."""
    feature_pass = FeaturePass(extractor)
    return lambda images: feature_pass.collect(images, Activate())


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
