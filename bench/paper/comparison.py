"""`--experiment methods`: every method of the engine under one budget, judged by what no method was trained on.

The budget is seconds of training: CPU seconds, or on a GPU seconds by the clock. That is what a method costs whoever
uses it. Steps and generated images count something else in every family: a step may train a critic five times, draw a
pool of samples, or reconstruct and draw nothing. How many steps the budget buys is found by two short runs of the
method before. Pretraining of the extractor, and what a command does before its first step, are not counted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.commands import Usage, in_turn
from bench.methods import RUNS, SAMPLES, MethodRow, judged, pretrain
from bench.paper.experiments import SMALL
from bench.paper.runs import ExperimentPlan, pretrained
from bench.paper.training import train
from bench.rows import read_json, save_figure
from engine.configuration.config import Config
from engine.configuration.inputs import load_run_sampler
from engine.configuration.methods import COMPARING
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
_WARM, _FEW, _MORE = 2, 20, 80
"""Steps of the runs that find out what a step costs: the first compiles kernels, the others' difference counts."""
_STAGES = {"gmmn-ae": "autoencoder_steps", "glann": "glo_steps"}
"""Methods whose training has a first stage, and the setting that says how long it is."""
_SHOWN = 20
"""Samples of each method in the figure."""


def runs(plan: ExperimentPlan) -> dict[str, tuple[str, ...]]:
    """Name → flags of `engine.train` that say the method, all those that the data set allows."""
    found = {
        **RUNS["comparing"],
        **RUNS["codes"],
        "mm-gan": ("--preset", "dcgan", "--game", "minimax"),
        **RUNS["critics"],
    }
    if plan.scale.classes is not None:
        found["improved-gan-labels"] = ("--preset", "improved-gan", "--classes", str(plan.scale.classes))
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


def compare(plan: ExperimentPlan, seconds: int) -> Iterator[MethodRow]:
    """A row for each method and seed, seed by seed, so that an early end leaves whole comparisons."""
    chosen = chosen_runs(plan)
    if plan.scale.name == SMALL:
        pretrain()
    else:
        for name in chosen:
            _weights(name, plan)
    costs: dict[str, float] = {}
    if not plan.smoke:
        costs = dict(zip(chosen, in_turn(lambda name: step_cost(name, plan), chosen, plan.jobs)))
    wanted = [(name, seed) for seed in plan.seeds for name in chosen]

    def flags_of(name: str, seed: int) -> list[str]:
        steps = 3 if plan.smoke else steps_for(seconds, costs[name])
        return training_flags(name, plan, seed, steps)

    def trained(run: tuple[str, int]) -> MethodRow | Usage:
        folder = run_folder(*run, plan)
        done = folder.with_name(folder.name + ".row.json")
        if done.exists():
            row = MethodRow(**json.loads(done.read_text()))
            if row.flags != " ".join(flags_of(*run)):
                raise InputError("runs", f"{folder} was run with other flags; delete it or choose another folder")
            return row
        return train(flags_of(*run), folder, plan.threads)

    network: EvaluationNetwork | None = None
    for (name, seed), found in zip(wanted, in_turn(trained, wanted, plan.jobs)):
        if isinstance(found, MethodRow):
            yield found
            continue
        folder = run_folder(name, seed, plan)
        if network is None:
            size = Config.load(RunFolder(folder).config).data.image_size
            network = evaluation_network(plan.scale.network, image_size=size)
        row = judged(
            name, flags_of(name, seed), folder, found, network, count=_count(plan), metrics=plan.scale.metrics,
            judge=network.label, scale=plan.scale.name, seed=seed, budget=seconds, smoke=plan.smoke,
        )  # fmt: skip
        text = json.dumps(row.as_json(), indent=1) + "\n"
        write_atomically(folder.with_name(folder.name + ".row.json"), text.encode())
        yield row


def _count(plan: ExperimentPlan) -> int:
    """As many samples as there are real digits, or what is usual at the scale."""
    return 64 if plan.smoke else SAMPLES if plan.scale.name == SMALL else plan.scale.samples


def run_folder(name: str, seed: int, plan: ExperimentPlan) -> Path:
    """Of one run, inside the plan's."""
    return _folder(plan) / f"{name}-seed{seed}"


def _folder(plan: ExperimentPlan) -> Path:
    return plan.folder / f"{NAME}-{plan.scale.name}{'-smoke' if plan.smoke else ''}"


