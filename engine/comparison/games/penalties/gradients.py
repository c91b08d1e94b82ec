"""Penalties of the critic's derivatives by images. They need autograd of autograd, and nothing fused."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.comparison.distances.diagonals import diagonal
from engine.comparison.distances.kernels import Kernel
from engine.comparison.games.outputs import check_positive, wide
from engine.comparison.games.penalties.protocols import SCALE, Added, Play, tracked


@dataclass(frozen=True)
class GradientPenalty(Added):
    """λ (‖∇D(x̂)‖ − 1)² at x̂ = u x + (1−u) G, one u for each image (WGAN-GP, Gulrajani et al. 2017, equation 3).

    For a critic with several outputs ‖∇D‖ is the Frobenius norm of the Jacobian, which bounds the Lipschitz constant.
    Where a critic's derivative is exactly 0, the norm has the subgradient 0. Draws: one number for each image. Cost: a
    forward, one backward for every output, and their backward.

    Raises:
        InputError: "weight", if it isn't positive and finite.
    """

    weight: float = 10.0
    double_backward = True

    def __post_init__(self) -> None:
        check_positive("weight", self.weight)

    def terms(self, play: Play) -> Tensor:
        """See `Penalty.terms`; one for every pair of a real and a generated image."""
        images = mixtures(play)
        return self.weight * (root(squared_jacobian(wide(play.critic(images)), images)) - 1).square()


@dataclass(frozen=True)
class R1(Added):
    """γ/2 ‖∇D(x)‖² at real images (Mescheder et al. 2018, section 4.1).

    The authors' code calls γ/2 its reg_param, so its 10 is a weight of 20 here. Several outputs: the Frobenius norm of
    the Jacobian. Cost: one backward for every output, and their backward; the forward is the game's.

    Raises:
        InputError: "weight" (γ), if it isn't positive and finite.
    """

    weight: float = 10.0
    double_backward = True
    at_real = True

    def __post_init__(self) -> None:
        check_positive("weight", self.weight)

    def terms(self, play: Play) -> Tensor:
        """See `Penalty.terms`; one for every real image."""
        images, phi = play.real_pass()
        return self.weight / 2 * squared_jacobian(wide(phi), images)


@dataclass(frozen=True)
class WitnessPenalty(Added):
    """λ (‖∇f(x̂)‖ − 1)² of MMD's witness f, at x̂ = u x + (1−u) G (Bińkowski et al. 2018).

        f(x̂) = 1/N Σ_j k(φ(x_j), φ(x̂)) − 1/N Σ_j k(φ(G_j), φ(x̂))

    with the real and generated images of all ranks in the sums. f is differentiated by x̂ alone; the penalty's gradient
    for the critic goes through φ(x̂), φ(x_j) and φ(G_j). Draws: one number for each image. Cost: a forward, a backward
    and its backward, whatever F.

    Raises:
        InputError: "weight", if it isn't positive and finite.
    """

    kernel: Kernel
    weight: float = 1.0
    double_backward = True

    def __post_init__(self) -> None:
        check_positive("weight", self.weight)

    def terms(self, play: Play) -> Tensor:
        """See `Penalty.terms`; one for every pair of a real and a generated image."""
        images = mixtures(play)
        phi = wide(play.critic(images))
        towards, away = (self.kernel(phi, outputs).mean(dim=1) for outputs in (play.phi_real, play.phi_fake))
        return self.weight * (root(squared_jacobian((towards - away)[:, None], images)) - 1).square()


@dataclass(frozen=True)
class Scaled:
    """loss / (1 + λ E s(x)): with the loss −MMD² that of the scaled MMD (SMMD, Arbel et al. 2018, section 3).

        s(x) = k(x, x) + Σ_i ∂²k(y, z) / ∂y_i ∂z_i at y = z = x

    over the real images x, for the kernel of images k(y, z) = K(φ(y), φ(z)). By the form of K:

        g(‖a−b‖²)         s = g(0) − 2 g'(0) ‖∇φ(x)‖²_F
        a·b               s = ‖φ(x)‖² + ‖∇φ(x)‖²_F
        (a·b/F + 1)^p     s = u^p + p/F u^(p−1) ‖∇φ(x)‖²_F + p (p−1)/F² u^(p−2) ‖∇½‖φ(x)‖²‖²,  u = ‖φ(x)‖²/F + 1

    and sums of these; −‖a−b‖ has none. The paper divides by λ' + E s, and this by 1 + λ E s = λ (λ' + E s) with
    λ = 1/λ': its loss is λ times the one here. With `values=False` s has no k(x, x), as in the authors' experiments,
    with λ = 10.

    Only the critic's loss is divided. To the generator, which doesn't change the real images, the divisor is a
    constant: `applied(loss, terms.detach())` divides its loss, but Adam sees that only as far as it changes from step
    to step.

    Cost: one backward for every output of the critic, and their backward; the forward is the game's.

    Raises:
        InputError: "weight", if it isn't positive and finite; "kernel", if it has no such s.
    """

    kernel: Kernel
    weight: float = 10.0
    values: bool = True
    double_backward = True
    at_real = True
    has_terms = True
    figure = SCALE

    def __post_init__(self) -> None:
        check_positive("weight", self.weight)
        diagonal(self.kernel, torch.zeros(1, 1))  # refuses a kernel that has none

    def terms(self, play: Play) -> Tensor:
        """s [n] of this rank's real images."""
        images, phi = play.real_pass()
        phi = wide(phi)
        value, slope, along = diagonal(self.kernel, phi)
        found = slope * squared_jacobian(phi, images)
        if along is not None:
            halves = phi.square().sum(dim=1, keepdim=True) / 2
            found = found + along * squared_jacobian(halves, images)
        return found + value if self.values else found

    def applied(self, loss: Tensor, terms: Tensor) -> Tensor:
        """loss / (1 + λ · mean of the terms)."""
        return loss / (1 + self.weight * terms.mean())

    def project_(self, critic: nn.Module) -> None:
        """Nothing to move."""


def mixtures(play: Play) -> Tensor:
    """x̂ = u x + (1−u) G [n, …], with one u for each image; tracked."""
    share = play.uniform(1).to(play.real).view(-1, *[1] * (play.real.dim() - 1))
    return tracked(share * play.real + (1 - share) * play.fake)


def squared_jacobian(outputs: Tensor, images: Tensor) -> Tensor:
    """‖∂outputs_n/∂image_n‖²_F [n] of outputs [n, F]; differentiable.

    The derivative of an output's sum over all images is each image's own one, as long as no other image's output
    depends on it.
    """
    gradients = (
        torch.autograd.grad(outputs[:, column].sum(), images, create_graph=True)[0]
        for column in range(outputs.shape[1])
    )
    return torch.stack([wide(gradient).flatten(1).square().sum(dim=1) for gradient in gradients]).sum(dim=0)


def root(squares: Tensor) -> Tensor:
    """√ with the derivative 0 at 0: there a norm has a kink, and √ an infinite derivative."""
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)
