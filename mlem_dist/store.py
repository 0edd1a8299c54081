"""Locations of datasets and models: folders of a file system, or of an object store by their URLs."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar
from urllib.parse import unquote

from mlem_dist.errors import UsageError
from mlem_dist.files import check_text, check_writable, replace_file, sync

if TYPE_CHECKING:
    from upath import UPath

Location: TypeAlias = "Path | UPath"
"""A path, or fsspec's path for a URL such as s3://BUCKET/NAME."""

S3, GOOGLE, AZURE = "s3fs", "gcsfs", "adlfs"
PACKAGES = {"s3": S3, "s3a": S3, "gs": GOOGLE, "gcs": GOOGLE, "az": AZURE, "abfs": AZURE, "abfss": AZURE}
"""Packages by kind of URL, for stores in which an object appears complete or not at all."""


HUB = "hf://"
"""Beginning of the URLs of files on the Hugging Face Hub."""

HUB_FILE = re.compile(rf"{HUB}datasets/([\w.-]+/[\w.-]+)(?:@([\w./-]+?))?/(.+)")

REQUESTS, BATCH = 32, 1000
"""Number of requests at a time, and number of items that are handed to the threads at a time."""

T = TypeVar("T")
U = TypeVar("U")


class StoreError(OSError):
    """An object store does not answer, or refuses."""


def parse_location(text: str, name: str = "out") -> Location:
    """The folder of a path or URL, which messages call `name`.

    Raises:
        UsageError: if the URL is neither a file's nor of a kind in `PACKAGES`, names no bucket, has a part that a
            folder cannot have, or cannot be opened, or if its package is not installed.
    """
    check_text([text], f"`{name}`")
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
        # No cached listings, which would miss the files that other processes write.
        folder = UPath(f"{kind}://{'/'.join(parts)}", use_listings_cache=False)
        assert folder.fs
    except ImportError:
        package = PACKAGES[kind]
        raise UsageError(f"{text} needs the package {package}, which is not installed: pip install {package}") from None
    except Exception as error:
        raise UsageError(f"{text} cannot be opened: {_reason(error)}; expected {kind}://BUCKET/NAME") from None
    return folder


def check_location(out: Location, name: str = "out") -> None:
    """Refuse an `out` that neither is nor can become a folder that this process may write. Writes nothing.

    Messages call it `name`.

    Raises:
        UsageError: as `check_writable`, or if the object store does not answer, lacks the bucket or refuses to list it.
    """
    if isinstance(out, Path):
        return check_writable(out, name)
    try:
        with reached(out):
            # Some credentials only give access to a folder of the bucket.
            if not out.exists():
                with suppress(PermissionError):
                    out.fs.info(out.drive)
    except FileNotFoundError:
        raise UsageError(f"`{name}` {out}: there is no bucket {out.drive}; make it, or choose another place") from None
    except StoreError as error:
        raise UsageError(f"`{name}` {error}") from None


@contextmanager
def reached(out: Location) -> Iterator[None]:
    """Turn an object store's own errors into an error that names the place.

    Raises:
        StoreError: if the store does not answer, or refuses.
        FileNotFoundError: if something is not there.
    """
    try:
        yield
    except (FileNotFoundError, StoreError, UsageError):
        raise
    except Exception as error:
        if isinstance(out, Path):
            raise
        raise StoreError(f"{out} cannot be reached: {_reason(error)}; check the name and the credentials") from None


