"""The rows of bench.ranks."""

from __future__ import annotations

from dataclasses import dataclass

from bench.rows import Row


@dataclass(frozen=True, kw_only=True)
class EqualityRow(Row):
    """W ranks against one: the largest ‖difference‖/‖value‖ of all tensors of a kind, on any rank.

    Attributes:
        method: "gfmn" or "mmd".
        averager: of gfmn; "" for mmd.
        ranks: W.
        minibatch: over all ranks; no multiple of W, so that shares differ.
        steps: of training after which `trained` is compared.
        gradient: of the generator's gradients in the first step.
        loss: of the first step.
        state: of the averager's state after the first step; None where there is none.
        trained: of all that the generator has learnt.
    """

    method: str
    averager: str
    ranks: int
    minibatch: int
    steps: int
    gradient: float
    loss: float
    state: float | None = None
    trained: float

    def cells(self) -> dict[str, object]:
        return {
            "method": f"{self.method} {self.averager}".strip(),
            "ranks": self.ranks,
            "gradient": f"{self.gradient:.1e}",
            "loss": f"{self.loss:.1e}",
            "averager": "" if self.state is None else f"{self.state:.1e}",
            f"generator, {self.steps} steps": f"{self.trained:.1e}",
        }


@dataclass(frozen=True, kw_only=True)
class BytesRow(Row):
    """What one rank hands to the collectives of one kind in a step.

    Attributes:
        what: "moments", "features", "counts", "gradients" or "BatchNorm".
        calls: collectives.
        counted: bytes of their results on one rank.
        formula: bytes that there should be.
    """

    extractor: str
    image_size: int
    minibatch: int
    ranks: int
    what: str
    calls: int
    counted: int
    formula: int

    def cells(self) -> dict[str, object]:
        return {
            "ranks": self.ranks,
            "what": self.what,
            "collectives": self.calls,
            "bytes": f"{self.counted:,}",
            "formula": f"{self.formula:,}",
        }


@dataclass(frozen=True, kw_only=True)
class TimeRow(Row):
    """A training step of a job.

    Attributes:
        threads: of each rank.
        seconds: of every step that was timed, each the slowest rank's.
        p20, p50, p80: of these.
    """

    extractor: str
    image_size: int
    minibatch: int
    dtype: str
    ranks: int
    threads: int
    seconds: list[float]
    p20: float
    p50: float
    p80: float

    def cells(self) -> dict[str, object]:
        return {
            "ranks": self.ranks,
            "threads of each": self.threads,
            "p20, s": f"{self.p20:.3f}",
            "p50": f"{self.p50:.3f}",
            "p80": f"{self.p80:.3f}",
            "least–most": f"{min(self.seconds):.3f}–{max(self.seconds):.3f}",
        }


@dataclass(frozen=True, kw_only=True)
class AloneRow(Row):
    """What a step of a single process spends in calls of `Ranks`, each of which returns its argument.

    Attributes:
        calls: name → how often a step calls it.
        call_seconds: of all of them together, each timed alone.
        step_seconds: median of a step.
    """

    extractor: str
    image_size: int
    minibatch: int
    calls: dict[str, int]
    call_seconds: float
    step_seconds: float

    def cells(self) -> dict[str, object]:
        return {
            "calls a step": ", ".join(f"{name} {count}" for name, count in self.calls.items()),
            "all calls, µs": f"{1e6 * self.call_seconds:.1f}",
            "step, s": f"{self.step_seconds:.3f}",
            "share": f"{self.call_seconds / self.step_seconds:.5%}",
        }


@dataclass(frozen=True, kw_only=True)
class ModelRow(Row):
    """A modelled step of W ranks, one GPU each; nothing is measured. Seconds.

    Attributes:
        network: between the ranks.
        growing: whether the minibatch grows with W (weak scaling), or is the same for all W (strong).
        minibatch: over all ranks.
        compute: of a rank's share of the images.
        fixed: what every rank does whatever its share: merge, averager and coefficients, Adam.
        gather, reduce: moments and gradients on their way.
        latency: of all collectives.
        total: of all that.
        efficiency: of W GPUs, against one.
        assumed: what the row follows from, by name.
    """

    network: str
    growing: bool
    ranks: int
    minibatch: int
    compute: float
    fixed: float
    gather: float
    reduce: float
    latency: float
    total: float
    efficiency: float
    assumed: dict[str, float]

    def cells(self) -> dict[str, object]:
        parts = {"compute": self.compute, "fixed": self.fixed, "gather": self.gather, "all-reduce": self.reduce,
                 "latencies": self.latency, "step": self.total}  # fmt: skip
        return {
            "network": self.network,
            "minibatch": f"{self.minibatch:,}{', growing' if self.growing else ''}",
            "ranks": self.ranks,
            **{f"{name}, ms (modelled)": f"{1e3 * value:.3f}" for name, value in parts.items()},
            "efficiency (modelled)": f"{self.efficiency:.0%}",
        }
