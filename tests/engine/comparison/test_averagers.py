"""The averagers on given moments: against `torch.optim.Adam` and running averages that are written out in NumPy."""

from __future__ import annotations

import math
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from oracle import WrittenOut, relative_error
from torch import Tensor

from engine.comparison.averagers import (
    AMA,
    AVERAGERS,
    Averager,
    BatchMoments,
    Direction,
    MovingAverage,
    NoAverage,
    PlainAverager,
    TargetMoments,
)
from engine.comparison.distances.moments import Moments
from engine.comparison.moment_matching import MomentMatching
from kernels import compiled, reference

FEATURES, MINIBATCH = 53, 6
BACKENDS = [pytest.param(reference, id="reference"), pytest.param(compiled, id="compiled")]


class Run:
    """An averager fed with features [N, D] directly, beside its oracle."""

    def __init__(
        self,
        averager: Averager,
        name: str,
        rate: float,
        kernels: ModuleType = reference,
        correction: int = 1,
        dtype: torch.dtype = torch.float64,
        features: int = FEATURES,
    ):
        self.averager, self.kernels, self.correction = averager, kernels, correction
        self.target = torch.stack((torch.randn(features), torch.rand(features))).double()
        averager.reset(features, dtype=dtype)
        start = averager.v if "v" in averager.state_names else None
        self.oracle = WrittenOut(lambda x: x, self.target, name, rate, correction, start)

    def step(self, features: Tensor, **options) -> Direction:
        dtype = features.dtype
        m2, mean = torch.var_mean(features, dim=0, correction=0)
        return self.averager.step(
            self.kernels,
            BatchMoments(len(features), mean, m2 * len(features)),
            TargetMoments(self.target[0].to(dtype), self.target[1].to(dtype)),
            correction=self.correction,
            **options,
        )


def state_of(averager: Averager) -> list[Tensor]:
    return [getattr(averager, name) for name in (*averager.state_names, "steps")]


def draw_features(count: int = MINIBATCH, features: int = FEATURES) -> Tensor:
    return (torch.randn(count, features, dtype=torch.float64) * torch.rand(features)).relu()


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize(
    ("make", "name", "rate"),
    [
        pytest.param(lambda: AMA(lr=3e-3), "ama", 3e-3, id="ama"),
        pytest.param(lambda: AMA(lr=3e-3, variant="authors"), "ama-authors", 3e-3, id="ama-authors"),
        pytest.param(lambda: MovingAverage(alpha=0.2), "ma", 0.2, id="ma"),
        pytest.param(lambda: MovingAverage(alpha=0.2, variant="authors"), "ma-authors", 0.2, id="ma-authors"),
        pytest.param(lambda: MovingAverage(variant="authors"), "ma-authors", 1.0, id="ma-authors of one batch"),
        pytest.param(NoAverage, "none", 0.0, id="none"),
    ],
)
def test_twenty_steps(make, name, rate, correction, kernels):
    """Loss, state, and a_d + b_d·x_nd against autograd; for AMA the oracle is `torch.optim.Adam` on the inner loss."""
    run = Run(make(), name, rate, kernels, correction)
    for step in range(20):
        features = draw_features(MINIBATCH + step % 3)
        leaf = features.clone().requires_grad_()
        loss = run.oracle(leaf)
        (gradient,) = torch.autograd.grad(loss, leaf)
        direction = run.step(features)
        assert relative_error(direction.sums[:2].sum(), loss) <= 1e-10
        assert relative_error(direction.a + direction.b * features, gradient) <= 1e-10
        for key, expected in run.oracle.state().items():
            assert relative_error(getattr(run.averager, key.removeprefix("averager.")), expected) <= 1e-10, key


def test_sums_are_loss_and_squared_difference_of_means_and_of_variances():
    run = Run(MovingAverage(alpha=0.2), "ma", 0.2)
    features = draw_features()
    variance, mean = torch.var_mean(features, dim=0)
    difference = run.target - torch.stack((mean, variance))
    sums = run.step(features).sums
    assert relative_error(sums[:2], 0.2 * difference.square().sum(dim=1)) <= 1e-12
    assert relative_error(sums[2:4], difference.square().sum(dim=1)) <= 1e-12
    assert relative_error(sums[4:], torch.stack((0.2 * difference.square().sum(), difference.square().sum()))) <= 1e-12


