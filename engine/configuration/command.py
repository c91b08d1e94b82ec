"""What the command lines share: exit codes, one-line errors, logging, and flags for arguments."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from engine.support.errors import InputError, Interrupted, OutOfMemory, out_of_memory
from pipelines import DataError

log = logging.getLogger("gfmn")


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line and not the whole usage, and a flag has one name."""

    def __init__(self, **options: Any):
        super().__init__(**options, allow_abbrev=False)

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
    log.setLevel(logging.INFO)
    # Inductor says at WARNING that it found no CUDA runtime, on every machine without one.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        with memory_advice("close other programs, or use a machine that has more"):
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


def _fail(code: int, line: str) -> int:
    print(line, file=sys.stderr)
    return code
