"""Running an experiment: training runs as anybody would start them, and their samples judged."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.commands import RunFailed, Usage, check, in_turn, run_module
from bench.paper.experiments import SMALL, Experiment, ExperimentSetting, Scale
from bench.paper.judging import Judge
from bench.paper.search import SEED, best, judged_by, kept_score, scorer
from bench.paper.training import check_kept, check_same, configured, settings_digest, train
from bench.rows import Row, environment
from engine.configuration.config import Config
from engine.configuration.inputs import open_data
from engine.representation.zoo import brings_weights
from engine.support.errors import InputError
from engine.support.files import write_atomically
from engine.training.precision import cpu_computes_in
from engine.training.run_folder import RunFolder


@dataclass(frozen=True)
class RunRow(Row):
    """One training run and what its samples are worth.

    Attributes:
        metrics: of the samples at the end, as `engine.evaluation.metrics.compute_metrics` names them.
        curve: at every evaluation during training its step and metrics, and the mean loss and ‖Δ‖ of the steps that
            were logged since the one before.
        seconds: of training, on the machine of `environment`, whatever else it did.
        smoke: a try of the machinery, whose numbers mean nothing.
        cpu_seconds: of training, of all threads together.
        searched: the trials that decided for a part of the flags: the candidate's flags, and its score; None for one
            that failed, with its message.
        searched_by: what gave the scores, the larger the better.
        trial_steps: training steps of a trial.
        settings: digest of all settings of the run.
        device: what the run was computed on; None is a CPU.
        training_threads: of the run; None: not recorded.
    """

    experiment: str
    scale: str
    setting: str
    seed: int
    steps: int
    minibatch: int
    extractor: str
    flags: list[str]
    network: str
    is_inception: bool
    samples: int
    real: int
    metrics: dict[str, float]
    curve: list[dict[str, float]]
    seconds: float
    smoke: bool
    cpu_seconds: float | None = None
    searched: list[dict[str, Any]] | None = None
    searched_by: str | None = None
    trial_steps: int | None = None
    settings: str | None = None
    device: str | None = None
    training_threads: int | None = None


@dataclass(frozen=True)
class ExperimentPlan:
    """What the command line asks for besides the experiment.

    Attributes:
        folder: where runs and weights go; what it already holds is not run again.
        seeds: training seeds.
        steps: in place of the experiment's.
        smoke: a few steps of everything; numbers mean nothing.
        data: folder of the data set, where it needs one.
        device: "cpu" or "cuda".
        only: names of settings, or parts of them between commas; none: all.
        jobs: runs at a time; with more than one, each has one thread.
    """

    scale: Scale
    folder: Path
    seeds: Sequence[int]
    steps: int | None
    smoke: bool
    data: str | None
    device: str
    only: Sequence[str] = ()
    jobs: int = 1

    @property
    def threads(self) -> int | None:
        """Of a run; None leaves that to PyTorch."""
        return 1 if self.jobs > 1 else None

    @property
    def machine(self) -> dict[str, Any]:
        """What rows say of where their runs are computed: the device, and the threads of each."""
        return {"device": self.device, "training_threads": self.threads or torch.get_num_threads()}

    @property
    def samples(self) -> int:
        """How many samples are judged at the end of a run."""
        return 64 if self.smoke else self.scale.samples


def chosen(settings: Sequence[ExperimentSetting], only: Sequence[str]) -> list[ExperimentSetting]:
    """Those that `only` names, wholly or by a part between commas; InputError for a name that is none."""
    parts = {setting.name: {setting.name, *setting.name.split(", ")} for setting in settings}
    if unknown := [name for name in only if not any(name in own for own in parts.values())]:
        raise InputError("only", f"{unknown[0]} is no setting, nor a part of one; there are {'; '.join(parts)}")
    return [setting for setting in settings if not only or parts[setting.name] & set(only)]


Rows = dict[tuple[str, int], RunRow]
"""By setting and seed."""


def run_experiment(
    experiment: Experiment, plan: ExperimentPlan, failures: list[str], kept: Rows
) -> Generator[RunRow, None, None]:
    """All runs of `experiment`, seed by seed, so that an early end leaves whole comparisons.

    A run that has a row in `kept` is not run again, and other seeds take what its search found. InputError if a row is
    of other settings. What fails, as a run that diverges, is noted in `failures`, and the others go on.
    """
    settings = chosen(experiment.settings(plan.scale), plan.only)
    known = _kept_searches(experiment, settings, plan, kept)
    runs = [(seed, setting) for seed in plan.seeds for setting in settings if (setting.name, seed) not in kept]
    settings = [setting for setting in settings if any(setting is left for _, left in runs)]
    if not settings:
        return
    for name in {name for setting in settings for name in setting.extractor.split("+")}:
        pretrained(name, plan)
    if plan.jobs > 1:  # the first that opens the data set may download and unpack it: none beside it
        open_data(configured(training_flags(experiment, settings[0], plan, 0, _weights(settings[0], plan))))
    searched = known | _search(experiment, [setting for setting in settings if setting.name not in known], plan)

    def flags_of(run: tuple[int, ExperimentSetting]) -> list[str]:
        seed, setting = run
        return training_flags(experiment, setting, plan, seed, _weights(setting, plan), _found(searched, setting))

    def trained(run: tuple[int, ExperimentSetting]) -> Usage | RunRow | RunFailed:
        seed, setting = run
        folder = run_folder(experiment, setting, plan, seed)
        try:
            done = _done_row(folder, flags_of(run))
            return train(flags_of(run), folder, plan.threads) if done is None else done
        except RunFailed as error:
            return error

    judge: Judge | None = None
    with contextlib.closing(in_turn(trained, runs, plan.jobs)) as all_found:
        for run, found in zip(runs, all_found):
            seed, setting = run
            if isinstance(found, RunRow):
                yield found
                continue
            if isinstance(found, RunFailed):
                failures.append(f"{setting.name}, seed {seed}: {found}")
                print(failures[-1], file=sys.stderr, flush=True)
                continue
            folder = run_folder(experiment, setting, plan, seed)
            judge = judge or Judge(plan, Config.load(RunFolder(folder).config))
            row = _row(experiment, setting, plan, seed, flags_of(run), found, judge, searched.get(setting.name))
            write_atomically(folder / "row.json", (json.dumps(row.as_json(), indent=1) + "\n").encode())
            yield row


def _done_row(folder: Path, flags: list[str]) -> RunRow | None:
    """The row of a run that was judged; InputError if it was run with other flags or settings."""
    if not (folder / "row.json").exists():
        return None
    row = RunRow(**json.loads((folder / "row.json").read_text()))
    check_same(folder, (row.flags, row.settings), (flags, settings_digest(flags)))
    return row


def _found(searched: Mapping[str, Sequence[Mapping[str, Any]]], setting: ExperimentSetting) -> tuple[str, ...]:
    return best(searched[setting.name]) if setting.name in searched else ()


def _kept_searches(
    experiment: Experiment, settings: Sequence[ExperimentSetting], plan: ExperimentPlan, kept: Rows
) -> dict[str, list[dict[str, Any]]]:
    """Setting → the trials of its search, from its rows in `kept`; InputError if one is of other settings."""
    found: dict[str, list[dict[str, Any]]] = {}
    for setting in settings:
        own = [row for row in kept.values() if row.setting == setting.name]
        if own and own[0].searched:
            found[setting.name] = own[0].searched
        weights = [Path(f"{name}.safetensors") for name in setting.extractor.split("+")]  # which count for nothing
        for row in own:
            again = training_flags(experiment, setting, plan, row.seed, weights, _found(found, setting))
            check_kept(f"{setting.name}, seed {row.seed}", row.settings, again)
    return found


def _search(
    experiment: Experiment, settings: Sequence[ExperimentSetting], plan: ExperimentPlan
) -> dict[str, list[dict[str, Any]]]:
    """Setting → its trials, of those that have candidates: short runs with a seed of their own."""
    trials = [(setting, candidate) for setting in settings for candidate in setting.candidates]
    if not trials:
        return {}
    folder = _experiment_folder(experiment, plan) / "trials"
    score = scorer(plan.scale, plan.samples, plan.device)

    def trained(trial: tuple[ExperimentSetting, tuple[str, ...]]) -> Path | RunFailed:
        setting, candidate = trial
        own = folder / f"{_file_name(setting)}-{setting.candidates.index(candidate)}"
        flags = training_flags(experiment, setting, plan, SEED, _weights(setting, plan), candidate, trial=True)
        try:
            train(flags, own, plan.threads, retry=False)
        except RunFailed as error:
            if not error.refused:  # and says nothing about the candidate
                raise
            return error
        return own

    found: dict[str, list[dict[str, Any]]] = {}
    with contextlib.closing(in_turn(trained, trials, plan.jobs)) as folders:
        for (setting, candidate), own in zip(trials, folders):
            entry: dict[str, Any] = {"flags": " ".join(candidate)}
            if isinstance(own, RunFailed):
                entry |= {"score": None, "message": str(own)}
            else:
                entry["score"] = kept_score(own, score)
            told = entry.get("message") or entry["score"]
            print(f"trial: {setting.name}, {entry['flags']}: {told}", file=sys.stderr, flush=True)
            found.setdefault(setting.name, []).append(entry)
    return found


def pretrained(name: str, plan: ExperimentPlan) -> Path:
    """Weights of the network `name`, trained on the scale's data set once for all experiments and seeds; "imagenet" for
    one that brings them."""
    if brings_weights(name):
        return Path("imagenet")
    path = plan.folder / "weights" / f"{name}{'-smoke' if plan.smoke else ''}.safetensors"
    if path.exists():
        return path
    task = "autoencode" if name == "dcgan-encoder" else "classify"
    if plan.scale.name in ("stl10", "celeba64") and task == "classify":
        task = "rotate"  # their images have no labels
    flags = [*plan.scale.flags, "--task", task, "--arch", name, *_machine(plan)]
    if plan.scale.name == SMALL and name != "vgg-small":
        flags += ["--steps", "120", *_amp(plan)]
    if plan.smoke:
        flags += ["--steps", "2"]
    partial = path.with_name(path.name + ".checkpoint").exists()
    command = [*flags, "--out", str(path), *(["--resume"] if partial else [])]
    print(f"python -m engine.pretrain {' '.join(command)}", file=sys.stderr, flush=True)
    check(run_module("engine.pretrain", command), f"{path}: python -m engine.pretrain")
    return path


def check_device(file: Path, device: str | None, plan: ExperimentPlan) -> None:
    """InputError if a row of `file` was computed on another device than the plan's; None is a CPU."""
    if (device or "cpu") != plan.device:
        raise InputError("json", f"{file} has rows of --device {device or 'cpu'}; give that, or another file")


