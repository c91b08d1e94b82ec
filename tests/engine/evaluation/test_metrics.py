"""The metrics are torch-fidelity's own numbers, and what cannot be computed is refused."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
import torch_fidelity
from helpers.judging import CLASSES, digits, reference, write_folder

from engine.evaluation.image_set import ImageSet
from engine.evaluation.judges import evaluation_network
from engine.evaluation.metrics import METRICS, compute_metrics
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


def test_inceptions_precision_and_recall_are_of_vgg16(monkeypatch, inception_weights):
    calls = []

    def calculate(**options):
        calls.append({key: options[key] for key in ("feature_extractor", "fid", "kid", "isc", "prc")})
        return {"precision": 0.5, "recall": 0.25} if options["prc"] else {"frechet_inception_distance": 1.0}

    monkeypatch.setattr(torch_fidelity, "calculate_metrics", calculate)
    monkeypatch.setattr("engine.evaluation.metrics.download_judges", lambda *_: None)
    network = evaluation_network(None, weights=inception_weights, image_size=32)
    found = compute_metrics(digits(0, 10), digits(0, 10), network, ("prc", "fid"), device="cpu")
    assert found == {"frechet_distance": 1.0, "precision": 0.5, "recall": 0.25}
    assert calls == [
        {"feature_extractor": network.name, "fid": True, "kid": False, "isc": False, "prc": False},
        {"feature_extractor": "vgg16", "fid": False, "kid": False, "isc": False, "prc": True},
    ]


@pytest.mark.parametrize(
    ("metrics", "generated", "real", "facts"),
    [
        (("fid",), 1, 9, ("fid", "2 generated", "1")),
        (("fid",), 9, 1, ("fid", "2 real", "1")),
        (("kid",), 39, 50, ("kid", "40 generated", "39")),
        (("is",), 9, 9, ("is", "10 generated", "9")),
        (("fid", "prc"), 9, 3, ("prc", "4 real", "3")),
        (("fid", "lpips"), 9, 9, ("lpips", *METRICS)),
        ((), 9, 9, METRICS),
        (("fid",), 9, None, ("fid",)),
    ],
)
def test_too_few_images_are_refused(network, metrics, generated, real, facts):
    with pytest.raises(InputError) as error:
        compute_metrics(digits(0, generated), None if real is None else digits(0, real), network, metrics, **CPU)
    assert error.value.argument == "metrics"
    assert all(fact in error.value.message for fact in facts)


def test_the_fewest_images_are_enough(network):
    found = compute_metrics(digits(0, 40), digits(0, 40), network, METRICS, **CPU)
    assert len(found) == 7
    assert compute_metrics(digits(0, 2), digits(0, 2), network, ("fid",), **CPU).keys() == {"frechet_distance"}


def test_default_subsets_of_kid_need_a_thousand(network):
    with pytest.raises(InputError, match="1000 generated") as error:
        compute_metrics(digits(0, 999), digits(0, 1000), network, ("kid",), device="cpu")
    assert error.value.argument == "metrics"
    with pytest.raises(InputError) as error:
        compute_metrics(digits(0, 9), digits(0, 9), network, ("kid",), device="cpu", kid_subset_size=1)
    assert error.value.argument == "kid_subset_size"


def test_sizes_that_differ_are_refused(network, tmp_path):
    small, wide = digits(0, 20, size=16), F.pad(digits(0, 20), (1, 1))
    folder = write_folder(tmp_path / "wide", wide)
    for generated, real, argument, sizes in (
        (small, digits(0, 20), "generated", ("16×16", "32×32")),
        (wide, wide, "generated", ("32×34", "32×32")),
        (folder, digits(0, 20), folder, ("32×34", "32×32")),
        (ImageSet(wide, "these"), wide, "these", ("32×34", "32×32")),
    ):
        with pytest.raises(InputError) as error:
            compute_metrics(generated, real, network, ("fid",), **CPU)
        assert error.value.argument == argument
        assert all(size in error.value.message for size in sizes)


def test_a_file_that_cannot_be_decoded_is_named(network, tmp_path):
    folder = write_folder(tmp_path / "damaged", digits(0, 20))
    file = folder / "00007.png"
    file.write_bytes(file.read_bytes()[:120])
    with pytest.raises(InputError) as error:
        compute_metrics(digits(0, 20), folder, network, ("fid",), **CPU)
    assert error.value.argument == file
    with warnings.catch_warnings():  # torch-fidelity leaves a file open that it cannot decode
        warnings.simplefilter("ignore", ResourceWarning)
        del error
        gc.collect()


def test_few_images_are_said_to_be_biased_once(network, caplog):
    images = digits(0, 30)
    for _ in range(2):
        compute_metrics(images, digits(40, 77), network, ("fid",), **CPU)
    warnings = [record.message for record in caplog.records if "30 images with 128 features" in record.message]
    assert len(warnings) == 1