@contextmanager
def hub_reached(what: str) -> Iterator[None]:
    """Turn errors of the hub's client into one sentence.

    Raises:
        UsageError: if the hub cannot be reached, or does not have what is asked for.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        reason = "its authors give access on request; accept their terms on its page, then log in by `hf auth login`"
    except RepositoryNotFoundError:
        reason = "the hub has no such repository, or it is private; check the name, or log in by `hf auth login`"
    except RevisionNotFoundError:
        reason = "the repository has no such branch, tag or commit; check the part after @"
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        offline = isinstance(error, OfflineModeIsEnabled) or "offline" in str(error).lower()
        reason = (
            "it is not in this machine's cache, and HF_HUB_OFFLINE forbids a download; download it first"
            if offline
            else "it is not in this machine's cache, and the hub cannot be reached; check the connection"
        )
    except EntryNotFoundError:
        reason = "the repository has no such file"
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = f"the hub cannot be reached: {' '.join(str(error).split())[:200]}"
    except Exception as error:
        # The client's own library for HTTP, which has changed before.
        if not type(error).__module__.startswith("http"):
            raise
        reason = f"the hub cannot be reached ({type(error).__name__}); check the connection"
    else:
        return
    raise UsageError(f"{what}: {reason}")


@dataclass(frozen=True)
class HubFile:
    """A file of a dataset on the Hugging Face Hub, of which each machine keeps a copy in the hub's cache.

    Attributes:
        repository: OWNER/NAME.
        revision: a branch, tag or commit.
        file: the file's path in the repository.
    """

    repository: str
    revision: str
    file: str

    @classmethod
    def parse(cls, text: str) -> HubFile:
        """The file of a URL hf://datasets/OWNER/NAME[@REVISION]/PATH.

        Raises:
            UsageError: if the URL is another one.
        """
        match = HUB_FILE.fullmatch(text)
        if match is None:
            raise UsageError(f"{text}: expected hf://datasets/OWNER/NAME/FILE, or NAME@REVISION")
        return cls(match[1], match[2] or "main", match[3])

    def path(self) -> Path:
        """The copy on this machine; a missing one is downloaded.

        Raises:
            UsageError: if the hub cannot be reached, or has no such file.
        """
        from huggingface_hub import hf_hub_download

        with hub_reached(str(self)):
            return Path(hf_hub_download(self.repository, self.file, repo_type="dataset", revision=self.revision))

    def pinned(self) -> HubFile:
        """The same file at the commit to which its revision points now."""
        parts = self.path().parts
        return replace(self, revision=parts[parts.index("snapshots") + 1])

    def __str__(self) -> str:
        return f"hf://datasets/{self.repository}@{self.revision}/{self.file}"


def publish(path: Location, content: str | bytes | Callable[[Path], Any], work: Location) -> None:
    """Write a file that appears under its name complete or not at all.

    Args:
        path: the file's location.
        content: the file's content, or a function that writes it to the path of a local file that it is given.
        work: a folder on the same file system for a temporary file, which an object store does not need.

    Raises:
        OSError: if the disk is full or not writable, or the object store does not take the file.
    """
    if isinstance(path, Path):
        assert isinstance(work, Path)
        return replace_file(path, content, work)
    if callable(content):
        with TemporaryDirectory() as folder:
            file = Path(folder, path.name)
            content(file)
            return _upload(path, lambda: path.fs.put_file(str(file), path.path))
    whole = content if isinstance(content, bytes) else content.encode()
    _upload(path, lambda: path.fs.pipe_file(path.path, whole))


def _upload(path: UPath, send: Callable[[], Any]) -> None:
    """Send an object, which appears when its upload is complete."""
    try:
        send()
    except Exception as error:
        raise StoreError(
            f"{path} cannot be written: {_reason(error)}; mend that, and the same command goes on"
        ) from None


def move(path: Location, target: Location) -> None:
    """Give a file another name, under which it appears complete or not at all.

    An object store has no names to change. There, the file is copied by the store and remains.

    Raises:
        OSError: as `publish`.
    """
    if isinstance(path, Path):
        assert isinstance(target, Path)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
        sync(target.parent)
    else:
        assert not isinstance(target, Path)
        source, name = path.path, target.path
        _upload(target, lambda: path.fs.cp_file(source, name))


def read_whole(path: Location) -> bytes:
    """A small file's content.

    Raises:
        OSError: as `reached`, or if the file cannot be read.
    """
    if isinstance(path, Path):
        return path.read_bytes()
    with reached(path):
        return bytes(path.fs.cat_file(path.path))


def listed(folder: Location) -> dict[str, int]:
    """The entries of a folder by name, with their sizes in bytes; empty if there is no folder.

    An object store is asked for one listing rather than for every entry: there may be very many.

    Raises:
        OSError: as `reached`, or if the folder may not be read.
    """
    sizes = {}
    with suppress(FileNotFoundError), reached(folder):
        if isinstance(folder, Path):
            with os.scandir(folder) as entries:
                for entry in entries:
                    sizes[entry.name] = 0
                    # A broken link has no size.
                    with suppress(OSError):
                        sizes[entry.name] = entry.stat().st_size
            return sizes
        for entry in folder.fs.ls(folder.path, detail=True):
            # Some tools mark a folder by an empty object with the folder's name.
            if (name := entry["name"].rstrip("/")) != folder.path.rstrip("/"):
                sizes[name.rpartition("/")[2]] = entry["size"]
    return sizes


def remove_folder(folder: Location) -> None:
    """Remove a folder and its content, as far as possible."""
    if isinstance(folder, Path):
        return shutil.rmtree(folder, ignore_errors=True)
    # File by file: removing a folder would take its name for a pattern, which other folders' names may match.
    remove_files(folder)


def remove_files(folder: Location, keep: str | None = None) -> None:
    """Remove the files in a folder but the one with the name `keep`, as far as possible."""

    def remove(name: str) -> None:
        with suppress(Exception):
            if isinstance(folder, Path):
                (folder / name).unlink()
            else:
                folder.fs.rm_file(f"{folder.path}/{name}")

    with suppress(OSError):
        of_each(remove, [name for name in listed(folder) if name != keep])


def of_each(look: Callable[[T], U], items: Sequence[T]) -> list[U]:
    """The results of `look` for each item, many at a time, as a file system or object store may be far away."""
    results: list[U] = []
    with ThreadPoolExecutor(REQUESTS) as pool:
        # In batches, as the thread pool holds memory for each item that it has not begun.
        for start in range(0, len(items), BATCH):
            results += pool.map(look, items[start : start + BATCH])
    return results


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
