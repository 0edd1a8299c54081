"""The one error that a user can cause."""


class UsageError(ValueError):
    """Bad input: one sentence that names the value, what was expected and the way out.

    The command line prints it without a traceback and exits with code 2.
    """
