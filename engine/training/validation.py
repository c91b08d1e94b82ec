"""Evaluation during training: how far the samples are from the real images, and what follows for the learning rate."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.evaluation.fidelity import fidelity
from engine.evaluation.judges import EvaluationNetwork
from engine.evaluation.metrics import KID_SUBSET, common_names
from engine.evaluation.three_sample import three_sample_test
from engine.training.ranks import ALONE, Ranks

log = logging.getLogger("gfmn")

SIGNIFICANCE = 0.05
FACTOR = 0.8
PATIENCE = 3

_NUMPY_SEEDS = 2**32
Draw = Callable[[int], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found.

    Attributes:
        metrics: for `metrics.jsonl`: the first network, numbers of images, distances, the three-sample test if it ran,
            and under "others" what further networks found, as a list of the same entries.
        best: whether no earlier evaluation of the run had a smaller kernel distance.
        lr_factor: factor for the learning rate: 1, or less where samples stopped getting closer.
    """

    metrics: dict[str, Any]
    best: bool
    lr_factor: float


class KernelRate:
    """Lowers the learning rate when samples stop getting closer (Bińkowski et al. 2018, section 5).

    Every evaluation asks the three-sample test whether the new samples are significantly closer to the real images
    than the reference: the first evaluation's, later those of the last evaluation that was. After `PATIENCE` times no
    in a row the rate is multiplied by `FACTOR`, and the count starts again.

    Args:
        real: features [M, F] of the real images.
    """

    def __init__(self, real: Tensor):
        self.real = real
        self.reference: Tensor | None = None
        self.failures = 0

    def update(self, samples: Tensor) -> tuple[float | None, bool]:
        """The test's p-value for new samples' features [N, F] (None the first time), and whether to lower the rate."""
        if self.reference is None:
            self.reference = samples
            return None, False
        p_value = three_sample_test(self.real, samples, self.reference).p_value
        if p_value < SIGNIFICANCE:
            self.reference, self.failures = samples, 0
            return p_value, False
        self.failures += 1
        if self.failures < PATIENCE:
            return p_value, False
        self.failures = 0
        return p_value, True


class Judge:
    """One network that compares samples with the real images.

    Args:
        network: whose features are compared.
        matched: whether they are what a run is trained to match.
        real: uint8 [M, 3, H, W], this rank's share.
        device: where features are computed.
        ranks: the processes that share the images.

    Attributes:
        real: on rank 0 the features [M, F] of all of them.
    """

    def __init__(
        self, network: EvaluationNetwork, matched: bool, real: Tensor, device: torch.device | str, ranks: Ranks
    ):
        self.network, self.matched, self.device, self.ranks = network, matched, device, ranks
        self.fidelity = fidelity()
        self.real = self.features(real)
        if ranks.rank == 0:
            self.real_statistics = self.fidelity.metric_fid.fid_features_to_statistics(self.real)

    def features(self, images: Tensor) -> Tensor:
        """Of everybody's images, in rank order, on rank 0; on others of their own."""
        own = torch.empty(0, self.network.num_features)
        if len(images):
            own = self.network.features(images, device=self.device)
        return torch.cat([state["features"] for state in self.ranks.to_first({"features": own})])

    def compare(self, samples: Tensor, seed: int) -> dict[str, Any]:
        """What `metrics.jsonl` says of samples with these features [N, F]."""
        found: dict[str, Any] = {"network": self.network.label, "is_inception": self.network.is_inception}
        if self.matched:
            found["is_matched"] = True
        return {**found, "samples": len(samples), "real": len(self.real), **self._distances(samples, seed)}

    def _distances(self, samples: Tensor, seed: int) -> dict[str, float]:
        """torch-fidelity's numbers. KID's subsets are no larger than the smaller set."""
        subset = min(KID_SUBSET, len(samples), len(self.real))
        kid = self.fidelity.metric_kid.kid_features_to_metric(
            samples, self.real, kid_subset_size=subset, rng_seed=seed % _NUMPY_SEEDS, verbose=False
        )
        frechet = self.fidelity.metric_fid
        statistics = frechet.fid_features_to_statistics(samples)
        fid = frechet.fid_statistics_to_metric(statistics, self.real_statistics, verbose=False)
        return common_names(fid | kid)