class TestPaperAndAuthors:
    """What the paper says and what the authors' code does (docs/method.md)."""

    def test_defaults(self):
        paper, authors = AMA(), AMA(variant="authors")
        assert (paper.rate, paper.beta1, paper.beta2, paper.eps, paper.variant) == (1e-5, 0.9, 0.999, 1e-8, "paper")
        assert (authors.rate, authors.beta1, authors.beta2, authors.eps) == (1e-5, 0.5, 0.999, 1e-8)
        assert AMA(beta1=0.7, variant="authors").beta1 == 0.7
        assert (MovingAverage().rate, MovingAverage().variant) == (0.1, "paper")
        assert MovingAverage(variant="authors").rate == 1.0

    def test_epsilon_of_the_mean_loss(self):
        """ε·D/2, ≈ 4.3e-3 for the paper's pair; ε itself for the sum."""
        assert AMA(variant="authors").eps_for(851_968) == pytest.approx(1e-8 * 851_968 / 2, rel=1e-12)
        assert AMA(variant="authors").eps_for(851_968) == pytest.approx(4.3e-3, rel=0.01)
        assert AMA().eps_for(851_968) == 1e-8

    @pytest.mark.parametrize("kernels", BACKENDS)
    def test_epsilon_matters_and_is_the_authors(self, kernels):
        """Where |v − Δ| is near ε·D/2 the two inner losses go different ways; ours goes Adam's."""
        run = Run(AMA(lr=1e-3, variant="authors", eps=1e-2), "ama", 1e-3, kernels)
        v = torch.nn.Parameter(run.averager.v.clone())
        adam = torch.optim.Adam([v], lr=1e-3, betas=(0.5, 0.999), eps=1e-2)
        for _ in range(20):
            features = draw_features()
            variance, mean = torch.var_mean(features, dim=0)
            difference = run.target - torch.stack((mean, variance))
            adam.zero_grad()
            sum(torch.nn.functional.mse_loss(v[row], difference[row]) for row in range(2)).backward()
            adam.step()
            run.step(features)
            assert relative_error(run.averager.v, v) <= 1e-10
        plain = Run(AMA(lr=1e-3, beta1=0.5, eps=1e-2), "ama", 1e-3)
        plain.averager.v.copy_(v)
        assert relative_error(plain.step(features).a, run.step(features).a) > 0.01

    @pytest.mark.parametrize("kernels", BACKENDS)
    def test_the_adam_of_pytorch_0_3(self, kernels):
        """Its recursion on the authors' mean loss, number by number, in double precision:

        p ← p − α √(1−β2^t)/(1−β1^t) · m/(√u + ε), where today's has ε beside √(u/(1−β2^t)).
        """
        rate, beta1, beta2, eps = 3e-3, 0.5, 0.999, 1e-3
        run = Run(AMA(lr=rate, variant="authors-0.3", eps=eps), "ama", rate, kernels)
        today = Run(AMA(lr=rate, variant="authors", eps=eps), "ama", rate, kernels)
        today.target = run.target
        assert torch.equal(run.averager.v, today.averager.v)
        v = run.averager.v.tolist()
        m, u = ([[0.0] * FEATURES for _ in range(2)] for _ in range(2))
        for t in range(1, 13):
            features = draw_features()
            numbers = features.T.tolist()
            for d, column in enumerate(numbers):
                mean = math.fsum(column) / len(column)
                variance = math.fsum((x - mean) ** 2 for x in column) / (len(column) - 1)
                for row, found in enumerate((mean, variance)):
                    g = (v[row][d] - (float(run.target[row, d]) - found)) * 2 / FEATURES
                    m[row][d] = beta1 * m[row][d] + (1 - beta1) * g
                    u[row][d] = beta2 * u[row][d] + (1 - beta2) * g * g
                    step_size = rate * math.sqrt(1 - beta2**t) / (1 - beta1**t)
                    v[row][d] -= step_size * m[row][d] / (math.sqrt(u[row][d]) + eps)
            run.step(features)
            today.step(features)
            assert relative_error(run.averager.v, torch.tensor(v, dtype=torch.float64)) <= 1e-12
            assert relative_error(run.averager.m, torch.tensor(m, dtype=torch.float64) * FEATURES / 2) <= 1e-12
            assert relative_error(run.averager.v, today.averager.v) > 1e-4, "another Adam"

    def test_authors_start_uniform(self):
        """±1/√D, apart for mean and variance, the same for the same seed only."""
        features = 20_000
        starts = {}
        for seed in (0, 0, 1):
            averager = AMA(variant="authors", seed=seed)
            averager.reset(features)
            v = averager.v.double() * math.sqrt(features)
            assert float(v.abs().max()) <= 1 + 1e-6
            for row in v.numpy():
                # Kolmogorov and Smirnov: the largest distance to the uniform distribution, 1e-4 significance.
                distance = np.abs(np.sort(row) - np.linspace(-1, 1, features)).max() / 2
                assert distance <= 2.23 / math.sqrt(features)
            assert abs(float(torch.corrcoef(v)[0, 1])) <= 4 / math.sqrt(features)
            assert not averager.m.any()
            assert not averager.u.any()
            assert seed not in starts or torch.equal(starts[seed], v)
            starts[seed] = v
        assert not torch.equal(starts[0], starts[1])

    def test_authors_start_is_one_whatever_dtype_and_global_seed(self):
        averager = AMA(variant="authors")
        torch.manual_seed(1)
        averager.reset(10, dtype=torch.float64)
        exact = averager.v
        torch.manual_seed(2)
        state = torch.get_rng_state()
        averager.reset(10)
        assert torch.equal(averager.v, exact.float())
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("averager", [AMA(), MovingAverage()], ids=["ama", "ma"])
    def test_paper_starts_at_zero(self, averager):
        averager.reset(7)
        assert averager.v.shape == (2, 7)
        assert not averager.v.any()

    def test_first_step_of_ama_is_the_sign(self):
        """|v| = α whatever |Δ|, and 0 where Δ is exactly 0 (a dead feature)."""
        run = Run(AMA(lr=1e-5), "ama", 1e-5)
        features = draw_features()
        features[:, :5] = 0.25
        run.target[:, :5] = torch.tensor([[0.25], [0.0]])
        run.step(features)
        variance, mean = torch.var_mean(features, dim=0)
        difference = run.target - torch.stack((mean, variance))
        assert float((run.averager.v - 1e-5 * difference.sign()).abs().max()) <= 1e-8

    def test_authors_moving_average_starts_at_the_first_batch(self):
        """…so the first loss is the mean squared difference of that batch, but its gradient carries 2α/D."""
        run = Run(MovingAverage(alpha=0.25, variant="authors"), "ma-authors", 0.25)
        features = draw_features()
        variance, mean = torch.var_mean(features, dim=0)
        moments = torch.stack((mean, variance))
        direction = run.step(features)
        assert torch.allclose(run.averager.v, moments, rtol=1e-14)
        assert relative_error(direction.sums[:2], (run.target - moments).square().mean(dim=1)) <= 1e-12
        slope = -2 * 0.25 / FEATURES * (run.target - moments)
        assert relative_error(direction.b, slope[1] * 2 / (MINIBATCH - 1)) <= 1e-12
        second = draw_features()
        run.step(second)
        variance, mean = torch.var_mean(second, dim=0)
        assert torch.allclose(run.averager.v, 0.75 * moments + 0.25 * torch.stack((mean, variance)), rtol=1e-12)


