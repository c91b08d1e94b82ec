"""bench.paper's search: who takes part, what is taken, and that finished trials and runs are not trained again."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import command
from sklearn.datasets import load_digits

from bench.commands import Ended, Usage, check, in_turn, run_module
from bench.digit_judge import DigitJudge, edge_level
from bench.paper import runs, training
from bench.paper.__main__ import main
from bench.paper.experiments import EXPERIMENTS, SCALES
from bench.paper.judging import pixel_distance
from bench.paper.page import at_the_edge, searched_table
from bench.paper.runs import ExperimentPlan, RunRow, chosen, run_experiment, steps_of
from bench.paper.search import best, readability
from engine.configuration.presets import PRESETS
from engine.support.errors import InputError

AVERAGING = EXPERIMENTS["averaging"]
SCALE = SCALES["digits"]


def plan_in(folder: Path, **given) -> ExperimentPlan:
    values = {"seeds": (0, 1), "steps": None, "smoke": False, "data": None, "device": "cpu"}
    return ExperimentPlan(scale=SCALE, folder=folder, **{**values, **given})


@pytest.mark.parametrize("scale", SCALES)
def test_every_averager_has_as_many_candidates_and_the_same_generator(scale: str) -> None:
    settings = AVERAGING.settings(SCALES[scale])
    assert {name.rpartition(", ")[2] for name in (setting.name for setting in settings)} == {"16", "64", "256"}
    assert len(settings) == 15
    for setting in settings:
        assert len(set(setting.candidates)) == 6
        flags = [dict(zip(candidate[::2], candidate[1::2])) for candidate in setting.candidates]
        counts = {flag: len({candidate[flag] for candidate in flags}) for flag in flags[0]}
        own = sum(flag not in ("--lr", "--beta2") for flag in counts)  # one, but for "none"
        assert (counts["--lr"], counts["--beta2"]) == ((1, 2) if own else (3, 2))
        assert all(count == 3 for flag, count in counts.items() if flag not in ("--lr", "--beta2"))
        assert setting.flags[setting.flags.index("--upsampling") + 1] == "transposed"
    assert AVERAGING.small_steps >= 4000


def test_a_trial_is_a_quarter(tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    assert (steps_of(AVERAGING, plan), steps_of(AVERAGING, plan, trial=True)) == (4000, 1000)
    assert steps_of(AVERAGING, plan_in(tmp_path, steps=30), trial=True) == 7


def test_the_best_has_the_largest_finite_score() -> None:
    scores = {"--lr 1": None, "--lr 2": 0.2, "--lr 3 --beta2 .9": 0.7, "--lr 4": 0.7, "--lr 5": -1.0}
    entries = [{"flags": flags, "score": score} for flags, score in scores.items()]
    assert best(entries) == ("--lr", "3", "--beta2", ".9")
    with pytest.raises(InputError, match="not finite"):
        best(entries[:1])


def test_readability_wants_all_ten_digits() -> None:
    pixels, classes = load_digits(return_X_y=True)
    images = np.zeros((len(pixels), 32, 32, 3), dtype=np.uint8)
    images[:, 4:28, 4:28] = np.kron(pixels.reshape(-1, 8, 8), np.ones((3, 3)))[..., None] * (255 / 16)
    judge = DigitJudge()
    assert readability(judge, images) > 0.95
    alone = readability(judge, images[classes == 0])
    assert 0 < alone < 0.11  # 1 − ½ (.9 + 9 · .1)


def test_the_edge_is_the_outermost_ring() -> None:
    images = np.zeros((2, 5, 4, 3), dtype=np.uint8)
    images[:, 1:-1, 1:-1] = 200
    assert edge_level(images) == 0
    images[0, 0, 0] = 140  # one of 14 places, in one of two images
    assert edge_level(images) == pytest.approx(140 / 14 / 2)


def test_distance_of_pixels_in_closed_form() -> None:
    black, white = torch.zeros(3, 3, 4, 4, dtype=torch.uint8), torch.full((5, 3, 4, 4), 255, dtype=torch.uint8)
    assert pixel_distance(black, white) == pytest.approx(2, abs=1e-5)
    mixed = torch.cat((black[:2], white[:2]))
    # Half of either against black: 2 · ½ − ½ − 0.
    assert pixel_distance(mixed, black) == pytest.approx(0.5, abs=1e-5)


def test_only_names_settings_or_parts() -> None:
    settings = AVERAGING.settings(SCALE)
    assert [setting.name for setting in chosen(settings, ["AMA", "none, 16"])] == [
        "none, 16", "AMA, 16", "AMA, 64", "AMA, 256",
    ]  # fmt: skip
    assert len(chosen(settings, ["64"])) == 5
    assert chosen(settings, []) == list(settings)
    with pytest.raises(InputError, match="32 is no setting"):
        chosen(settings, ["64", "32"])


class Engine:
    """Stands for `python -m engine.train` and the judges: notes the flags, and makes what is looked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trained: list[list[str]] = []
        self.status = 0
        self.diverges: tuple[str, ...] = ()
        monkeypatch.setattr(training, "run_module", self.run)
        monkeypatch.setattr(runs, "pretrained", lambda name, plan: Path(name))
        monkeypatch.setattr(runs, "scorer", lambda *_: self.score)
        monkeypatch.setattr(runs, "Judge", lambda *_: None)
        monkeypatch.setattr(runs.Config, "load", lambda *_: None)
        monkeypatch.setattr(runs, "_row", self.row)

    def run(self, module: str, flags: list[str], threads: int | None = None) -> Ended:
        assert module == "engine.train"
        self.trained.append(flags)
        folder = Path(flags[flags.index("--out") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        if "--resume" not in flags:
            (folder / "config.json").write_text(json.dumps(flags))
        status = 2 if self.diverges and set(self.diverges) <= set(flags) else self.status
        return Ended(Usage(1.0, 2.0, 3.0), status, "it burned")

    def score(self, folder: Path) -> float:
        flags = json.loads((folder / "config.json").read_text())
        return {"0.1": 0.9}.get(flags[flags.index("--ma-alpha") + 1], 0.5) + 0.01 * ("0.999" in flags)

    def row(self, experiment, setting, plan, seed, flags, usage, judge, searched) -> RunRow:
        return RunRow(
            experiment=experiment.name, scale=plan.scale.name, setting=setting.name, seed=seed, steps=4000,
            minibatch=64, extractor="", flags=flags, network="", is_inception=False, samples=1, real=1,
            metrics={"kernel_distance": 0.1, "frechet_distance": 0.2}, curve=[], seconds=usage.seconds,
            smoke=plan.smoke, cpu_seconds=usage.cpu_seconds, searched=searched, searched_by="the eye", trial_steps=1000,
            settings=training.settings_digest(flags),
        )  # fmt: skip


@pytest.mark.parametrize("jobs", [1, 3])
def test_runs_take_what_the_trials_found(jobs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch)
    plan = plan_in(tmp_path, only=("MA, 64",), jobs=jobs)
    failures: list[str] = []
    rows = list(run_experiment(AVERAGING, plan, failures, {}))
    assert not failures
    assert len(engine.trained) == 6 + 2
    trials, long = [flags for flags in engine.trained if "1000" in flags], [f for f in engine.trained if "4000" in f]
    assert (len(trials), len(long)) == (6, 2)
    assert all(flags[flags.index("--seed") + 1] == "1000" for flags in trials)
    assert sorted(flags[flags.index("--seed") + 1] for flags in long) == ["0", "1"]
    for flags in long:
        assert flags[flags.index("--ma-alpha") + 1] == "0.1"
    assert [row.seed for row in rows] == [0, 1]
    assert [len(row.searched or ()) for row in rows] == [6, 6]
    table = searched_table(rows)
    assert "| MA, 64 | `--lr 1e-3 --ma-alpha 0.1 --beta2 0.999` |" in table
    assert "`--lr 1e-3 --ma-alpha 0.03 --beta2 0.9` 0.5" in table
    assert at_the_edge(rows) == ""
    again = list(run_experiment(AVERAGING, plan, failures, {}))
    assert len(engine.trained) == 8
    assert [row.as_json() for row in again] == [row.as_json() for row in rows]
    for entry in rows[0].searched or ():
        entry["score"] = 0.99 if "0.03" in entry["flags"] else 0.5
    assert at_the_edge(rows[:1]) == "MA, 64 (`--ma-alpha 0.03`)"  # one of two β2 is always at an edge


def test_what_diverges_is_told_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch)
    plan = plan_in(tmp_path, only=("MA, 64",))
    engine.diverges = ("0.1", "0.999", "1000")  # what would be the best trial
    failures: list[str] = []
    rows = list(run_experiment(AVERAGING, plan, failures, {}))
    assert not failures
    assert [row.flags[row.flags.index("--ma-alpha") + 1] for row in rows] == ["0.1", "0.1"]
    assert [row.flags[row.flags.index("--beta2") + 1] for row in rows] == ["0.9", "0.9"]
    (failed,) = (entry for entry in rows[0].searched or () if entry["score"] is None)
    assert failed["flags"] == "--lr 1e-3 --ma-alpha 0.1 --beta2 0.999"
    assert failed["message"].endswith("python -m engine.train failed: it burned")
    assert "`--lr 1e-3 --ma-alpha 0.1 --beta2 0.999` failed" in searched_table(rows)
    count = len(engine.trained)
    list(run_experiment(AVERAGING, plan, failures, {}))
    assert len(engine.trained) == count  # not even the trial that failed
    engine.diverges = ("--seed", "0")
    rows = list(run_experiment(AVERAGING, plan_in(tmp_path / "other", only=("MA, 64",)), failures, {}))
    assert [row.seed for row in rows] == [1]
    (failure,) = failures
    assert failure.startswith("MA, 64, seed 0: ")
    assert failure.endswith("failed: it burned")


def test_a_trial_that_was_killed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch)
    engine.status = 137
    plan = plan_in(tmp_path, only=("MA, 64",))
    with pytest.raises(InputError, match=r"MA-64-0: python -m engine\.train failed: it burned"):
        list(run_experiment(AVERAGING, plan, [], {}))
    assert len(engine.trained) == 1
    engine.status = 0
    rows = list(run_experiment(AVERAGING, plan, [], {}))
    assert None not in [entry["score"] for entry in rows[0].searched or ()]
    assert "--resume" in engine.trained[1]


