"""What a command line prints instead of a traceback, and how an interrupted run says where it stopped."""

from __future__ import annotations

from pathlib import Path


class InputError(ValueError):
    """A mistake in what the user gave: one clear line that names what is wrong and says what to do.

    Args:
        argument: the name of the argument that is wrong ("image_size"), or the file (a `Path`); "" if it is neither.
        message: what is wrong with it, and what to do. The text of the error is "argument: message".

    Nothing here knows a command line: `engine.configuration.command` shows an argument as the flag that set it.
    """

    def __init__(self, argument: str | Path, message: str | None = None):
        if message is None:  # the text alone
            argument, message = "", str(argument)
        self.argument, self.message = argument, message
        super().__init__(f"{argument}: {message}" if argument else message)


class Interrupted(Exception):
    """Ctrl-C, after what had to be saved was saved; the text says where."""
