"""What ranks send each other in a step: how much, when, and how it fits into a CUDA graph. One rank of 64, alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.fake_ranks import Events, FakeRanks, Message, fake_ranks
from helpers.host_waits import fake_cuda_trainer, host_waits
from helpers.marks import slow
from helpers.recorded_graphs import RecordedGraphs
from helpers.small_steps import configuration, device_step, small_trainer
from helpers.step_trace import capture_faults
from torch import Tensor

from engine.comparison import moment_matching
from engine.comparison.distances.moments import Moments
from engine.comparison.moment_matching import tap_groups
from engine.configuration.build import bare_extractor
from engine.generation.batch_norm import BatchNorm2d
from engine.training import arriving
from engine.training.graphs import EAGER_STEPS, GraphedStep
from engine.training.ranks import ALONE
from engine.training.trainer import Trainer

SIZE, BATCH = 64, 129  # rank 3 has two images, rank 0 three


@pytest.fixture
def ranks() -> Iterator[FakeRanks]:
    with fake_ranks(size=SIZE) as made:
        yield made


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of a few taps, of networks that would be one group each."""
    monkeypatch.setattr(moment_matching, "_LEAST_TOGETHER", 1 << 14)
    monkeypatch.setattr(moment_matching, "_MOST_GROUPS", 1 << 20)


def trainer(ranks: FakeRanks, **settings: Any) -> Trainer:
    small = {"batch_size": BATCH, "extractor": "vgg-small+resnet18", **settings}
    return small_trainer(configuration("digits", small), ranks)


