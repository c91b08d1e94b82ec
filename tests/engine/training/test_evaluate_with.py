"""Several networks that evaluate one run: what is logged, who decides, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from helpers.judging import digits, reference, write_weights
from helpers.runs import command, same_run
from safetensors.torch import load_file
from torch import Tensor

from engine import train
from engine.configuration.build import make_generator
from engine.configuration.config import Config
from engine.configuration.modelling import _outside_steps
from engine.evaluation.judges import EvaluationNetwork
from engine.generation.saved import load_sampler
from engine.support.errors import InputError

pytestmark = pytest.mark.usefixtures("own_cache")

FIRST, OTHER = "dcgan-encoder", "vgg-small"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty real digits, and random weights of two networks."""
    folder = tmp_path_factory.mktemp("judges")
    np.save(folder / "digits.npy", digits(0, 60).permute(0, 2, 3, 1).numpy())
    write_weights(folder / "first.safetensors", FIRST, seed=1)
    write_weights(folder / "other.safetensors", OTHER, seed=2)
    return folder


@pytest.fixture(scope="module")
def flags(files: Path) -> list[str]:
    text = f"""--data {files / "digits.npy"} --weights random --batch-size 4 --steps 6 --layers 1 --nz 8
        --kernels reference --loader torch --log-every 1 --sample-every 100 --checkpoint-every 2 --threads 1
        --evaluate-every 2 --evaluate-samples 40"""
    return text.split()


@pytest.fixture(scope="module")
def several(files: Path) -> list[str]:
    weights = [str(files / "first.safetensors"), str(files / "other.safetensors")]
    return ["--evaluate-with", FIRST, OTHER, "--evaluate-weights", *weights]


