"""What a command prints for an error of the library: one line, with the flag in place of the argument."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from engine.configuration.command import Parser, arguments_as, run_command
from engine.support.errors import InputError, Interrupted
from pipelines import DataError


def failing(error: Exception):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("image_size", "must be at least 1"), 2, "error: --image-size: must be at least 1"),
        (InputError(Path("run_1/w.pth"), "is damaged"), 2, "error: run_1/w.pth: is damaged"),
        (InputError("", "no image\ncould be used"), 2, "error: no image could be used"),
        (DataError("center_crop must be positive"), 2, "error: center_crop must be positive"),
        (Interrupted("interrupted at step 3"), 130, "interrupted at step 3"),
        (PermissionError(13, "Permission denied", "a\nb"), 2, "error: a b: Permission denied"),
    ],
    ids=["argument", "file", "neither", "data", "interrupted", "system"],
)
def test_one_line_and_an_exit_code(error, code, line, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_command(failing(error), [])
    assert exit_.value.code == code
    assert capsys.readouterr() == ("", line + "\n")


@pytest.mark.parametrize("word", ["a\nb", "--a\nb", "--verbos\n"])
def test_a_word_of_several_lines_is_refused_in_one(word, capsys):
    with pytest.raises(SystemExit) as exit_:
        Parser(prog="test").parse_args([word])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_warning_of_a_library_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)

    def main(argv):
        print(warnings.formatwarning(UserWarning("of many\nlines"), UserWarning, "torch/file.py", 3), end="")

    run_command(main, [])
    assert capsys.readouterr().out == "warning: of many lines\n"


def test_what_takes_seconds_to_import_is_imported_when_it_is_used():
    """--help, a plan and a line about bad input do without it."""
    commands = "train, sample, evaluate, report, pretrain, precompute, env"
    code = f"import sys; from engine import {commands}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    late = {"torchvision", "torch._dynamo", "triton", "sympy", "matplotlib", "scipy", "sklearn", "timm", "nvidia.dali"}
    assert "engine.configuration.config" in loaded
    assert not late & set(loaded)


def test_an_argument_is_renamed_and_others_are_left():
    with pytest.raises(InputError) as error, arguments_as(bn="extractor_bn", name="extractor"):
        raise InputError("bn", "'none' is not one of running, batch")
    assert (error.value.argument, error.value.message) == ("extractor_bn", "'none' is not one of running, batch")
    for argument in ("layers", Path("bn"), ""):
        left = InputError(argument, "is wrong")
        with pytest.raises(InputError) as error, arguments_as(bn="extractor_bn"):
            raise left
        assert error.value is left
