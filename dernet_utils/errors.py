"""What went wrong, in one sentence."""


class DernetError(Exception):
    """An error that a user can act on.

    The message is one sentence that says what was expected, what came, and what to do.
    The command line prints it without a traceback and ends with exit code 1.
    """
