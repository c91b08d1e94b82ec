"""The configuration of a training run: a preset, and what the command line gave in place of its values."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.configuration.groups import (
    GROUPS,
    METHODS,
    DataConfig,
    GfmnConfig,
    MatchingConfig,
    MethodConfig,
    MmdConfig,
    NetworksConfig,
    OutputConfig,
    TrainingConfig,
    ValidationConfig,
    field_names,
    owners,
    require,
    resumable,
)
from engine.configuration.presets import PRESETS, preset_for, preset_values
from engine.support.errors import InputError

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
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        chunk, batch = self.matching.chunk_size, self.training.batch_size
        larger = isinstance(chunk, int) and chunk > batch
        require(not larger, "chunk_size", f"is larger than the minibatch: {chunk} > {batch}")
        batched = self.networks.extractor_bn == "batch"
        require(
            not (batched and isinstance(chunk, int)),
            "chunk_size",
            "batch statistics (--extractor-bn batch) need the whole minibatch at once",
        )

    @classmethod
    def build(cls, preset: str | None, given: Mapping[str, Any]) -> Config:
        """The preset's configuration with the `given` settings (field name → value) in place of its own.

        Without a preset: that of photographs if `data` names pictures, else that of the digits.
        """
        preset = preset_for(given) if preset is None else preset
        if preset not in PRESETS:
            raise InputError("preset", f"{preset!r} is not one of {', '.join(PRESETS)}")
        method = given.get("method", "gfmn")
        require(method in METHODS, "method", f"{method!r} is not one of {', '.join(METHODS)}")
        check_owners(given, method)
        values = {**preset_values(preset, method), **_absolute(given)}
        if given.get("data") is not None and "dataset" not in given and values.get("dataset", "digits") == "digits":
            values["dataset"] = "images"
        return cls.of_flat(preset, values)

    @classmethod
    def of_flat(cls, preset: str, values: Mapping[str, Any]) -> Config:
        """The configuration of field name → value; what is missing has its default."""
        parts = {
            name: {key: values[key] for key in field_names(group) if key in values} for name, group in GROUPS.items()
        }
        return cls(preset=preset, **{name: group(**parts[name]) for name, group in GROUPS.items()})

    def replaced(self, given: Mapping[str, Any]) -> Config:
        """This configuration with `given` settings in place of its own."""
        check_owners(given, given.get("method", self.method.method))
        return self.of_flat(self.preset, {**self.flat(), **_absolute(given)})

    def resumed_with(self, given: Mapping[str, Any]) -> Config:
        """This configuration, of a run to be resumed, with `given` settings that a resumed run may change."""
        flat = self.flat()
        free = resumable()
        if self.validation.evaluate_every is None:
            free |= field_names(ValidationConfig) - {"lr_adapt"}
        if given.get("method", self.method.method) == self.method.method:
            check_owners(given, self.method.method)
        for name, value in sorted(_absolute(given).items(), key=lambda item: item[0] != "method"):
            if name not in free and flat[name] != value:
                raise InputError(name, f"the run was started with {flat[name]}, it cannot be resumed with {value}")
        return self.replaced(given)

    def groups(self) -> dict[str, Any]:
        """The groups of settings that decide something here, by name: all but those of other methods."""
        found = {name: getattr(self, name) for name in GROUPS}
        return {
            name: group for name, group in found.items() if self.method.method in getattr(group, "methods", METHODS)
        }

    @property
    def summary(self) -> str:
        """How features are compared, for people."""
        return "; ".join(group.summary for group in self.groups().values() if hasattr(group, "summary"))

    def flat(self) -> dict[str, Any]:
        """Field name → value, over all groups."""
        return {key: value for name in GROUPS for key, value in dataclasses.asdict(getattr(self, name)).items()}

    def to_json(self) -> str:
        """As in `config.json`."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> Config:
        """Read a `config.json`; InputError that names the file if it is not one."""
        try:
            values = json.loads(Path(path).read_text())
            preset = values.pop("preset")
            flat = {_RENAMED.get(key, key): value for group in values.values() for key, value in group.items()}
            if unknown := sorted(flat.keys() - set().union(*map(field_names, GROUPS.values()))):
                raise ValueError(f"there is no setting {unknown[0]!r}")
            check_choices(flat)
            return cls.of_flat(preset, tuples(flat))
        except FileNotFoundError:
            raise InputError(Path(path), "no such file; is this the folder of a run?") from None
        except KeyError as error:
            raise InputError(Path(path), f"is not the configuration of a run (there is no {error})") from None
        except (AttributeError, TypeError, ValueError, OSError) as error:
            raise InputError(Path(path), f"is not the configuration of a run ({error})") from None


def check_owners(given: Mapping[str, Any], method: str) -> None:
    """InputError if one of the `given` settings belongs to other methods than `method`."""
    for name in given:
        of = owners(name)
        require(not of or method in of, name, f"belongs to --method {' or '.join(of)}, and this is --method {method}")


def check_choices(values: Mapping[str, Any]) -> None:
    """InputError if one of the settings `values` is none of its choices."""
    for group in GROUPS.values():
        for entry in dataclasses.fields(group):
            choices = entry.metadata["choices"]
            if choices and entry.name in values and values[entry.name] not in choices:
                raise InputError(entry.name, f"{values[entry.name]!r} is not one of {', '.join(choices)}")


def _absolute(given: Mapping[str, Any]) -> dict[str, Any]:
    """Files and folders among the given flags by their whole path, so that a run can be resumed from anywhere."""
    values = dict(given)
    for name in ("data", "target"):
        if values.get(name) is not None:
            values[name] = str(Path(values[name]).expanduser().absolute())
    weights = values.get("evaluate_weights")
    if weights is not None and Path(weights).expanduser().exists():
        values["evaluate_weights"] = str(Path(weights).expanduser().absolute())
    if "weights" in values:
        files = (Path(entry).expanduser() for entry in values["weights"])
        values["weights"] = tuple(
            str(file.absolute()) if file.exists() else entry
            for file, entry in zip(files, values["weights"], strict=True)
        )
    return values


def tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with tuples in place of lists, as settings are."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
