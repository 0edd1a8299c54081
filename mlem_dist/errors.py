"""The error for bad user input."""


class UsageError(ValueError):
    """Bad input: one sentence that names the value, the expected input and the way out.

    The command line prints it without a traceback and exits with code 2.
    """
