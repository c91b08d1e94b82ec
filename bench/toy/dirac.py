"""The Dirac-GAN (Mescheder et al. 2018, arXiv 1801.04406, section 2): every game with everything that may tame it.

All real images are 0, all generated ones θ, and the critic has one weight ψ: D(x) = ψx. In the equilibrium θ = 0.
Losses and penalties are the engine's own; gradient descent moves ψ and θ in turns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor, nn

from bench.rows import Row
from engine.comparison.distances import kernels
from engine.comparison.games import GAMES, Game
from engine.comparison.games.penalties import PENALTIES, Penalty, Play

RATE, STEPS, START = 0.1, 600, (1.0, 1.0)
R1_WEIGHT = 0.5  # γ, below 2s: eigenvalues are complex, and trajectories spiral in
_OUTSIDE = 100.0
_NOISY_POINTS = 32
_KERNEL = kernels.gaussian([1.0])
# What keeps the papers' settings from one number's scale.
_SETTINGS: Mapping[str, Mapping[str, object]] = {
    "fisher": {"rho": 0.1},
    "mcgan-covariance": {"components": 1},
    "mmd": {"kernel": _KERNEL},
    "root-mmd": {"kernel": _KERNEL},
}
_OF_KERNELS = ("mmd", "root-mmd")
SLOPES = {"minimax": 0.5, "nonsaturating": 0.5, "hinge": 1.0, "wasserstein": 1.0}
"""s of the games whose linear part is θ' = sψ, ψ' = −sθ at the equilibrium."""


@dataclass(frozen=True)
class Addition:
    """What is added to a game.

    Attributes:
        penalty: of the critic.
        setting: in words.
        noise: variance of what is added to all images.
        consensus: γ of −γ ∇½‖(θ', ψ')‖², in both directions (Mescheder et al. 2017, arXiv 1705.10461).
    """

    penalty: Penalty = field(default_factory=PENALTIES["none"])
    setting: str = ""
    noise: float = 0.0
    consensus: float = 0.0


ADDITIONS: dict[str, Addition] = {
    "nothing": Addition(),
    "clip": Addition(PENALTIES["clip"](limit=1.0), "±1"),
    "gradient": Addition(PENALTIES["gradient"](weight=0.1), "λ = 0.1"),
    "r1": Addition(PENALTIES["r1"](weight=R1_WEIGHT), f"γ = {R1_WEIGHT:g}"),
    "autoencode": Addition(PENALTIES["autoencode"](weight=0.1), "λ = 0.1"),
    "witness": Addition(PENALTIES["witness"](_KERNEL, weight=0.1), "λ = 0.1"),
    "scaled": Addition(PENALTIES["scaled"](_KERNEL, weight=1.0), "λ = 1"),
    "noise": Addition(setting="σ² = 1", noise=1.0),
    "consensus": Addition(setting="γ = 1", consensus=1.0),
}
"""`consistency` and `activations` are nothing here: an image of one pixel has no other copy, and D(0) is 0."""


@dataclass(frozen=True, kw_only=True)
class DiracRow(Row):
    """One trajectory.

    Attributes:
        game, addition, setting: who plays.
        update: "in turns", "at once", or how many critic steps before each of the generator's.
        rate, steps: of gradient descent, from `START`.
        theta, psi: where it ends.
        verdict: see `judge`.
        decay: of the distance from the equilibrium in units of time (rate · steps), fitted; negative for growth. None
            where that makes no sense.
        known_decay: minus the largest real part of the flow's eigenvalues at the equilibrium, where that is known.
        known: whether that converges at a rate; a flow with an imaginary eigenvalue circles, or creeps.
    """

    game: str
    addition: str
    setting: str
    update: str
    rate: float
    steps: int
    theta: float
    psi: float
    verdict: str
    decay: float | None = None
    known_decay: float | None = None
    known: str | None = None


class Line(nn.Module):
    """D(x) = ψx of images [n, 1]; its decoder has the same weight."""

    def __init__(self, psi: Tensor):
        super().__init__()
        self.psi = psi if psi.requires_grad else nn.Parameter(psi)

    def forward(self, images: Tensor) -> Tensor:
        return self.psi * images

    def decode(self, outputs: Tensor) -> Tensor:
        return self.psi * outputs


class Memory(Line):
    """BEGAN's critic of one number: an autoencoder that reproduces every image as ψ, ℓ(x) = |x − ψ|."""

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.psi).abs()


