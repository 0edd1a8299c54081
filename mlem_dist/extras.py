"""Libraries that only the extra `train` installs."""

import importlib.util

from mlem_dist.errors import UsageError


def require(module: str, work: str) -> None:
    """Refuse to begin work, in the plural, that could not go on without a module.

    Raises:
        UsageError: the module is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise UsageError(f"{work} need {module}, which is not installed: install the extra `train`")
