"""`--experiment methods`: every method of the engine under one budget, judged by what no method was trained on.

The budget is seconds of training: CPU seconds, or on a GPU seconds by the clock. That is what a user pays for a
method. Steps and generated images count something else in every family: a step may train a critic five times, draw a
pool of samples, or reconstruct and draw nothing. How many steps the budget buys is found by a short run of the
method before. Pretraining of the extractor, and what a command does before its first step, are not counted.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.commands import Result, RunFailed, Usage, in_turn
from bench.methods import RUNS, SAMPLES, MethodRow, judged, pretrain
from bench.paper.cost import Span, seconds_per_step
from bench.paper.experiments import SMALL, Scale
from bench.paper.runs import ExperimentPlan, check_device, pretrained
from bench.paper.training import check_kept, check_same, configured, settings_digest, train
from bench.rows import read_json, save_figure
from engine.configuration.config import Config
from engine.configuration.inputs import load_run_sampler, open_data
from engine.configuration.methods import COMPARING
from engine.configuration.updates import all_of
from engine.evaluation.judges import EvaluationNetwork, evaluation_network
from engine.representation.zoo import brings_weights
from engine.support.errors import InputError
from engine.support.files import write_atomically
from engine.support.pixels import grid
from engine.training.run_folder import RunFolder

NAME = "methods"
NO_GAME, GAME, SUPERVISED = "no adversarial training", "adversarial", "supervised"
"""The groups of the paper's Table 4. Methods that learn codes are in the first, but for the ones with a critic."""
_ADVERSARIAL_CODES = ("wae-gan",)
_SKIPPED, _COUNTED, _STAGED = 5, 20, 90
"""Steps of the run that finds out what a step costs: those at first, which compile kernels, those that are timed, and
all of a method with stages."""
_WARMUPS, _PERIODS = ("critic_warmup",), ("critic_every", "moment_every", "pool_every")
"""Settings that say how many steps at first, or from one to another, are not like others."""
_STAGES = {"gmmn-ae": "autoencoder_steps", "glann": "glo_steps"}
"""Methods whose training has a first stage, and the setting that says how long it is."""
_SHOWN = 20
"""Samples of each method in the figure."""
Rows = dict[tuple[str, int | None], MethodRow]


def runs(plan: ExperimentPlan) -> dict[str, tuple[str, ...]]:
    """`runs_of` the plan's scale."""
    return runs_of(plan.scale)


def runs_of(scale: Scale) -> dict[str, tuple[str, ...]]:
    """Name → flags of `engine.train` that say the method, all those that the data set allows."""
    found = {
        **RUNS["comparing"],
        **RUNS["codes"],
        "mm-gan": ("--preset", "dcgan", "--game", "minimax"),
        **RUNS["critics"],
    }
    if scale.classes is not None:
        found["improved-gan-labels"] = ("--preset", "improved-gan", "--classes", str(scale.classes))
    return found


def group(name: str) -> str:
    """Of the paper's Table 4."""
    if name == "improved-gan-labels":
        return SUPERVISED
    codes = name in RUNS["codes"] and name not in _ADVERSARIAL_CODES
    return NO_GAME if codes or name in RUNS["comparing"] else GAME


def chosen_runs(plan: ExperimentPlan) -> dict[str, tuple[str, ...]]:
    """Those of `runs` that `--only` names; InputError for another name."""
    found = runs(plan)
    if unknown := [name for name in plan.only if name not in found]:
        raise InputError("only", f"{unknown[0]} is none of the methods ({', '.join(found)})")
    return {name: flags for name, flags in found.items() if not plan.only or name in plan.only}


def budget(plan: ExperimentPlan) -> int:
    """Seconds of training for each method."""
    return plan.scale.budget


