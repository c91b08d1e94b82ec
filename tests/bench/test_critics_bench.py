"""The benchmark of critics: it says what it needs, and times nothing that is not theirs."""

import importlib.util

import pytest
import torch

from bench import critics, mimicry
from engine.support.errors import InputError

needs_mimicry = pytest.mark.skipif(not mimicry.is_installed(), reason="needs torch-mimicry")


def test_says_how_to_install_what_it_needs(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"torch-mimicry, which is not installed: pip install --no-deps") as error:
        critics.main(["--only", "sngan"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("flag", "least"), [("--repetitions", 1), ("--critic-steps", 1), ("--batch-size", 2)])
def test_refuses_counts_that_make_no_sense(flag, least, capsys):
    with pytest.raises(SystemExit):
        critics.main([flag, "0"])
    assert f"{flag}: must be at least {least}, got 0" in capsys.readouterr().err


def test_errors_are_relative_to_the_exact_step_and_the_larger_of_both_networks():
    exact = critics.Results(torch.tensor([2.0, -4.0]), (torch.tensor([3.0, 4.0]), torch.tensor([1.0])))
    found = critics.Results(torch.tensor([2.0, -4.4]), (torch.tensor([3.0, 4.5]), torch.tensor([1.01])))
    assert found.errors(exact) == pytest.approx((0.1, 0.1))


def test_generator_draws_bilinear_blocks_of_one_width():
    with torch.device("meta"):
        generator = mimicry.BilinearGenerator()
    # Linear layer; blocks of two 3×3 convolutions (one without bias), a 1×1, and two BatchNorms; BatchNorm; 3×3 to RGB.
    block = 2 * 9 * 256**2 + 256 + 257 * 256 + 4 * 256
    expected = 129 * 16 * 256 + 3 * block + 2 * 256 + 9 * 256 * 3 + 3
    assert sum(weight.numel() for weight in generator.parameters()) == expected


@pytest.fixture
def one_thread():
    """Threads that wait for one another on cores that are taken cost minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@needs_mimicry
@pytest.mark.slow
@pytest.mark.parametrize("name", critics.MODELS)
def test_equals_theirs(name, one_thread, monkeypatch):
    monkeypatch.setattr(critics, "CHECKED", 2)
    *_, rows = critics.measure(name, 2, 1, "cpu", 1, torch.bfloat16)
    assert [(row.variant, row.dtype) for row in rows][:2] == [("torch-mimicry", "float32"), ("ours", "float32")]
    assert ("bf16" in [row.dtype for row in rows]) is (name == "sngan")
    monkeypatch.setitem(critics.MODELS, name, critics.Model(critics.MODELS[name].theirs, "least-squares"))
    with pytest.raises(RuntimeError, match="off theirs in float64"):
        critics.Comparison(name, 2, 1, "cpu")
