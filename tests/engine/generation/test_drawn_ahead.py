"""z drawn ahead: the numbers of `Noise` in every case, in slots that stay, in an order that a device may lag behind."""

from __future__ import annotations

import pytest
import torch
from helpers.recorded_graphs import RecordedLane
from torch import Tensor

from engine.generation.drawn_ahead import DrawnAhead
from engine.generation.priors import Gaussian, Noise, Prior, Uniform

GAUSSIAN, UNIFORM = Gaussian(5), Uniform(3)
Request = tuple[Prior, int]
A, B, C = (GAUSSIAN, 4), (UNIFORM, 7), (GAUSSIAN, 2)


def take_step(noise: Noise, *requests: Request) -> list[Tensor]:
    """Copies of what a step gets, and the step."""
    noise.deliver()
    noise.begin()
    got = [noise.draw(*request).clone() for request in requests]
    noise.draw_ahead()
    return got


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


STEPS = {
    "one": [[A]] * 4,
    "two": [[A, B]] * 4,
    "another count": [[A], [A], [C], [C], [A]],
    "another prior": [[A, A], [A, A], [B, A], [B, A]],
    "fewer": [[A, B], [A, B], [A], [A], [], [A, B], [A, B]],
    "more": [[A], [A], [A, B, C], [A, B, C]],
    "nothing": [[], [], [A], []],
    "never twice the same": [[A], [B], [C], [B, A], [A, B]],
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_the_numbers_and_the_state_are_those_of_noise(steps: list[list[Request]]) -> None:
    plain, ahead = Noise(3), DrawnAhead(3, RecordedLane())
    for requests in steps:
        assert same(take_step(ahead, *requests), take_step(plain, *requests))
        assert torch.equal(ahead.state_dict()["z"], plain.state_dict()["z"])
        # Another run that starts from this state goes on alike.
        resumed = DrawnAhead(99, RecordedLane())
        take_step(resumed, A, A)
        resumed.load_state_dict(ahead.state_dict())
        twin = Noise(0)
        twin.load_state_dict(plain.state_dict())
        assert same(take_step(resumed, B, A), take_step(twin, B, A))


def test_the_state_inside_a_step_is_that_of_what_was_asked_for() -> None:
    plain, ahead = Noise(3), DrawnAhead(3, RecordedLane())
    for _ in range(2):
        for noise in (plain, ahead):
            noise.deliver()
            noise.begin()
            noise.draw(*A)
        assert torch.equal(ahead.state_dict()["z"], plain.state_dict()["z"])
        assert torch.equal(ahead.draw(*B), plain.draw(*B))
        for noise in (plain, ahead):
            noise.draw_ahead()


def test_a_step_that_begins_anew_gets_the_same_numbers() -> None:
    """As after a capture that failed, which has asked for some of them."""
    plain, ahead = Noise(3), DrawnAhead(3, RecordedLane())
    for noise in (plain, ahead):
        take_step(noise, A, B)
    ahead.deliver()
    ahead.begin()
    ahead.draw(*A)
    ahead.begin()
    assert same([ahead.draw(*A), ahead.draw(*B)], [plain.draw(*A), plain.draw(*B)])


def test_draws_between_steps_are_the_stream_s_next() -> None:
    plain, ahead = Noise(3), DrawnAhead(3, RecordedLane())
    for _ in range(3):
        assert same(take_step(ahead, A, B), take_step(plain, A, B))
        slot = ahead._places[0].slot
        drawn = ahead.draw(*A)
        assert torch.equal(drawn, plain.draw(*A))
        assert drawn is not slot


def test_slots_stay_and_a_replayed_step_finds_the_next_numbers_in_them() -> None:
    """A replay calls neither `begin` nor `draw`: it reads the addresses of its capture."""
    plain, ahead = Noise(3), DrawnAhead(3, RecordedLane())
    for _ in range(2):
        take_step(ahead, A, B)
        take_step(plain, A, B)
    ahead.deliver()
    ahead.begin()
    slots = [ahead.draw(*A), ahead.draw(*B)]
    ahead.draw_ahead()
    expected = take_step(plain, A, B)
    for replays in range(4):
        assert same(slots, expected)
        assert torch.equal(ahead.state_dict()["z"], plain.state_dict()["z"])
        if replays == 2:  # somebody draws in between, and what was drawn ahead has to be drawn again
            assert torch.equal(ahead.draw(*C), plain.draw(*C))
        ahead.deliver()
        ahead.draw_ahead()
        expected = take_step(plain, A, B)


def test_a_capture_is_refused_what_was_not_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ahead = Noise(3), DrawnAhead(3, RecordedLane())
    for noise in (plain, ahead):
        take_step(noise, A)
    ahead.deliver()
    with monkeypatch.context() as patch:
        patch.setattr(RecordedLane, "capturing", True)
        ahead.begin()
        ahead.draw(*A)
        with pytest.raises(RuntimeError, match="other random numbers"):
            ahead.draw(*B)
    ahead.begin()
    assert same([ahead.draw(*A), ahead.draw(*B)], [plain.draw(*A), plain.draw(*B)])


class TestOrder:
    def test_copies_come_before_the_step_and_the_next_z_is_drawn_after_it(self) -> None:
        lane = RecordedLane()
        noise = DrawnAhead(3, lane)
        take_step(noise, A, B)
        assert [what for what, _ in lane.log] == ["copy", "copy"], "the first step's are drawn when it asks"
        state = noise.random.get_state()
        lane.log.clear()
        noise.deliver()
        assert [what for what, _ in lane.log] == ["copy", "copy"]
        noise.begin()
        slots = [noise.draw(*A), noise.draw(*B)]
        assert [slot for _, slot in lane.log] == slots
        assert torch.equal(noise.random.get_state(), state), "a step draws nothing"
        assert len(lane.log) == 2
        noise.draw_ahead()
        assert not torch.equal(noise.random.get_state(), state)
        assert [what for what, _ in lane.log[2:]] == ["wait", "wait"]

    def test_a_device_that_lags_reads_what_was_meant_for_it(self) -> None:
        """Copies are made as late as possible: when drawing into a buffer has to wait for them."""
        lane, plain = RecordedLane(late=True), Noise(3)
        noise = DrawnAhead(3, lane)
        expected = [take_step(plain, A)[0] for _ in range(8)]
        for _ in range(7):
            take_step(noise, A)
            assert len(lane.copies) - lane.done <= 2, "the host is never further ahead"
        slot = lane.copies[0][0]
        found = lane.done
        for step in range(found, 7):
            lane.work(step + 1)
            assert torch.equal(slot, expected[step])

    def test_the_host_waits_for_the_copy_of_the_step_before_the_last(self) -> None:
        lane = RecordedLane(late=True)
        noise = DrawnAhead(3, lane)
        for step in range(1, 7):
            take_step(noise, A)
            waits = [number for what, number in lane.log if what == "wait"]
            assert waits == list(range(1, step)), "with one buffer it would be this step's own"