class Duel:
    """A game between two numbers."""

    def __init__(self, game: str, addition: Addition):
        self.game: Game = GAMES[game](**_SETTINGS.get(game, {}))
        self.addition = addition
        self.critic: Callable[[Tensor], Line] = Memory if game == "began" else Line
        self.noise = torch.zeros(2, 1, dtype=torch.float64)  # two images: an unbiased MMD has no fewer
        if addition.noise:
            quantiles = [NormalDist().inv_cdf((index + 0.5) / _NOISY_POINTS) for index in range(_NOISY_POINTS)]
            points = torch.tensor(quantiles, dtype=torch.float64)[:, None]
            self.noise = points / points.square().mean().sqrt() * math.sqrt(addition.noise)

    def play(self, theta: Tensor, psi: Tensor) -> Play:
        """Outputs for real and generated images, with their graph to both numbers."""
        critic, real, fake = self.critic(psi), self.noise, self.noise + theta
        half = torch.full((len(real), 1), 0.5, dtype=real.dtype)
        return Play(critic, real, fake, critic(real), critic(fake), lambda count: half.expand(-1, count))

    def critic_slope(self, theta: Tensor, psi: Tensor, *, graph: bool = False) -> Tensor:
        """∂/∂ψ of what the critic minimises."""
        play, penalty = self.play(theta, psi), self.addition.penalty
        loss = penalty.applied(self.game.critic_loss(play.phi_real, play.phi_fake), penalty.terms(play))
        return _slope(loss, psi, graph)

    def generator_slope(self, theta: Tensor, psi: Tensor, *, graph: bool = False) -> Tensor:
        """∂/∂θ of what the generator minimises."""
        play = self.play(theta, psi)
        return _slope(self.game.generator_loss(play.phi_real, play.phi_fake), theta, graph)

    def slope(self, of_critic: bool, at: tuple[float, float]) -> float:
        """By which ψ or else θ is moved, at (θ, ψ)."""
        theta, psi = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in at)
        own = self.critic_slope if of_critic else self.generator_slope
        if not self.addition.consensus:
            return own(theta, psi).item()
        slopes = self.critic_slope(theta, psi, graph=True), self.generator_slope(theta, psi, graph=True)
        half = (slopes[0].square() + slopes[1].square()) / 2
        towards = _slope(half, psi if of_critic else theta, False)
        return (slopes[0 if of_critic else 1] + self.addition.consensus * towards).item()

    def moved_critic(self, theta: float, psi: float, slope: float, rate: float) -> float:
        """ψ after a step, with what game and penalty do after one."""
        with torch.no_grad():
            play = self.play(*(torch.tensor(value, dtype=torch.float64) for value in (theta, psi)))
        moved = self.critic(torch.tensor(psi - rate * slope, dtype=torch.float64))
        self.addition.penalty.project_(moved)
        self.game.update_(play.phi_real, play.phi_fake)
        return moved.psi.item()


def _slope(loss: Tensor, by: Tensor, graph: bool) -> Tensor:
    if not loss.requires_grad:
        return torch.zeros_like(by)
    return torch.autograd.grad(loss, by, create_graph=graph, allow_unused=True, materialize_grads=True)[0]


def trajectory(duel: Duel, steps: int, rate: float = RATE, update: str = "in turns") -> np.ndarray:
    """(θ, ψ) [steps + 1, 2] by gradient descent, the critic first; as far as it isn't far outside.

    Args:
        update: "in turns"; "at once", both from the same place; or "K critic steps", of which each turn has K.
    """
    theta, psi = START
    found = [(theta, psi)]
    count = int(update.split()[0]) if update.endswith("critic steps") else 1
    for _ in range(steps):
        before = psi
        for _ in range(count):
            psi = duel.moved_critic(theta, psi, duel.slope(True, (theta, psi)), rate)
        theta -= rate * duel.slope(False, (theta, before if update == "at once" else psi))
        found.append((theta, psi))
        if not max(abs(theta), abs(psi)) < _OUTSIDE:
            break
    return np.array(found)