def training_flags(name: str, plan: ExperimentPlan, seed: int, steps: int) -> list[str]:
    """The flags of `engine.train` for one run, all but `--out`."""
    flags = _method_flags(name, plan)
    flags += ["--seed", str(seed), "--steps", str(steps), "--device", plan.device]
    flags += ["--data", plan.data] if plan.data is not None else []
    if name in _STAGES:
        values = _config(name, plan).flat()
        first = steps * values[_STAGES[name]] // values["steps"]
        flags += [f"--{_STAGES[name].replace('_', '-')}", str(max(first, 1))]
    # Neither costs anything before the end, where both are written anyway.
    flags += ["--sample-every", str(steps), "--checkpoint-every", str(max(steps // 4, 1))]
    weights = _weights(name, plan)
    return [*flags, *(["--weights", *map(str, weights)] if weights else [])]


def _method_flags(name: str, plan: ExperimentPlan) -> list[str]:
    flags = runs(plan)[name]
    return [*flags, *plan.scale.data] if "--preset" in flags else [*plan.scale.flags, *flags]


def _config(name: str, plan: ExperimentPlan) -> Config:
    """What the flags of the method alone say at the scale."""
    # Here, because the front door imports all settings' flags.
    from engine.configuration.flags import given_flags
    from engine.train import parser

    arguments = parser().parse_args(_method_flags(name, plan))
    return Config.build(arguments.preset, given_flags(arguments))


def _weights(name: str, plan: ExperimentPlan) -> list[Path]:
    """Of the networks that are matched; none where the preset pretrains them, or nothing is matched."""
    if plan.scale.name == SMALL:
        return []
    config = _config(name, plan)
    networks = config.networks.extractor.split("+")
    if config.method.method not in COMPARING or all(map(brings_weights, networks)):
        return []
    return [pretrained(network, plan) for network in networks]


def step_cost(name: str, plan: ExperimentPlan) -> float:
    """Seconds of a training step: from the difference of two short runs, kept in the plan's folder."""
    file = _folder(plan) / "costs" / f"{name}.json"
    if not file.exists():
        used = []
        for steps in (_WARM, _FEW, _MORE):
            folder = file.with_name(f"{name}-{steps}")
            used.append(train(training_flags(name, plan, 0, steps), folder, plan.threads))
        few, more = (usage.cpu_seconds if plan.device == "cpu" else usage.seconds for usage in used[1:])
        write_atomically(file, (json.dumps({"seconds": (more - few) / (_MORE - _FEW)}) + "\n").encode())
    found = float(json.loads(file.read_text())["seconds"])
    if found <= 0:
        raise InputError(f"{file}: a step took no time, as other work disturbed the measurement; delete {file.parent}")
    print(f"{name}: {found:.3g} s a step", file=sys.stderr, flush=True)
    return found


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


Rows = dict[tuple[str, int | None], MethodRow]


def kept_rows(file: Path | None, plan: ExperimentPlan, seconds: int) -> Rows:
    """Those in `file`, by name and seed; InputError if they are of another scale or budget."""
    if file is None or not file.is_file() or not file.stat().st_size:
        return {}
    found = read_rows(file, smoke=plan.smoke)
    for row in found:
        if (row.scale, row.budget) != (plan.scale.name, seconds):
            raise InputError("json", f"{file} has rows of {row.scale} and {row.budget} seconds; give another file")
    return {(row.name, row.seed): row for row in found}


def ordered(rows: Mapping[tuple[str, int | None], MethodRow], plan: ExperimentPlan) -> list[MethodRow]:
    """Method by method, in the order of `runs`."""
    names = list(runs(plan))
    return sorted(
        (row for row in rows.values() if row.name in names), key=lambda row: (names.index(row.name), row.seed)
    )


def draw(path: Path, plan: ExperimentPlan, names: Sequence[str] = ()) -> None:
    """A strip of samples of each method's first seed, of those whose runs are there."""
    folders = {name: run_folder(name, plan.seeds[0], plan) for name in names or runs(plan)}
    shown = [name for name, folder in folders.items() if RunFolder(folder).generator.exists()]
    figure = Figure(figsize=(9, 0.42 * len(shown) + 0.1), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    for axis, name in zip(np.atleast_1d(figure.subplots(len(shown), 1)), shown):
        picture = grid(load_run_sampler(folders[name]).draw(_SHOWN, seed=0), columns=_SHOWN)
        axis.imshow(picture.permute(1, 2, 0).numpy())
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    save_figure(path, figure)
