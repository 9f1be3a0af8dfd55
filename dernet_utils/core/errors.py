"""What went wrong, in one sentence."""

import traceback
from pathlib import Path


class DernetError(Exception):
    """An error that a user can act on.

    The message is one sentence that says what was expected, what came, and what to do.
    The command line prints it without a traceback and ends with exit code 1.
    """


def where_raised(error: Exception) -> str:
    """Return an error's type and line for a log: its message may quote a patient's header."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno}"
