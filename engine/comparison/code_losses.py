"""How far codes are from a prior: pure functions of codes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from engine.comparison.distances import kernels, mmd

IMQ_SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""s of the C = 2·nz·s of WAE's kernels."""
ROOT_FLOOR = 1e-6


def kl_to_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(μ, diag σ²) ‖ N(0, I)) = ½ Σ_d (μ_d² + σ_d² − log σ_d² − 1) of every row [n, nz], as [n].

    Kingma & Welling 2014, appendix B.
    """
    return 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(dim=1)


def wae_mmd(codes: Tensor, z: Tensor, variance: float = 1.0) -> Tensor:
    """MMD², unbiased, of codes and draws of the prior, [N, nz] both, as [] (Tolstikhin et al. 2018, algorithm 2).

    With k(x, y) = Σ_s C / (C + ‖x − y‖²), C = 2·nz·s·`variance` and s of `IMQ_SCALES`; s = 1 is the mean of ‖z − z'‖².

    Args:
        variance: that of each coordinate of the prior.

    Raises:
        InputError: "x" or "y", for fewer than 2 rows, or rows of different lengths.
    """
    unit = 2 * z.shape[1] * variance
    return mmd(codes, z, kernels.imq([unit * scale for scale in IMQ_SCALES]), unbiased=True)


def root_mmd_of_codes(drawn: Tensor, real: Tensor, bandwidths: Sequence[float]) -> Tensor:
    """√(MMD² + `ROOT_FLOOR`) of drawn and real codes, [n, nz] and [m, nz], as [] (Li et al. 2015, section 3).

    MMD² is biased, with k(x, y) = Σ_σ exp(−‖x − y‖²/(2σ²u)); u is the mean of ‖y − y'‖² over pairs of the real codes, a
    unit that no gradient knows. The floor keeps the root's derivative finite where the two sets are alike.
    """
    unit = 2 * real.detach().var(dim=0).sum()
    scale = unit.clamp_min(1e-12).rsqrt()
    squared = mmd(drawn * scale, real.detach() * scale, kernels.gaussian(bandwidths))
    return (squared.clamp_min(0) + ROOT_FLOOR).sqrt()
