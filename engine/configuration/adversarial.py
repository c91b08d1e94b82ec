"""The settings of adversarial methods: the critic, what keeps it smooth, and the games that they play."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine.comparison.games.penalties import PENALTIES
from engine.configuration.methods import ADVERSARIAL, PLAYING
from engine.configuration.moment_nets import check_moments
from engine.configuration.options import Settings, option, require
from engine.methods.gradient_step import OPTIMIZERS
from engine.representation.critics import CRITIC_NORMS, CRITICS
from engine.representation.critics.architectural import ARCHITECTURE_CRITICS

if TYPE_CHECKING:
    from engine.configuration.config import Config

SCALAR_GAMES = ("nonsaturating", "minimax", "least-squares", "boundary-seeking", "hinge", "wasserstein")
KERNELS: dict[str, str] = {
    "rq": "rational-quadratic",
    "rq*": "rational-quadratic-linear",
    "rbf": "gaussian",
    "linear": "linear",
    "polynomial": "polynomial",
    "imq": "imq",
    "distance": "energy",
}
"""The papers' names of kernels of a critic's outputs → those of `distances.kernels`."""
BANDWIDTHS: dict[str, tuple[float, ...]] = {
    "rq": (0.2, 0.5, 1.0, 2.0, 5.0),
    "rq*": (0.2, 0.5, 1.0, 2.0, 5.0),
    "rbf": (1.0, 2.0, 4.0, 8.0, 16.0),
    "imq": (0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
}
"""Published ones: α of rational quadratics and σ of Gaussians, on outputs as they are."""
TWICE = tuple(name for name, make in PENALTIES.items() if getattr(make, "double_backward", False))
"""Penalties that differentiate the critic's derivatives."""
_FEATURES = 16
_GROWING = ("linear", "polynomial", "distance", "rq*")  # kernels without a largest value
_ALWAYS_BOUND = ("clip", "witness")
_BOUND_SLOPES = ("scaled", "gradient", "r1")
_KERNELS_ONLY = ("scaled", "witness")


@dataclass(kw_only=True)
class CriticConfig(Settings):
    """The critic, which is trained against the generator."""

    methods: ClassVar[tuple[str, ...]] = ADVERSARIAL

    critic: str = option("dcgan", f"network of the critic: {', '.join(CRITICS)}", metavar="NAME", since="0.2")
    critic_norm: str = option(
        "none",
        "'batch', BatchNorm as DCGAN has it; 'spectral', weights divided by their largest singular value (SN-GAN); "
        "'spectral-scaled', times a learnt factor (SN-SMMD)",
        choices=CRITIC_NORMS,
        since="0.2",
    )
    critic_weights: str | None = option(
        None,
        "weights that an extractor's network starts from: a file, or 'imagenet' (default: random ones)",
        metavar="FILE",
        resumable=True,
        since="0.2",
    )
    critic_outputs: int | None = option(
        None,
        "numbers that the critic gives for an image (default: as many as the game needs, or "
        f"{_FEATURES} where that is free)",
        at_least=1,
        at_most=2**16,
        metavar="F",
        methods=PLAYING,
        since="0.2",
    )
    minibatch_discrimination: bool = option(
        False,
        "let the critic see how close an image is to the others of its minibatch (Salimans 2016)",
        methods=PLAYING,
        since="0.2",
    )
    critic_steps: int = option(
        1, "steps of the critic for each of the generator's", at_least=1, metavar="K", methods=PLAYING, since="0.2"
    )
    critic_warmup: int = option(
        0,
        "so many first steps of the generator have --critic-many of the critic's (WGAN: 25)",
        at_least=0,
        metavar="N",
        methods=PLAYING,
        since="0.2",
    )
    critic_every: int | None = option(
        None,
        "every N-th step of the generator has --critic-many of the critic's as well (WGAN: 500)",
        at_least=1,
        metavar="N",
        methods=PLAYING,
        since="0.2",
    )
    critic_many: int = option(
        100,
        "steps of the critic, where --critic-warmup or --critic-every asks for many",
        at_least=1,
        at_most=100_000,
        metavar="K",
        methods=PLAYING,
        since="0.2",
    )
    critic_optimizer: str | None = option(
        None, "optimizer of the critic (default: the generator's)", choices=tuple(OPTIMIZERS), since="0.2"
    )
    critic_lr: float | None = option(
        None, "learning rate of the critic (default: --lr)", above=0, at_most=1e30, metavar="X", since="0.2"
    )
    critic_beta1: float | None = option(
        None, "β1 of the critic's Adam (default: --beta1)", at_least=0, below=1, metavar="X", since="0.2"
    )
    critic_beta2: float | None = option(
        None, "β2 of the critic's Adam (default: --beta2)", at_least=0, below=1, metavar="X", since="0.2"
    )
    penalty: tuple[str, ...] = option(
        ("none",),
        f"what keeps the critic smooth, one or several of {', '.join(PENALTIES)}; with {', '.join(TWICE)}, which "
        "differentiate twice, --amp is the generator's alone",
        metavar="NAME",
        methods=PLAYING,
        since="0.2",
    )
    penalty_weight: tuple[float, ...] = option(
        (),
        "one for each --penalty (of clip the largest weight; default: the published ones)",
        above=0,
        at_most=1e30,
        metavar="X",
        methods=PLAYING,
        since="0.2",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.penalty) > 0, "penalty", "is an empty list; give none")
        for name in self.penalty:
            require(name in PENALTIES, "penalty", f"{name!r} is not one of {', '.join(PENALTIES)}")
            require(self.penalty.count(name) == 1, "penalty", f"has {name} twice")
        require("none" not in self.penalty or len(self.penalty) == 1, "penalty", "none goes with no other")
        given, names = len(self.penalty_weight), len(self.penalty)
        require(
            given in (0, names), "penalty_weight", f"{given} given for {names} penalt{'y' if names == 1 else 'ies'}"
        )
        require(not given or self.penalty != ("none",), "penalty_weight", "needs a --penalty")

    @property
    def start_file(self) -> str | None:
        """The file whose weights it starts from; None if there is none. A checkpoint has all that a file decides;
        "imagenet" adds a normalisation of images."""
        return None if self.critic_weights == "imagenet" else self.critic_weights

    @property
    def varies(self) -> bool:
        """Whether some steps of the generator have more of the critic's."""
        return self.critic_warmup > 0 or self.critic_every is not None