class PlainMovingAverage(PlainAverager):
    """The paper's moving average, as one would add it."""

    state_names = ("v",)
    v: Tensor

    def __init__(self, alpha: float):
        super().__init__()
        self.alpha = alpha

    def direction(self, difference: Tensor, advance: bool) -> Tensor:
        v = (1 - self.alpha) * self.v + self.alpha * difference
        if advance:
            self.v.copy_(v)
            return v
        return self.v


class TestPlainAverager:
    """An averager in plain PyTorch, beside the fused one of the same rule."""

    @pytest.mark.parametrize("kernels", BACKENDS)
    @pytest.mark.parametrize("correction", [0, 1])
    def test_twenty_steps(self, correction, kernels):
        run = Run(PlainMovingAverage(0.2), "ma", 0.2, kernels, correction)
        for _ in range(20):
            features = draw_features()
            leaf = features.clone().requires_grad_()
            loss = run.oracle(leaf)
            (gradient,) = torch.autograd.grad(loss, leaf)
            direction = run.step(features)
            assert relative_error(direction.sums[:2].sum(), loss) <= 1e-10
            assert relative_error(direction.a + direction.b * features, gradient) <= 1e-10
        assert int(run.averager.steps) == 20

    @pytest.mark.parametrize("kernels", BACKENDS)
    def test_weights_as_the_fused_rule(self, kernels):
        weight = torch.rand(FEATURES, dtype=torch.float64)
        features = [draw_features() for _ in range(3)]
        results = []
        target = None
        for averager in (PlainMovingAverage(0.2), MovingAverage(0.2)):
            run = Run(averager, "ma", 0.2, kernels)
            target = run.target if target is None else target
            run.target = target
            results.append([run.step(x, weight=weight, advance=n < 2) for n, x in enumerate(features)])
        for plain, fused in zip(*results, strict=True):
            for name in ("a", "b", "sums"):
                assert relative_error(getattr(plain, name), getattr(fused, name)) <= 1e-12, name

    def test_saved_and_restored_with_the_objective(self, tiny_extractor, draw_images):
        target = Moments.of(tiny_extractor.features(draw_images(9, torch.float32)).double())
        make = lambda: MomentMatching(tiny_extractor, target, PlainMovingAverage(0.2), kernels="reference")  # noqa: E731
        objective, other = make(), make()
        objective(draw_images(5, torch.float32).requires_grad_()).backward()
        state = objective.state_dict()
        assert set(state) == {"averager.v", "averager.steps"}
        other.load_state_dict(state)
        images = draw_images(5, torch.float32)
        assert torch.equal(other(images.clone().requires_grad_()), objective(images.clone().requires_grad_()))

    def test_start_of_the_state(self):
        class Started(PlainMovingAverage):
            def __init__(self):
                PlainAverager.__init__(self, {"v": lambda num_features: torch.full((2, num_features), 3.0)})

        averager = Started()
        averager.reset(4, dtype=torch.float64)
        assert torch.equal(averager.v, torch.full((2, 4), 3.0, dtype=torch.float64))


