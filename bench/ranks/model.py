"""A model of a step on W GPUs, from assumed bandwidths and latencies. Nothing here is measured.

    t(W) = t_compute(N/W) + t_fixed(W) + 4·2·D·(W−1)/B + 2·(W−1)/W·4·P/B + latencies

Compute is a time per image, but not less than what a GPU needs to launch a step's kernels. What is fixed does not
shrink with W: every rank merges the moments of all W, and takes the averager's step, the coefficients and Adam on its
own. Moments come by a ring of W−1 hops, gradients by one of 2(W−1), and every BatchNorm needs three small sums of
2·log₂W hops: two in forward, one in backward. Left out are the counts, a few bytes between CPUs, and that moments may
travel while the pass goes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import nn

from bench.ranks.rows import ModelRow
from bench.rows import environment

# Bytes of memory traffic: a feature's averager step (10 numbers read, 8 written), a merge of two ranks' moments of a
# feature (4 read, 2 written), and Adam's step of a weight (4 read, 3 written).
_AVERAGER, _MERGE, _ADAM = 72, 24, 28
_SUMS_OF_A_NORM = 3


@dataclass(frozen=True)
class Network:
    """What lies between two ranks, as NCCL models it for its own choices (its tuning constants, µs and GB/s).

    Attributes:
        bandwidth: bytes a second, each way, that a rank gets.
        ring_base, ring_hop: seconds of a collective that moves much: to begin, and for every hop (ring, "Simple").
        tree_base, tree_hop: of one that moves little (tree, "LL").
    """

    bandwidth: float
    ring_base: float
    ring_hop: float
    tree_base: float
    tree_hop: float


NETWORKS: Mapping[str, Network] = {
    "NVLink, H100/H200": Network(360e9, 8.4e-6, 3.4e-6, 6.8e-6, 0.6e-6),
    # 88% of the line's 12.5 GB/s: assumed. One GPU a machine.
    "100 Gbit Ethernet": Network(11e9, 8.4e-6, 14e-6, 6.8e-6, 5.0e-6),
}


@dataclass(frozen=True)
class Machine:
    """What a GPU alone is assumed to do.

    Attributes:
        image_seconds: of a step's kernels, for each image.
        least_images: a step takes at least as long as one of so many images.
        memory: bytes a second that kernels reach, 80% of an H200's 4.8 TB/s.
    """

    image_seconds: float
    least_images: int = 64
    memory: float = 0.8 * 4.8e12


@dataclass(frozen=True)
class Work:
    """Sizes of what is trained: D features, P weights of the generator, its BatchNorms."""

    features: int
    weights: int
    norms: int

    @classmethod
    def of(cls, features: int, generator: nn.Module) -> Work:
        norms = sum(isinstance(module, nn.BatchNorm2d) for module in generator.modules())
        return cls(features, sum(weight.numel() for weight in generator.parameters()), norms)


def modelled_step(network: str, machine: Machine, work: Work, ranks: int, minibatch: int) -> dict[str, float]:
    """compute, fixed, gather, reduce, latency: seconds of a step of `minibatch` images on `ranks` GPUs."""
    line, others = NETWORKS[network], ranks - 1
    share = math.ceil(minibatch / ranks)
    traffic = _AVERAGER * work.features + others * _MERGE * work.features + _ADAM * work.weights
    ring, tree = line.ring_base, line.tree_base + 2 * math.log2(ranks) * line.tree_hop
    hops = 3 * others  # W−1 of the gather, 2(W−1) of the all-reduce
    return {
        "compute": machine.image_seconds * max(share, machine.least_images),
        "fixed": traffic / machine.memory,
        "gather": 4 * 2 * work.features * others / line.bandwidth,
        "reduce": 2 * others / ranks * 4 * work.weights / line.bandwidth,
        "latency": 0.0 if ranks == 1 else 2 * ring + hops * line.ring_hop + _SUMS_OF_A_NORM * work.norms * tree,
    }


def model_rows(machine: Machine, work: Work, minibatches: Sequence[int], ranks: Sequence[int]) -> Iterator[ModelRow]:
    """Every network, with the minibatch the same for all W and growing with it."""
    where = environment()
    for network, line in NETWORKS.items():
        assumed = {**asdict(machine), **asdict(work), **asdict(line)}
        for growing in (False, True):
            for minibatch in minibatches:
                alone = sum(modelled_step(network, machine, work, 1, minibatch).values())
                for size in ranks:
                    images = minibatch * size if growing else minibatch
                    if images < size:
                        continue
                    parts = modelled_step(network, machine, work, size, images)
                    total = sum(parts.values())
                    yield ModelRow(
                        network=network, growing=growing, ranks=size, minibatch=images, **parts, total=total,
                        efficiency=alone / total / (1 if growing else size), assumed=assumed, environment=where,
                    )  # fmt: skip
