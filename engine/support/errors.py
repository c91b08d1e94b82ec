"""What a command line prints instead of a traceback."""

from __future__ import annotations


class InputError(ValueError):
    """A mistake in what the user gave: one clear line that names the flag or file and says what to do."""
