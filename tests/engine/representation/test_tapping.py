import pytest
import torch
import torch.nn.functional as F
from helpers.visiting import enliven, run
from torch import nn
from torchvision.models import convnext_tiny
from torchvision.models.swin_transformer import SwinTransformer, SwinTransformerBlockV2

from engine.representation.tracing.tap import NoMatch, tap_network


class EveryActivation(nn.Module):
    """All kinds of activations, called in all ways, some in place, with a shortcut and a vector at the end."""

    def __init__(self):
        super().__init__()
        self.conv = nn.ModuleList(nn.Conv2d(3 if i == 0 else 5, 5, 3, padding=1) for i in range(7))
        self.relu, self.silu, self.relu6 = nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.ReLU6(inplace=True)
        self.gelu = nn.GELU()
        self.linear = nn.Linear(5, 4)

    def steps(self, x):
        x = self.relu(self.conv[0](x))
        yield x
        x = F.relu6(self.conv[1](x), inplace=True)
        yield x
        x = self.silu(self.conv[2](x))
        yield x
        shortcut = x
        x = self.conv[3](x)
        x += shortcut
        x = self.relu(x)
        yield x
        x = self.gelu(self.conv[4](x))
        yield x
        x = self.conv[5](x).relu_()
        yield x
        x = F.silu(self.conv[6](x))
        yield x
        yield torch.relu(self.linear(x.mean(dim=(2, 3))))

    def forward(self, x):
        *_, last = self.steps(x)
        return last


def test_every_activation_is_found_named_and_equal_to_the_networks_own():
    torch.manual_seed(0)
    network = EveryActivation().eval().double()
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    expected = [value.clone() for value in network.steps(images.clone())][:-1]
    graph, sites = tap_network(network, prefix="net", example=images)
    assert [site.activation for site in sites] == ["relu", "relu6", "none", "relu", "none", "relu", "none"]
    assert [site.index for site in sites] == list(range(7))
    taps = run(graph, sites, images)
    names = ["relu", "relu6", "silu", "relu_1", "gelu", "relu_2", "silu_1"]
    assert list(taps) == [site.name for site in sites] == [f"net.{name}" for name in names]
    for tap, value in zip(taps.values(), expected, strict=True):
        torch.testing.assert_close(tap, value, rtol=0, atol=1e-14)
    assert "linear" not in dict(graph.named_modules())


def test_names_are_modules_and_functions():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU())
    network.append(network[1])
    _, sites = tap_network(network.eval(), prefix="net")
    assert [site.name for site in sites] == ["net.1", "net.3", "net.1_1"]


