"""The package's error, and where an error was raised."""

import traceback
from pathlib import Path


class DernetError(Exception):
    """An error that a user can act on.

    The message is one sentence: what was expected, what was found, and what to do. The command
    line prints it without a traceback and exits with code 1.
    """


def where_raised(error: Exception) -> str:
    """Return an error's type and line, for logs: its message might quote a patient's header."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno}"
