"""The evaluation command from outside: torch-fidelity's digits, honest names, one clear line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch_fidelity
from helpers.judging import digits, reference, write_folder, write_weights
from PIL import Image

from engine import evaluate
from engine.configuration.command import run_command
from engine.configuration.config import Config
from engine.configuration.inputs import load_run_sampler
from engine.evaluate import named, table, was_trained_on
from engine.evaluation.image_set import ImageSet
from engine.evaluation.judges import EvaluationNetwork
from engine.generation.learnt import FittedGaussian, MappedNoise, MappingNetwork
from engine.generation.networks import build_generator
from engine.generation.priors import Gaussian
from engine.generation.sampling import Sampler
from engine.generation.saved import save_sampler
from engine.training.run_folder import RunFolder

INCEPTION = EvaluationNetwork("inception-v3-compat", "Inception-v3", True, "", True, 2048, None)
VALUES = {
    "frechet_distance": 12.34567,
    "kernel_distance": 0.0012345678,
    "kernel_distance_std": 0.0005,
    "classifier_score": 2.5,
    "classifier_score_std": 0.25,
    "precision": 0.75,
    "recall": 0.5,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Ninety digits and seventy others, some grey, some JPEG, and a file that is no image."""
    root = tmp_path_factory.mktemp("folders")
    first, second = write_folder(root / "a", digits(0, 85)), write_folder(root / "b", digits(100, 170))
    for number, image in enumerate(digits(85, 90).permute(0, 2, 3, 1).numpy()):
        picture = Image.fromarray(np.ascontiguousarray(image))
        picture.convert("L").save(first / f"grey{number}.png") if number % 2 else picture.save(first / f"{number}.JPG")
    (first / "notes.txt").write_text("not an image")
    return first, second


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that never trained, with a generator all the same; its dataset is a file of sixty digits."""
    root = tmp_path_factory.mktemp("run")
    np.save(root / "digits.npy", digits(0, 60).permute(0, 2, 3, 1).numpy())
    folder = RunFolder(root / "run")
    flags = {"data": str(root / "digits.npy"), "loader": "torch", "nz": 8, "horizontal_flip": True}
    folder.write_config(Config.build("digits", flags).to_json())
    torch.manual_seed(2)
    generator = build_generator("dcgan", image_size=32, nz=8)
    save_sampler(folder.generator, Sampler(Gaussian(8), generator), 17)
    return folder.path


def test_two_folders_give_torch_fidelitys_own_digits(folders, weights, small, tmp_path, capsys):
    torch_fidelity.register_feature_extractor("reference-of-folders", reference(weights))
    first, second = map(str, folders)
    expected = torch_fidelity.calculate_metrics(
        **{"input1": first, "input2": second, "feature_extractor": "reference-of-folders", "kid_subset_size": 40},
        **{"isc": True, "fid": True, "kid": True, "prc": True, "cuda": False, "cache": False, "verbose": False},
    )
    file = tmp_path / "report.json"
    capsys.readouterr()
    flags = ["--images", first, "--against", second, "--metrics", "fid,kid,is,prc", "--json", str(file)]
    evaluate.main([*flags, *small])
    heading, by, *rows = capsys.readouterr().out.splitlines()
    assert heading == f"90 images of {first}, against 70 of {second}"
    assert by.startswith("by vgg-small (weights ")
    assert by.endswith("which is not Inception-v3: not comparable with published numbers")
    kid, score = (
        f"{expected[f'{name}_mean']:.{digits}f} ± {expected[f'{name}_std']:.{digits}f}"
        for name, digits in (("kernel_inception_distance", 6), ("inception_score", 4))
    )
    assert [row.split(maxsplit=1) for row in rows] == [
        ["frechet_distance[vgg-small]", f"{expected['frechet_inception_distance']:.4f}"],
        ["kernel_distance[vgg-small]", kid],
        ["classifier_score[vgg-small]", score],
        ["precision[vgg-small]", f"{expected['precision']:.4f}"],
        ["recall[vgg-small]", f"{expected['recall']:.4f}"],
    ]
    report = json.loads(file.read_text())
    found = list(report["metrics"].values())
    names = ("frechet_inception_distance", "kernel_inception_distance_mean", "kernel_inception_distance_std")
    assert found[:3] == [expected[name] for name in names]
    assert report["generated"] == {"source": first, "images": 90, "step": None, "best": False}
    assert report["real"] == {"source": second, "images": 70}
    assert (report["seed"], report["kid_subset_size"], report["image_size"]) == (2020, 40, [32, 32])
    assert report["network"]["label"] == "vgg-small"
    assert report["versions"]["torch-fidelity"] == torch_fidelity.__version__
    assert len(report["network"]["digest"]) == 16


def test_a_runs_samples_against_its_dataset(run_folder, small, tmp_path, capsys):
    def judge(name: str, *flags: str) -> dict[str, object]:
        evaluate.main(["--samples", "50", "--json", str(tmp_path / name), *flags, *small])
        return json.loads((tmp_path / name).read_text())

    run = ["--run", str(run_folder)]
    first, again, other = judge("1", *run), judge("2", *run), judge("3", *run, "--seed", "1")
    assert first == again
    assert first["metrics"] != other["metrics"]
    assert first["generated"] == {"source": str(run_folder), "images": 50, "step": 17, "best": False}
    assert first["real"]["images"] == 60  # --horizontal-flip of the run does not count
    assert first["real"]["source"].startswith("images (")
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3 * 4
    assert out[0].startswith(f"50 images of {run_folder}, step 17, against 60 of images (")

    # The same from outside: samples and data set as files.
    generated = write_folder(tmp_path / "samples", load_run_sampler(run_folder).draw_pixels(50, 2020))
    arrays = ["--images", str(generated), "--against", str(run_folder.parent / "digits.npy"), "--json"]
    evaluate.main([*arrays, str(tmp_path / "4"), *small])
    assert json.loads((tmp_path / "4").read_text())["metrics"] == first["metrics"]


def test_the_real_side_may_be_another(run_folder, folders, small, tmp_path):
    np.savez(tmp_path / "other.npz", images=digits(0, 55)[:, :1].numpy().transpose(0, 2, 3, 1))

    def real(*flags: str) -> dict[str, object]:
        file = tmp_path / "report.json"
        evaluate.main([*flags, "--metrics", "fid", "--json", str(file), *small])
        return json.loads(file.read_text())["real"]

    run = ["--run", str(run_folder), "--samples", "12"]
    images = ["--images", str(folders[0])]
    assert real(*run, "--against", str(folders[1])) == {"source": str(folders[1]), "images": 70}
    assert real(*run, "--data", str(tmp_path / "other.npz"))["images"] == 55
    assert real(*run, "--preset", "digits") == {"source": "digits", "images": 1797}
    assert real(*run, "--dataset", "digits") == {"source": "digits", "images": 1797}
    assert real(*run, "--horizontal-flip")["images"] == 120
    assert real(*run, "--real-samples", "13")["images"] == 13
    assert real(*run, "--real-samples", "1300")["images"] == 60
    assert real(*images, "--against", str(tmp_path / "other.npz"))["images"] == 55
    assert real(*images, "--data", str(tmp_path / "other.npz"), "--loader", "torch")["images"] == 55


def test_the_score_alone_needs_no_real_images(folders, small, capsys):
    evaluate.main(["--images", str(folders[0]), "--metrics", "is", *small])
    heading, _, row = capsys.readouterr().out.splitlines()
    assert heading == f"90 images of {folders[0]}"
    assert row.startswith("classifier_score[vgg-small]  ")


def test_real_samples_are_drawn_by_the_seed(run_folder, small, tmp_path):
    found = []
    for seed in ("1", "1", "2"):
        flags = ["--run", str(run_folder), "--samples", "12", "--real-samples", "20", "--metrics", "fid"]
        evaluate.main([*flags, "--seed", seed, "--json", str(tmp_path / "report.json"), *small])
        found.append(json.loads((tmp_path / "report.json").read_text())["metrics"])
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("name", ["fitted", "mapped"])
def test_priors_that_were_learnt_are_judged_as_any_other(name, run_folder, small, tmp_path):
    """As the images that they draw."""
    torch.manual_seed(4)
    fitted = FittedGaussian.of(torch.randn(20, 8) @ torch.randn(8, 8))
    prior = fitted if name == "fitted" else MappedNoise(MappingNetwork((3, 5, 8)))
    folder = RunFolder(tmp_path / "run")
    folder.write_config(Config.load(RunFolder(run_folder).config).to_json())
    save_sampler(folder.generator, Sampler(prior, load_run_sampler(run_folder).generator), 3)
    drawn = load_run_sampler(folder.path).draw_pixels(12, seed=2020)
    np.save(tmp_path / "drawn.npy", drawn.permute(0, 2, 3, 1).numpy())
    found = []
    for flags in (["--run", str(folder.path), "--samples", "12"], ["--images", str(tmp_path / "drawn.npy")]):
        data = ["--data", str(run_folder.parent / "digits.npy"), "--metrics", "fid", *small]
        evaluate.main([*flags, "--json", str(tmp_path / "report.json"), *data])
        found.append(json.loads((tmp_path / "report.json").read_text())["metrics"])
    assert found[0] == found[1]


def test_names_belong_to_inception_alone():
    stand_in = EvaluationNetwork("resnet18-1", "resnet18", False, "0123456789abcdef", True, 512, 32)
    assert list(named(VALUES, INCEPTION)) == ["fid", "kid", "kid_std", "is", "is_std", "precision", "recall"]
    assert list(named(VALUES, stand_in)) == [f"{key}[resnet18]" for key in VALUES]
    images = ImageSet(digits(0, 3), "samples")
    text = table(VALUES, stand_in, images, images)
    assert not any(word in text.lower() for word in ("fid", "kid", "inception score", "is  "))
    assert table(VALUES, INCEPTION, images, images, 900).splitlines() == [
        "3 images of samples, step 900, against 3 of samples",
        "by Inception-v3 (torch-fidelity's weights); precision and recall by VGG16",
        "FID              12.3457",
        "KID              0.001235 ± 0.000500",
        "Inception score  2.5000 ± 0.2500",
        "precision        0.7500",
        "recall           0.5000",
    ]


def config_of(extractor: str, *sources: str) -> Config:
    return Config.build("digits", {"extractor": extractor, "weights": sources})


@pytest.mark.parametrize(
    ("extractor", "sources", "name", "own_file", "expected"),
    [
        ("efficientnet-lite0", ("imagenet",), "efficientnet-lite0", False, True),
        ("efficientnet-lite0", ("pretrain",), "efficientnet-lite0", False, True),
        ("efficientnet-lite0", ("pretrain",), "timm:tf_efficientnet_lite0", False, True),
        ("vgg19", ("imagenet",), "torchvision:vgg19_bn", False, True),
        ("vgg-small", ("pretrain",), "vgg-small", True, True),
        ("vgg-small", ("FILE",), "vgg-small", True, True),
        ("resnet18+vgg-small", ("OTHER", "FILE"), "vgg-small", True, True),
        ("resnet18+vgg-small+opponent", ("OTHER", "FILE"), "vgg-small", True, True),
        ("opponent+vgg-small+resnet18", ("FILE", "OTHER"), "resnet18", True, False),
        ("vgg-small+opponent", ("FILE",), "opponent", False, True),
        ("vgg-small+opponent", ("random",), "opponent", False, True),
        ("vgg-small+efficientnet-lite0", ("pretrain",), "efficientnet-lite0", False, True),
        ("vgg-small", ("OTHER",), "vgg-small", True, False),
        ("vgg-small", ("gone.safetensors",), "vgg-small", True, False),
        ("vgg-small", ("random",), "vgg-small", True, False),
        ("vgg-small", ("pretrain",), "resnet18", True, False),
        ("efficientnet-lite0", ("imagenet",), None, False, False),
    ],
)
def test_whether_a_run_was_trained_on_the_judge(tmp_path, weights, extractor, sources, name, own_file, expected):
    other = write_weights(tmp_path / "other.safetensors", seed=1)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(weights.read_bytes())
    files = {"FILE": str(copy), "OTHER": str(other)}
    config = config_of(extractor, *(files.get(source, source) for source in sources))
    assert was_trained_on(config, name, weights if own_file else None) is expected


@pytest.mark.parametrize(
    ("given", "name", "own_file", "expected"),
    [
        ({"method": "glo", "reconstruction": "perceptual"}, "efficientnet-lite0", False, True),
        ({"method": "imle", "search": "features"}, "timm:tf_efficientnet_lite0", False, True),
        ({"method": "imle", "search": "features"}, "vgg-small", True, False),
        (
            {"method": "glo", "reconstruction": "perceptual", "perceptual": "vgg-small+opponent"},
            "vgg-small",
            True,
            True,
        ),
        ({"method": "vae", "reconstruction": "perceptual", "perceptual": "vgg-small"}, "vgg-small", True, True),
        ({"method": "vae"}, "efficientnet-lite0", False, False),
        ({"method": "imle", "search": "pixels"}, "efficientnet-lite0", False, False),
    ],
)
def test_whether_a_run_with_codes_learnt_by_the_judge(weights, given, name, own_file, expected):
    files = {"perceptual_weights": str(weights)} if "perceptual" in given else {}
    config = Config.build("digits", {**given, **files})
    assert was_trained_on(config, name, weights if own_file else None) is expected


def test_a_judge_that_the_run_was_trained_on_is_warned_of(run_folder, weights, small, tmp_path, caplog):
    folder = RunFolder(tmp_path / "run")
    trained = Config.load(RunFolder(run_folder).config).replaced({"weights": (str(weights),)})
    folder.write_config(trained.to_json())
    folder.generator.write_bytes(RunFolder(run_folder).generator.read_bytes())
    evaluate.main(["--run", str(folder.path), "--samples", "12", "--metrics", "fid", *small])
    assert [r.levelname for r in caplog.records if "learnt by the features of vgg-small" in r.message] == ["WARNING"]


def test_evaluation_never_imports_the_training_objective():
    code = "import sys, engine.evaluate; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"engine.evaluation.metrics", "engine.evaluation.judges", "engine.evaluation.image_set"} <= set(loaded)
    objective = {
        "engine.comparison.moment_matching",
        "engine.comparison.on_features",
        "engine.methods.matching",
        "engine.representation.feature_pass",
        "engine.training.trainer",
        "engine.configuration.build",
    }
    assert not objective & set(loaded)
    assert not [name for name in loaded if name.split(".")[0] == "kernels"]


def refuse(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as caught:
        run_command(evaluate.main, [str(part) for part in argv])
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--images A --run RUN", "not allowed with argument"),
        ("", "--run --images is required"),
        ("--images A", "--images: say what they are compared with: --against PATH, --preset, or --dataset"),
        ("--images A --loader torch", "--images: say what they are compared with"),
        ("--images A --skip-bad-images --image-size 16", "--images: say what they are compared with"),
        ("--images nowhere --against B", "--images: nowhere"),
        ("--images A --against nowhere", "--against: nowhere"),
        ("--images ~nobody-has-this-name/x --against B", "--images: ~nobody-has-this-name/x"),
        ("--images A --against NOTES", "--against: "),
        ("--images A --against B --dataset digits", "--dataset: "),
        ("--images A --against B --preset digits", "--preset: "),
        ("--images A --against B --real-samples 5", "--real-samples: "),
        ("--images A --against B --samples 5", "--samples: "),
        ("--images A --against B --metrics is", "--against: is of real images, and --metrics is compares with none"),
        ("--images A --metrics is --dataset digits", "--dataset: is of real images"),
        ("--images A --against B --best", "--best: "),
        ("--run RUN --plain-reading", "--plain-reading: "),
        ("--images A --against B --batch-size 0", "--batch-size: "),
        ("--images A --against B --seed -1", "--seed: "),
        ("--images A --against B --metrics fid,inception", "--metrics: 'inception'"),
        ("--images A --against B --metrics ,", "--metrics: "),
        ("--images A --against B --kid-subset-size 71", "--metrics: kid "),
        ("--images A --against B --kid-subset-size 1", "--kid-subset-size: "),
        ("--images A --against B --metrics fid --kid-subset-size 1", "--kid-subset-size: "),
        ("--images A --against B --feature-extractor nonsense", "--feature-extractor: "),
        ("--images A --against B --feature-extractor vgg19+resnet18", "--feature-extractor: 'vgg19+resnet18'"),
        ("--images A --against B --json .", "--json: . "),
        ("--images A --dataset digits --image-size 16", "a: images are 32×32 pixels, but those of digits are 16×16"),
        ("--images EMPTY --against B", "empty: "),
        ("--images JUNK --against B", "junk: "),
        ("--images A --against MIXED", "mixed: "),
        ("--images WIDE --against WIDE", "wide: images are 32×40 pixels, but vgg-small was made for 32×32"),
        ("--images DAMAGED --against B --metrics fid", "damaged/00003.png: "),
        ("--images FAKE --against B", "fake/0.png: "),
        ("--images A --against FLOATS", "floats.npy: "),
        ("--run nowhere", "nowhere"),
        ("--run EMPTY", "empty"),
        ("--run RUN --best", "--best"),
        ("--run RUN --samples 0", "--samples: "),
        ("--run RUN --samples 39", "--metrics: kid "),
        ("--run RUN --against SMALL", "run: images are 32×32 pixels, but those of"),
        ("--run RUN --weights RESNET", "resnet.safetensors: for vgg-small: "),
        ("--run RUN --weights nowhere.pth", "nowhere.pth"),
    ],
)
def test_bad_input_is_one_line(flags, named, folders, run_folder, small, tmp_path, capsys):
    first, second = folders
    paths = {"A": first, "B": second, "RUN": run_folder, "NOTES": first / "notes.txt"}
    for word in set(flags.split()) - paths.keys():
        paths[word] = tmp_path / word.lower()
        if word == "EMPTY":
            paths[word].mkdir()
        elif word == "JUNK":
            write_folder(paths[word] / "__MACOSX", digits(0, 2))
        elif word == "MIXED":
            write_folder(tmp_path / "one", digits(0, 1))
            (tmp_path / "one").rename(paths[word])
            (paths[word] / "00000.png").rename(paths[word] / "0.png")
            Image.new("RGB", (30, 20)).save(paths[word] / "1.png")
        elif word == "WIDE":
            write_folder(paths[word], torch.zeros(50, 3, 32, 40, dtype=torch.uint8))
        elif word == "SMALL":
            write_folder(paths[word], digits(0, 50, size=16))
        elif word == "DAMAGED":
            write_folder(paths[word], digits(0, 50))
            file = paths[word] / "00003.png"
            file.write_bytes(file.read_bytes()[:120])
        elif word == "FAKE":
            paths[word].mkdir()
            (paths[word] / "0.png").write_text("not a PNG")
        elif word == "FLOATS":
            paths[word] = tmp_path / "floats.npy"
            np.save(paths[word], np.zeros((50, 32, 32, 3)))
        elif word == "RESNET":
            paths[word] = write_weights(tmp_path / "resnet.safetensors", "resnet18")
        else:
            del paths[word]
    argv = [str(paths.get(word, word)) for word in flags.split()]
    assert named in refuse(capsys, *small, *argv)


def test_without_inception_the_way_out_is_named(folders, monkeypatch, capsys):
    def fails(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", fails)
    line = refuse(capsys, "--images", folders[0], "--against", folders[1], "--device", "cpu")
    assert "--weights: " in line
    assert "weights-inception-2015-12-05-6726825d.pth" in line


def test_weights_of_another_network_are_no_inception(folders, weights, capsys):
    line = refuse(capsys, "--images", folders[0], "--against", folders[1], "--device", "cpu", "--weights", weights)
    assert "small.safetensors: for torch-fidelity's Inception-v3: " in line