def judge(path: np.ndarray, rate: float = RATE) -> tuple[str, float | None]:
    """What a trajectory does in its last third, and by what rate it decays.

    - "converges": θ stays within a fiftieth of its start.
    - "stops": both stay where they are, and θ isn't 0.
    - "chatters": θ jumps from one side of 0 to the other and back, by two steps at most: its slope has a jump there.
    - "diverges": it is far outside, or is a twentieth further out than in the third before, and than at its start.
    - "circles": it goes around the equilibrium, once at least, and comes no nearer than in the third before.
    - "creeps": none of these.
    """
    third = len(path) // 3
    middle, late = path[third : 2 * third], path[2 * third :]
    if not np.isfinite(path).all() or np.abs(path[-1]).max() >= _OUTSIDE:
        return "diverges", None
    theta = late[:, 0]
    farthest = np.abs(theta).max()
    radii = [np.linalg.norm(part, axis=1).max() for part in (middle, late)]
    turned = np.ptp(np.unwrap(np.arctan2(late[:, 1], theta))) > 2 * np.pi
    if farthest < 0.02 * START[0]:
        found = "converges"
    elif np.ptp(late, axis=0).max() < 0.01:
        found = "stops"
    elif farthest < 2 * rate * START[0] and (np.diff(np.sign(theta)) != 0).mean() > 0.25:
        found = "chatters"
    elif radii[1] > max(1.05 * radii[0], np.linalg.norm(START)):
        found = "diverges"
    else:
        found = "circles" if turned and radii[1] > 0.95 * radii[0] else "creeps"
    return found, _decay(path, rate)


def _decay(path: np.ndarray, rate: float) -> float | None:
    """−d log(distance)/dt by least squares, of (θ, ψ) or, where ψ stays, of θ; from a sixth on, down to its floor."""
    distance = np.linalg.norm(path, axis=1) if abs(path[-1, 1]) < 0.2 else np.abs(path[:, 0])
    least = float(distance.min())
    floor = max(1e-9, 2 * least) if least < 1e-3 else 0.0
    below = np.flatnonzero(distance < floor)
    end = int(below[0]) if len(below) else len(path)
    begin = end // 6
    if end - begin < 3:
        return None
    return float(-np.polyfit(rate * np.arange(begin, end), np.log(distance[begin:end]), 1)[0])


def known_eigenvalue(game: str, addition: str) -> complex | None:
    """The eigenvalue with the largest real part of the flow's derivative at the equilibrium, in closed form.

    Source: Mescheder et al. 2018, sections 2 to 4 (nothing, clipping, R1, noise); 2017 (consensus).
    """
    if game not in SLOPES:
        return None
    s, added = SLOPES[game], ADDITIONS[addition]
    if addition in ("nothing", "clip"):  # near 0 nothing is clipped
        return 1j * s
    if addition == "r1":
        return -R1_WEIGHT / 2 + 1j * math.sqrt(s**2 - R1_WEIGHT**2 / 4)
    if addition == "noise":  # a critic that is linear in the outputs doesn't see it
        curved = added.noise / 4 if s == 0.5 else 0.0
        return -curved + 1j * math.sqrt(s**2 - curved**2)
    if addition == "consensus":
        return -added.consensus * s**2 + 1j * s
    return None


def cases() -> Iterator[tuple[str, str, str, int]]:
    """(game, addition, update, steps) of all trajectories."""
    for game in GAMES:
        for name in ADDITIONS:
            if plays(game, name):
                yield game, name, "in turns", STEPS
    for game in SLOPES:
        yield game, "nothing", "at once", STEPS
    for game, name in (("wasserstein", "clip"), ("nonsaturating", "r1"), ("mmd", "nothing"), ("mmd", "scaled")):
        yield game, name, "10 critic steps", STEPS // 4


def plays(game: str, addition: str) -> bool:
    """Whether the addition says something of this game: of kernels, of a decoder, or of a smooth vector field."""
    if addition in ("witness", "scaled"):
        return game in _OF_KERNELS
    if addition == "autoencode":  # BEGAN's draws ψ, whatever it is given
        return game != "began"
    return addition != "consensus" or game not in (*_OF_KERNELS, "mcgan-covariance")


def measure(game: str, addition: str, update: str, steps: int = STEPS) -> tuple[DiracRow, np.ndarray]:
    """A row, and the trajectory."""
    path = trajectory(Duel(game, ADDITIONS[addition]), steps, update=update)
    verdict, decay = judge(path)
    eigenvalue = known_eigenvalue(game, addition) if update == "in turns" else None
    real = None if eigenvalue is None else eigenvalue.real
    known = None if real is None else ("converges" if real < 0 else "doesn't")
    if (game, addition) == ("wasserstein", "gradient"):  # not smooth at ψ = 0: Mescheder et al. 2018, section 2.3
        known = "doesn't"
    row = DiracRow(
        game=game,
        addition=addition,
        setting=ADDITIONS[addition].setting,
        update=update,
        rate=RATE,
        steps=len(path) - 1,
        theta=float(path[-1, 0]),
        psi=float(path[-1, 1]),
        verdict=verdict,
        decay=decay,
        known_decay=None if real is None else abs(real),
        known=known,
    )
    return row, path
