"""The configuration of a training run: a preset, and what the command line gave in place of its values."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.configuration.adversarial import CriticConfig, GameConfig, check_adversarial
from engine.configuration.autoencoding import AutoencoderConfig, check_autoencoding
from engine.configuration.games import has_capturable_game
from engine.configuration.groups import (
    GROUPS,
    OWN_WEIGHTS,
    DataConfig,
    MatchingConfig,
    NetworksConfig,
    OutputConfig,
    TrainingConfig,
    ValidationConfig,
    default_of,
    field_names,
    group_of,
    names_with,
    owners,
)
from engine.configuration.idle import check_used
from engine.configuration.latent import LatentConfig, check_latent
from engine.configuration.methods import (
    ADVERSARIAL,
    AUTOENCODING,
    COMPARING,
    LATENT,
    METHODS,
    NEEDS,
    DriftingConfig,
    FeaturesConfig,
    FrechetConfig,
    GfmnConfig,
    GmmnConfig,
    MethodConfig,
    MmdConfig,
    Needs,
    PopulationConfig,
    SinkhornConfig,
    named,
)
from engine.configuration.moment_nets import DenoisingConfig, MomentsConfig
from engine.configuration.options import MOST_SEED, checked, require
from engine.configuration.presets import PRESETS, preset_for, preset_method, preset_values
from engine.configuration.updates import UpdatesConfig, all_of
from engine.representation.zoo import has_tokens
from engine.support.errors import InputError, one_line
from engine.support.files import expanded, read_file, what_is

# Of every setting that names files of weights, the words that stand for some, whatever lies beside.
_WEIGHTS = {
    "weights": ("imagenet", "random", "pretrain"),
    "critic_weights": ("imagenet",),
    "perceptual_weights": ("imagenet", "random"),
    "evaluate_weights": (OWN_WEIGHTS,),
}
_MOVABLE = ("critic_weights", "perceptual_weights")
"""Of these, a file may lie elsewhere when the run is resumed; words may not change, as they may normalise images."""
# Settings of runs made by version 0.1, under today's names.
_RENAMED = {"checkpoint": "recompute", "checkpoint_generator": "recompute_generator"}


@dataclass(kw_only=True)
class Config:
    """Everything that a run is made from; `config.json` holds it."""

    preset: str = "digits"
    method: MethodConfig = field(default_factory=MethodConfig)
    data: DataConfig = field(default_factory=DataConfig)
    networks: NetworksConfig = field(default_factory=NetworksConfig)
    gfmn: GfmnConfig = field(default_factory=GfmnConfig)
    mmd: MmdConfig = field(default_factory=MmdConfig)
    frechet: FrechetConfig = field(default_factory=FrechetConfig)
    sinkhorn: SinkhornConfig = field(default_factory=SinkhornConfig)
    drifting: DriftingConfig = field(default_factory=DriftingConfig)
    gmmn: GmmnConfig = field(default_factory=GmmnConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    population: PopulationConfig = field(default_factory=PopulationConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    game: GameConfig = field(default_factory=GameConfig)
    denoising: DenoisingConfig = field(default_factory=DenoisingConfig)
    moments: MomentsConfig = field(default_factory=MomentsConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    latent: LatentConfig = field(default_factory=LatentConfig)
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    updates: UpdatesConfig = field(default_factory=UpdatesConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        known = isinstance(self.preset, str) and self.preset in PRESETS
        require(known, "preset", f"{self.preset!r} is not one of {', '.join(PRESETS)}")
        method, batch = self.method.method, self.training.batch_size
        _check_preset(self.preset, method)
        # What belongs to other methods decides nothing, and no flag could change it.
        chunk = self.matching.chunk_size if method in COMPARING else None
        larger = isinstance(chunk, int) and chunk > batch
        require(not larger, "chunk_size", f"is larger than the minibatch: {chunk} > {batch}")
        batched = self.networks.extractor_bn == "batch"
        require(
            not (batched and isinstance(chunk, int)),
            "chunk_size",
            "batch statistics (--extractor-bn batch) need the whole minibatch at once",
        )
        queue = self.population.population_images
        queues = self.population.population == "queue" and method in PopulationConfig.methods
        require(not queues or queue >= batch, "population_images", f"is smaller than the minibatch: {queue} < {batch}")
        # It keeps every minibatch's moments, and not the images.
        broken = queues and method == "gfmn" and queue % batch > 0
        less = queue - queue % batch
        near = f"give {less} or {less + batch}"
        require(
            not broken, "population_images", f"gfmn's queue is of whole minibatches of {batch}, {queue} is not; {near}"
        )
        self._check_updates()
        if method in ADVERSARIAL:
            check_adversarial(self)
        if self.method.method in AUTOENCODING:
            check_autoencoding(self)
        if self.method.method in LATENT:
            check_latent(self)

    def _check_updates(self) -> None:
        updates, training = self.updates, self.training
        warmup, final, sampled = updates.warmup_steps, updates.lr_final, updates.sample_ema
        require(
            warmup < training.steps, "warmup_steps", f"{warmup} steps of warm-up leave none of {training.steps} --steps"
        )
        require(final <= training.lr, "lr_final", f"{final} is more than --lr {training.lr}")
        optimizers = {updates.optimizer, self.critic.critic_optimizer if self.method.method in ADVERSARIAL else None}
        decays = "adamw" in optimizers or updates.weight_decay is None
        require(decays, "weight_decay", f"--optimizer {updates.optimizer} has none, adamw has")
        known = all_of(training.generator_ema)
        names = ", ".join(map(str, known))
        missing = f"{sampled} is not among --generator-ema {names}" if known else "needs --generator-ema"
        require(sampled is None or sampled in known, "sample_ema", missing)

    @classmethod
    def build(cls, preset: str | None, given: Mapping[str, Any]) -> Config:
        """The preset's configuration with the `given` settings (field name → value) in place of its own.

        Without a preset: that of photographs if `data` names pictures, else that of the digits.
        """
        preset = preset_for(given) if preset is None else preset
        require(preset in PRESETS, "preset", f"{preset!r} is not one of {', '.join(PRESETS)}")
        given = _given(given)
        method = given.get("method", preset_method(preset))
        _check_preset(preset, method)
        check_owners(given, method)
        on_digits = given.get("data") is None and given.get("dataset", "digits") == "digits"
        usual = preset_values(preset, method, given.get("population", "none"), on_digits=on_digits)
        values = {**usual, **dropped(given, usual), **given}
        if "extractor" in given and "pool" not in values and has_tokens(given["extractor"]):
            values["pool"] = "mean"  # a grid is of the places of a map
        config = cls.of_flat(preset, values)
        check_used(given, config)
        return config

    @classmethod
    def of_flat(cls, preset: str, values: Mapping[str, Any]) -> Config:
        """The configuration of field name → value; what is missing has its default."""
        parts = {
            name: {key: values[key] for key in field_names(group) if key in values} for name, group in GROUPS.items()
        }
        return cls(preset=preset, **{name: group(**parts[name]) for name, group in GROUPS.items()})

    def usual(self) -> Config:
        """The preset's own configuration, of this method and population and for these images."""
        given = {"method": self.method.method, "dataset": self.data.dataset}
        given |= {} if self.data.data is None else {"data": self.data.data}
        moving = self.method.method in PopulationConfig.methods
        return self.build(self.preset, given | ({"population": self.population.population} if moving else {}))

    def replaced(self, given: Mapping[str, Any]) -> Config:
        """This configuration with `given` settings in place of its own."""
        given = _given(given)
        check_owners(given, given.get("method", self.method.method))
        own = self.flat()
        config = self.of_flat(self.preset, {**own, **dropped(given, own), **given})
        check_used(given, config)
        return config

    def resumed_with(self, given: Mapping[str, Any]) -> Config:
        """This configuration, of a run to be resumed, with `given` settings that a resumed run may change."""
        flat, given = self.flat(), _given(given)
        free = self._resumable() - {name for name in _MOVABLE if given.get(name, "") in (None, *_WEIGHTS[name])}
        if self.validation.evaluate_every is None:
            free |= field_names(ValidationConfig) - {"lr_adapt"}
        if given.get("method", self.method.method) == self.method.method:
            check_owners(given, self.method.method)
        asked = {**dropped(given, flat), **given}
        for name, value in sorted(asked.items(), key=lambda item: (item[0] != "method", item[0] not in given)):
            if name not in free and flat[name] != value:
                raise InputError(
                    name if name in given else "data",  # which alone brings the dataset of pictures
                    f"the run was started with {flat[name]}, it cannot be resumed with {value}; leave it out, or "
                    "start a new run: another --out, without --resume",
                )
        return self.replaced(given)

    def _resumable(self) -> set[str]:
        """What every resume may change: not the length of a run whose rate falls until its end, and of weights that
        are in a file its place alone."""
        flat = self.flat()
        fixed = {name for name in _MOVABLE if flat[name] in (None, *_WEIGHTS[name])}
        return names_with("resumable") - fixed - ({"steps"} if self.updates.lr_schedule != "constant" else set())

    def fixed(self) -> dict[str, str]:
        """What no resume may change: the settings that decide a run's numbers, as text."""
        free = self._resumable()
        if self.validation.lr_adapt == "none":  # then evaluations change nothing
            free |= field_names(ValidationConfig) - {"lr_adapt"}
        return {f"setting_{name}": str(value) for name, value in self.flat().items() if name not in free}

    def groups(self) -> dict[str, Any]:
        """The groups of settings that decide something here, by name: all but those of other methods."""
        found = {name: getattr(self, name) for name in GROUPS}
        return {
            name: group for name, group in found.items() if self.method.method in getattr(group, "methods", METHODS)
        }

    @property
    def needs(self) -> Needs:
        """What the method needs besides a generator."""
        needs = NEEDS[self.method.method]
        by_host = self.method.method in ADVERSARIAL and not has_capturable_game(self)
        return dataclasses.replace(needs, captured=False) if by_host else needs

    @property
    def summary(self) -> str:
        """How features are compared, for people."""
        groups = self.groups()
        if self.population.population != "none":  # which takes the averager's place
            groups.pop("gfmn", None)
        found = (group.summary for group in groups.values() if hasattr(group, "summary"))
        return "; ".join(filter(None, found))

    def flat(self) -> dict[str, Any]:
        """Field name → value, over all groups."""
        return {key: value for name in GROUPS for key, value in dataclasses.asdict(getattr(self, name)).items()}

    def to_json(self) -> str:
        """As in `config.json`."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> Config:
        """Read a `config.json`; InputError that names the file if it is not one."""
        path = Path(path)
        text = read_file(path, "no such file; is this the folder of a run?")
        try:
            return cls.of_flat(*_read(json.loads(text)))
        except (ValueError, RecursionError) as error:
            raise InputError(path, f"is not the configuration of a run ({one_line(error)})") from None


def _read(values: Any) -> tuple[Any, dict[str, Any]]:
    """The preset, and field name → value, of what a `config.json` holds; InputError for what is unknown or lacking."""
    if not isinstance(values, dict) or not all(isinstance(values[name], dict) for name in values.keys() - {"preset"}):
        raise InputError("", "it must hold the preset's name, and groups of settings")
    require("preset" in values, "preset", "there is no 'preset'")
    flat: dict[str, Any] = {}
    for group, settings in values.items():
        if group == "preset":
            continue
        require(group in GROUPS, group, "there is no such group of settings")
        for name, value in settings.items():
            name = _RENAMED.get(name, name)
            # Version 0.1 knew no methods, and had these settings in other groups.
            here = group_of(name) is GROUPS[group] or "method" not in values
            require(here, f"{group}.{name}", f"there is no setting {name!r} in this group")
            require(name not in flat, name, "is there twice")
            flat[name] = value
    names = set().union(*map(field_names, GROUPS.values())) - names_with("since")
    if lacking := sorted(names - flat.keys()):
        raise InputError(lacking[0], f"there is no {lacking[0]!r}, and a run's configuration has every setting")
    return values["preset"], flat


def _check_preset(preset: str, method: str) -> None:
    """InputError if the preset is another method's recipe."""
    own = preset_method(preset)
    fits = own in ("gfmn", method)
    require(fits, "method", f"the preset {preset} is one of --method {own}, and this is --method {method}")