@pytest.fixture(scope="module")
def finished(flags: list[str], several: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    train.main([*flags, *several, "--lr-adapt", "kid", "--out", str(out)])
    return out


def evaluations(run: Path) -> dict[int, dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["evaluation"] for line in lines if "evaluation" in line}


def test_numbers_are_torch_fidelitys(flags: list[str], several: list[str], files: Path, tmp_path: Path) -> None:
    """Of the other judge: written out once more, on the images that the saved generator draws."""
    run = tmp_path / "run"
    train.main([*flags, *several, "--steps", "2", "--out", str(run)])
    saved = load_sampler(run / "generator.safetensors")
    pixels = saved.images(saved.prior.draw(40, seed=1_000_003 * 2)).add(1).mul(127.5).round().to(torch.uint8)
    torch_fidelity.register_feature_extractor("several-judges", reference(files / "other.safetensors"))

    class Images(torch.utils.data.Dataset):
        def __init__(self, images: Tensor):
            self.images = images

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, index: int) -> Tensor:
            return self.images[index]

    expected = torch_fidelity.calculate_metrics(
        input1=Images(pixels),
        input2=Images(digits(0, 60)),
        cuda=False,
        fid=True,
        kid=True,
        kid_subset_size=40,
        rng_seed=0,
        feature_extractor="several-judges",
        save_cpu_ram=True,
        cache=False,
        verbose=False,
    )
    (other,) = evaluations(run)[2]["others"]
    assert other["frechet_distance"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    assert other["kernel_distance"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
    assert other["kernel_distance_std"] == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-3)


@pytest.mark.parametrize("name", [FIRST, OTHER])
def test_each_judge_says_what_it_says_alone(name: str, flags, finished: Path, files: Path, tmp_path: Path) -> None:
    file = files / f"{'first' if name == FIRST else 'other'}.safetensors"
    alone = ["--evaluate-extractor", name, "--evaluate-weights", str(file)]
    train.main([*flags, *alone, "--steps", "4", "--out", str(tmp_path / "run")])
    for step, expected in evaluations(tmp_path / "run").items():
        found = evaluations(finished)[step]
        assert (found if name == FIRST else found["others"][0]).items() >= expected.items()


def test_the_log_keeps_the_first_judges_entries(finished: Path) -> None:
    found = evaluations(finished)
    assert list(found) == [2, 4, 6]
    for step, evaluation in found.items():
        (other,) = evaluation["others"]
        assert (evaluation["network"], other["network"]) == (FIRST, OTHER)
        assert evaluation.keys() - {"others"} - other.keys() == ({"three_sample_p"} if step > 2 else set())
        assert (other["samples"], other["real"]) == (40, 60)


def test_the_first_judge_decides_what_is_best(finished: Path) -> None:
    distances = {step: evaluation["kernel_distance"] for step, evaluation in evaluations(finished).items()}
    best = min(distances, key=lambda step: distances[step])
    assert load_sampler(finished / "generator_best.safetensors").step == best


@pytest.mark.parametrize("stop", [2, 3])
def test_resumed_equals_uninterrupted(stop: int, flags, several, finished: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    train.main([*flags, *several, "--lr-adapt", "kid", "--steps", str(stop), "--out", out])
    train.main(["--resume", "--out", out, "--steps", "6"])
    again, expected = evaluations(Path(out)), evaluations(finished)
    assert {step: again[step] for step in expected} == expected
    assert same_run(Path(out), finished)
    name = "generator_best.safetensors"
    assert stop == 3 or (Path(out) / name).read_bytes() == (finished / name).read_bytes()


def test_a_run_of_an_older_version_resumes(flags: list[str], files: Path, tmp_path: Path) -> None:
    """Its configuration has one file of weights, and knows of no list; its checkpoint has one judge's state."""
    one = ["--evaluate-extractor", OTHER, "--evaluate-weights", str(files / "other.safetensors"), "--lr-adapt", "kid"]
    run = tmp_path / "run"
    train.main([*flags, *one, "--out", str(tmp_path / "whole")])
    train.main([*flags, *one, "--steps", "4", "--out", str(run)])
    config = json.loads((run / "config.json").read_text())
    del config["validation"]["evaluate_with"]
    config["validation"]["evaluate_weights"] = str(files / "other.safetensors")
    (run / "config.json").write_text(json.dumps(config))
    state = load_file(run / "checkpoints/step_00000004.safetensors")
    assert {key for key in state if key.startswith("validation/")} == {
        f"validation/{name}" for name in ("best", "failures", "reference")
    }
    train.main(["--resume", "--out", str(run), "--steps", "6"])
    assert evaluations(run) == evaluations(tmp_path / "whole")


def test_a_resumed_run_keeps_its_judges(finished: Path, files: Path, capsys) -> None:
    code, errors = command(
        train.main, ["--resume", "--out", str(finished), "--steps", "7", "--evaluate-with", OTHER], capsys
    )
    assert code == 2
    assert "--evaluate-with: the run was started with ('dcgan-encoder', 'vgg-small')" in errors.splitlines()[-1]
    swapped = [str(files / "first.safetensors"), str(write_weights(files / "third.safetensors", OTHER, seed=3))]
    resume = ["--resume", "--out", str(finished), "--steps", "7", "--evaluate-weights", *swapped]
    code, errors = command(train.main, resume, capsys)
    assert code == 2
    assert "was made from something else" in errors.splitlines()[-1]


def test_a_judge_that_is_matched_is_warned_of_and_marked(flags, several, files: Path, tmp_path: Path, caplog) -> None:
    index = flags.index("random")
    matched = [*flags[:index], str(files / "other.safetensors"), *flags[index + 1 :], "--extractor", OTHER]
    train.main([*matched, *several, "--steps", "2", "--out", str(tmp_path / "run")])
    assert "--evaluate-with: training compares by vgg-small" in caplog.text
    assert "training compares by dcgan-encoder" not in caplog.text
    evaluation = evaluations(tmp_path / "run")[2]
    assert evaluation["others"][0]["is_matched"] is True
    assert "is_matched" not in evaluation


def test_training_warns_when_judges_and_what_is_matched_part(flags, several, tmp_path: Path, caplog, monkeypatch):
    """Judges that see every new set of samples farther away, and a rate at which the matched distance goes down."""
    from engine.training import logbook, validation

    count = iter(range(1000))
    monkeypatch.setattr(
        validation.Judge, "_distances", lambda *_: {"kernel_distance": float(next(count)), "frechet_distance": 1.0}
    )
    write = logbook.Logbook.write

    def falling(self, entry, evaluation=None):
        write(self, {**entry, "difference_norm": 1 / entry["step"]}, evaluation)

    monkeypatch.setattr(logbook.Logbook, "write", falling)
    caplog.set_level(logging.WARNING, "gfmn")
    train.main([*flags, *several, "--evaluate-every", "1", "--out", str(tmp_path / "run")])
    said = [record.getMessage() for record in caplog.records if "over the last" in record.getMessage()]
    assert [line.split(": ")[1] for line in said] == ["step 5"]
    assert "by dcgan-encoder, vgg-small rises" in said[0]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--evaluate-with vgg99 vgg-small", "--evaluate-with: "),
        ("--evaluate-with vgg-small vgg-small", "--evaluate-with: has vgg-small twice"),
        (
            "--evaluate-with efficientnet-lite0 timm:tf_efficientnet_lite0",
            "--evaluate-with: efficientnet-lite0 and timm:tf_efficientnet_lite0 are two names of one network",
        ),
        (
            "--evaluate-with vgg-small --evaluate-extractor vgg19",
            "--evaluate-with: names all the networks; leave out --evaluate-extractor",
        ),
        (
            "--evaluate-with vgg-small dcgan-encoder --evaluate-weights {other}",
            "--evaluate-weights: 1 given for 2 networks; give one for each, 'own' for its own",
        ),
        (
            "--evaluate-extractor vgg-small --evaluate-weights {other} {other}",
            "--evaluate-weights: 2 given for 1 net",
        ),
        (
            "--evaluate-with vgg-small dcgan-encoder --evaluate-weights {other} own",
            "--evaluate-weights: dcgan-encoder has none of its own",
        ),
        ("--evaluate-with vgg-small dcgan-encoder --evaluate-weights {other} {other}", "other.safetensors"),
        ("--evaluate-with vgg-small dcgan-encoder --evaluate-weights {other} nowhere", "nowhere"),
        ("--evaluate-with", "--evaluate-with: expected at least one argument"),
    ],
)
def test_bad_input_is_one_line(more: str, said: str, flags, files: Path, tmp_path: Path, capsys) -> None:
    argv = [*flags, "--out", str(tmp_path / "run"), *more.format(other=files / "other.safetensors").split()]
    code, errors = command(train.main, argv, capsys)
    assert code == 2
    assert said in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert not (tmp_path / "run/config.json").exists()


