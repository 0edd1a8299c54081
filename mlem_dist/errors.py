"""The errors for bad user input and for failures of the user's code."""


class UsageError(ValueError):
    """Bad input: one sentence that names the value, the expected input and the way out.

    The command line prints it without a traceback and exits with code 2.
    """


class ScoreError(RuntimeError):
    """A score class fails, or returns what cannot be written.

    Attributes:
        details: the traceback in the user's code; "" if it raises nothing.
    """

    def __init__(self, message: str, details: str) -> None:
        super().__init__(message, details)
        self.details = details

    def __str__(self) -> str:
        return str(self.args[0])
