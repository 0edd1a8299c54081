"""Where a dataset lies: a folder of a file system, or one in an object store, by its URL."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from upath import UPath

from mlem_dist.errors import UsageError
from mlem_dist.files import check_writable, replace_file

Location = Path | UPath
"""A path, or what fsspec finds under a URL such as s3://BUCKET/NAME."""


def parse_location(text: str) -> Location:
    """The folder of a path or URL.

    Raises:
        UsageError: no such kind of URL is known, or its package is not installed.
    """
    kind, is_url, place = text.partition("://")
    if not is_url:
        return Path(text)
    try:
        if not place.strip("/"):
            raise ValueError("it names no place")
        # Of what other processes write, a listing from before says nothing.
        found = UPath(f"{kind}://{place.rstrip('/')}", use_listings_cache=False)
        # Refused where there is no bucket.
        found / "data"
        return Path(found.path) if "file" in found.fs.protocol else found
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"{text} cannot be opened: {error}; expected a path or a URL such as s3://BUCKET/NAME"
        ) from None


def check_location(out: Location) -> None:
    """Refuse an `--out` that is not, and cannot become, a folder that this process may write. Touches nothing.

    Raises:
        UsageError: as `check_writable`, or the object store does not answer, has no such bucket or refuses to list it.
    """
    if isinstance(out, Path):
        return check_writable(out)
    try:
        with reached(out):
            found = out.exists()
            # Some may list their own folder only.
            with suppress(PermissionError):
                found = found or out.fs.exists(out.drive)
    except OSError as error:
        raise UsageError(f"--out {error}") from None
    if not found:
        raise UsageError(f"--out {out}: there is no bucket {out.drive}; make it, or choose another place")


@contextmanager
def reached(out: Location) -> Iterator[None]:
    """What an object store raises, each errors of its own, as OSError that names the place."""
    try:
        yield
    except Exception as error:
        if isinstance(out, Path) or isinstance(error, FileNotFoundError):
            raise
        raise OSError(f"{out} cannot be reached: {_said(error)}; check the name and the credentials") from None


def publish(path: Location, content: str | bytes, work: Location) -> None:
    """Write a file that appears under its name complete or not at all.

    Args:
        path: its name.
        content: of the file.
        work: a folder on the same file system for a temporary file, which an object store does not need.

    Raises:
        OSError: the disk is full or not writable, or the object store does not take the file.
    """
    if isinstance(path, Path):
        assert isinstance(work, Path)
        return replace_file(path, content, work)
    try:
        # The object is there when its upload is complete.
        path.fs.pipe_file(path.path, content if isinstance(content, bytes) else content.encode())
    except Exception as error:
        raise OSError(f"{path} cannot be written: {_said(error)}; mend that, and the same command goes on") from None


def listed(folder: Location) -> dict[str, int]:
    """What is in a folder, by name, with its bytes; nothing where there is no folder.

    By one listing and not by a look at each: there may be very many.
    """
    found = {}
    if isinstance(folder, Path):
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                found[entry.name] = 0
                # A link to nothing has no size.
                with suppress(OSError):
                    found[entry.name] = entry.stat().st_size
        return found
    with suppress(FileNotFoundError), reached(folder):
        for one in folder.fs.ls(folder.path, detail=True):
            found[one["name"].rstrip("/").rpartition("/")[2]] = one["size"]
    return found


def remove_folder(folder: Location) -> None:
    """Remove a folder and all that is in it, as far as that can be done."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with suppress(Exception):
        folder.fs.rm(folder.path, recursive=True)


def _said(error: Exception) -> str:
    return " ".join(str(error).split())
