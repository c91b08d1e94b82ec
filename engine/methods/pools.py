"""Pools of samples, of which each real one pulls the nearest (implicit maximum likelihood, Li & Malik 2018)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from engine.comparison.distances.nearest import nearest_rows
from engine.comparison.image_losses import laplacian_pyramid
from engine.comparison.pooling import Grid, sizes
from engine.generation.priors import Noise, Prior
from engine.representation.feature_pass import FeaturePass, chosen_backend
from engine.representation.protocols import TapInput
from engine.support.errors import InputError
from engine.training.ranks import Ranks
from kernels.layout import accumulation_dtype

Rows = Callable[[Tensor], Tensor]
"""What is compared of samples [n, …]: rows [n, F], whose squared distance says how far two samples are apart."""
_NETWORK = "network."
_CELLS = 4
"""Along a side of the grid that features are averaged over."""


def pixel_rows(images: Tensor) -> Tensor:
    """Pixels as they are, [n, 3HW]."""
    return images.flatten(1)


def pyramid_rows(images: Tensor) -> Tensor:
    """The values of each level of the Laplacian pyramid, divided by the root of their number, [n, F]: all levels count
    alike, as in `pyramid_errors`."""
    levels = [level.flatten(1) for level in laplacian_pyramid(images)]
    return torch.cat([level / level.shape[1] ** 0.5 for level in levels], dim=1)


class FeatureRows:
    """The features of a network, means over 4 × 4 cells of every map, divided by the root of their number in a tap,
    [n, F]: all taps count alike, as in `PerceptualErrors`. Without gradients.

    Args:
        feature_pass: runs the network, with running statistics.

    Raises:
        InputError: "extractor", if it has batch statistics.
    """

    def __init__(self, feature_pass: FeaturePass):
        if feature_pass.extractor.batch_statistics:
            raise InputError("extractor", "batch statistics mix images, and each needs its own features")
        self.feature_pass, self.pool = feature_pass, Grid(_CELLS)
        self.sizes = sizes(self.pool, feature_pass.prepared.taps)

    def __call__(self, images: Tensor) -> Tensor:
        """See the class."""
        dtype = accumulation_dtype(self.feature_pass.dtype)
        rows = torch.empty(len(images), sum(self.sizes), dtype=dtype, device=images.device)
        self.feature_pass.collect(images, _Pooled(self.pool, torch.split(rows, self.sizes, dim=1)))
        return rows


class _Pooled:
    """The collector of pooled features, of every tap in a place of its own."""

    def __init__(self, pool: Grid, of_taps: Sequence[Tensor]):
        self.pool, self.of_taps = pool, of_taps

    def collect(self, tap: int, x: TapInput, images: slice) -> None:
        """See `engine.representation.protocols.Collector`."""
        own = self.of_taps[tap]
        own[images] = self.pool(x.activate_()) / own.shape[1] ** 0.5


class Pool:
    """Samples of a network, drawn anew every so many steps by the network as it is then, and the nearest of them.

    Every rank draws its share of the samples, finds the nearest of those for the real samples of all ranks, and the
    ranks tell each other: all of them know the same nearest ones of the whole pool.

    Args:
        network: noise [n, K] → samples; what is drawn of it has running statistics, rank 0's.
        prior: the law of noise.
        size: samples of the pool, over all ranks.
        every: steps between two pools.
        rows: of samples.
        batch: samples that the network draws at a time.
        ranks: the processes that share the pool.
        kernels: the backend that finds the nearest.

    Raises:
        InputError: "pool", if it is smaller than `at_least`; "kernels", if the backend cannot run here.
    """

    def __init__(
        self,
        network: nn.Module,
        prior: Prior,
        *,
        size: int,
        every: int,
        rows: Rows,
        batch: int,
        at_least: int,
        ranks: Ranks,
        kernels: str | ModuleType = "auto",
    ):
        if size < at_least:
            raise InputError("pool", f"{size} samples are fewer than the minibatch, {at_least}; give at least so many")
        self.network, self.prior, self.ranks = network, prior, ranks
        self.size, self.every, self.rows, self.batch = size, every, rows, batch
        self.share = ranks.share(size)
        weight = next(network.parameters())
        self.kernels = chosen_backend(kernels, weight.device, weight.dtype)
        self.steps = 0
        self.noise: Tensor | None = None
        self.weights: dict[str, Tensor] = {}
        self.own: Tensor | None = None

    def begin(self, noise: Noise) -> None:
        """One more step, before which there is a new pool if it is time."""
        if self.steps % self.every == 0:
            self.noise = noise.draw(self.prior, self.size).clone()  # which lies where the next one will be
            self.weights = {name: kept.detach().clone() for name, kept in self.network.state_dict().items()}
            # Where BatchNorm is local, ranks have statistics of their own, and rank 0's are those that are saved.
            self.ranks.copy_first([self.weights[name] for name, _ in self.network.named_buffers()])
            self._draw()
        self.steps += 1

    @torch.no_grad()
    def _draw(self) -> None:
        """The rows of this rank's samples, from `noise` and `weights`."""
        assert self.noise is not None
        own = self.noise[self.share].to(next(self.network.parameters()).dtype)
        self.network.eval()
        self.own = None  # the last pool's, before there are two
        begun = 0
        for part in torch.split(own, self.batch):
            rows = self.rows(torch.func.functional_call(self.network, self.weights, part))
            if self.own is None:
                self.own = rows.new_empty(len(own), rows.shape[1])
            self.own[begun : begun + len(rows)] = rows
            begun += len(rows)
        self.network.train()

    @torch.no_grad()
    def nearest(self, real: Tensor) -> tuple[Tensor, Tensor]:
        """For every row of all ranks [N, F], the noise of its nearest sample [N, K], and their squared distance [N]."""
        assert self.noise is not None
        assert self.own is not None
        index, squares = nearest_rows(real, self.own, self.kernels)
        index += self.share.start
        if self.ranks.size > 1:
            every, _ = self.ranks.gather(torch.stack([index.double(), squares.double()]).unsqueeze(0))
            best = every[:, 1].argmin(dim=0, keepdim=True)
            index = every[:, 0].gather(0, best)[0].long()
            squares = every[:, 1].gather(0, best)[0].to(squares.dtype)
        return self.noise[index], squares

    def state_dict(self) -> dict[str, Tensor]:
        """The noise, the weights that drew samples of it, and the number of steps; samples are drawn again."""
        state = {"steps": torch.tensor(self.steps)}
        if self.noise is not None:
            state |= {"noise": self.noise, **{_NETWORK + name: kept for name, kept in self.weights.items()}}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`; KeyError, RuntimeError or ValueError if the state is another pool's."""
        self.steps = int(state["steps"])
        if not self.steps:
            return
        if len(state["noise"]) != self.size:
            raise ValueError(f"a pool of {len(state['noise'])} samples, and this one has {self.size}")
        self.noise = state["noise"].to(next(self.network.parameters()).device)
        own = self.network.state_dict()
        self.weights = {name: state[_NETWORK + name].to(kept.device) for name, kept in own.items()}
        self._draw()
