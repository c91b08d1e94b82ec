"""What the command lines share: exit codes, one-line errors, logging."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from engine.support.errors import InputError
from pipelines import DataError

log = logging.getLogger("gfmn")


class Interrupted(Exception):
    """Ctrl-C, after what had to be saved was saved; the text says where."""


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
        shown = str(error)
        if isinstance(error, InputError) and error.argument and isinstance(error.argument, str):
            shown = f"--{error.argument.replace('_', '-')}: {error.message}"
        sys.exit(_fail(2, f"error: {' '.join(shown.split())}"))
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