@dataclass(kw_only=True)
class GameConfig(Settings):
    """What critic and generator want of each other."""

    methods: ClassVar[tuple[str, ...]] = ADVERSARIAL

    game: str = option(
        "nonsaturating", "losses of one output for an image", choices=SCALAR_GAMES, methods=("gan",), since="0.2"
    )
    kernel: str = option(
        "rq",
        "kernel of the critic's outputs: rational quadratics, 'rq*' with x·y added (Bińkowski 2018), Gaussians 'rbf' "
        "(Li 2017), …",
        choices=tuple(KERNELS),
        methods=("mmd-gan",),
        since="0.2",
    )
    kernel_bandwidths: tuple[float, ...] = option(
        (),
        "α of rational quadratics, σ of Gaussians, or scales of IMQ (default: "
        + "; ".join(f"{name} {' '.join(f'{value:g}' for value in values)}" for name, values in BANDWIDTHS.items())
        + ")",
        above=0,
        at_least=1e-6,
        at_most=1e6,
        metavar="X",
        methods=("mmd-gan",),
        since="0.2",
    )
    estimate: str = option(
        "unbiased",
        "MMD², unbiased (Bińkowski 2018), or its 'root', biased, with a one-sided term (Li 2017)",
        choices=("unbiased", "root"),
        methods=("mmd-gan",),
        since="0.2",
    )
    scaled: bool = option(
        False, "scaled MMD (Arbel 2018); short for --penalty scaled", methods=("mmd-gan",), since="0.2"
    )
    began_gamma: float = option(
        0.5,
        "γ, the loss of generated images in units of that of real ones; a smaller one gives less variety",
        above=0,
        at_most=1,
        metavar="X",
        methods=("began",),
        since="0.2",
    )
    began_rate: float = option(1e-3, "λ of k", above=0, at_most=1e6, metavar="X", methods=("began",), since="0.2")
    fisher_rho: float = option(
        1e-6, "ρ of the quadratic term", above=0, at_most=1e6, metavar="X", methods=("fisher-gan",), since="0.2"
    )
    match: str = option(
        "mean",
        "what of the critic's outputs differs most: their means, or their covariances",
        choices=("mean", "covariance"),
        methods=("mcgan",),
        since="0.2",
    )
    match_norm: str = option(
        "2", "q, the norm of the difference of means", choices=("1", "2", "inf"), methods=("mcgan",), since="0.2"
    )
    match_directions: int = option(
        16, "singular directions of --match covariance", at_least=1, metavar="K", methods=("mcgan",), since="0.2"
    )
    classes: int | None = option(
        None,
        "take the data set's labels for so many classes, and 'generated' for one more",
        at_least=1,
        at_most=2**16,
        metavar="K",
        methods=("improved-gan",),
        since="0.2",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        takes = self.kernel in BANDWIDTHS
        require(takes or not self.kernel_bandwidths, "kernel_bandwidths", f"--kernel {self.kernel} has none")

    @property
    def bandwidths(self) -> tuple[float, ...]:
        """The given ones, or else the kernel's."""
        return self.kernel_bandwidths or BANDWIDTHS.get(self.kernel, ())


def penalty_names(config: Config) -> tuple[str, ...]:
    """The penalties that are asked for, in the order in which they are applied."""
    asked = set(config.critic.penalty) | ({"scaled"} if config.game.scaled and _is(config, "mmd-gan") else set())
    return tuple(name for name in PENALTIES if name in asked and name != "none")


def critic_outputs(config: Config) -> int:
    """How many outputs the critic has."""
    if _is(config, "improved-gan") and config.game.classes is not None:
        return config.game.classes
    if config.method.method in ("mmd-gan", "mcgan"):
        return config.critic.critic_outputs or _FEATURES
    return 1


def missing_bounds(config: Config) -> str:
    """What to add where the critic gains without end by larger outputs, as neither the game nor a penalty nor a norm
    bounds them; "" where something does."""
    method, game, asked = config.method.method, config.game, set(penalty_names(config))
    grows = {"gan": game.game == "wasserstein", "mmd-gan": game.kernel in _GROWING, "mcgan": True}
    # These grow with the outputs themselves, or faster than their slopes do.
    needs_more = {"mmd-gan": game.kernel == "polynomial", "mcgan": game.match == "covariance"}
    slopes = config.critic.critic_norm == "spectral" or asked & set(_BOUND_SLOPES)
    if not grows.get(method, False) or asked & set(_ALWAYS_BOUND):
        return ""
    if needs_more.get(method, False):
        return "--penalty clip"
    return "" if slopes else "--penalty gradient or clip, or --critic-norm spectral"


def check_adversarial(config: Config) -> None:
    """InputError if settings of the critic and of the game make no sense together."""
    _check_penalties(config)
    critic, game, method = config.critic, config.game, config.method.method
    outputs, needed = critic.critic_outputs, critic_outputs(config)
    if method == "molm":
        check_moments(config)
    fits = outputs in (None, needed)
    require(fits, "critic_outputs", f"this game of --method {method} needs {needed}, not {outputs}")
    own = (critic.critic == "autoencoder") == (method == "began")
    require(own, "critic", f"autoencoder is that of --method began, and this is {critic.critic} with {method}")
    drawing = critic.critic != "encoder-decoder" or (method in PLAYING and "autoencode" in penalty_names(config))
    without = "dcgan is the same without a decoder"
    more = f"add that penalty, or take another critic: {without}" if method in PLAYING else without
    require(drawing, "critic", f"encoder-decoder has a decoder, which learns by --penalty autoencode alone; {more}")
    starts = critic.critic_weights is None or critic.critic in ARCHITECTURE_CRITICS
    extractors = ", ".join(ARCHITECTURE_CRITICS)
    others = "" if method == "began" else f", or choose one of {extractors}"
    none = f"--critic {critic.critic} has none to start from; leave them out{others}"
    require(starts, "critic_weights", none)
    if method == "mcgan" and game.match == "covariance":
        more = (
            f"{game.match_directions} are more than the critic's {needed} outputs; give fewer, or more --critic-outputs"
        )
        require(game.match_directions <= needed, "match_directions", more)


def _check_penalties(config: Config) -> None:
    critic, game, method = config.critic, config.game, config.method.method
    for name in penalty_names(config):
        kernel = name not in _KERNELS_ONLY or method == "mmd-gan"
        require(kernel, "penalty", f"{name} is of kernels: it belongs to --method mmd-gan, and this is {method}")
        draws = name != "autoencode" or critic.critic == "encoder-decoder"
        require(draws, "penalty", "autoencode needs a critic with a decoder beside its outputs: encoder-decoder")
        smooth = name != "scaled" or game.kernel != "distance"
        require(smooth, "kernel", "distance has a kink where two images are the same, and no scaled MMD")
        whole = name != "scaled" or game.estimate == "unbiased"
        require(whole, "estimate", "a scaled MMD is a scaled MMD², and root is none; leave out one of them")
        clipped = name == "clip" and critic.critic_norm.startswith("spectral")
        require(not clipped, "penalty", f"clip bounds weights that --critic-norm {critic.critic_norm} divides again")
        if name in TWICE:
            why = f"{name} needs each image's own derivative"
            require(critic.critic_norm != "batch", "critic_norm", f"--penalty {why}, and batch mixes images")
            alone = not critic.minibatch_discrimination
            require(alone, "minibatch_discrimination", f"--penalty {why}, and this mixes images")


def _is(config: Config, method: str) -> bool:
    return config.method.method == method