class Validation:
    """Compares samples with real images every so many steps.

    The ranks of a job share the images, real and drawn, and compute features of their own; rank 0 compares, of all
    images in rank order, so that the numbers are those of a single process.

    Args:
        networks: whose features are compared. The first decides what is best, and on the learning rate.
        real: uint8 [M, 3, H, W], this rank's share.
        matched: for each network, whether a run is trained to match its features.
        every: steps between two evaluations.
        samples: of each.
        adapt_lr: whether the three-sample test lowers the learning rate.
        device: where features are computed.
        ranks: the processes that share the images.
    """

    def __init__(
        self,
        networks: Sequence[EvaluationNetwork],
        real: Tensor,
        *,
        matched: Sequence[bool] = (),
        every: int,
        samples: int,
        adapt_lr: bool = False,
        device: torch.device | str = "cpu",
        ranks: Ranks = ALONE,
    ):
        self.every, self.samples, self.ranks = every, samples, ranks
        self.best = float("inf")
        known = matched or (False,) * len(networks)
        self.judges = [Judge(*judge, real, device, ranks) for judge in zip(networks, known, strict=True)]
        self.rate = KernelRate(self.judges[0].real) if adapt_lr and ranks.rank == 0 else None

    @property
    def fingerprint(self) -> dict[str, str]:
        """Of the networks, for the run's: a resumed run is judged by the same ones."""
        names = ["evaluation_weights", *(f"evaluation_weights_{number}" for number in range(2, len(self.judges) + 1))]
        digests = (judge.network.digest for judge in self.judges)
        return {name: digest for name, digest in zip(names, digests, strict=True) if digest}

    def evaluate(self, draw: Draw, step: int, seed: int) -> Evaluation | None:
        """Evaluate `draw(n)`, this rank's share of n images of fresh random z, uint8 [., 3, H, W], after `step` steps;
        `seed` decides KID's subsets. All ranks have to come; rank 0 gets what was found, the others None.

        The last step of a run may lie between two evaluations: it changes no rate, so that a resumed run is
        the one that never stopped. What is `best` is so for later evaluations once `keep` was called.
        """
        images = draw(self.samples)
        features = [judge.features(images) for judge in self.judges]
        if self.ranks.rank > 0:
            return None
        metrics, *others = (judge.compare(own, seed) for judge, own in zip(self.judges, features, strict=True))
        lower = False
        if self.rate is not None and step % self.every == 0:
            p_value, lower = self.rate.update(features[0])
            if p_value is not None:
                metrics["three_sample_p"] = p_value
        if others:
            metrics["others"] = others
        best = metrics["kernel_distance"] < self.best
        return Evaluation(metrics, best, FACTOR if lower else 1.0)

    @contextlib.contextmanager
    def keep(self, evaluation: Evaluation) -> Iterator[None]:
        """Inside, the samples of a `best` evaluation are the best, and remain so unless an error ends the block."""
        before, self.best = self.best, evaluation.metrics["kernel_distance"]
        try:
            yield
        except BaseException:
            self.best = before
            raise

    def state_dict(self) -> dict[str, Tensor]:
        """What the next evaluation depends on."""
        state = {"best": torch.tensor(self.best, dtype=torch.float64)}
        if self.rate is not None:
            state["failures"] = torch.tensor(self.rate.failures)
            if self.rate.reference is not None:
                state["reference"] = self.rate.reference
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.best = float(state["best"])
        if self.rate is not None and "failures" in state:
            self.rate.failures = int(state["failures"])
            self.rate.reference = state.get("reference")
