"""Where a dataset lies: a folder of a file system, or one in an object store, by its URL."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar
from urllib.parse import unquote

from mlem_dist.errors import UsageError
from mlem_dist.files import check_text, check_writable, replace_file

if TYPE_CHECKING:
    from upath import UPath

Location: TypeAlias = "Path | UPath"
"""A path, or what fsspec finds under a URL such as s3://BUCKET/NAME."""

S3, GOOGLE, AZURE = "s3fs", "gcsfs", "adlfs"
PACKAGES = {"s3": S3, "s3a": S3, "gs": GOOGLE, "gcs": GOOGLE, "az": AZURE, "abfs": AZURE, "abfss": AZURE}
"""Packages by kind of URL, of stores in which an object is there whole or not at all."""


REQUESTS, BATCH = 32, 1000
"""Requests at a time."""

T = TypeVar("T")
U = TypeVar("U")


class StoreError(OSError):
    """An object store does not answer, or refuses."""


def parse_location(text: str) -> Location:
    """The folder of a path or URL.

    Raises:
        UsageError: the URL is of another kind than those of `PACKAGES` and file, names no bucket or has a part that a
            folder cannot have; or its package is not installed.
    """
    check_text([text], "`out`")
    kind, is_url, place = text.partition("://")
    kind, parts = kind.lower(), place.rstrip("/").split("/")
    if not is_url:
        return Path(text)
    if kind in ("file", "local"):
        if not place.startswith("/"):
            raise UsageError(f"{text}: expected {kind}:///PATH, with three slashes, or the path alone")
        return Path(unquote(place))
    if kind not in PACKAGES:
        raise UsageError(f"{text}: expected a path or a URL of the kinds {', '.join(PACKAGES)}, as s3://BUCKET/NAME")
    if "::" in place:
        raise UsageError(f"{text}: expected a name without ::, which would be that of one file system in another")
    if {"", ".", ".."} & {*parts}:
        raise UsageError(f"{text}: expected a bucket and names of folders without . and .., as {kind}://BUCKET/NAME")
    if kind in ("s3", "s3a", "gs", "gcs") and "@" in parts[0]:
        raise UsageError(f"{kind}://...@...: expected {kind}://BUCKET/NAME; credentials belong in the environment")
    from upath import UPath

    try:
        # Of what other processes write, a listing from before says nothing.
        folder = UPath(f"{kind}://{'/'.join(parts)}", use_listings_cache=False)
        assert folder.fs
    except ImportError:
        package = PACKAGES[kind]
        raise UsageError(f"{text} needs the package {package}, which is not installed: pip install {package}") from None
    except Exception as error:
        raise UsageError(f"{text} cannot be opened: {_said(error)}; expected {kind}://BUCKET/NAME") from None
    return folder


def check_location(out: Location) -> None:
    """Refuse an `out` that is not, and cannot become, a folder that this process may write. Touches nothing.

    Raises:
        UsageError: as `check_writable`, or the object store does not answer, has no such bucket or refuses to list it.
    """
    if isinstance(out, Path):
        return check_writable(out)
    try:
        with reached(out):
            # Some may see their own folder only.
            if not out.exists():
                with suppress(PermissionError):
                    out.fs.info(out.drive)
    except FileNotFoundError:
        raise UsageError(f"`out` {out}: there is no bucket {out.drive}; make it, or choose another place") from None
    except StoreError as error:
        raise UsageError(f"`out` {error}") from None


@contextmanager
def reached(out: Location) -> Iterator[None]:
    """What an object store raises, each errors of its own, as one that names the place.

    Raises:
        StoreError: it does not answer, or refuses.
        FileNotFoundError: something is not there.
    """
    try:
        yield
    except (FileNotFoundError, StoreError, UsageError):
        raise
    except Exception as error:
        if isinstance(out, Path):
            raise
        raise StoreError(f"{out} cannot be reached: {_said(error)}; check the name and the credentials") from None


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
        raise StoreError(f"{path} cannot be written: {_said(error)}; mend that, and the same command goes on") from None


def read_whole(path: Location) -> bytes:
    """A small file's content.

    Raises:
        OSError: as `reached`, or the file cannot be read.
    """
    if isinstance(path, Path):
        return path.read_bytes()
    with reached(path):
        return bytes(path.fs.cat_file(path.path))


def listed(folder: Location) -> dict[str, int]:
    """What is in a folder, by name, with its bytes; nothing where there is no folder.

    By one listing and not by a look at each: there may be very many.

    Raises:
        OSError: as `reached`, or the folder may not be read.
    """
    sizes = {}
    with suppress(FileNotFoundError), reached(folder):
        if isinstance(folder, Path):
            with os.scandir(folder) as entries:
                for entry in entries:
                    sizes[entry.name] = 0
                    # A link to nothing has no size.
                    with suppress(OSError):
                        sizes[entry.name] = entry.stat().st_size
            return sizes
        for entry in folder.fs.ls(folder.path, detail=True):
            # Some tools mark a folder by an empty object of its name.
            if (name := entry["name"].rstrip("/")) != folder.path.rstrip("/"):
                sizes[name.rpartition("/")[2]] = entry["size"]
    return sizes


def remove_folder(folder: Location) -> None:
    """Remove a folder and all that is in it, as far as that can be done."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return

    def remove(name: str) -> None:
        with suppress(Exception):
            folder.fs.rm_file(f"{folder.path}/{name}")

    # By name: removal of a folder would take its name for a pattern, which those of others may match.
    with suppress(OSError):
        of_each(remove, [*listed(folder)])


def of_each(look: Callable[[T], U], items: Sequence[T]) -> list[U]:
    """What `look` returns for each, many at a time, as a file system or object store may be far away."""
    results: list[U] = []
    with ThreadPoolExecutor(REQUESTS) as pool:
        # A pool holds something for each that it has not begun.
        for start in range(0, len(items), BATCH):
            results += pool.map(look, items[start : start + BATCH])
    return results


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
