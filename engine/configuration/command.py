"""What the command lines share: exit codes, one-line errors, logging, and flags for arguments."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from engine.support.errors import InputError, Interrupted
from pipelines import DataError

log = logging.getLogger("gfmn")


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line and not the whole usage, a flag has one name, and its value is not empty."""

    def __init__(self, **options: Any):
        super().__init__(**options, allow_abbrev=False)
        # argparse takes -1 for a value, but -1e-3 for a flag.
        self._negative_number_matcher = re.compile(r"-\.?\d|-inf|-nan")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """argparse's, after a look at each word: an unknown flag is named with the one that may be meant."""
        words = list(sys.argv[1:] if args is None else args)
        flag = ""
        for word in words:
            name, has_value, value = word.partition("=")
            if word == "--":
                break
            if word == "" or (word.startswith("-") and has_value and value == ""):
                self.error(f"argument {name or flag}: needs a value, and got an empty one")
            if len(word) > 1 and word[0] == "-" and " " not in word and not self._negative_number_matcher.match(word):
                flag = name
                if name not in self._option_string_actions:
                    self.error(f"unrecognized argument: {name}{self._meant(name)}")
        return super().parse_known_args(words, namespace)

    def _meant(self, name: str) -> str:
        """The flags whose name begins so, or else those that look like it, as a question."""
        known = [
            flag
            for flag, action in self._option_string_actions.items()
            if flag.startswith("--") and action.help != argparse.SUPPRESS
        ]
        wanted = "--" + name.lstrip("-").replace("_", "-").lower()
        near = [flag for flag in known if flag.startswith(wanted)] or difflib.get_close_matches(wanted, known, 2)
        return f"; did you mean {' or '.join(near[:3])}?" if near else ""

    def error(self, message: str) -> NoReturn:
        """One line, exit code 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


@contextlib.contextmanager
def arguments_as(**names: str) -> Iterator[None]:
    """Inside, an InputError on the argument `a` becomes one on `names[a]`: the setting that it came from."""
    try:
        yield
    except InputError as error:
        if isinstance(error.argument, str) and error.argument in names:
            raise InputError(names[error.argument], error.message) from None
        raise


@contextlib.contextmanager
def without_pretraining(architecture: str) -> Iterator[None]:
    """Inside an extractor is pretrained for a run; an InputError says what does without, as no flag of the run can set
    what is wrong."""
    try:
        yield
    except InputError as error:
        if not isinstance(error.argument, str) or error.argument == "extractor":
            raise
        raise InputError(
            "weights",
            f"{architecture} could not be pretrained: {error.message}; a file of weights, --weights random, or an "
            "--extractor that brings its own (efficientnet-lite0, torchvision:NAME, timm:NAME) does without",
        ) from None


def shown(error: Exception) -> str:
    """An error as one line; an InputError's argument as the flag that sets it."""
    text = str(error)
    if isinstance(error, DataError) and error.option is not None:
        text += f" (--{error.option.replace('_', '-')})"
    if isinstance(error, InputError) and isinstance(error.argument, str) and error.argument:
        text = f"--{error.argument.replace('_', '-')}: {error.message}"
    return " ".join(text.split())


def run_command(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> None:
    """Run a command's `main` and exit: 0 on success, 2 on bad input, 130 when interrupted."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    warnings.formatwarning = _one_line_warning
    log.setLevel(logging.INFO)
    # Inductor says at WARNING that it found no CUDA runtime, on every machine without one.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        main(argv)
    except (InputError, DataError) as error:
        sys.exit(_fail(2, f"error: {shown(error)}"))
    except Interrupted as interruption:
        sys.exit(_fail(130, str(interruption)))
    except KeyboardInterrupt:
        sys.exit(_fail(130, "interrupted; nothing was half-written"))
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); what is left to print has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _one_line_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Another library's warning without its file and its line of code."""
    return f"warning: {' '.join(str(message).split())[:300]}\n"


def _fail(code: int, line: str) -> int:
    print(line, file=sys.stderr)
    return code