def compare(plan: ExperimentPlan, seconds: int, failures: list[str], kept: Rows) -> Generator[MethodRow, None, None]:
    """A row for each method and seed, seed by seed, so that an early end leaves whole comparisons.

    A run that has a row in `kept` is not run again, and other seeds of its method take as many steps as it has; so
    several machines can share the seeds. InputError if a row is of other settings. What fails, as a method that
    diverges, is noted in `failures`, and the others go on.
    """
    chosen = chosen_runs(plan)
    known = {name: _kept_steps(name, plan, kept) for name in chosen}
    runs_left = [(name, seed) for seed in plan.seeds for name in chosen if (name, seed) not in kept]
    chosen = {name: flags for name, flags in chosen.items() if any(name == left for left, _ in runs_left)}
    if not chosen:
        return
    if plan.scale.name == SMALL:  # each seed learns a network of its own
        pretrain(sorted({seed for name, seed in runs_left if _pretrained(name, plan)}))
    else:
        for name in chosen:
            _weights(name, plan)
    if plan.jobs > 1:  # the first that opens the data set may download and unpack it: none beside it
        open_data(configured(training_flags(next(iter(chosen)), plan, 0, 10)))
    steps = {name: count for name, count in known.items() if count is not None}
    if plan.smoke:
        steps = dict.fromkeys(chosen, 3)
    if unknown := [name for name in chosen if name not in steps]:
        for name, cost in zip(unknown, in_turn(lambda name: _tried(step_cost, name, plan), unknown, plan.jobs)):
            if isinstance(cost, RunFailed):
                _note(failures, f"{name}: {cost}")
            else:
                steps[name] = steps_for(seconds, cost)
    wanted = [(name, seed) for name, seed in runs_left if name in steps]

    def flags_of(name: str, seed: int) -> list[str]:
        return training_flags(name, plan, seed, steps[name])

    def trained(run: tuple[str, int]) -> MethodRow | Usage | RunFailed:
        folder, flags = run_folder(*run, plan), flags_of(*run)
        if (folder / "row.json").exists():
            row = MethodRow(**json.loads((folder / "row.json").read_text()))
            check_same(folder, (row.flags, row.settings), (" ".join(flags), settings_digest(flags)))
            return row
        return _tried(train, flags, folder, plan.threads)

    network: EvaluationNetwork | None = None
    with (
        tempfile.TemporaryDirectory() as real_features,
        contextlib.closing(in_turn(trained, wanted, plan.jobs)) as all_found,
    ):
        for (name, seed), found in zip(wanted, all_found):
            if isinstance(found, MethodRow):
                yield found
                continue
            if isinstance(found, RunFailed):
                _note(failures, f"{name}, seed {seed}: {found}")
                continue
            folder = run_folder(name, seed, plan)
            if network is None:
                size = Config.load(RunFolder(folder).config).data.image_size
                network = evaluation_network(plan.scale.network, image_size=size)
            row = judged(
                name, flags_of(name, seed), folder, found, network, count=_count(plan), metrics=plan.scale.metrics,
                judge=network.label, scale=plan.scale.name, seed=seed, budget=seconds, smoke=plan.smoke,
                settings=settings_digest(flags_of(name, seed)), preset_steps=_config(name, plan).training.steps,
                real_cache=Path(real_features), **plan.machine,
            )  # fmt: skip
            text = json.dumps(row.as_json(), indent=1) + "\n"
            write_atomically(folder / "row.json", text.encode())
            yield row


def _kept_steps(name: str, plan: ExperimentPlan, kept: Rows) -> int | None:
    """Steps of the method's runs that have rows; None if there are none, InputError for rows of other settings."""
    own = [row for row in kept.values() if row.name == name]
    for row in own:  # in whose digest weights count for nothing
        flags = training_flags(name, plan, row.seed or 0, own[0].steps, weights=())
        check_kept(f"{name}, seed {row.seed}", row.settings, flags)
    return own[0].steps if own else None


def _tried(work: Callable[..., Result], *given: Any) -> Result | RunFailed:
    try:
        return work(*given)
    except RunFailed as error:
        return error


def _note(failures: list[str], failure: str) -> None:
    failures.append(failure)
    print(failure, file=sys.stderr, flush=True)


