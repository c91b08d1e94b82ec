"""What the command lines share: exit codes, one-line errors, logging."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from engine.support.errors import InputError, Interrupted
from pipelines import DataError

log = logging.getLogger("gfmn")


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line and not the whole usage."""

    def error(self, message: str) -> NoReturn:
        """One line, exit code 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def run_command(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> None:
    """Run a command's `main` and exit: 0 on success, 2 on bad input, 130 when interrupted."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    log.setLevel(logging.INFO)
    # Inductor says at WARNING that it found no CUDA runtime, on every machine without one.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        main(argv)
    except (InputError, DataError) as error:
        sys.exit(_fail(2, f"error: {' '.join(_shown(error).split())}"))
    except Interrupted as interruption:
        sys.exit(_fail(130, str(interruption)))
    except KeyboardInterrupt:
        sys.exit(_fail(130, "interrupted; nothing was half-written"))
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); what is left to print has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


@contextlib.contextmanager
def arguments_as(**names: str) -> Iterator[None]:
    """Rename arguments in errors: inside `arguments_as(bn="extractor_bn")`, an InputError about `bn` is raised again
    about `extractor_bn`, which the command line shows as `--extractor-bn`."""
    try:
        yield
    except InputError as error:
        if isinstance(error.argument, str) and error.argument in names:
            raise InputError(names[error.argument], error.message) from None
        raise


def _shown(error: InputError | DataError) -> str:
    """The error's text, with the flag in place of the argument's name."""
    if isinstance(error, InputError) and isinstance(error.argument, str) and error.argument:
        return f"--{error.argument.replace('_', '-')}: {error.message}"
    return str(error)


def _fail(code: int, line: str) -> int:
    print(line, file=sys.stderr)
    return code
