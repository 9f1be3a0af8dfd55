"""The package's error, and where an error was raised."""

import traceback
from pathlib import Path


class DernetError(Exception):
    """An error that a user can act on.

    The message is one sentence: what was expected, what was found, and what to do. The command
    line prints it without a traceback and exits with code 1.
    """


def where_raised(error: Exception) -> str:
    """Return an error's type and line, for logs: its message might quote a patient's header.

    Of an error that another process raised, it is the line there, if `keep_place` was called there.
    """
    if place := getattr(error, "place", ""):
        return place
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno}"


def keep_place(error: Exception, raised: Exception | None = None) -> Exception:
    """Return an error that tells `where_raised` its line in another process too.

    Args:
        error: It is about to be sent to that process; tracebacks do not go with it.
        raised: The error that was raised here, if it is another.
    """
    error.place = where_raised(raised or error)
    return error