def _count(plan: ExperimentPlan) -> int:
    """As many samples as there are real digits, or what is usual at the scale."""
    return 64 if plan.smoke else SAMPLES if plan.scale.name == SMALL else plan.scale.samples


def run_folder(name: str, seed: int, plan: ExperimentPlan) -> Path:
    """Of one run, inside the plan's."""
    return _folder(plan) / f"{name}-seed{seed}"


def _folder(plan: ExperimentPlan) -> Path:
    return plan.folder / f"{NAME}-{plan.scale.name}{'-smoke' if plan.smoke else ''}"


def training_flags(
    name: str, plan: ExperimentPlan, seed: int, steps: int, weights: Sequence[Path] | None = None
) -> list[str]:
    """The flags of `engine.train` for one run, all but `--out`.

    Args:
        weights: of the matched networks; None for those of `pretrained`, which are made where they are missing.
    """
    flags = _method_flags(name, plan)
    flags += ["--seed", str(seed), "--steps", str(steps), "--device", plan.device]
    flags += ["--data", plan.data] if plan.data is not None else []
    config = _config(name, plan)
    if name in _STAGES:
        first = steps * config.flat()[_STAGES[name]] // config.training.steps
        flags += [f"--{_STAGES[name].replace('_', '-')}", str(max(first, 1))]
    if (average := config.training.generator_ema) and steps < config.training.steps:
        flags += ["--generator-ema", _same_share(all_of(average), config.training.steps / steps)]
    # Few, for a run of minutes; the last samples are written anyway.
    flags += ["--sample-every", str(steps), "--checkpoint-every", str(max(steps // 4, 1))]
    weights = _weights(name, plan) if weights is None else weights
    return [*flags, *(["--weights", *map(str, weights)] if weights else [])]


def _same_share(decays: Sequence[float], shorter: float) -> str:
    """Decays d^s of weights' averages, in a run that is s times shorter: what an average remembers is as much of it.

    A decay of .995 forgets the first weights in the 1,500 steps of a preset; after 200 they would be a third of it.
    """
    return ",".join(f"{decay**shorter:.6g}" for decay in decays)


def _method_flags(name: str, plan: ExperimentPlan) -> list[str]:
    flags = runs(plan)[name]
    return [*flags, *plan.scale.data] if "--preset" in flags else [*plan.scale.flags, *flags]


def _config(name: str, plan: ExperimentPlan) -> Config:
    """What the flags of the method alone say at the scale."""
    return configured(_method_flags(name, plan))


def _weights(name: str, plan: ExperimentPlan) -> list[Path]:
    """Of the networks that are matched; none where the run pretrains them, or nothing is matched."""
    return [] if plan.scale.name == SMALL else [pretrained(network, plan) for network in _pretrained(name, plan)]


def _pretrained(name: str, plan: ExperimentPlan) -> list[str]:
    """The networks that the method matches; none if they bring their weights, or nothing is matched."""
    config = _config(name, plan)
    networks = config.networks.extractor.split("+")
    return [] if config.method.method not in COMPARING or all(map(brings_weights, networks)) else networks


def step_cost(name: str, plan: ExperimentPlan) -> float:
    """Seconds of a training step, kept in the plan's folder.

    InputError if what is kept there is of other flags or settings; RunFailed if the run fails.
    """
    file = _folder(plan) / "costs" / f"{name}.json"
    steps, stages = _stages(name, plan)
    flags = training_flags(name, plan, 0, steps)
    asked = {"flags": flags, "settings": settings_digest(flags), **plan.machine}
    if not file.exists():
        parts = seconds_per_step(flags, [span for _, span in stages], plan.threads)
        seconds = float(np.average(parts, weights=[length for length, _ in stages]))
        write_atomically(file, (json.dumps({**asked, "seconds": seconds}) + "\n").encode())
    known = json.loads(file.read_text())
    check_same(file, {key: known.get(key) for key in asked}, asked)
    found = float(known["seconds"])
    print(f"{name}: {found:.3g} s a step", file=sys.stderr, flush=True)
    return found


def _stages(name: str, plan: ExperimentPlan) -> tuple[int, list[tuple[int, Span]]]:
    """Steps of a run, and of each of its stages: how long it is, and which of its steps are timed."""
    config = _config(name, plan)
    groups = config.groups().values()

    def longest(settings: Sequence[str]) -> int:
        return max(getattr(group, key, None) or 0 for group in groups for key in settings)

    period = max(longest(_PERIODS), 1)
    if name not in _STAGES:
        span = Span(max(_SKIPPED, longest(_WARMUPS)), -(-_COUNTED // period) * period)
        return max(config.training.steps, span.skipped + span.counted), [(config.training.steps, span)]
    first = _STAGED * config.flat()[_STAGES[name]] // config.training.steps
    stages = []
    for length in (first, _STAGED - first):
        count = length - _SKIPPED
        stages.append((length, Span(_SKIPPED, count // period * period or count)))
    return _STAGED, stages


def steps_for(seconds: float, cost: float) -> int:
    """How many steps of `cost` seconds the budget of `seconds` buys, in tens, and at least 10."""
    return max(int(seconds / cost) // 10, 1) * 10


def are_rows(path: Path) -> bool:
    """Whether the file holds rows of this comparison."""
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return bool(entries) and isinstance(entries, list) and all("budget" in entry for entry in entries)


def read_rows(path: Path, *, smoke: bool = False) -> list[MethodRow]:
    """The rows that `--json` wrote; InputError that names the file if it is something else, or of a `smoke` run that it
    should not be of, or the reverse."""
    try:
        found = read_json(path, MethodRow)
    except (OSError, TypeError, ValueError) as error:
        raise InputError(f"{path}: does not hold rows of bench.paper ({error})") from None
    if not found or any(row.budget is None or row.seed is None for row in found):
        raise InputError(f"{path}: does not hold rows of bench.paper")
    if any(bool(row.smoke) != smoke for row in found):
        raise InputError(f"{path}: comes from a --smoke run, whose numbers are not reported" if not smoke else
                         f"{path}: has rows that are no --smoke run's; give another file")  # fmt: skip
    return found


def kept_rows(file: Path | None, plan: ExperimentPlan, seconds: int) -> Rows:
    """Those in `file`, by name and seed; InputError if they are of another scale or budget."""
    if file is None or not file.is_file() or not file.stat().st_size:
        return {}
    found = read_rows(file, smoke=plan.smoke)
    for row in found:
        if (row.scale, row.budget) != (plan.scale.name, seconds):
            raise InputError("json", f"{file} has rows of {row.scale} and {row.budget} seconds; give another file")
        check_device(file, row.device, plan)
    return {(row.name, row.seed): row for row in found}


def ordered(rows: Mapping[tuple[str, int | None], MethodRow], plan: ExperimentPlan) -> list[MethodRow]:
    """Method by method, in the order of `runs`."""
    names = list(runs(plan))
    return sorted(
        (row for row in rows.values() if row.name in names), key=lambda row: (names.index(row.name), row.seed)
    )


def draw(path: Path, plan: ExperimentPlan) -> bool:
    """A strip of samples of the first seed of each method that was run in the plan's folder; False if none was."""
    folders = {name: run_folder(name, plan.seeds[0], plan) for name in runs(plan)}
    shown = [name for name, folder in folders.items() if (folder / "row.json").exists()]
    if not shown:
        return False
    figure = Figure(figsize=(9, 0.42 * len(shown) + 0.1), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    for axis, name in zip(np.atleast_1d(figure.subplots(len(shown), 1)), shown):
        picture = grid(load_run_sampler(folders[name]).draw(_SHOWN, seed=0), columns=_SHOWN)
        axis.imshow(picture.permute(1, 2, 0).numpy())
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    save_figure(path, figure)
    return True
