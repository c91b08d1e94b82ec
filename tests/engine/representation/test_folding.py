import pytest
import torch
from helpers.visiting import enliven, run
from oracle import relative_error
from torch import fx, nn

from engine.representation.architectures import ARCHITECTURES
from engine.representation.tracing.folding import fold_batchnorm, freeze
from engine.representation.tracing.tap import tap_network


@pytest.mark.parametrize(
    ("name", "size"), [("vgg-small", 32), ("vgg19", 32), ("resnet18", 32), ("dcgan-encoder", 32)], ids=str
)
def test_taps_of_the_frozen_network_agree_with_the_unfolded_one(name, size):
    torch.manual_seed(0)
    network = enliven(ARCHITECTURES[name].make(10, size))
    images = torch.rand(2, 3, size, size) * 2 - 1
    graph, sites = tap_network(network, prefix=name, fold=False)
    with torch.no_grad():
        expected = run(graph, sites, images)
        assert any(isinstance(module, nn.BatchNorm2d) for module in graph.modules())
        frozen = freeze(graph)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())
        found = run(frozen, sites, images)
    for tap, value in found.items():
        assert relative_error(value, expected[tap]) <= 1e-5, tap
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert {parameter.dtype for parameter in frozen.parameters()} == {torch.float32}
    assert all(
        module.weight.is_contiguous(memory_format=torch.channels_last)
        for module in frozen.modules()
        if isinstance(module, nn.Conv2d)
    )


class Awkward(nn.Module):
    """BatchNorm that must not be folded: its convolution runs twice, is read elsewhere, or isn't there."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Conv2d(3, 3, 1)
        self.bn1, self.bn2, self.bn3, self.bn4 = (nn.BatchNorm2d(3) for _ in range(4))
        self.read = nn.Conv2d(3, 3, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = self.bn2(self.twice(self.bn1(self.twice(x)))).relu()
        y = self.read(x)
        x = self.drop(self.bn3(y).relu() + y)
        return self.bn4(x).relu()


def test_what_must_not_be_folded_is_not():
    torch.manual_seed(0)
    network = enliven(Awkward()).double()
    images = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    expected = network(images)
    frozen = freeze(fx.symbolic_trace(network), dtype=torch.float64)
    torch.testing.assert_close(frozen(images), expected)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in frozen.modules()) == 4
    assert not any(isinstance(module, nn.Dropout) for module in frozen.modules())


@pytest.mark.parametrize("bias", [False, True])
def test_folded_weights_are_the_formula(bias):
    torch.manual_seed(0)
    network = enliven(nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4))).double()
    conv, bn = network
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    weight = conv.weight * scale[:, None, None, None]
    shift = ((conv.bias if bias else 0) - bn.running_mean) * scale + bn.bias
    traced = fx.symbolic_trace(network)
    fold_batchnorm(traced)
    folded = traced.get_submodule("0")
    torch.testing.assert_close(folded.weight, weight)
    torch.testing.assert_close(folded.bias, shift)


def test_batch_statistics_stay_where_they_are():
    network = enliven(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    frozen = freeze(fx.symbolic_trace(network), fold=False)
    assert any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())