def test_nothing_is_searched_where_every_trial_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch)
    engine.diverges = ("1000", "--ma-alpha")
    failures: list[str] = []
    rows = list(run_experiment(AVERAGING, plan_in(tmp_path, only=("MA, 64",)), failures, {}))
    assert not rows
    assert [failure.split(":")[0] for failure in failures] == ["MA, 64, seed 0", "MA, 64, seed 1"]


def test_a_preset_s_other_values_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Engine(monkeypatch)
    plan = plan_in(tmp_path, only=("MA, 64",), seeds=(0,))
    list(run_experiment(AVERAGING, plan, [], {}))
    training.train(["--steps", "5"], tmp_path / "run")
    monkeypatch.setitem(PRESETS["digits"], "nz", 7)
    assert training.configured(["--steps", "5"]).networks.nz == 7
    for again in (
        lambda: list(run_experiment(AVERAGING, plan, [], {})),
        lambda: training.train(["--steps", "5"], tmp_path / "run"),
    ):
        with pytest.raises(InputError, match="its preset had other values; delete it or give another"):
            again()
    shutil.rmtree(tmp_path / "run")
    training.train(["--steps", "5"], tmp_path / "run")


def test_an_interrupted_run_goes_on_and_its_pieces_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch)
    folder = tmp_path / "run"
    engine.status = 130
    with pytest.raises(KeyboardInterrupt):
        training.train(["--steps", "5"], folder)
    engine.status = 0
    assert training.train(["--steps", "5"], folder) == Usage(2.0, 4.0, 3.0)
    assert engine.trained == [
        ["--steps", "5", "--out", str(folder)],
        ["--resume", "--steps", "5", "--out", str(folder)],
    ]
    assert training.train(["--steps", "5"], folder) == Usage(2.0, 4.0, 3.0)
    assert len(engine.trained) == 2
    with pytest.raises(InputError, match="other flags") as error:
        training.train(["--steps", "6"], folder)
    assert error.value.argument == "runs"
    engine.status = 2
    with pytest.raises(InputError, match="failed: it burned"):
        training.train(["--steps", "5"], tmp_path / "other")


