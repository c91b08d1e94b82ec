"""bench.toy: verdicts and distances that are known, learners that learn, and a command that ends in files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.integrate import solve_ivp

from bench.pages import toys
from bench.pages.regions import Results
from bench.toy import dirac, distances, learners, networks, witness
from bench.toy.__main__ import PARTS, Workshop, main
from bench.toy.dirac import ADDITIONS, Duel, judge, known_eigenvalue, trajectory
from bench.toy.planes import PARTS as MODES
from bench.toy.planes import PLANES
from bench.toy.planes import judge as judge_points
from engine.comparison.games.penalties.weights import Clip
from engine.configuration.command import run_command


@pytest.mark.parametrize(
    ("game", "addition", "update", "verdict"),
    [
        ("minimax", "nothing", "in turns", "circles"),
        ("wasserstein", "nothing", "in turns", "circles"),
        ("wasserstein", "nothing", "at once", "diverges"),
        ("wasserstein", "clip", "in turns", "circles"),
        ("wasserstein", "gradient", "in turns", "circles"),
        ("nonsaturating", "r1", "in turns", "converges"),
        ("minimax", "noise", "in turns", "converges"),
        ("minimax", "consensus", "in turns", "converges"),
        ("mmd", "scaled", "10 critic steps", "converges"),
    ],
    ids=str,
)
def test_verdicts_that_are_known(game: str, addition: str, update: str, verdict: str) -> None:
    steps = 40 if update.endswith("critic steps") else 450
    row, path = dirac.measure(game, addition, update, steps)
    assert row.verdict == verdict
    assert len(path) == row.steps + 1
    if row.known is not None:
        assert (row.known == "converges") == (verdict == "converges")
    if row.known == "converges":
        assert row.decay == pytest.approx(row.known_decay, rel=0.1)


@pytest.mark.parametrize("addition", ["nothing", "r1", "noise", "consensus"])
def test_known_eigenvalues_are_the_field_s(addition: str) -> None:
    """Of the field's derivative at 0 by central differences."""
    duel, step = Duel("nonsaturating", ADDITIONS[addition]), 1e-5

    def field(theta: float, psi: float) -> np.ndarray:
        return -np.array([duel.slope(False, (theta, psi)), duel.slope(True, (theta, psi))])

    columns = [(field(*at) - field(*-at)) / (2 * step) for at in np.eye(2) * step]
    found = np.linalg.eigvals(np.stack(columns, axis=1))
    known = known_eigenvalue("nonsaturating", addition)
    assert known is not None
    np.testing.assert_allclose(found[np.argmax(found.imag)], known, atol=1e-6)


def test_small_steps_follow_the_flow() -> None:
    """θ' = ψ σ(ψθ), ψ' = −θ σ(ψθ) of minimax, by SciPy."""

    def field(_: float, at: np.ndarray) -> list[float]:
        share = 1 / (1 + math.exp(-at[0] * at[1]))
        return [at[1] * share, -at[0] * share]

    found = trajectory(Duel("minimax", ADDITIONS["nothing"]), 100, rate=0.01)
    np.testing.assert_allclose(found[-1], solve_ivp(field, (0, 1), dirac.START, rtol=1e-8).y[:, -1], atol=0.01)


def test_judge_knows_its_verdicts() -> None:
    turn, line = np.linspace(0, 12 * np.pi, 600), np.linspace(1, 0.5, 600)
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    assert judge(circle)[0] == "circles"
    verdict, decay = judge(circle * np.exp(-0.03 * turn)[:, None], rate=turn[1])
    assert (verdict, decay) == ("creeps", pytest.approx(0.03, rel=0.05))
    assert judge(circle * np.exp(-0.2 * turn)[:, None])[0] == "converges"
    assert judge(2 * circle * np.exp(0.03 * turn)[:, None])[0] == "diverges"
    assert judge(circle * 200) == ("diverges", None)
    assert judge(np.stack([0 * line + 0.3, 0 * line], axis=1))[0] == "stops"
    assert judge(np.stack([line, line], axis=1))[0] == "creeps"
    assert judge(np.stack([0.09 * (-1.0) ** np.arange(600), line], axis=1))[0] == "chatters"


def test_distances_of_point_masses() -> None:
    rows = {row.name: row for row in distances.point_rows()}
    thetas = np.array(distances.THETAS)
    np.testing.assert_allclose(rows["Wasserstein-1"].found, np.abs(thetas), rtol=1e-12)
    np.testing.assert_allclose(rows["Jensen-Shannon"].found, np.where(thetas == 0, 0, math.log(2)), atol=1e-8)
    np.testing.assert_allclose(rows["total variation"].found, thetas != 0, atol=1e-12)
    np.testing.assert_allclose(rows["energy"].found, 2 * np.abs(thetas), rtol=1e-9)
    assert {row.name: row.error for row in rows.values() if row.error > 1e-8} == {}
    flat = {name for name, row in rows.items() if abs(row.slope) < 1e-6}
    assert flat == {"total variation", "Jensen-Shannon", "Fisher", "MMD², best σ"}


