"""Settings are checked in one place, whether a file, a flag or Python gives them; the error names the field."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import command

from engine import train
from engine.configuration import presets
from engine.configuration.build import make_extractor
from engine.configuration.config import Config
from engine.configuration.groups import GROUPS
from engine.configuration.inputs import open_data
from engine.configuration.methods import COMPARING
from engine.configuration.presets import PRESETS, preset_method
from engine.configuration.provenance import was_trained_on
from engine.support.errors import InputError

GONE = object()
# (group, field, value in config.json): each is refused with one line that names the file and the field.
NONSENSE: list[tuple[str, str, Any]] = [
    ("gfmn", "averager", "sgd"),
    ("gfmn", "averager", None),
    ("gfmn", "ama_lr", True),
    ("gfmn", "ama_lr", 0),
    ("gfmn", "ma_alpha", 1.01),
    ("gfmn", "correction", 2),
    ("training", "amp", "no"),
    ("training", "amp", 1),
    ("training", "amp", None),
    ("training", "amp_dtype", "bf17"),
    ("training", "steps", 3.5),
    ("training", "steps", 3.0),
    ("training", "steps", "3"),
    ("training", "steps", True),
    ("training", "steps", 0),
    ("training", "steps", 10**30),
    ("training", "steps", None),
    ("training", "lr", "1e-3"),
    ("training", "lr", [1e-3]),
    ("training", "lr", float("nan")),
    ("training", "lr", float("inf")),
    ("training", "lr", 1e300),
    ("training", "lr", 10**400),
    ("training", "lr", -1e-3),
    ("training", "lr", GONE),
    ("training", "beta2", 1),
    ("training", "generator_ema", 0),
    ("training", "generator_ema", []),
    ("training", "generator_ema", [0.9, 0.9]),
    ("training", "generator_ema", [0.9, "0.99"]),
    ("training", "generator_ema", "0.9,0.99"),
    ("updates", "optimizer", "sgd"),
    ("updates", "clip_grad", -1),
    ("updates", "warmup_steps", -1),
    ("updates", "warmup_steps", 10**6),
    ("updates", "max_skipped", None),
    ("updates", "sample_ema", 1),
    ("training", "seed", -1),
    ("training", "seed", 2**63),
    ("training", "batch_size", 1),
    ("training", "batch_size", 10**9),
    ("training", "threads", 0),
    ("training", "device", {}),
    ("training", "unheard_of", 1),
    ("training", "nz", 100),
    ("data", "dataset", "nothing"),
    ("data", "data", 3),
    ("data", "data", ""),
    ("data", "data", "a\0b"),
    ("data", "image_size", 4),
    ("data", "image_size", 10**7),
    ("data", "center_crop", -1),
    ("data", "horizontal_flip", "false"),
    ("networks", "extractor", ""),
    ("networks", "extractor", ["vgg19"]),
    ("networks", "weights", "pretrain"),
    ("networks", "weights", [1]),
    ("networks", "weights", [""]),
    ("networks", "weights", None),
    ("networks", "layers", 0),
    ("networks", "nz", 10**9),
    ("mmd", "mmd_bandwidths", [1, 0]),
    ("mmd", "mmd_bandwidths", [float("nan")]),
    ("mmd", "mmd_bandwidths", [1e-300]),
    ("mmd", "mmd_bandwidths", 1.0),
    ("mmd", "mmd_degree", 10**6),
    ("mmd", "mmd_images", 1),
    ("matching", "chunk_size", "many"),
    ("matching", "chunk_size", 2.5),
    ("matching", "chunk_size", 0),
    ("matching", "memory_budget", "9" * 400 + "TiB"),
    ("matching", "memory_budget", 12),
    ("output", "log_every", 0),
    ("output", "profile", False),
    ("validation", "evaluate_samples", 10**12),
    ("validation", "lr_adapt", "fid"),
    ("method", "method", "dragan"),
    ("critic", "critic_norm", "layer"),
    ("critic", "critic_steps", 0),
    ("critic", "critic_lr", 0),
    ("critic", "penalty", []),
    ("critic", "penalty", ["gp"]),
    ("critic", "penalty", ["r1", "r1"]),
    ("critic", "penalty", ["none", "r1"]),
    ("critic", "penalty_weight", [1.0]),
    ("game", "game", "zero-sum"),
    ("game", "kernel_bandwidths", [-1.0]),
    ("game", "began_gamma", 2),
    ("denoising", "denoise_weight", -1),
    ("denoising", "denoise_deviation", 0),
    ("denoising", "denoiser_layers", 0),
    ("moments", "moment_every", 0),
    ("moments", "moment_images", 10**12),
    ("moments", "moment_penalty", float("nan")),
    ("method", "method", ["gfmn"]),
]


def values() -> dict[str, Any]:
    return json.loads(Config.build("digits", {}).to_json())


@pytest.mark.parametrize(("group", "name", "value"), NONSENSE, ids=lambda value: repr(value)[:20])
def test_nonsense_is_refused_by_the_field(group: str, name: str, value: Any, tmp_path: Path) -> None:
    content, file = values(), tmp_path / "config.json"
    if value is GONE:
        del content[group][name]
    else:
        content[group][name] = value
    file.write_text(json.dumps(content))
    with pytest.raises(InputError) as error:
        Config.load(file)
    assert error.value.argument == file
    assert name in error.value.message
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    if value is GONE or name == "unheard_of":
        return
    if (group, name) == ("training", "nz"):
        return  # a setting, in another group
    for give in (
        lambda: Config.build("digits", {name: value}),
        lambda: Config.build("digits", {}).replaced({name: value}),
    ):
        with pytest.raises(InputError) as error:
            give()
        assert error.value.argument == name


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"", "config.json"),
        (b"\xff\xfe\x00", "config.json"),
        (b"[" * 100_000, "config.json"),
        (b"[]", "config.json"),
        (b"null", "config.json"),
        (b'{"preset": "digits"}', "config.json"),
        (b'{"preset": "digits", "training": []}', "config.json"),
        (b'{"preset": "digits", "nothing": {}}', "nothing"),
        (b'{"preset": ["digits"], "method": {}}', "config.json"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_no_configuration_at_all(text: bytes, named: str, tmp_path: Path, capsys) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text)
    code, errors = command(train.main, ["--config", str(file), "--out", str(tmp_path / "run")], capsys)
    assert (code, errors.count("\n")) == (2, 1)
    assert str(file) in errors
    assert named in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("key", "value"), [("preset", "nothing"), ("preset", 3), ("extras", {"lr": 1})])
def test_unknown_preset_and_group(key: str, value: Any, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values() | {key: value}))
    with pytest.raises(InputError, match=key) as error:
        Config.load(file)
    assert error.value.argument == file


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_written_is_read_again(preset: str, tmp_path: Path) -> None:
    given = {"data": "photos/\udcff é", "lr": 1, "weights": ["random"], "chunk_size": 8, "generator_ema": [0.9, 0.99]}
    if preset_method(preset) not in COMPARING:
        given = {name: value for name, value in given.items() if name not in ("weights", "chunk_size")}
    config, file = Config.build(preset, given), tmp_path / "config.json"
    file.write_text(config.to_json())
    assert asdict(Config.load(file)) == asdict(config)
    assert type(config.training.lr) is float
    assert config.networks.weights == (("random",) if "weights" in given else ("pretrain",))
    assert config.training.generator_ema == (0.9, 0.99)
    assert file.read_text() == Config.load(file).to_json()


def test_a_configuration_of_version_0_1_is_read(tmp_path: Path) -> None:
    """It had no methods, other groups for some settings, and other names for two."""
    content, file = values(), tmp_path / "config.json"
    del content["method"], content["mmd"], content["updates"], content["networks"]["prior"]
    content["matching"] |= content.pop("gfmn")
    content["matching"]["averager"] = "ma"
    content["output"]["target"] = content["matching"].pop("target")
    content["matching"]["checkpoint"] = "stages"
    del content["matching"]["recompute"]
    content["training"]["checkpoint_generator"] = content["training"].pop("recompute_generator")
    file.write_text(json.dumps(content))
    config = Config.load(file)
    assert config.method.method == "gfmn"
    assert (config.gfmn.averager, config.matching.recompute) == ("ma", "stages")


def test_unknown_settings_from_python() -> None:
    config = Config.build("digits", {})
    for give in (lambda given: Config.build("digits", given), config.replaced, config.resumed_with):
        with pytest.raises(InputError) as error:
            give({"stps": 3})
        assert error.value.argument == "stps"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--lr", "-1e-3"], "--lr"),
        (["--lr", "-.5"], "--lr"),
        (["--lr", "-inf"], "--lr"),
        (["--lr", "nan"], "--lr"),
        (["--steps", "3.5"], "--steps"),
        (["--steps", "9" * 40], "--steps"),
        (["--step", "5"], "--steps?"),
        (["--step=5"], "--steps?"),
        (["-steps", "5"], "--steps?"),
        (["--batch_size", "5"], "--batch-size?"),
        (["--Batch-Size", "5"], "--batch-size?"),
        (["--no-am"], "--no-amp?"),
        (["--data", ""], "--data"),
        (["--data="], "--data"),
        (["--weights", "random", ""], "--weights"),
        (["--extractor", "vgg-small+resnet18", "--weights", "pretrain", "imagenet"], "'pretrain' is for all networks"),
        (["--out", ""], "--out"),
        (["--config", ""], "--config"),
    ],
    ids=" ".join,
)
def test_flags(argv: list[str], named: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    code, errors = command(train.main, argv, capsys)
    assert (code, errors.count("\n")) == (2, 1)
    assert named in errors
    assert list(tmp_path.iterdir()) == []


def test_a_flag_that_is_like_none_gets_no_suggestion(capsys) -> None:
    assert "mean" not in command(train.main, ["--qqqq"], capsys)[1]


def test_usual_steps_say_nothing_of_what_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(presets, "has_perceptual", lambda: False)
    presets._say_small_once.cache_clear()
    assert "350 (digits), 2,000 (photos)" in presets.usual_steps(32, "sinkhorn")
    assert not caplog.text


def test_pixels_stay_pixels_where_efficientnet_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "has_perceptual", lambda: False)
    assert Config.build("photos", {"data": "x"}).networks.extractor == "vgg-small"
    assert Config.build("photos", {"data": "x", "method": "gmmn"}).networks.extractor == "pixels"


def test_networks_with_nothing_to_learn_need_no_weights() -> None:
    given = {"dataset": "digits", "extractor": "pixels+opponent"}
    config = Config.build("cifar10", given)
    extractor = make_extractor(config, open_data(config), torch.device("cpu"))
    assert extractor.num_features == 2 * 3 * 32 * 32
    assert was_trained_on(config, "opponent", None)
    config = Config.build("cifar10", {**given, "extractor": "pixels+vgg-small"})
    with pytest.raises(InputError, match=r"needs weights for pixels\+vgg-small"):
        make_extractor(config, open_data(config), torch.device("cpu"))


def test_a_population_brings_settings_of_its_own() -> None:
    plain, moving = (Config.build("digits", {"population": name}) for name in ("none", "ema"))
    assert (plain.training.beta2, moving.training.beta2) == (0.999, 0.9)
    assert Config.build("digits", {"population": "queue", "beta2": 0.99}).training.beta2 == 0.99
    assert Config.build("digits", {"population": "ema", "method": "frechet"}).training.beta2 == 0.999


@pytest.mark.parametrize("beside", ["folder", "file"])
def test_a_word_for_weights_is_that_word_whatever_lies_beside(beside: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for word in ("imagenet", "random", "pretrain", "own"):
        Path(word).mkdir() if beside == "folder" else Path(word).write_bytes(b"")
    for word in ("imagenet", "random", "pretrain"):
        assert Config.build("digits", {"weights": [word]}).networks.weights == (word,)
    critic = {"method": "gan", "critic": "vgg-small", "critic_weights": "imagenet"}
    assert Config.build("digits", critic).critic.critic_weights == "imagenet"
    for word in ("imagenet", "random"):
        perceptual = {"method": "ae", "reconstruction": "perceptual", "perceptual_weights": word}
        assert Config.build("digits", perceptual).autoencoder.perceptual_weights == word
    judge = {"evaluate_every": 1, "evaluate_with": ["vgg19", "inception"], "evaluate_weights": ["./own", "own"]}
    own = str(tmp_path / "own") if beside == "file" else "./own"  # a word is not a path to what is called so
    assert Config.build("digits", judge).validation.evaluate_weights == (own, "own")


def test_a_file_of_weights_is_named_by_its_whole_path_and_a_folder_as_it_was_given(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("folder/a.safetensors").write_bytes(b"")
    given = ["folder/a.safetensors", "folder", "missing"]
    whole = str(tmp_path / "folder" / "a.safetensors")
    assert Config.build("digits", {"weights": given}).networks.weights == (whole, "folder", "missing")
    evaluated = {"evaluate_every": 1, "evaluate_extractor": "vgg19", "evaluate_weights": given[0]}
    assert Config.build("digits", evaluated).validation.evaluate_weights == (whole,)


@pytest.mark.parametrize("group", GROUPS)
def test_help_names_what_it_speaks_of(group: str) -> None:
    """--help lists flags one by one: "its" and "that network" of another flag's text would be anybody's."""
    elsewhere = re.compile(
        r"^((\S+ )?of )?(its|it|and)\b|\b(that|such) (it|networks?)\b|\b(let|keeps) it\b|\bthese are$"
    )
    texts = {entry.name: entry.metadata["help"] for entry in fields(GROUPS[group])}
    assert {name: text for name, text in texts.items() if elsewhere.search(text)} == {}


def test_help_tells_the_network_of_noise_from_other_networks() -> None:
    texts = {entry.name: entry.metadata["help"] for entry in fields(GROUPS["autoencoder"])}
    assert [name for name, text in texts.items() if "noise" in text] == ["code_noise", "code_width", "mapping_lr"]


def test_a_seed_that_pytorch_would_cut(tmp_path) -> None:
    """Nobody may give one any more; a run of an earlier version that has one can be read."""
    config = Config.build("digits", {})
    text = config.to_json().replace('"seed": 0', f'"seed": {2**40}')
    (tmp_path / "config.json").write_text(text)
    assert Config.load(tmp_path / "config.json").training.seed == 2**40
    with pytest.raises(InputError, match="must be at most 4294967295") as refused:
        Config.build("digits", {"seed": 2**32})
    assert refused.value.argument == "seed"