class TestManners:
    def test_every_averager_has_a_name_and_defaults(self):
        assert list(AVERAGERS) == ["ama", "ma", "none"]
        assert [type(make()) for make in AVERAGERS.values()] == [AMA, MovingAverage, NoAverage]

    def test_listing_the_names_imports_no_pytorch(self):
        code = "import sys; from engine.comparison.averagers import AVERAGERS; print(*sys.modules)"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert not {"torch", "kernels"} & set(run.stdout.split())

    def test_abstract_ones_cannot_be_made(self):
        for abstract in (Averager, PlainAverager):
            with pytest.raises(TypeError, match="abstract"):
                abstract()

    @pytest.mark.parametrize(
        "make",
        [AMA, MovingAverage, lambda: MovingAverage(variant="authors"), NoAverage, lambda: PlainMovingAverage(0.2)],
        ids=["ama", "ma", "maa", "none", "plain"],
    )
    def test_without_advance_nothing_changes(self, make):
        run = Run(make(), "none", 0.0)
        for advance in (True, False):
            run.step(draw_features())
            before = [tensor.clone() for tensor in state_of(run.averager)]
            run.step(draw_features(), advance=False)
            after = state_of(run.averager)
            assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True)), advance

    def test_results_are_nobody_s_buffers(self):
        """A later step must not change the coefficients of an earlier one."""
        run = Run(AMA(), "ama", 1e-5)
        first = run.step(draw_features())
        kept = [tensor.clone() for tensor in (first.a, first.b, first.sums)]
        run.step(draw_features())
        assert all(torch.equal(a, b) for a, b in zip((first.a, first.b, first.sums), kept, strict=True))

    def test_reset_forgets(self):
        averager = AMA()
        run = Run(averager, "ama", 1e-5)
        run.step(draw_features())
        averager.reset(FEATURES + 1)
        assert averager.v.shape == averager.m.shape == averager.u.shape == (2, FEATURES + 1)
        assert int(averager.steps) == 0
        assert not averager.u.any()

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: AMA(lr=0), "lr: .*0"),
            (lambda: AMA(lr=float("nan")), "lr: .*nan"),
            (lambda: AMA(beta1=1), "beta1: .*1"),
            (lambda: AMA(beta1=-0.1), "beta1: .*-0.1"),
            (lambda: AMA(beta2=1.5), "beta2: .*1.5"),
            (lambda: AMA(eps=-1e-8), "eps: .*-1e-08"),
            (lambda: AMA(variant="code"), "variant: 'code' .*paper, authors, authors-0.3"),
            (lambda: MovingAverage(alpha=0), "alpha: .*0"),
            (lambda: MovingAverage(alpha=1.1), "alpha: .*1.1"),
            (lambda: MovingAverage(variant="ours"), "variant: 'ours'"),
        ],
    )
    def test_wrong_arguments(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()
