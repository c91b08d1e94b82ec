"""Errors of readers and loaders: a file, a folder or an option cannot be used."""

from __future__ import annotations

from typing import NamedTuple


class DataError(ValueError):
    """Input that cannot be used. The message is one line: which file, folder or option, and what to do about it.

    Args:
        option: the argument of `open_dataset` that is a way out, for a command to show as its flag; None for none.
    """

    def __init__(self, message: str, option: str | None = None) -> None:
        super().__init__(" ".join(str(message).split()))
        self.option = option


class BadImage(NamedTuple):
    """One file (or class folder) that could not be used: where it is, and why."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"

    def error(self) -> DataError:
        """The error that stops a pass; its line says what the user can do."""
        return DataError(f"{self.path}: {self.reason}; replace or remove it, or skip bad images", "skip_bad_images")


def one_line(error: BaseException) -> str:
    """The message of a library's error on one line of at most 200 characters, without its stack."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
