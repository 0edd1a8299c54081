"""Libraries that only an extra installs."""

import importlib.util

from mlem_dist.errors import UsageError


def require(module: str, work: str, extra: str = "train") -> None:
    """Refuse work that needs a missing module of an extra; `work` names the work in the plural, for the message.

    Raises:
        UsageError: if the module is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise UsageError(f"{work} need {module}, which is not installed: install the extra `{extra}`")