def check_owners(given: Mapping[str, Any], method: str) -> None:
    """InputError if one of the `given` settings belongs to other methods than `method`."""
    for name in given:
        of = owners(name)
        require(not of or method in of, name, f"belongs to {named(of)}, and this is --method {method}")


_NUMBERS = {
    "penalty": ("penalty_weight",),
    "kernel": ("kernel_bandwidths",),
    "mmd_kernel": ("mmd_bandwidths", "mmd_degree"),
    "population": ("population_decay", "population_images"),
}
"""Setting → the numbers that belong to its present value, and go back to their defaults when it changes."""


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that were given, checked one by one; files and folders by their whole path, so that a run can be resumed
    from anywhere."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        result |= checked(group_of(name), {name: value})
    require(result.get("seed", 0) <= MOST_SEED, "seed", f"must be at most {MOST_SEED}; larger ones repeat smaller ones")
    for name in ("data", "target"):
        if result.get(name) is not None:
            result[name] = str(expanded(result[name]).absolute())
    for name, words in _WEIGHTS.items():
        if isinstance(given := result.get(name), tuple):
            result[name] = tuple(_absolute(entry, words) for entry in given)
        elif given is not None:
            result[name] = _absolute(given, words)
    return result


def dropped(given: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """What `given` settings make of others among `values`, unless those are given too.

    Another penalty, kernel or population has its own numbers, not those that there were for the one. A constant rate
    drops `lr_final`, and optimizers without weight decay drop `weight_decay`. `scaled` is short for a penalty, and
    takes the place of those that there were. Another data set has its own files, and their crop; files beside the
    digits, which have none, are pictures.
    """
    short = bool(given.get("scaled")) and not values.get("scaled")
    found: dict[str, Any] = {"penalty": ("none",)} if short else {}
    changed = {name for name, value in given.items() if value != values.get(name)} | found.keys()
    for name in changed & _NUMBERS.keys():
        found |= {of: default_of(of) for of in _NUMBERS[name]}
    if "lr_schedule" in changed and given["lr_schedule"] == "constant":
        found["lr_final"] = default_of("lr_final")
    optimizers = {name: given.get(name, values.get(name)) for name in ("optimizer", "critic_optimizer")}
    if changed & optimizers.keys() and "adamw" not in optimizers.values():
        found["weight_decay"] = default_of("weight_decay")
    dataset = values.get("dataset", "digits")
    if given.get("data") is not None and dataset == "digits":
        found["dataset"] = "images"
    if "data" not in given and given.get("dataset", dataset) != dataset:
        found |= {"data": None, "center_crop": None}
    return found


def _absolute(entry: str, words: tuple[str, ...]) -> str:
    """The whole path of a file; what is none, or one of `words`, stays."""
    file = expanded(entry)
    return str(file.absolute()) if entry not in words and what_is(file) == "file" else entry