def _weights(setting: ExperimentSetting, plan: ExperimentPlan) -> list[Path]:
    return [pretrained(name, plan) for name in setting.extractor.split("+")]


def _amp(plan: ExperimentPlan, small: bool = True) -> list[str]:
    """The flag, where it makes anything faster; on the digits only if their runs are to have it (`small`)."""
    wanted = small or plan.scale.name != SMALL
    return ["--amp"] if wanted and (plan.device != "cpu" or cpu_computes_in(torch.bfloat16)) else []


def _machine(plan: ExperimentPlan) -> list[str]:
    return ["--device", plan.device, *(["--data", plan.data] if plan.data is not None else [])]


def steps_of(experiment: Experiment, plan: ExperimentPlan, *, trial: bool = False) -> int:
    """Training steps of a run; a trial has a quarter of them."""
    if plan.smoke:
        return 2 if trial else 3
    small = experiment.small_steps if plan.scale.name == SMALL else None
    steps = plan.steps or small or Config.build(plan.scale.preset or plan.scale.name, {}).training.steps
    return max(steps // 4, 1) if trial else steps


def training_flags(
    experiment: Experiment,
    setting: ExperimentSetting,
    plan: ExperimentPlan,
    seed: int,
    weights: Sequence[Path],
    found: Sequence[str] = (),
    *,
    trial: bool = False,
) -> list[str]:
    """The flags of `engine.train` for one run, all but `--out`; `found` are those of a candidate."""
    steps = steps_of(experiment, plan, trial=trial)
    flags = [*plan.scale.flags, "--extractor", setting.extractor, *_amp(plan, experiment.small_amp)]
    flags += [*setting.flags, *found]
    flags += ["--seed", str(seed), "--steps", str(steps), "--log-every", str(max(steps // 200, 1)), *_machine(plan)]
    if plan.scale.name == SMALL:
        flags += _used(experiment.small_flags, setting)
    if experiment.evaluations:
        flags += ["--evaluate-every", str(max(steps // experiment.evaluations, 1))]
        flags += ["--evaluate-samples", str(min(plan.samples, 5000))]
        if plan.scale.network is not None:
            flags += ["--evaluate-extractor", plan.scale.network]
    return [*flags, "--weights", *map(str, weights)]


def _used(flags: Sequence[str], setting: ExperimentSetting) -> list[str]:
    """Pairs of a flag and its value, without AMA's where the setting has another averager."""
    pairs = zip(flags[::2], flags[1::2], strict=True)
    other = "--averager" in setting.flags and "ama" not in setting.flags
    return [word for pair in pairs for word in pair if not (other and pair[0].startswith("--ama-"))]


def run_folder(experiment: Experiment, setting: ExperimentSetting, plan: ExperimentPlan, seed: int) -> Path:
    """The folder of one run, inside the plan's."""
    return _experiment_folder(experiment, plan) / f"{_file_name(setting)}-seed{seed}"


def _experiment_folder(experiment: Experiment, plan: ExperimentPlan) -> Path:
    return plan.folder / f"{experiment.name}-{plan.scale.name}{'-smoke' if plan.smoke else ''}"


def _file_name(setting: ExperimentSetting) -> str:
    return setting.name.replace(", ", "-").replace(" ", "-")


def _row(
    experiment: Experiment,
    setting: ExperimentSetting,
    plan: ExperimentPlan,
    seed: int,
    flags: list[str],
    usage: Usage,
    judge: Judge,
    searched: list[dict[str, Any]] | None,
) -> RunRow:
    folder = run_folder(experiment, setting, plan, seed)
    config = Config.load(RunFolder(folder).config)
    return RunRow(
        experiment=experiment.name,
        scale=plan.scale.name,
        setting=setting.name,
        seed=seed,
        steps=config.training.steps,
        minibatch=config.training.batch_size,
        extractor=setting.extractor,
        flags=flags,
        network=judge.network.label,
        is_inception=judge.network.is_inception,
        samples=plan.samples,
        real=len(judge.real),
        metrics=judge(folder),
        curve=_curve(RunFolder(folder)),
        seconds=usage.seconds,
        smoke=plan.smoke,
        cpu_seconds=usage.cpu_seconds,
        searched=searched,
        searched_by=None if searched is None else judged_by(plan.scale),
        trial_steps=None if searched is None else steps_of(experiment, plan, trial=True),
        settings=settings_digest(flags),
        **plan.machine,
        environment=environment(plan.device),
    )


def _curve(run: RunFolder) -> list[dict[str, float]]:
    points: list[dict[str, float]] = []
    since: list[dict[str, Any]] = []
    for entry in run.read_metrics():
        since.append(entry)
        evaluation = entry.get("evaluation")
        if evaluation is None:
            continue
        means = {key: float(np.mean([logged[key] for logged in since])) for key in ("loss", "difference_norm")}
        numbers = {key: value for key, value in evaluation.items() if isinstance(value, float)}
        points.append({"step": entry["step"], **means, **numbers})
        since = []
    return points