def test_a_list_needs_evaluations() -> None:
    with pytest.raises(InputError, match="needs --evaluate-every") as error:
        Config.build("digits", {"evaluate_with": ["vgg-small"]})
    assert error.value.argument == "evaluate_with"


def test_inception_has_a_name_in_the_list() -> None:
    given = {"evaluate_every": 1, "evaluate_with": ["vgg-small", "inception"], "evaluate_weights": ["a.pth", "own"]}
    asked = Config.build("digits", given).validation
    assert asked.judges == (("vgg-small", "a.pth"), (None, None))
    assert Config.build("digits", {"evaluate_every": 1}).validation.judges == ((None, None),)
    given = {"evaluate_every": 1, "evaluate_extractor": "inception", "evaluate_weights": "a.pth"}
    assert Config.build("digits", given).validation.judges == ((None, "a.pth"),)


def test_the_plan_counts_all_judges_weights() -> None:
    """The second network's weights are all that is added: its activations come when the first one's have gone."""

    def needed(**given: object) -> int:
        config = Config.build("digits", {"evaluate_every": 1, **given})
        return _outside_steps(config, make_generator(config))

    large, both = needed(evaluate_extractor="vgg19"), needed(evaluate_with=["vgg19", "vgg-small"])
    from engine.representation.zoo import make_network

    weights = [tensor for tensor in make_network("vgg-small", 32).module.state_dict().values()]
    bytes_ = sum(tensor.numel() * tensor.element_size() for tensor in weights)
    assert bytes_ <= both - large <= bytes_ + 512 * len(weights) + 2 * 2**20


def test_judges_see_the_same_samples(flags, several, tmp_path: Path, monkeypatch) -> None:
    seen: list[tuple[str, Tensor]] = []
    features = EvaluationNetwork.features

    def watched(self, images, **options):
        seen.append((self.label, images.clone()))
        return features(self, images, **options)

    monkeypatch.setattr(EvaluationNetwork, "features", watched)
    train.main([*flags, *several, "--steps", "2", "--out", str(tmp_path / "run")])
    assert [label for label, _ in seen] == [FIRST, OTHER] * 2
    assert [len(images) for _, images in seen] == [60, 60, 40, 40]
    assert torch.equal(seen[2][1], seen[3][1])
