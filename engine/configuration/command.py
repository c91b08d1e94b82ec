"""What the command lines share: exit codes, one-line errors, logging, and flags for arguments."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from engine.support.errors import InputError, Interrupted, OutOfMemory, out_of_memory, reason
from engine.training.stopping import Interrupts

log = logging.getLogger("gfmn")

_INTERRUPTED = "interrupted; nothing was half-written"


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line and not the whole usage, a flag has one name, and its value is not empty."""

    def __init__(self, **options: Any):
        super().__init__(**options, allow_abbrev=False)
        self.add_argument(
            "--verbose", action=_Verbose, nargs=0, default=argparse.SUPPRESS, help="also tell details, such as digests"
        )
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
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (--help lists the flags)\n")


class _Verbose(argparse.Action):
    def __call__(self, *_: Any) -> None:
        log.setLevel(logging.DEBUG)


@contextlib.contextmanager
def arguments_as(**names: str) -> Iterator[None]:
    """Inside, an InputError on the argument `a` becomes one on `names[a]`: the setting that it came from."""
    try:
        yield
    except InputError as error:
        if isinstance(error.argument, str) and error.argument in names:
            raise InputError(names[error.argument], error.message) from None
        raise


def output_file(text: str) -> Path:
    """For argparse: the path of a file to come; refused at once where none could be written."""
    # Here, because it imports PyTorch, and `engine.env` works without.
    from engine.support.files import check_output, expanded

    path = expanded(text)
    try:
        check_output(path, "")
    except InputError as error:
        raise argparse.ArgumentTypeError(error.message) from None
    return path


def check_two_files(arguments: argparse.Namespace, first: str, second: str) -> None:
    """InputError on the argument `second`, a file to be written, if it leads to the file of `first`, or to one of its
    files; by another spelling or a link, too."""
    given, other = (getattr(arguments, name) for name in (first, second))
    files = given if isinstance(given, list) else [given]
    if other is not None and os.path.realpath(other) in (os.path.realpath(file) for file in files if file is not None):
        raise InputError(second, f"{other} is the file of --{first}; name another")


@contextlib.contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Inside, memory that is refused becomes `OutOfMemory`, which ends with `advice`. Decorates a command's `main`."""
    try:
        yield
    except OutOfMemory:
        raise
    except Exception as error:
        if (refused := out_of_memory(error)) is None:
            raise
        raise OutOfMemory("", f"{refused}; {advice}") from None


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
    option = getattr(error, "option", None)  # of a DataError
    if option is not None:
        text += f" (--{option.replace('_', '-')})"
    if isinstance(error, InputError) and isinstance(error.argument, str) and error.argument:
        text = f"--{error.argument.replace('_', '-')}: {error.message}"
    return " ".join(text.split())


def run_command(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> None:
    """Run a command's `main` and exit: 0 on success, 2 on bad input, 128 and a signal's number when interrupted.

    What the system refuses (a full disk, permissions) is bad input, too. docs/commands.md has the table of all.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    warnings.formatwarning = _one_line_warning
    log.setLevel(logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold bytes that are no text
    # Inductor says at WARNING that it found no CUDA runtime, on every machine without one; matplotlib, where it keeps
    # its fonts, on every machine without a home folder.
    for library in ("torch.utils.cpp_extension", "matplotlib"):
        logging.getLogger(library).setLevel(logging.ERROR)
    with Interrupts() as interrupts:
        try:
            try:
                with memory_advice("close other programs, or use a machine that has more"):
                    main(argv)
                if interrupts.waiting:
                    raise KeyboardInterrupt
            finally:
                sys.stdout.flush()
        except BaseException as error:
            ending = (130, _INTERRUPTED) if interrupts.raised else _ending(error)
            if ending is None:
                raise
            sys.exit(_fail(*ending))
        finally:
            _give_up_closed_streams()


def _one_line_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Another library's warning without its file and its line of code."""
    return f"warning: {' '.join(str(message).split())[:300]}\n"


def _ending(error: BaseException) -> tuple[int, str] | None:
    """The status and the line that an error of `main` ends with; None for what is no mistake of the user's."""
    if isinstance(error, KeyboardInterrupt):
        return 130, _INTERRUPTED
    if isinstance(error, Interrupted):
        return error.status, str(error)
    if isinstance(error, BrokenPipeError):  # the reader of our output has gone (`| head`)
        return 128 + signal.SIGPIPE, ""
    if isinstance(error, OSError):
        file = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return 2, f"error: {file}{reason(error)}"
    if isinstance(error, InputError):
        return 2, f"error: {shown(error)}"
    if isinstance(error, ValueError):
        from pipelines import DataError  # here, because it imports PyTorch, and `engine.env` works without

        return (2, f"error: {shown(error)}") if isinstance(error, DataError) else None
    return None


def _fail(status: int, line: str) -> int:
    if line:
        with contextlib.suppress(OSError):
            print(*line.splitlines(), file=sys.stderr)  # a path may have several
    return status


def _give_up_closed_streams() -> None:
    """What is left to print to a pipe, disk or terminal that takes no more has nowhere to go, and is no other error."""
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
