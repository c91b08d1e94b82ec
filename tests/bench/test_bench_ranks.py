"""bench.ranks: the model's formula, what counts as equal, what is counted, and its tables."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.runs import command
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench.pages import ranks as pages
from bench.pages.regions import Results
from bench.ranks import __main__ as program
from bench.ranks.jobs import Job
from bench.ranks.measuring import bytes_rows, differences, equality_rows
from bench.ranks.model import NETWORKS, Machine, Work, model_rows, modelled_step
from bench.ranks.rows import AloneRow, TimeRow
from bench.ranks.tasks import calls_of
from bench.ranks.traffic import Exchange, expected, watched
from bench.scenario import Problem
from engine.generation.networks import build_generator
from engine.training.ranks import Ranks

SMALL = Problem("vgg-small", 32)
WORK = Work(features=1000, weights=700, norms=2)
MACHINE = Machine(image_seconds=1e-3, least_images=4, memory=1e6)


class TestModel:
    def test_by_hand(self) -> None:
        """W = 4, 40 images: 10 a rank."""
        line = NETWORKS["100 Gbit Ethernet"]
        found = modelled_step("100 Gbit Ethernet", MACHINE, WORK, 4, 40)
        assert found["compute"] == pytest.approx(10e-3)
        assert found["fixed"] == pytest.approx((72 * 1000 + 3 * 24 * 1000 + 28 * 700) / 1e6)
        assert found["gather"] == pytest.approx(3 * 2 * 1000 * 4 / line.bandwidth)
        assert found["reduce"] == pytest.approx(2 * 3 / 4 * 700 * 4 / line.bandwidth)
        rings = 2 * line.ring_base + (3 + 6) * line.ring_hop
        assert found["latency"] == pytest.approx(rings + 2 * 3 * (line.tree_base + 4 * line.tree_hop))

    def test_one_gpu_sends_nothing(self) -> None:
        found = modelled_step("NVLink, H100/H200", MACHINE, WORK, 1, 40)
        assert found["gather"] == found["reduce"] == found["latency"] == 0

    def test_a_small_share_takes_as_long_as_its_launches(self) -> None:
        assert modelled_step("NVLink, H100/H200", MACHINE, WORK, 64, 64)["compute"] == 4e-3

    def test_rows(self) -> None:
        rows = list(model_rows(MACHINE, WORK, [8], (1, 2, 16)))
        fixed = [row for row in rows if not row.growing]
        assert {row.ranks for row in fixed} == {1, 2}, "8 images are too few for 16 ranks"
        for row in rows:
            assert row.total == pytest.approx(row.compute + row.fixed + row.gather + row.reduce + row.latency)
            assert row.minibatch == 8 * (row.ranks if row.growing else 1)
            (alone,) = (o for o in rows if o.ranks == 1 and (o.network, o.growing) == (row.network, row.growing))
            ideal = alone.total / (1 if row.growing else row.ranks)
            assert row.efficiency == pytest.approx(ideal / row.total)
        assert all("modelled" in name for name in list(rows[0].cells())[3:])


ONE_RANK = {"gradient.a": torch.tensor([3.0, 4.0]), "gradient.b": torch.zeros(2), "trained.n": torch.tensor(7)}


class TestDifferences:
    def test_largest_of_all_ranks(self) -> None:
        other = {**ONE_RANK, "gradient.a": torch.tensor([3.0, 4.5])}
        assert differences(ONE_RANK, [ONE_RANK, other]) == {"gradient": pytest.approx(0.1)}

    @pytest.mark.parametrize("name", ["gradient.b", "trained.n"])
    def test_zeros_and_counters_must_be_the_same(self, name: str) -> None:
        other = {**ONE_RANK, name: ONE_RANK[name] + 1}
        with pytest.raises(RuntimeError, match=f"{name} of ranks"):
            differences(ONE_RANK, [other])

    def test_so_must_the_names(self) -> None:
        with pytest.raises(RuntimeError, match="more or less"):
            differences(ONE_RANK, [{}])


def test_collectives_are_watched_and_carried_out() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=3)
    reduce = dist.all_reduce
    try:
        with watched() as found:
            dist.all_reduce(torch.ones(5))
            dist.all_gather_single(torch.empty(3, dtype=torch.int64), torch.ones(1, dtype=torch.int64))
    finally:
        dist.destroy_process_group()
    assert found == [Exchange("other", 20), Exchange("counts", 24)]
    assert dist.all_reduce is reduce


def test_formula_of_bytes() -> None:
    generator = build_generator("dcgan", image_size=32)
    found = expected(100, generator, 3)
    weights = sum(weight.numel() for weight in generator.parameters())
    channels = sum(norm.num_features for norm in generator.modules() if isinstance(norm, nn.BatchNorm2d))
    assert found == {"moments": 2400, "counts": 24, "gradients": 4 * weights, "BatchNorm": 20 * channels + 5 * 8}


@pytest.mark.slow
def test_bytes_of_a_job_are_what_the_formula_says() -> None:
    rows = list(bytes_rows(SMALL, 5, (2,)))
    assert {row.what for row in rows} == {"moments", "counts", "gradients", "BatchNorm"}
    assert all(row.counted == row.formula > 0 for row in rows)
    assert all(row.calls >= 1 for row in rows)


@pytest.mark.slow
def test_ranks_take_the_step_of_one() -> None:
    rows = list(equality_rows(SMALL, (2, 3)))
    assert [(row.method, row.averager) for row in rows[::2]] == [
        ("gfmn", "ama"), ("gfmn", "ma"), ("gfmn", "none"), ("mmd", "")
    ]  # fmt: skip
    for row in rows:
        assert max(row.gradient, row.loss, row.state or 0.0) < 1e-12
        assert row.trained < (1e-5 if row.averager == "ama" else 1e-9)


def test_calls_of_one_process_are_counted_once() -> None:
    alone = Ranks()
    tensors = [torch.ones(2)]

    def step() -> None:
        alone.share(4)
        alone.sum_(tensors)
        alone.sum_(tensors)

    calls, seconds = calls_of(alone, step)
    assert calls == {"share": 1, "sum_": 2, "counts": 1}
    assert 0 < seconds < 1e-2
    assert not {"share", "sum_", "counts"} & set(vars(alone)), "the methods are its own again"


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_benchmark() -> None:
    with (
        pytest.raises(RuntimeError, match="rank 0 of 1 ended with status 1"),
        Job(1, 1, "traffic", extractor="nothing", image_size=32, minibatch=4) as job,
    ):
        job.ask()


def results(two: float, calls: float) -> Results:
    shared = {"extractor": "e", "image_size": 32, "minibatch": 64}
    made = [
        TimeRow(**shared, dtype="float32", ranks=size, threads=3 - size, seconds=[p50], p20=p50, p50=p50, p80=p50)
        for size, p50 in ((1, 2.0), (2, two))
    ]
    alone = AloneRow(**shared, calls={"share": 1}, call_seconds=calls, step_seconds=2.0)
    return Results([row.as_json() for row in (*made, alone)], "rows.json")


def test_page_compares_with_what_is_wanted() -> None:
    text = pages.times(results(2.2, 1e-5))
    assert "| 2 ranks of 1 thread / 1 rank of 2 threads, medians | 1.100 | at most 1.15 | yes |" in text
    assert "| calls of ranks in a step of one process | 0.0005% | at most 1% | yes |" in text
    text = pages.times(results(2.4, 0.1))
    assert "| 1.200 | at most 1.15 | no |" in text
    assert "| 5.0000% | at most 1% | no |" in text
    assert pages.times(Results([], "rows.json")) == "Not measured yet."


def test_command_writes_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    program.main(["--only", "model", "--extractor", "vgg-small", "--step-ms", "6.4", "--json", str(path)])
    rows = json.loads(path.read_text())
    assert len(rows) == len(NETWORKS) * 2 * 2 * 7
    assert math.isclose(rows[0]["compute"], 6.4e-3)
    assert "modelled" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--only speed", "--only: invalid choice: 'speed'"),
        ("--batch-size 1", "--batch-size: must be at least 4, got 1"),
        ("--repetitions 0", "--repetitions: must be at least 1, got 0"),
        ("--model-batch-sizes 1", "--model-batch-sizes: must be at least 2, got 1"),
        ("--step-ms nan", "--step-ms: must be more than 0, got nan"),
    ],
)
def test_mistakes_are_one_line(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = command(program.main, flags.split(), capsys)
    assert code == 2
    assert message in text
    assert len(text.splitlines()) == 1
