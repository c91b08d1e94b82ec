"""Moments of a critic against each image's own, the denoiser written out, and what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.adversaries import SIZE, TinyCritic
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from engine.generation.batch_norm import share_batches
from engine.representation.critics import activation, build_critic
from engine.representation.critics.critic import Critic
from engine.representation.critics.denoiser import Denoiser
from engine.representation.critics.hidden_units import MomentNetwork, hidden_units
from engine.support.errors import InputError
from engine.training.ranks import ALONE

# Name, norm → images of that size.
CRITICS = [
    ("tiny", "none"),
    ("dcgan", "none"),
    ("dcgan", "spectral-scaled"),
    ("resnet", "none"),
    ("encoder-decoder", "none"),
    ("vgg-small", "none"),
]


def made(name: str, norm: str = "none", outputs: int = 1) -> tuple[Critic, int]:
    torch.manual_seed(3)
    if name == "tiny":
        return TinyCritic(outputs, norm=norm).double(), SIZE
    return build_critic(name, image_size=32, outputs=outputs, norm=norm).double(), 32


def images(count: int, side: int) -> Tensor:
    return torch.rand(count, 3, side, side, dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize(("name", "norm"), CRITICS)
def test_gradient_of_the_mean_is_the_mean_of_gradients(name: str, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """E ∇_w D, of every image's own gradient by vmap (through PyTorch's own LeakyReLU), and ∇_w E D."""
    critic, side = made(name, norm)
    network, x = MomentNetwork(critic, 0.5), images(3, side)
    critic.eval()
    weights = {name: weight.detach() for name, weight in critic.named_parameters()}

    def output(weights: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(critic, weights, (image[None],)).squeeze()

    with monkeypatch.context() as patch:
        patch.setattr(activation, "rectified", lambda x, slope=0.0: F.leaky_relu(x, slope))
        each = vmap(grad(output), in_dims=(None, 0))(weights, x)
    kept = {id(weight) for weight in network.weights}
    own = [each[name].mean(dim=0).flatten() for name, weight in critic.named_parameters() if id(weight) in kept]
    left = {name for name, weight in critic.named_parameters() if id(weight) not in kept}
    assert {name for name in left if not name.startswith("decoder")} == {"last.bias"}
    torch.testing.assert_close(each["last.bias"], torch.ones(3, 1, dtype=torch.float64))
    expected = torch.cat(own)
    found = network.means(x, 3)
    torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        layers = torch.cat([0.5 * layer.mean(dim=0).flatten() for layer in (x, *hidden_units(critic.eval(), x)[1])])
    torch.testing.assert_close(found[len(expected) :], layers)
    parts = network.means(x[:1], 3) + network.means(x[1:], 3)
    torch.testing.assert_close(parts, found, rtol=1e-10, atol=1e-10)
    critic.train()
    torch.testing.assert_close(network.means(x, 3), found, rtol=1e-12, atol=1e-12)  # spectral vectors as they were
    assert critic.training


def test_hidden_units_are_what_activations_give() -> None:
    critic, side = made("dcgan")
    x = images(2, side)
    outputs, units = hidden_units(critic, x)
    expected, h = [], x
    for layer in critic.layers:
        h = layer(h)
        if isinstance(layer, activation.Rectified):
            expected.append(h)
    torch.testing.assert_close(units, expected)
    torch.testing.assert_close(outputs, critic(x))
    # resnet: 4 blocks, one ReLU in the first, two in each other, and the last one; resnet18: its stem, and two a block.
    counts = {name: len(hidden_units(made(name)[0], x)[1]) for name in ("resnet", "vgg-small", "resnet18")}
    assert counts == {"resnet": 12, "vgg-small": 6, "resnet18": 17}
    assert len(hidden_units(made("tiny")[0], images(2, SIZE))[1]) == 1
    assert not any(module._forward_hooks for module in critic.modules())


def test_derivatives_of_moments_by_finite_differences() -> None:
    critic, _ = made("tiny")
    network, x = MomentNetwork(critic, 0.5), images(2, SIZE)
    few = x[:, :, :2, :2].clone().requires_grad_()

    def means(part: Tensor) -> Tensor:
        whole = x.clone()
        whole[:, :, :2, :2] = part
        found = network.means(whole, 2, create_graph=True)
        return torch.cat([found[:40], found[-30:]])

    assert torch.autograd.gradcheck(means, few)


def test_moments_refuse_what_is_no_network_of_moments() -> None:
    with_batches, _ = made("tiny", "batch")
    for critic in (made("tiny", outputs=2)[0], build_critic("autoencoder", image_size=32)):
        with pytest.raises(InputError, match="one output") as error:
            MomentNetwork(critic, 1.0)
        assert error.value.argument == "critic"
    with pytest.raises(InputError, match="mixes the images") as error:
        MomentNetwork(with_batches, 1.0)
    assert error.value.argument == "critic"


@pytest.mark.parametrize("shared", [False, True])
def test_denoiser_written_out(shared: bool) -> None:
    torch.manual_seed(5)
    denoiser = Denoiser(4, width=3, layers=3).double()
    if shared:
        share_batches(denoiser, ALONE)
    (first, _, norm, *_), second = denoiser.layers[:3], denoiser.layers[5:8]
    h = torch.randn(6, 4, dtype=torch.float64)
    for training in (True, False):
        denoiser.train(training)
        expected = h
        for linear, batch_norm in ((first, norm), (second[0], second[2])):
            expected = expected @ linear.weight.T
            mean, variance = expected.mean(dim=0), expected.var(dim=0, correction=0)
            if not training:  # after one minibatch, with momentum 0.1
                mean, variance = 0.1 * mean, 0.9 + 0.1 * expected.var(dim=0)
            normalised = (expected - mean) / (variance + batch_norm.eps).sqrt()
            expected = (normalised * batch_norm.weight + batch_norm.bias).clamp(min=0)
            if not training:
                break
        if training:
            expected = expected @ denoiser.layers[-1].weight.T + denoiser.layers[-1].bias
            torch.testing.assert_close(denoiser(h), expected, rtol=1e-10, atol=1e-10)
        else:
            torch.testing.assert_close(denoiser.layers[:5](h), expected, rtol=1e-10, atol=1e-10)
    sizes = [tuple(layer.weight.shape) for layer in Denoiser(7, 5, 10).layers if isinstance(layer, nn.Linear)]
    assert sizes == [(5, 7), *[(5, 5)] * 8, (7, 5)]
