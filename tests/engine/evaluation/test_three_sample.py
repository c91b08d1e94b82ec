"""The three-sample test: its statistic, its spread, and how often it is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_kid import kernel_mmd, kid_features_to_metric

from engine.comparison.distances import kernels, mmd
from engine.evaluation.three_sample import RelativeDistance, three_sample_test
from engine.support.errors import InputError

F = 12


def draw(count: int, random: torch.Generator, shift: float = 0.0) -> Tensor:
    """Features as a ReLU network has them: skewed, correlated."""
    mixing = torch.randn(F, F, generator=torch.Generator().manual_seed(5)) / F**0.5
    return torch.relu(torch.randn(count, F, generator=random, dtype=torch.float64) @ mixing.double() + shift)


def test_difference_is_that_of_two_kernel_distances() -> None:
    random = torch.Generator().manual_seed(0)
    real, new, old = (draw(60, random, shift) for shift in (0.0, 0.2, 0.4))
    expected = kernel_mmd(new.numpy(), real.numpy()) - kernel_mmd(old.numpy(), real.numpy())
    assert three_sample_test(real, new, old).difference == pytest.approx(expected, rel=1e-10)


def test_numbers_of_images_may_differ() -> None:
    random = torch.Generator().manual_seed(0)
    real, new, old = draw(41, random), draw(23, random, 0.1), draw(17, random, 0.5)

    def kernel(x: Tensor, y: Tensor) -> np.ndarray:
        return (x.numpy() @ y.numpy().T / F + 1) ** 3

    def within(x: Tensor) -> float:
        return float(np.mean([kernel(x, x)[i, j] for i in range(len(x)) for j in range(len(x)) if i != j]))

    expected = within(new) - 2 * kernel(new, real).mean() - within(old) + 2 * kernel(old, real).mean()
    assert three_sample_test(real, new, old).difference == pytest.approx(expected, rel=1e-10)


def test_deviation_is_that_of_repeated_draws() -> None:
    random = torch.Generator().manual_seed(1)
    found = [three_sample_test(draw(150, random), draw(200, random, 0.2), draw(120, random, 0.25)) for _ in range(600)]
    spread = float(np.std([one.difference for one in found]))
    assert float(np.mean([one.deviation for one in found])) == pytest.approx(spread, rel=0.1)


def test_false_positives_are_as_many_as_announced() -> None:
    """Old and new samples of one law, real images of another: 5% ± 2% of 500 tests find a difference."""
    random = torch.Generator().manual_seed(2)
    p_values = np.array(
        [
            three_sample_test(draw(200, random), draw(200, random, 0.3), draw(200, random, 0.3)).p_value
            for _ in range(500)
        ]
    )
    assert 0.03 <= (p_values < 0.05).mean() <= 0.07
    assert 0.4 < p_values.mean() < 0.6


def test_closer_and_farther_samples_are_told_apart() -> None:
    random = torch.Generator().manual_seed(3)
    real, near, far = draw(300, random), draw(300, random, 0.1), draw(300, random, 0.6)
    assert three_sample_test(real, near, far).p_value < 1e-4
    assert three_sample_test(real, far, near).p_value > 1 - 1e-4


def test_the_same_samples_twice_are_no_closer() -> None:
    same = draw(30, torch.Generator().manual_seed(4), 0.2)
    assert RelativeDistance(0.0, 0.0).p_value == 1.0
    assert three_sample_test(draw(30, torch.Generator()), same, same).difference == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("which", ["real", "new", "old"])
def test_what_is_not_features_is_refused(which: str) -> None:
    sets = {name: torch.rand(5, F) for name in ("real", "new", "old")}
    sets[which] = torch.rand(1, F)
    with pytest.raises(InputError) as error:
        three_sample_test(**sets)
    assert error.value.argument == which


def test_difference_is_that_of_two_mmds() -> None:
    """Unbiased MMD² with KID's kernel, as everyone else has it from `comparison.distances`."""
    random = torch.Generator().manual_seed(6)
    real, new, old = draw(53, random), draw(29, random, 0.1), draw(31, random, 0.5)
    kernel = kernels.polynomial(degree=3)
    expected = mmd(new, real, kernel, unbiased=True) - mmd(old, real, kernel, unbiased=True)
    assert three_sample_test(real, new, old).difference == pytest.approx(float(expected), abs=1e-12)


def test_kid_is_the_mean_of_mmds_over_subsets() -> None:
    """torch-fidelity's KID, which the engine reports, is `mmd` on the subsets that torch-fidelity draws."""
    random = torch.Generator().manual_seed(7)
    samples, real = draw(90, random, 0.2), draw(120, random)
    subsets, size, seed = 13, 37, 5
    found = kid_features_to_metric(
        samples, real, kid_subsets=subsets, kid_subset_size=size, rng_seed=seed, verbose=False
    )
    rows = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        drawn = samples[rows.choice(len(samples), size, replace=False)]
        against = real[rows.choice(len(real), size, replace=False)]
        values.append(float(mmd(drawn, against, kernels.polynomial(degree=3), unbiased=True)))
    assert found["kernel_inception_distance_mean"] == pytest.approx(np.mean(values), rel=1e-10, abs=1e-13)
    assert found["kernel_inception_distance_std"] == pytest.approx(np.std(values), rel=1e-10, abs=1e-13)