def events(step: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> Events:
    """What happens in a step, in order."""
    found, wait = Events(), arriving.Arriving.wait

    def waiting(self: arriving.Arriving) -> Tensor:
        found.log.append("wait for the counts" if self.own.dtype == torch.int64 else "wait")
        return wait(self)

    with monkeypatch.context() as patch, found:
        patch.setattr(arriving.Arriving, "wait", waiting)
        step()
    return found


class Stream:
    """A stream of CUDA's by name."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


COUNTS = Message("gather", 8, torch.int64)


class TestHowMuch:
    def test_moments_gradients_and_batch_statistics(self, ranks: FakeRanks, monkeypatch: pytest.MonkeyPatch) -> None:
        """2·D float32 of moments from each rank, the generator's gradients once, and sums of channels; no more."""
        made = trainer(ranks)
        messages = events(made.train_step, monkeypatch).messages
        method = made.method
        features = method.objective.extractor.num_features
        moments = [message for message in messages if message.kind == "gather" and message != COUNTS]
        assert messages.count(COUNTS) == 1
        assert messages[len(messages) - messages[::-1].index(COUNTS) - 1] == COUNTS
        assert {message.dtype for message in moments} == {torch.float32}
        assert sum(message.nbytes for message in moments) == 2 * features * 4
        weights = sum(parameter.numel() for parameter in method.generator.parameters())
        channels = [module.num_features for module in method.generator.modules() if isinstance(module, BatchNorm2d)]
        sums = [message.nbytes for message in messages if message.kind == "sum"]
        forward = [nbytes for width in channels for nbytes in ((width + 1) * 8, width * 4)]
        backward = [2 * width * 4 for width in reversed(channels)]
        assert sums == [*forward, *backward, weights * 4]

    def test_own_batches_send_no_statistics(self, ranks: FakeRanks, monkeypatch: pytest.MonkeyPatch) -> None:
        made = trainer(ranks, generator_bn="local")
        assert [m.kind for m in events(made.train_step, monkeypatch).messages].count("sum") == 1

    def test_pooled_features_of_a_distance(self, ranks: FakeRanks, monkeypatch: pytest.MonkeyPatch) -> None:
        """As many rows as the rank with the most images has, or as the fake group says."""
        made = trainer(ranks, method="mmd", pool="mean")
        log = events(made.train_step, monkeypatch).log
        counts, features = (entry for entry in log if isinstance(entry, Message) and entry.kind == "gather")
        taps = made.method.objective.extractor.taps
        assert counts == COUNTS
        assert features.nbytes == 2 * sum(tap.shape[0] for tap in taps) * 4
        assert log.index(COUNTS) < log.index("convolution", log.index(COUNTS))
        assert log.index("wait for the counts") < log.index(features)

    def test_alone_nothing_is_sent_and_all_taps_are_one_group(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = small_trainer(configuration("digits", {"extractor": "vgg-small+resnet18"}))
        assert events(made.train_step, monkeypatch).log.count("convolution") > 0
        assert events(made.train_step, monkeypatch).messages == []
        (group,) = made.method.objective.groups
        assert group.features == slice(0, made.method.objective.extractor.num_features)


class TestWhen:
    @pytest.mark.parametrize("chunks", [None, 1])
    @pytest.mark.usefixtures("small_groups")
    def test_moments_travel_while_the_next_layers_run(
        self, chunks: int | None, ranks: FakeRanks, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = trainer(ranks, chunk_size=chunks)
        objective = made.method.objective
        images = torch.rand(2, 3, 32, 32, requires_grad=True)
        log, groups = events(lambda: objective(images), monkeypatch).log, objective.groups
        of_second = objective.feature_pass.prepared.taps_of_networks()[1].start
        assert len(groups) > len(objective.extractor.networks) == 2
        assert log[0] == COUNTS, "the counts set out before the first convolution"
        sent = [(place, entry) for place, entry in enumerate(log) if place and isinstance(entry, Message)]
        assert [m.nbytes for _, m in sent] == [8 * (g.features.stop - g.features.start) for g in groups]
        first_wait = log.index("wait for the counts")
        # How many convolutions are still to come when a group sets out.
        after = [log[place:first_wait].count("convolution") for place, _ in sent]
        assert after == sorted(set(after), reverse=True), "each as soon as it is known"
        assert after[-1] == 0
        last_of_first = max(n for n, group in enumerate(groups) if group.taps.stop == of_second)
        assert after[last_of_first] > 0, "the second network runs while the first one's last moments travel"
        assert log[first_wait:].count("wait") == len(groups)
        assert "convolution" not in log[first_wait:]

    @pytest.mark.usefixtures("small_groups")
    def test_groups_set_out_from_their_networks_stream(self, ranks: FakeRanks, monkeypatch: pytest.MonkeyPatch) -> None:
        """There NCCL waits for that network alone; in the end it is the step's own stream that waits for NCCL."""
        log: list[str] = []
        current = [Stream("main", log)]
        begin, wait = arriving.Arriving.__init__, arriving.Arriving.wait

        @contextlib.contextmanager
        def inside(stream: Stream) -> Iterator[None]:
            current.append(stream)
            yield
            current.pop()

        def beginning(self: arriving.Arriving, own: Tensor, *others: Any) -> None:
            if own.dtype != torch.int64:
                log.append(f"start on {current[-1].name}")
            begin(self, own, *others)

        def waiting(self: arriving.Arriving) -> Tensor:
            if self.own.dtype != torch.int64:
                log.append(f"wait on {current[-1].name}")
            return wait(self)

        found: list[Any] = []

        def make() -> Callable[[], object]:
            settings = {"batch_size": BATCH, "extractor": "vgg-small+resnet18"}
            objective = fake_cuda_trainer(configuration("digits", settings), ranks).method.objective
            found.append(objective)

            def step() -> None:
                images = torch.zeros(2, 3, 32, 32, device="cuda")
                with monkeypatch.context() as patch:
                    patch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
                    patch.setattr(torch.cuda, "Stream", lambda device: Stream("second", log))
                    patch.setattr(torch.cuda, "stream", inside)
                    patch.setattr(arriving.Arriving, "__init__", beginning)
                    patch.setattr(arriving.Arriving, "wait", waiting)
                    objective(images)

            return step

        assert host_waits(make) == []
        (objective,) = found
        networks = objective.feature_pass.prepared.taps_of_networks()
        of_first, of_second = (sum(group.taps.start in taps for group in objective.groups) for taps in networks)
        assert of_first > 1
        assert of_second > 1
        assert log == [
            "second waits for main",
            *["start on main"] * of_first,
            *["start on second"] * of_second,
            "main waits for second",
            *["wait on main"] * (of_first + of_second),
        ]

    def test_a_rank_without_images_sends_the_same_at_the_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = []
        for images in (2, 0):
            with fake_ranks(rank=SIZE - 1, size=SIZE) as ranks:
                made = trainer(ranks)
                monkeypatch.setattr(ranks, "counting", lambda own: lambda: [2, *[own] * (SIZE - 1)])
                objective = made.method.objective
                with Events() as record:
                    objective(torch.rand(images, 3, 32, 32))
                found.append(record.messages)
        assert found[0] == found[1] != []

    def test_groups(self) -> None:
        sizes = [8, 8, 4, 4, 2, 8, 2, 2]
        networks = [range(0, 5), range(5, 8)]
        groups = tap_groups(networks, sizes, least=16)
        assert [(g.taps, g.features) for g in groups] == [
            (range(0, 2), slice(0, 16)),
            (range(2, 5), slice(16, 26)),
            (range(5, 8), slice(26, 38)),
        ]
        assert tap_groups(networks, sizes, least=1)[3].taps == range(3, 4)
        assert len(tap_groups(networks, sizes)) == 2
        many = tap_groups([range(0, 1000)], [1 << 16] * 1000)
        assert len(many) == 8
        assert {g.features.stop - g.features.start for g in many} == {125 << 16}

    def test_taps_of_networks(self) -> None:
        extractor = bare_extractor(configuration("digits", {"extractor": "vgg-small+resnet18"}))
        first, second = extractor.prepared().taps_of_networks()
        assert (first.start, first.stop, second.stop) == (0, second.start, len(extractor.taps))
        for taps, name in ((first, "vgg-small"), (second, "resnet18")):
            assert all(extractor.taps[tap].name.startswith(name) for tap in taps)


class TestMerging:
    def test_portions_give_the_same_bits(self, ranks: FakeRanks) -> None:
        mean, m2 = torch.randn(2, 1001)
        m2 = m2.square()
        moments = moment_matching.BatchMoments(7, mean, m2)
        whole = ranks.merge(moments)
        merging = ranks.merging(7)
        for part in (slice(0, 1), slice(1, 500), slice(500, 1001)):
            merging.start(moment_matching.BatchMoments(7, mean[part], m2[part]))
        together = moment_matching.side_by_side(merging.wait())
        assert whole.count == together.count == 7 * SIZE
        assert torch.equal(whole.mean, together.mean)
        assert torch.equal(whole.m2, together.m2)

    def test_against_all_images(self, ranks: FakeRanks) -> None:
        """64 times the same images have their mean, and 64 times their M2. And any moments will do."""
        x = torch.randn(5, 11, dtype=torch.float64)
        found = ranks.merge(Moments.of(x))
        assert found.count == 5 * SIZE
        variance, mean = torch.var_mean(x.repeat(SIZE, 1), dim=0)
        torch.testing.assert_close(found.mean, mean, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found.variance(), variance, rtol=1e-12, atol=0)

    def test_alone(self) -> None:
        moments = Moments.of(torch.randn(5, 3))
        merging = ALONE.merging(5)
        merging.start(moments)
        assert merging.wait() == [moments]
        assert ALONE.agree(True)
        assert not ALONE.agree(False)


CAPTURED: dict[str, dict[str, Any]] = {
    "two-networks": {"amp": True},
    "fp16-chunks": {"extractor": "vgg-small", "amp": True, "amp_dtype": "fp16", "chunk_size": 1},
    "mmd": {"extractor": "vgg-small", "method": "mmd"},
}


class TestCapture:
    @pytest.mark.parametrize("name", ["fp16-chunks", "mmd", slow("two-networks")])
    @pytest.mark.usefixtures("small_groups")
    def test_on_fake_cuda_the_host_waits_for_nothing(self, name: str, ranks: FakeRanks) -> None:
        """Steps as they are rehearsed wait for other hosts alone, captured ones for nobody; all are the same."""
        settings = {"batch_size": BATCH, "extractor": "vgg-small+resnet18", **CAPTURED[name]}
        changes: list[str] = []
        messages: list[Message] = []

        def make() -> Callable[[], object]:
            step = device_step(fake_cuda_trainer(configuration("digits", settings), ranks))

            def capturable(context: contextlib.AbstractContextManager[Any]) -> None:
                @contextlib.contextmanager
                def both_inside() -> Iterator[None]:
                    with ranks.capturing(), context:
                        yield

                step(both_inside())

            def both() -> None:
                for _ in range(EAGER_STEPS):
                    with ranks.rehearsing():
                        step(contextlib.nullcontext())
                record = Events()
                capturable(record)
                messages.extend(record.messages)
                changes.extend(capture_faults(capturable, warmup=0))

            return both

        assert host_waits(make) == []
        assert changes == []
        assert messages
        assert not [message for message in messages if message.dtype == torch.int64], "hosts exchange nothing"

    @pytest.mark.parametrize("name", CAPTURED)
    @pytest.mark.usefixtures("small_groups")
    def test_replays_are_steps(self, name: str, ranks: FakeRanks) -> None:
        """The collectives are in the graph: with it and without the bits are the same, and no host tells a count."""
        settings = {"batch_size": BATCH // 2, "extractor": "vgg-small+resnet18", **CAPTURED[name]}
        config = configuration("digits", settings)
        eager = small_trainer(config, ranks)
        graphed = small_trainer(config, ranks, RecordedGraphs())
        for number in range(EAGER_STEPS + 3):
            expected = eager.train_step()
            with Events() as record:
                found = graphed.train_step()
            told = [message for message in record.messages if message.dtype == torch.int64]
            assert len(told) == (1 if number <= EAGER_STEPS else 0), "to be counted, then to agree on the capture"
            assert all(torch.equal(found[key], value) for key, value in expected.items())
        assert graphed.graphed is not None
        assert graphed.graphed.is_captured
        for one, other in zip(eager.method.generator.parameters(), graphed.method.generator.parameters(), strict=True):
            assert torch.equal(one, other)

    def test_a_capture_that_tells_another_count_fails(self, ranks: FakeRanks) -> None:
        with ranks.rehearsing():
            assert ranks.counts(4) == [4] * SIZE
        with ranks.capturing():
            assert ranks.counts(4) == [4] * SIZE
            with pytest.raises(RuntimeError, match="told None, and the captured one tells 4"):
                ranks.counts(4)
        with ranks.capturing(), pytest.raises(RuntimeError, match="told 4, and the captured one tells 5"):
            ranks.counts(5)
        assert ranks.counts(5) == [5] * SIZE

    def test_what_cannot_be_captured_says_why(self, ranks: FakeRanks) -> None:
        """Nobody is waited for in a capture, so an error in it doesn't mean that another process has ended."""
        with ranks.capturing(), pytest.raises(RuntimeError, match="not permitted"), ranks._together():
            raise RuntimeError("operation not permitted when stream is capturing")


class Others:
    """Ranks of which another one could not capture its step."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def agree(self, flag: bool) -> bool:
        self.log.append(f"agree {flag}")
        return True

    rehearsing = capturing = staticmethod(contextlib.nullcontext)


def test_all_ranks_capture_or_none(caplog: pytest.LogCaptureFixture) -> None:
    others = Others()
    graphs, weight = RecordedGraphs(), torch.zeros(3)

    def step() -> dict[str, Tensor]:
        return {"loss": weight.add_(1).sum()}

    graphed = GraphedStep(step, graphs, lambda: None, others)  # type: ignore[arg-type]
    for number in range(EAGER_STEPS + 2):
        assert float(graphed()["loss"]) == 3 * (number + 1)
    assert others.log == ["agree False"]
    assert graphs.log == ["aside"] * EAGER_STEPS + ["capture"]
    assert not graphed.is_captured
    assert "cannot be captured in a CUDA graph (another process of this job cannot)" in caplog.text


def test_the_graph_goes_before_the_group(ranks: FakeRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    """A communicator waits for the graphs that use it before it is destroyed, so none outlives training."""
    made = small_trainer(configuration("digits", {"batch_size": BATCH}), ranks, RecordedGraphs())
    for name in ("save", "_sample", "_log"):
        monkeypatch.setattr(made, name, lambda *arguments: None)
    made.writes = False
    seen = []
    graphed = made.graphed
    assert graphed is not None

    def stop(stop: Any) -> int:
        seen.append(graphed.is_captured)
        return 0 if made.step < EAGER_STEPS + 2 else 130

    monkeypatch.setattr(made, "_stopped", stop)
    with pytest.raises(Exception, match="stopped at step"):
        made.fit()
    assert seen[-1]
    assert not graphed.is_captured
