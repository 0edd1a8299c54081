"""What every part of the program asks of the files that it reads and the folders that it writes."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlem_dist.errors import UsageError


def check_writable(out: Path) -> None:
    """Refuse an `--out` that is not, and cannot become, a folder that this process may write. Touches nothing.

    Raises:
        UsageError: it is a file, or it or the folder that would hold it is not writable.
    """
    try:
        if out.exists() and not out.is_dir():
            raise UsageError(f"--out {out} is a file, expected a folder; choose another path")
        parent = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    except PermissionError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror}; choose another path") from None
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK, effective_ids=True):
        raise UsageError(f"--out {out} cannot be written: {parent} is not a writable folder; choose another path")


def replace_file(path: Path, content: str | Callable[[Path], Any]) -> None:
    """Write text, or what a function writes to the path it is given, so that a file appears complete or not at all."""
    # Ray's processes outlive a killed driver for a moment: two may write.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    if isinstance(content, str):
        temporary.write_text(content)
    else:
        content(temporary)
    temporary.replace(path)


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file; `what` it is, for the errors.

    Raises:
        UsageError: it is missing, unreadable, or holds no JSON object.
    """
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{what} {path} is missing") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{what} {path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{what} {path} is not a JSON object")
    return found
