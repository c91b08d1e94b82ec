"""Priors that a method learns: a Gaussian fitted to codes, and noise that a small network maps to codes.

Both draw noise and make z of it, in float64 and rounded once: how many are drawn at a time decides no bit of them, but
in a case of many millions.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from engine.generation.priors import PRIORS, Ball, Gaussian, Prior, interpolate, make_prior
from engine.support.errors import InputError

FITTED, MAPPED = "fitted", "mapped"
_OF_NOISE = "noise."


class FittedGaussian:
    """z ~ N(m, Σ), the Gaussian with the mean and the covariance of codes; a path is that of the noise.

    Args:
        mean: m [nz].
        factor: a symmetric one of Σ, Σ^½ [nz, nz]: z = m + Σ^½ e with e ~ N(0, I).

    Raises:
        InputError: "mean" or "factor" doesn't have its shape.
    """

    name = FITTED

    def __init__(self, mean: Tensor, factor: Tensor):
        if mean.dim() != 1 or not len(mean):
            raise InputError("mean", f"expected [nz], got {list(mean.shape)}")
        self.nz = len(mean)
        if factor.shape != (self.nz, self.nz):
            raise InputError("factor", f"expected [{self.nz}, {self.nz}], got {list(factor.shape)}")
        self.mean, self.factor = (tensor.detach().cpu().double() for tensor in (mean, factor))
        self.noise = Gaussian(self.nz)

    @classmethod
    def of(cls, codes: Tensor) -> FittedGaussian:
        """Of `codes` [M, nz]: m = Σ_i z_i / M, Σ = Σ_i (z_i − m)(z_i − m)ᵀ / M.

        Σ^½ is the symmetric root, which is unique also where Σ has no inverse: the same noise gives nearly the same z
        when the codes have moved a little.
        """
        codes = codes.detach().cpu().double()
        mean = codes.mean(dim=0)
        deviations = codes - mean
        values, vectors = torch.linalg.eigh(deviations.T @ deviations / len(codes))
        return cls(mean, vectors * values.clamp(min=0).sqrt() @ vectors.T)

    def sample(self, count: int, random: torch.Generator) -> Tensor:
        """The next z [count, nz] of `random`, float32."""
        return self._codes(self.noise.sample(count, random))

    def draw(self, count: int, seed: int) -> Tensor:
        """z [count, nz]; `seed` decides it."""
        return self._codes(self.noise.draw(count, seed))

    def draw_ends(self, count: int, seed: int) -> Tensor:
        """Noise [count, nz]."""
        return self.noise.draw(count, seed)

    def between(self, start: Tensor, end: Tensor, steps: int) -> Tensor:
        """z of the arcs between two rows of noise."""
        return self._codes(interpolate(start, end, steps))

    def state_dict(self) -> dict[str, Tensor]:
        """`mean` and `factor`, float64."""
        return {"mean": self.mean, "factor": self.factor}

    def _codes(self, noise: Tensor) -> Tensor:
        return (self.mean + noise.double() @ self.factor).float()


class MappingNetwork(nn.Module):
    """T: noise [N, widths[0]] → codes [N, widths[-1]], linear layers with ReLU between them.

    Args:
        widths: of the noise, of every hidden layer, and of the codes.
    """

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        self.widths = tuple(widths)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(self.widths))

    def forward(self, noise: Tensor) -> Tensor:
        """[N, widths[0]] → [N, widths[-1]]."""
        first, *others = self.layers
        x = first(noise)
        for layer in others:
            x = layer(x.relu())
        return x


class MappedNoise:
    """z = T(e), noise that a network maps to codes; a path is that of the noise.

    Args:
        network: T; what it is now is copied.
        noise: the law of e, one of `PRIORS`; Gaussian by default.

    Raises:
        InputError: "noise" is of another length than T's, or none of `PRIORS`.
    """

    name = MAPPED

    def __init__(self, network: MappingNetwork, noise: Prior | None = None):
        self.nz = network.widths[-1]
        self.noise = Gaussian(network.widths[0]) if noise is None else noise
        if self.noise.name not in PRIORS:
            raise InputError("noise", f"must be one of {', '.join(PRIORS)}, not {self.noise.name}")
        if self.noise.nz != network.widths[0]:
            raise InputError("noise", f"has {self.noise.nz} dimensions, and the network takes {network.widths[0]}")
        self.network = copy.deepcopy(network).cpu().double().requires_grad_(False)

    def sample(self, count: int, random: torch.Generator) -> Tensor:
        """The next z [count, nz] of `random`, float32."""
        return self._codes(self.noise.sample(count, random))

    def draw(self, count: int, seed: int) -> Tensor:
        """z [count, nz]; `seed` decides it."""
        return self._codes(self.noise.draw(count, seed))

    def draw_ends(self, count: int, seed: int) -> Tensor:
        """Noise [count, K]."""
        return self.noise.draw_ends(count, seed)

    def between(self, start: Tensor, end: Tensor, steps: int) -> Tensor:
        """z of the path between two rows of noise."""
        return self._codes(self.noise.between(start, end, steps))

    def state_dict(self) -> dict[str, Tensor]:
        """The network's, float64, and the numbers that its noise has, as "noise.…"."""
        return {**self.network.state_dict(), **_of_noise(self.noise)}

    def _codes(self, noise: Tensor) -> Tensor:
        with torch.no_grad():
            codes: Tensor = self.network(noise.double())
        return codes.float()


