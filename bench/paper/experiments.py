"""What the paper compared, and what it found: settings of `engine.train`, and claims about their results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

SMALL = "digits"
SEEDS = 3
"""Runs of every setting, if nobody asks for another number."""
# Table 3's numbers of layers of VGG19.
_VGG19_LAYERS = (1, 3, 5, 7, 9, 11, 13, 15, 16)


@dataclass(frozen=True)
class Scale:
    """Where an experiment is run.

    Attributes:
        name: on the command line, and the preset of `engine.train` unless there is another.
        extractor: the network that is matched where an experiment does not say another; the classifier of Table 3.
        layers: how many of its layers `layers` tries.
        network: judges the samples (see `engine.evaluation.metrics.evaluation_network`); None is Inception-v3.
        samples: how many of them are judged.
        metrics: some of `engine.evaluation.metrics.METRICS`.
        preset: whose values the runs have; None: that of the name.
        data: flags of `engine.train` for the data set; with a preset of that name they change nothing.
        classes: of its labels; None if it has none.
        budget: seconds of training for each method in the comparison of all: CPU seconds, or on a GPU by the clock.
    """

    name: str
    extractor: str = "vgg19"
    layers: tuple[int, ...] = _VGG19_LAYERS
    network: str | None = None
    samples: int = 50_000
    metrics: tuple[str, ...] = ("fid", "kid", "is", "prc")
    preset: str | None = None
    data: tuple[str, ...] = ()
    classes: int | None = None
    budget: int = 4 * 3600

    @property
    def flags(self) -> list[str]:
        """Of `engine.train` and `engine.pretrain`: the preset, and the data set where it has another."""
        return ["--preset", self.preset or self.name, *(self.data if self.preset else ())]


_CELEBA = ("--dataset", "celeba", "--image-size", "64", "--center-crop", "160")
SCALES = {
    SMALL: Scale(
        SMALL,
        classes=10,
        budget=100,
        extractor="vgg-small",
        layers=(1, 2, 4, 6),
        network="efficientnet-lite0",
        samples=2000,
        metrics=("fid", "kid", "prc"),
    ),
    "cifar10": Scale("cifar10", data=("--dataset", "cifar10"), classes=10),
    "stl10": Scale("stl10", data=("--dataset", "stl10")),
    "celeba64": Scale("celeba64", data=_CELEBA),
    "fashion": Scale("fashion", preset="cifar10", data=("--dataset", "fashion"), classes=10),
}


@dataclass(frozen=True)
class ExperimentSetting:
    """One row of an experiment's table.

    Attributes:
        name: as the table and the claims call it.
        extractor: the matched networks, pretrained on the scale's data set unless they bring their weights.
        flags: of `engine.train`.
        candidates: more flags of which those are taken that a short trial each finds best (see `bench.paper.search`).
    """

    name: str
    extractor: str
    flags: tuple[str, ...] = ()
    candidates: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Claim:
    """The paper says that samples of the setting `better` are closer to the real images than those of `worse`."""

    text: str
    better: str
    worse: str


@dataclass(frozen=True)
class Experiment:
    """A table or a figure of the paper.

    Attributes:
        name: on the command line.
        title: heading of its section.
        source: table, figure or section of the paper.
        settings: from a scale to the rows.
        claims: from a scale to what the paper found.
        small_steps: training steps on the digits; the paper's scale takes the preset's.
        small_flags: of `engine.train` on the digits, in place of the preset's.
        small_amp: whether the digits' runs compute in bf16, where the machine does.
        evaluations: how many times the samples are judged during training, at equal distances; 0: at the end only.
        remark: what the small scale's numbers don't say and its pictures do; no numbers.
    """

    name: str
    title: str
    source: str
    settings: Callable[[Scale], tuple[ExperimentSetting, ...]]
    claims: Callable[[Scale], tuple[Claim, ...]]
    small_steps: int
    small_flags: tuple[str, ...] = ()
    small_amp: bool = True
    evaluations: int = 0
    remark: str = ""


def _layers(scale: Scale) -> tuple[ExperimentSetting, ...]:
    return tuple(
        ExperimentSetting(f"{k} layer{'s'[: k > 1]}", scale.extractor, ("--layers", str(k))) for k in scale.layers
    )


def _layers_claims(scale: Scale) -> tuple[Claim, ...]:
    names = [setting.name for setting in _layers(scale)]
    first, middle, last = names[0], names[len(names) // 2], names[-1]
    pairs = ((last, first), (middle, first), (last, middle))
    return tuple(Claim(f"{more} are better than {fewer}", more, fewer) for more, fewer in pairs)


_AUTOENCODER, _RESNET, _VGG, _BOTH = "dcgan-encoder", "resnet18", "vgg19", "vgg19+resnet18"


def _extractors(scale: Scale) -> tuple[ExperimentSetting, ...]:
    return tuple(ExperimentSetting(name, name) for name in (_AUTOENCODER, _RESNET, _VGG, _BOTH))


def _extractors_claims(scale: Scale) -> tuple[Claim, ...]:
    return (
        Claim("a classifier is better than an autoencoder's encoder (ResNet18)", _RESNET, _AUTOENCODER),
        Claim("a classifier is better than an autoencoder's encoder (VGG19)", _VGG, _AUTOENCODER),
        Claim("both classifiers together are better than VGG19", _BOTH, _VGG),
        Claim("both classifiers together are better than ResNet18", _BOTH, _RESNET),
    )


_AMA, _AUTHORS = "AMA", "AMA authors"
_AVERAGERS = {
    "none": ("--averager", "none"),
    "MA": ("--averager", "ma"),
    _AMA: ("--averager", "ama", "--ama-variant", "paper"),
    _AUTHORS: ("--averager", "ama", "--ama-variant", "authors-0.3"),
    "population": ("--population", "ema"),
}
_RATES = {
    "MA": ("--ma-alpha", ("0.03", "0.1", "0.3")),
    _AMA: ("--ama-lr", ("3e-4", "1e-3", "3e-3")),
    _AUTHORS: ("--ama-lr", ("3e-4", "1e-3", "3e-3")),
    "population": ("--population-decay", ("0.9", "0.97", "0.99")),
}
# Around the paper's, which are the generator's 5e-5 and AMA's 1e-5.
_PAPERS_RATES = {name: ("--ama-lr", ("3e-6", "1e-5", "3e-5")) for name in (_AMA, _AUTHORS)}
_MINIBATCHES = (16, 64, 256)


def _candidates(averager: str, scale: Scale) -> tuple[tuple[str, ...], ...]:
    """Six each: three rates, the averager's own or without any the generator's, times two β2 of the generator's Adam;
    .9 forgets the large gradients of early squares."""
    lrs = ("1e-3", "3e-4", "3e-3") if scale.name == SMALL else ("5e-5", "2e-5", "1e-4")
    rates = _RATES if scale.name == SMALL else {**_RATES, **_PAPERS_RATES}
    flag, values = rates.get(averager, ("--lr", lrs))
    lr = () if flag == "--lr" else ("--lr", lrs[0])
    return tuple((*lr, flag, value, "--beta2", beta2) for value in values for beta2 in ("0.9", "0.999"))


def _averaging(scale: Scale) -> tuple[ExperimentSetting, ...]:
    # 256 images in chunks of 64: the memory of the small minibatch, and the same gradient.
    return tuple(
        ExperimentSetting(
            f"{averager}, {minibatch}",
            f"{scale.extractor}+opponent" if scale.name == SMALL else scale.extractor,
            (*flags, "--upsampling", "transposed", "--batch-size", str(minibatch))
            + (("--chunk-size", "64") if minibatch > 64 and scale.name != SMALL else ()),
            _candidates(averager, scale),
        )
        for minibatch in _MINIBATCHES
        for averager, flags in _AVERAGERS.items()
    )


def _averaging_claims(scale: Scale) -> tuple[Claim, ...]:
    small, usual, large = _MINIBATCHES
    claims = [Claim(f"with MA, minibatch {large} is better than {usual}", f"MA, {large}", f"MA, {usual}")]
    for ama in (_AMA, _AUTHORS):
        for minibatch in (small, usual):
            claims += [
                Claim(
                    f"at minibatch {minibatch}, {ama} is better than {text}",
                    f"{ama}, {minibatch}",
                    f"{other}, {minibatch}",
                )
                for other, text in (("MA", "MA"), ("none", "no average"))
            ]
        claims.append(
            Claim(f"{ama} at minibatch {usual} is better than MA at {large}", f"{ama}, {usual}", f"MA, {large}")
        )
    return tuple(claims)


def _single(scale: Scale) -> tuple[ExperimentSetting, ...]:
    return (ExperimentSetting("AMA", scale.extractor),)


def _fidelity(scale: Scale) -> tuple[ExperimentSetting, ...]:
    return tuple(
        ExperimentSetting(f"AMA, {variant}", scale.extractor, ("--ama-variant", variant))
        for variant in ("paper", "authors")
    )


# Where a step is expensive: few steps at large rates, at which AMA with minibatch 64 draws digits after 120 steps.
_FAST = ("--lr", "1e-3", "--ama-lr", "1e-2", "--generator-ema", "0.95")
# Where a few hundred steps are affordable.
_MODERATE = ("--lr", "3e-4", "--ama-lr", "2e-3", "--generator-ema", "0.98")
_PAPERS_AMA = ("--ama-variant", "paper")


_COLOUR = (
    "Classifiers of grey digits need not see colour, so the colours of the samples drift. The judge was trained on "
    "photographs and minds that more than a reader of digits would. An autoencoder has to draw its images again, so it "
    "sees colour."
)
_SEARCH = (
    "Every averager has the same generator, and six candidates: three rates of its own, or without an average of "
    "the generator's, times two β2 of the generator's Adam. The search ran once: a trial of a quarter of the steps "
    "for each candidate, with a seed and a z that no judged run has, by a judge that has no part in the verdict. "
    "What was best in a short trial need not be best in a long one. The second network, `opponent`, sees the "
    "colours that a classifier of grey digits leaves open, so that the verdict is not about tints."
)
_LOSS = (
    "AMA's loss is v · Δ, and v starts at zero. So the loss rises and falls while v catches up with Δ, passes zero, "
    "and then hardly moves. The samples improve during that time."
)


def _no_claims(scale: Scale) -> tuple[Claim, ...]:
    return ()


EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            "layers", "How many layers are matched", "Table 3", _layers, _layers_claims, 300, (*_MODERATE, *_PAPERS_AMA)
        ),
        Experiment(
            "extractors",
            "Which network is matched",
            "Table 2",
            _extractors,
            _extractors_claims,
            120,
            (*_FAST, *_PAPERS_AMA),
            remark=_COLOUR,
        ),
        Experiment(
            "averaging",
            "What smooths the differences of moments",
            "Figure 4",
            _averaging,
            _averaging_claims,
            4000,
            ("--generator-ema", "0.99"),
            small_amp=False,  # so that all kinds of machines can share the runs
            remark=_SEARCH,
        ),
        Experiment(
            "loss-vs-quality",
            "Does the loss follow quality",
            "Figure 5",
            _single,
            _no_claims,
            600,
            (*_MODERATE, *_PAPERS_AMA),
            evaluations=15,
            remark=_LOSS,
        ),
        Experiment(
            "fidelity",
            "AMA as in the paper and as in the authors' code",
            "section 2.2 and the authors' code",
            _fidelity,
            _no_claims,
            400,
            _MODERATE,
        ),
    )
}
