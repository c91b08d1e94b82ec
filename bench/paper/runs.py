"""Running an experiment: training runs as anybody would start them, and their samples judged."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.paper.experiments import SMALL, Experiment, ExperimentSetting, Scale
from bench.rows import Row, environment
from engine.configuration.config import Config
from engine.configuration.inputs import load_run_sampler, open_data
from engine.evaluation.judges import EvaluationNetwork, evaluation_network
from engine.evaluation.metrics import KID_SUBSET, compute_metrics
from engine.support.errors import InputError
from engine.support.files import write_atomically
from engine.training.run_folder import RunFolder
from pipelines import read_pixels


@dataclass(frozen=True)
class RunRow(Row):
    """One training run and what its samples are worth.

    Attributes:
        metrics: of the samples at the end, as `engine.evaluation.metrics.compute_metrics` names them.
        curve: at every evaluation during training its step and metrics, and the mean loss and ‖Δ‖ of the steps that
            were logged since the one before.
        seconds: of training, on the machine of `environment`, whatever else it did.
        smoke: a try of the machinery, whose numbers mean nothing.
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
    """

    scale: Scale
    folder: Path
    seeds: Sequence[int]
    steps: int | None
    smoke: bool
    data: str | None
    device: str

    @property
    def samples(self) -> int:
        """How many samples are judged at the end of a run."""
        return 64 if self.smoke else self.scale.samples


def run_experiment(experiment: Experiment, plan: ExperimentPlan) -> Iterator[RunRow]:
    """All runs of `experiment`, seed by seed, so that an early end leaves whole comparisons."""
    judge: Judge | None = None
    settings = experiment.settings(plan.scale)
    for seed in plan.seeds:
        for setting in settings:
            weights = [pretrained(name, plan) for name in setting.extractor.split("+")]
            flags = training_flags(experiment, setting, plan, seed, weights)
            folder = run_folder(experiment, setting, plan, seed)
            done = folder / "row.json"
            if done.exists():
                row = RunRow(**json.loads(done.read_text()))
                if row.flags == flags:
                    yield row
                    continue
                raise InputError(f"--runs: {folder} was run with other flags; delete it or choose another folder")
            seconds = _train(flags, folder)
            judge = judge or Judge(plan, Config.load(RunFolder(folder).config))
            row = _row(experiment, setting, plan, seed, flags, folder, seconds, judge)
            write_atomically(done, (json.dumps(row.as_json(), indent=1) + "\n").encode())
            yield row


class Judge:
    """The evaluating network and the real images, which all runs of a scale share."""

    def __init__(self, plan: ExperimentPlan, config: Config):
        self.plan = plan
        size = config.data.image_size
        self.network: EvaluationNetwork = evaluation_network(plan.scale.network, image_size=size)
        real = read_pixels(open_data(config))
        self.real: Tensor = real[:200] if plan.smoke else real
        self.device = torch.device(plan.device)

    def __call__(self, folder: Path) -> dict[str, float]:
        """Metrics of samples of the run in `folder`, of the same z for every run."""
        samples = load_run_sampler(folder).to(self.device).draw_pixels(self.plan.samples, seed=0)
        subset = min(KID_SUBSET, len(samples), len(self.real))
        return compute_metrics(
            samples, self.real, self.network, self.plan.scale.metrics, device=self.device, kid_subset_size=subset
        )


def pretrained(name: str, plan: ExperimentPlan) -> Path:
    """Weights of the network `name`, trained on the scale's data set once for all experiments and seeds."""
    path = plan.folder / "weights" / f"{name}{'-smoke' if plan.smoke else ''}.safetensors"
    if path.exists():
        return path
    task = "autoencode" if name == "dcgan-encoder" else "classify"
    if plan.scale.name in ("stl10", "celeba64") and task == "classify":
        task = "rotate"  # their images have no labels
    flags = ["--preset", plan.scale.name, "--task", task, "--arch", name, *_machine(plan)]
    if plan.scale.name == SMALL and name != "vgg-small":
        flags += ["--steps", "120", "--amp"]
    if plan.smoke:
        flags += ["--steps", "2"]
    partial = path.with_name(path.name + ".checkpoint").exists()
    _run("engine.pretrain", [*flags, "--out", str(path), *(["--resume"] if partial else [])], path)
    return path


def _machine(plan: ExperimentPlan) -> list[str]:
    return ["--device", plan.device, *(["--data", plan.data] if plan.data is not None else [])]


def _steps(experiment: Experiment, plan: ExperimentPlan) -> int:
    if plan.smoke:
        return 3
    small = experiment.small_steps if plan.scale.name == SMALL else None
    return plan.steps or small or Config.build(plan.scale.name, {}).training.steps


def training_flags(
    experiment: Experiment, setting: ExperimentSetting, plan: ExperimentPlan, seed: int, weights: Sequence[Path]
) -> list[str]:
    """The flags of `engine.train` for one run, all but `--out`."""
    steps = _steps(experiment, plan)
    flags = ["--preset", plan.scale.name, "--extractor", setting.extractor, "--amp", *setting.flags]
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
    name = setting.name.replace(", ", "-").replace(" ", "-")
    kind = f"{experiment.name}-{plan.scale.name}{'-smoke' if plan.smoke else ''}"
    return plan.folder / kind / f"{name}-seed{seed}"


def _train(flags: Sequence[str], folder: Path) -> float:
    """Seconds of training, resumed if it was interrupted."""
    run = RunFolder(folder)
    resumed = run.config.exists()
    begun = time.perf_counter()
    if resumed:
        steps = flags[list(flags).index("--steps") + 1]
        _run("engine.train", ["--resume", "--out", str(folder), "--steps", steps], folder)
    else:
        _run("engine.train", [*flags, "--out", str(folder)], folder)
    return time.perf_counter() - begun


def _run(module: str, flags: Sequence[str], what: Path) -> None:
    print(f"python -m {module} {' '.join(flags)}", file=sys.stderr, flush=True)
    result = subprocess.run([sys.executable, "-m", module, *flags], stderr=subprocess.PIPE, text=True)
    if result.returncode == 130:
        raise KeyboardInterrupt
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"{what}: python -m {module} failed: {last}")


def _row(
    experiment: Experiment,
    setting: ExperimentSetting,
    plan: ExperimentPlan,
    seed: int,
    flags: list[str],
    folder: Path,
    seconds: float,
    judge: Judge,
) -> RunRow:
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
        seconds=seconds,
        smoke=plan.smoke,
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