def _of_noise(noise: Prior) -> dict[str, Tensor]:
    return {_OF_NOISE + name: tensor for name, tensor in noise.state_dict().items()}


def noise_name(prior: Prior) -> str:
    """The law of the noise that a prior maps, as in `PRIORS`; "" for all other priors."""
    return prior.noise.name if isinstance(prior, MappedNoise) else ""


def read_prior(name: str, nz: int, state: Mapping[str, Tensor], noise: str = "") -> Prior:
    """The prior that `state_dict` and `noise_name` tell of; InputError or ValueError if they tell of none.

    Args:
        name: in `PRIORS`, or "fitted" or "mapped".
        nz: length of z.
    """
    if not all(tensor.is_floating_point() and bool(tensor.isfinite().all()) for tensor in state.values()):
        raise ValueError(f"the prior {name} has numbers that are not finite")
    if name == "ball" and state.keys() == {"radius"} and state["radius"].numel() == 1:
        prior: Prior = Ball(nz, state["radius"].item())
    elif name in PRIORS and name != "ball":
        prior = make_prior(name, nz)
    elif name == FITTED and state.keys() == {"mean", "factor"}:
        prior = FittedGaussian(state["mean"], state["factor"])
    elif name == MAPPED:
        network = _network({key: tensor for key, tensor in state.items() if not key.startswith(_OF_NOISE)})
        usual = make_prior(noise or "gaussian", network.widths[0])
        state = {**_of_noise(usual), **state}  # older files lack the noise's numbers; runs had the usual ones
        own = {key.removeprefix(_OF_NOISE): state[key] for key in state if key.startswith(_OF_NOISE)}
        prior = MappedNoise(network, read_prior(usual.name, usual.nz, own))
    else:
        raise InputError("prior", f"{name!r} is not known, or lacks numbers of its own")
    if prior.nz != nz or prior.state_dict().keys() != state.keys():
        raise ValueError(f"the prior {name} has other numbers than those of {nz} dimensions")
    return prior


def _network(state: Mapping[str, Tensor]) -> MappingNetwork:
    """ValueError unless these are weights of one."""
    weights = [state[name] for index in range(len(state)) if (name := f"layers.{index}.weight") in state]
    if not weights or any(weight.dim() != 2 or not weight.numel() for weight in weights):
        raise ValueError("the prior's network has no layers")
    if any(len(before) != weight.shape[1] for before, weight in itertools.pairwise(weights)):
        raise ValueError("the prior's network has weights that don't fit together")  # before there is memory for them
    network = MappingNetwork([weights[0].shape[1], *(len(weight) for weight in weights)]).double()
    try:
        network.load_state_dict(dict(state))
    except RuntimeError:
        raise ValueError("the prior's network has weights that don't fit together") from None
    return network
