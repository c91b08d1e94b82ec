"""Extractors of a network of the user's own, `build_extractor(name, module=...)`."""

import copy

import pytest
import torch
from helpers.visiting import enliven
from oracle import hooked_features, relative_error
from safetensors.torch import save_file
from torch import nn

from engine.representation.architectures import ARCHITECTURES
from engine.representation.build import build_extractor
from engine.support.errors import InputError

SIZE = 12


def own_network():
    layers = [nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(5, 7, 3, padding=1), nn.BatchNorm2d(7), nn.SiLU(), nn.Flatten(), nn.Linear(7 * 36, 4)]
    return enliven(nn.Sequential(*layers))


def images():
    return torch.rand(4, 3, SIZE, SIZE, dtype=torch.float64) * 2 - 1


def test_features_are_those_of_hooks_on_the_module():
    network = own_network()
    extractor = build_extractor("mine", module=network, image_size=SIZE)
    assert [(tap.name, tap.shape) for tap in extractor.taps] == [("mine.2", (5, 12, 12)), ("mine.6", (7, 6, 6))]
    x = images()
    expected = hooked_features(network, [network[2], network[6]])(x)
    assert relative_error(extractor.features(x.float()), expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_module_stays_as_it_is(dtype):
    network = own_network().to(dtype).train()
    before = copy.deepcopy(network.state_dict())
    extractor = build_extractor("mine", module=network, image_size=SIZE)
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert extractor.dtype == torch.float32
    x = images().float()
    with torch.no_grad():
        features = extractor.features(x)
        for parameter in network.parameters():
            parameter.zero_()
        assert torch.equal(extractor.features(x), features), "the extractor has weights of its own"


def test_a_module_has_the_bits_and_the_fingerprint_of_the_named_network():
    torch.manual_seed(3)
    named = build_extractor("vgg-small", image_size=8)
    torch.manual_seed(3)
    own = build_extractor("vgg-small", module=ARCHITECTURES["vgg-small"].make(10, 8), image_size=8)
    assert own.fingerprint == named.fingerprint
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    assert torch.equal(own.features(x), named.features(x))


def test_the_fingerprint_follows_weights_name_and_taps():
    network = own_network()
    first = build_extractor("mine", module=network, image_size=SIZE).fingerprint
    assert build_extractor("mine", module=copy.deepcopy(network), image_size=SIZE).fingerprint == first
    others = [
        build_extractor("mine", module=own_network(), image_size=SIZE),
        build_extractor("other", module=network, image_size=SIZE),
        build_extractor("mine", module=network, image_size=SIZE, layers=1),
        build_extractor("mine", module=network, image_size=SIZE, bn="batch"),
    ]
    assert all(other.fingerprint != first for other in others)
    assert len({tuple(other.fingerprint.items()) for other in others}) == len(others)


def test_weights_from_a_file_replace_the_modules_own(tmp_path):
    network, trained = own_network(), own_network()
    save_file(trained.state_dict(), tmp_path / "trained.safetensors")
    extractor = build_extractor("mine", module=network, image_size=SIZE, weights=tmp_path / "trained.safetensors")
    assert extractor.fingerprint == build_extractor("mine", module=trained, image_size=SIZE).fingerprint


def test_a_name_with_a_plus_is_one_network():
    extractor = build_extractor("a+b", module=own_network(), image_size=SIZE)
    assert [tap.name for tap in extractor.taps] == ["a+b.2", "a+b.6"]


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return torch.relu(self.conv(x)) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"module": nn.Conv2d(3, 4, 3)}, "module"),
        ({"module": nn.ReLU()}, "module"),
        ({"module": Untraceable()}, "module"),
        ({"module": nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())}, "module"),
        ({"module": "vgg19"}, "module"),
        ({"module": own_network(), "name": ""}, "name"),
        ({"module": own_network(), "taps": "conv*"}, "taps"),
        ({"module": own_network(), "weights": "imagenet"}, "weights"),
        ({"module": own_network(), "weights": ["a", "b"]}, "weights"),
    ],
    ids=[
        "no activation",
        "no weights",
        "untraceable",
        "one channel",
        "no module",
        "no name",
        "taps",
        "imagenet",
        "files",
    ],
)
def test_bad_modules_are_one_line_about_the_argument(options, argument):
    with pytest.raises(InputError) as error:
        build_extractor(**({"name": "mine", "image_size": SIZE} | options))
    assert error.value.argument == argument
    assert "\n" not in str(error.value)