def test_what_a_killed_piece_used_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch)

    def killed(*_, **__) -> Ended:
        (tmp_path / "run").mkdir()
        raise SystemExit  # this process, too: nothing is written any more

    monkeypatch.setattr(training, "run_module", killed)
    with pytest.raises(SystemExit):
        training.train(["--steps", "5"], tmp_path / "run")
    monkeypatch.setattr(training, "run_module", engine.run)
    assert training.train(["--steps", "5"], tmp_path / "run") == Usage(1.0, None, 3.0)


def test_rows_of_other_invocations_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Engine(monkeypatch)
    monkeypatch.setattr("bench.paper.__main__.draw", lambda *_: None)
    file = tmp_path / "rows.json"
    argv = ["--experiment", "averaging", "--device", "cpu", "--runs", str(tmp_path), "--json", str(file)]
    for more in (["MA, 256"], ["MA, 16"]):
        main([*argv, "--seeds", "1", "--only", *more])
    main([*argv, "--seeds", "2", "--only", "MA, 16"])
    shown = [(entry["setting"], entry["seed"]) for entry in json.loads(file.read_text())]
    assert shown == [("MA, 16", 0), ("MA, 256", 0), ("MA, 16", 1)]
    code, text = command(main, [*argv, "--steps", "9", "--only", "MA, 16"], capsys)
    assert code == 2
    assert "--json: " in text
    assert "4000 steps; give another file" in text