@pytest.mark.slow
def test_distances_of_gaussians(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "_TRANSPORTED", 80)
    rows = distances.gaussian_rows()
    assert {row.name: row.error for row in rows if row.error > 0.02} == {}
    means = {row.name: row.found[2] for row in rows}
    assert means["Fréchet"] == pytest.approx(4, abs=1e-3)
    assert means["Kullback-Leibler"] == pytest.approx(2, abs=1e-6)


def test_a_trained_kernel_leaves_no_gradient_and_a_penalty_does() -> None:
    rows = {
        name: [row for row, _ in witness.measure(name, (3, 150))][-1]
        for name in ("nothing", "witness", "scaled", witness.SPECTRAL)
    }
    assert rows["nothing"].gradient < 0.1 * rows["witness"].gradient
    assert rows["nothing"].mmd > rows["witness"].mmd
    assert rows["witness"].aligned > 0.5


@pytest.mark.parametrize("law", list(PLANES))
def test_what_is_judged_of_points(law: str) -> None:
    plane = PLANES[law]()
    found = judge_points(plane, plane.draw(1000, torch.Generator().manual_seed(3)))
    assert found.near > 0.97
    assert found.covered == MODES
    alone = plane.centres[plane.part == 2][:1].expand(100, 2)
    one = judge_points(plane, alone)
    assert (one.near, one.covered) == (1.0, 1)
    assert one.distance > 3 * found.distance
    lost = judge_points(plane, torch.full((50, 2), math.nan))
    assert (lost.near, lost.covered, lost.distance) == (0.0, 0, math.inf)


def test_the_assigned_distance_is_that_of_shifted_points() -> None:
    """2-Wasserstein of a law and the law moved by (3, 4) is 5."""
    plane = PLANES["eight-gaussians"]()
    moved = plane.draw(1000, torch.Generator().manual_seed(3)) + torch.tensor([3.0, 4.0])
    assert judge_points(plane, moved).distance == pytest.approx(5, rel=0.02)


@pytest.mark.parametrize("name", ["energy", "nonsaturating"])
def test_learners_learn(name: str) -> None:
    before, _ = learners.measure("eight-gaussians", name, 1)
    after, points = learners.measure("eight-gaussians", name, 120)
    assert points.shape == (learners.SAMPLES, 2)
    assert after.distance < 0.8 * before.distance


def test_a_decoder_is_not_clipped() -> None:
    """Outputs don't depend on it (Li et al. 2017)."""
    critic = networks.PlaneCritic(4, decodes=True)
    with torch.no_grad():
        for weight in critic.parameters():
            weight.fill_(0.5)
    Clip(0.1).project_(critic)
    found = {name.partition(".")[0]: float(weight.detach().abs().max()) for name, weight in critic.named_parameters()}
    assert found == {"hidden": pytest.approx(0.1), "last": pytest.approx(0.1), "decoder": 0.5}


def test_every_learner_takes_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And parts are drawn, without the processes that the command has."""
    monkeypatch.setattr(learners, "SAMPLES", 60)
    played = [(*pair, "in turns", 9) for pair in (("hinge", "r1"), ("began", "nothing"), ("mmd", "scaled"))]
    monkeypatch.setattr(dirac, "cases", lambda: played)
    workshop = Workshop(tmp_path, 6)
    rows = {part: PARTS[part](workshop) for part in ("dirac", "witness", "spiral")}
    assert [row.name for row in rows["spiral"]] == ["real", *learners.LEARNERS]
    pictures = sorted(path.name for path in tmp_path.iterdir())
    assert pictures == ["dirac.png", "spiral.png", "witness.png"]
    for name in pictures:
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 400
    for part, writer in (("dirac", toys.dirac), ("witness", toys.witness), ("spiral", toys.learners)):
        read = [json.loads(json.dumps(row.as_json())) for row in rows[part]]
        assert writer(Results(read, "rows.json")).count("\n| ") >= 3


@pytest.mark.slow
def test_the_command_writes_rows_and_pictures(tmp_path: Path) -> None:
    main(["--only", "distances", "--figures", str(tmp_path / "figures"), "--results", str(tmp_path)])
    (file,) = tmp_path.glob("toys_distances_*.json")
    rows = json.loads(file.read_text())
    assert {row["laws"] for row in rows} == {"points", "gaussians"}
    assert (tmp_path / "figures/distances.png").stat().st_size < 60_000


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--only", "dirak"], "'dirak'"), (["--steps", "1"], "must be at least 6, got 1")],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["bench.toy", *words])
    with pytest.raises(SystemExit) as stopped:
        run_command(main)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1
