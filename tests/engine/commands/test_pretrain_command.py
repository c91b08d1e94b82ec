"""The command that pretrains an extractor: what it writes and prints, how it resumes, and what it refuses."""

import pytest
from helpers.pretraining import interrupt_at, make_array, same
from safetensors import safe_open
from safetensors.torch import load_file

from engine.configuration.command import run_command
from engine.pretrain import _PRESETS, main
from engine.support.errors import InputError, Interrupted


def command(tmp_path, *flags):
    data = tmp_path / "tiny.npz"
    if not data.exists():
        make_array(data)
    main(["--data", str(data), "--image-size", "16", "--arch", "vgg-small", "--steps", "3", *flags])


def test_command_line_writes_weights_and_prints_the_validation(tmp_path, capsys):
    out = tmp_path / "made" / "extractor.safetensors"
    command(
        tmp_path, "--out", str(out), "--batch-size", "8", "--horizontal-flip", "--seed", "5", "--weight-decay", "1e-3"
    )
    printed = capsys.readouterr().out
    assert "accuracy on held-out images: " in printed
    assert str(out) in printed
    assert [path.name for path in out.parent.iterdir()] == ["extractor.safetensors"]
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["seed"], metadata["flip"], metadata["batch_size"]) == ("5", "True", "8")
    assert metadata["weight_decay"] == "0.001"
    with pytest.raises(InputError) as error:
        command(tmp_path, "--out", str(out))
    assert error.value.argument == "out"
    command(tmp_path, "--out", str(out), "--resume")
    assert "is complete" in capsys.readouterr().out


def test_steps_take_the_place_of_the_preset_s_epochs(tmp_path, monkeypatch):
    monkeypatch.setitem(_PRESETS, "photos", {"epochs": 60})
    command(tmp_path, "--out", str(tmp_path / "three.safetensors"))
    with safe_open(tmp_path / "three.safetensors", framework="pt") as file:
        assert file.metadata()["steps"] == "3"


def test_command_line_resumes_after_ctrl_c(tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    command(tmp_path, "--out", str(whole))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(Interrupted, match="--resume"):
            command(tmp_path, "--out", str(out))
    with pytest.raises(InputError, match="checkpoint exists") as error:
        command(tmp_path, "--out", str(out))
    assert error.value.argument == "out"
    command(tmp_path, "--out", str(out), "--resume")
    assert same(load_file(out), load_file(whole))
    assert not out.with_name(out.name + ".checkpoint").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arch", "vgg16"], "error: --arch: 'vgg16'"),
        (["--threads", "0"], "error: --threads"),
        (["--device", "cuda"], "error: --device"),
        (["--steps", "many"], "invalid int value"),
        (["--epochs", "5"], "error: --steps: give epochs or steps, not both"),
        (["--crop-padding", "-1"], "error: --crop-padding: "),
        (["--batch-size", "1"], "error: --batch-size: "),
        (["--batch-size", "9" * 12], "error: --batch-size: "),
        (["--seed", "-1"], "error: --seed: "),
        (["--weight-decay", "-1"], "error: --weight-decay: "),
        (["--dataset", "images", "--task", "autoencode"], "error: --task: autoencode"),
    ],
)
def test_command_line_fails_with_one_line(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda argv: command(tmp_path, "--out", str(tmp_path / "out.safetensors"), *flags))
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
