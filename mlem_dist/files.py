"""File helpers for every part of the program: checks of names and folders, complete writes, digests, JSON."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from mlem_dist.errors import UsageError

if TYPE_CHECKING:
    from upath import UPath


SYSTEM_NAMES = (
    "$RECYCLE.BIN",
    ".DS_Store",
    ".Trash-*",
    ".fuse_hidden*",
    ".gitignore",
    ".gitkeep",
    ".nfs*",
    ".snapshot",
    ".snapshots",
    ".stfolder",
    "@eaDir",
    "System Volume Information",
    "Thumbs.db",
    "__MACOSX",
    "desktop.ini",
    "lost+found",
)
"""Name patterns of entries that file systems, desktops and version control put into an otherwise empty folder."""


REMEMBERED = 2**24
"""Smallest size in bytes of a file whose digest is remembered."""


def own_names(names: Iterable[str]) -> list[str]:
    """The names in a folder that match none of `SYSTEM_NAMES`, sorted."""
    return sorted(name for name in names if not any(fnmatchcase(name, pattern) for pattern in SYSTEM_NAMES))


def listing(names: Iterable[str], limit: int = 10) -> str:
    """The first `limit` names and the number of further ones, for a message."""
    every = list(names)
    return ", ".join(every[:limit]) + (f" and {len(every) - limit} more" if len(every) > limit else "")


def check_writable(out: Path, name: str = "out") -> None:
    """Refuse an `out` that neither is nor can become a folder that this process may write. Writes nothing.

    Messages call it `name`.

    Raises:
        UsageError: if `out` is a file, or if `out` or the folder that would hold it is not writable.
    """
    try:
        if (out.exists() or out.is_symlink()) and not out.is_dir():
            kind = "a file" if out.exists() else "a link to nothing"
            raise UsageError(f"`{name}` {out} is {kind}, expected a folder; choose another path")
        parent = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    except OSError as error:
        raise UsageError(f"`{name}` {out} cannot be written: {error.strerror}; choose another path") from None
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK, effective_ids=True):
        raise UsageError(f"`{name}` {out} cannot be written: {parent} is not a writable folder; choose another path")


def replace_file(path: Path, content: str | bytes | Callable[[Path], Any], work: Path | None = None) -> None:
    """Write a file that appears under its name complete or not at all, even after a power cut.

    Args:
        path: the file's path; missing folders are made.
        content: the file's content, or a function that writes it to the path that the function is given.
        work: a folder on the same file system for the temporary file; the file's own folder by default.

    Raises:
        OSError: if the disk is full or not writable.
    """
    # Ray's processes outlive a killed driver for a moment, so two processes on different machines may write.
    temporary = (work or path.parent) / f"{path.name}.{uuid4().hex[:12]}.tmp"
    try:
        for folder in (temporary.parent, path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        why = error.strerror or " ".join(str(error).split())
        raise OSError(f"{path} cannot be written: {why}; mend that, and the same command goes on") from None
    finally:
        # The cause of a failed write may also prevent the removal.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_text(names: Iterable[str], where: str) -> None:
    """Refuse names that cannot be encoded as UTF-8, such as a folder's name in another encoding.

    Raises:
        UsageError: if a name is not text; the message says that it is from `where`.
    """
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UsageError(f"{where}: the name {name!a} is not text in UTF-8; rename it") from None


def file_digest(path: Path | UPath) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    # fsspec's files have `readinto`, though their type does not declare it.
    opened: Any = path.open("rb")
    with opened as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """The folder of what this program keeps on this machine: `$MLEM_DIST_CACHE`, or one in the user's cache folder."""
    if given := os.environ.get("MLEM_DIST_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mlem-dist"


def remembered_digest(path: Path) -> str:
    """As `file_digest`, but a large file that has not changed since an earlier call on this machine is not read again.

    Digests are remembered in the program's cache folder, by the file's path, size, inode and times of change.
    """
    status = path.stat()
    if status.st_size < REMEMBERED:
        return file_digest(path)
    identity = [str(path.resolve()), status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    folder = cache_folder() / "digests"
    with suppress(OSError):
        digest = (folder / name).read_text("ascii", "replace")
        if len(digest) == 64:
            return digest
    digest = file_digest(path)
    # Without a cache folder that can be written, the next call reads the file again.
    with suppress(OSError):
        replace_file(folder / name, digest)
    return digest


def read_object(path: Path | UPath, what: str) -> dict[str, Any]:
    """The object in a JSON file; `what` names the file in errors.

    Raises:
        UsageError: if the file is missing, unreadable, or holds no JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{what} {path} is missing") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{what} {path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{what} {path} is not a JSON object")
    return content