class LateReader(nn.Module):
    """Something reads the input of an activation in place after it: it sees the activation's output."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.first(x)
        y = self.second(self.relu(x))
        return torch.relu(y + x)


@pytest.mark.parametrize("pattern", [None, "relu_1"])
def test_reader_after_an_activation_in_place(pattern):
    torch.manual_seed(1)
    network = LateReader().eval()
    images = torch.randn(2, 3, 4, 4)
    expected = network(images)
    graph, sites = tap_network(network, prefix="net", pattern=pattern)
    *_, tap = run(graph, sites, images).values()
    torch.testing.assert_close(tap, expected)


def small():
    layers = []
    for width in (4, 5, 6, 7):
        layers += [nn.Conv2d(layers[-3].out_channels if layers else 3, width, 3, padding=1), nn.BatchNorm2d(width)]
        layers += [nn.ReLU()]
    return enliven(nn.Sequential(*layers))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["2", "5", "8", "11"]),
        ({"layers": 1}, ["2"]),
        ({"layers": 3}, ["2", "5", "8"]),
        ({"layers": 9}, ["2", "5", "8", "11"]),
        ({"layers": 2, "layers_from": "top"}, ["8", "11"]),
        ({"pattern": "[58]"}, ["5", "8"]),
        ({"pattern": "net.1*"}, ["11"]),
        ({"pattern": "2, 8"}, ["2", "8"]),
        ({"pattern": "?", "layers": 2}, ["2", "5"]),
        ({"pattern": "?", "layers": 2, "layers_from": "top"}, ["5", "8"]),
    ],
    ids=str,
)
def test_selection(options, expected):
    network = small()
    images = torch.randn(2, 3, 4, 4)
    everything = run(*tap_network(small_copy(network), prefix="net"), images)
    graph, sites = tap_network(small_copy(network), prefix="net", **options)
    assert [site.name for site in sites] == [f"net.{name}" for name in expected]
    for name, tap in run(graph, sites, images).items():
        torch.testing.assert_close(tap, everything[name])
    last = int(expected[-1])
    assert all(int(name) < last for name, _ in graph.named_children())


def small_copy(network):
    copy = small()
    copy.load_state_dict(network.state_dict())
    return copy


def test_first_index_numbers_the_taps_of_a_second_network():
    _, sites = tap_network(small(), prefix="net", first_index=5)
    assert [site.index for site in sites] == [5, 6, 7, 8]


class ChannelsLast(nn.Module):
    """Linear layers over the channels of a map [N, H, W, C], as in ConvNeXt and Swin; two readers of the first tap."""

    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 4, 1), nn.Linear(4, 6), nn.Linear(6, 5)
        self.last = nn.Conv2d(5, 7, 1)
        self.norm = nn.LayerNorm(6)

    def steps(self, x):
        y = F.gelu(self.first(self.conv(x).permute(0, 2, 3, 1)))
        yield y.permute(0, 3, 1, 2)
        y = torch.relu(self.second(self.norm(y) + y))
        yield y.permute(0, 3, 1, 2)
        yield torch.relu(self.last(y.permute(0, 3, 1, 2)))

    def forward(self, x):
        *_, last = self.steps(x)
        return last


def test_a_map_behind_a_linear_layer_is_tapped_with_its_channels_second():
    torch.manual_seed(3)
    network = ChannelsLast().eval().double()
    images = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    expected = list(network.steps(images))
    graph, sites = tap_network(network, prefix="net", example=images)
    taps = run(graph, sites, images)
    assert [tuple(tap.shape[1:]) for tap in taps.values()] == [(6, 8, 9), (5, 8, 9), (7, 8, 9)]
    for tap, value in zip(taps.values(), expected, strict=True):
        torch.testing.assert_close(tap, value, rtol=0, atol=1e-14)


def test_convnext_is_tapped_as_its_activations_return():
    network = convnext_tiny().eval()
    seen = []
    for module in network.modules():
        if isinstance(module, nn.GELU):
            module.register_forward_hook(lambda _module, _input, output: seen.append(output.permute(0, 3, 1, 2)))
    images = torch.randn(1, 3, 32, 32)
    network(images)
    expected = list(seen)
    graph, sites = tap_network(network, prefix="net", example=images)
    taps = run(graph, sites, images)
    assert len(taps) == 18
    for tap, value in zip(taps.values(), expected, strict=True):
        torch.testing.assert_close(tap, value)


def test_what_is_made_of_weights_alone_is_no_feature_map():
    """Swin V2's table of biases is [1, H, W, C] behind a ReLU, and says nothing of an image."""
    network = SwinTransformer([4, 4], 12, [2], [2], [4, 4], block=SwinTransformerBlockV2, num_classes=3).eval()
    images = torch.randn(2, 3, 32, 32)
    assert any("cpb_mlp" in name for name, module in network.named_modules() if isinstance(module, nn.ReLU))
    graph, sites = tap_network(network, prefix="net", example=images)
    taps = run(graph, sites, images)
    assert [tuple(tap.shape) for tap in taps.values()] == [(2, 48, 8, 8)] * 2


class Shared(nn.Module):
    """Which sites may work in place: every way to share an input."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x):
        x = self.a(x)
        y = torch.relu(x)  # its input is read again below
        z = torch.relu(self.b(y) + x)  # x is the shortcut
        halves = z.view(z.shape[0], 2, 2, 4, 4)
        return torch.relu(self.pool(halves.flatten(1, 2)))


def test_ownership():
    _, sites = tap_network(Shared().eval(), prefix="net")
    assert [site.owns_input for site in sites] == [False, True, False]


class Untraceable(nn.Module):
    def forward(self, x):
        return torch.relu(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 1)), {}, "net: the network has no feature maps behind ReLU"),
        (nn.Sequential(nn.Flatten(), nn.Linear(48, 4), nn.ReLU()), {}, "net: the network has no feature maps"),
        (Untraceable(), {}, "net: torch.fx cannot trace this network"),
        (nn.Sequential(nn.Conv2d(3, 4, 9), nn.ReLU()), {}, r"net: cannot take images \[2, 3, 4, 4\]"),
    ],
    ids=["no-activation", "vectors", "untraceable", "too-small"],
)
def test_what_cannot_be_tapped(network, options, message):
    with pytest.raises(ValueError, match=message) as error:
        tap_network(network.eval(), prefix="net", example=torch.zeros(2, 3, 4, 4), **options)
    assert "\n" not in str(error.value)


def test_pattern_without_a_match_lists_some_names():
    with pytest.raises(NoMatch, match=r"no tap of net matches 'block.\*'; its taps are net.2, net.5, net.8, net.11$"):
        tap_network(small(), prefix="net", pattern="block.*")