def test_what_was_found_serves_other_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also on another machine, where there is nothing but the rows."""
    engine = Engine(monkeypatch)
    monkeypatch.setattr("bench.paper.__main__.draw", lambda *_: None)
    file = tmp_path / "rows.json"
    argv = ["--experiment", "averaging", "--device", "cpu", "--only", "MA, 16", "--json", str(file), "--runs"]
    main([*argv, str(tmp_path / "one"), "--seeds", "1"])
    assert len(engine.trained) == 6 + 1
    main([*argv, str(tmp_path / "other"), "--seeds", "2"])
    assert len(engine.trained) == 6 + 2
    first, second = json.loads(file.read_text())
    assert first["searched"] == second["searched"]
    assert "--amp" not in first["flags"]
    main([*argv, str(tmp_path / "third"), "--seeds", "2"])
    assert len(engine.trained) == 8
    file.write_text(json.dumps([first, {**second, "settings": "another"}]))
    code, text = command(main, [*argv, str(tmp_path / "third"), "--seeds", "3"], capsys)
    assert code == 2
    assert "--json: its row of MA, 16, seed 1 is of other settings" in text


def test_a_process_tells_what_it_used_and_why_it_failed() -> None:
    ended = run_module("timeit", ["-n", "1", "-r", "1", "sum(range(10**6))"], threads=1)
    assert ended.status == 0
    assert ended.usage.cpu_seconds > 0
    assert ended.usage.mebibytes > 1
    failed = run_module("no_such_module", [])
    assert failed.status == 1
    with pytest.raises(InputError, match=r"^that failed: .*No module named no_such_module$"):
        check(failed, "that")


def test_in_turn_keeps_the_order_and_ends_at_the_first_failure() -> None:
    assert list(in_turn(lambda x: x * x, range(20), 4)) == [x * x for x in range(20)]
    begun: list[int] = []

    def work(x: int) -> int:
        begun.append(x)
        if x == 1:
            raise InputError("no")
        time.sleep(0.01)
        return x

    for jobs in (1, 2):
        begun.clear()
        with pytest.raises(InputError, match="no"):
            list(in_turn(work, range(200), jobs))
        assert len(begun) < 200
