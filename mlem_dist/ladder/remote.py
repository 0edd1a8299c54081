"""Models elsewhere: on the hub, or by their URLs in object stores, of whose files each machine keeps copies."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from fcntl import LOCK_EX, flock
from functools import partial
from os import utime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from mlem_dist.errors import UsageError
from mlem_dist.files import cache_folder, remembered_digest
from mlem_dist.ladder import hub
from mlem_dist.store import of_each, parse_location, reached

if TYPE_CHECKING:
    from upath import UPath

SUFFIXES = (".json", ".model", ".safetensors", ".txt")
"""Ends of the names of files that are used; the names of folders may have a point, too."""

TIMES = ("LastModified", "mtime", "last_modified")
"""Names under which kinds of stores give the time of a file's last change."""


def is_url(text: str) -> bool:
    """Whether a text is a URL."""
    return "://" in text


def is_remote(path: str) -> bool:
    """Whether a path in `ladder.json` is that of a file or folder on the hub or in a store."""
    return path.startswith(hub.PREFIX) or is_url(path)


def local_path(path: str, digest: str = "") -> Path:
    """The path of a file or folder elsewhere in the cache of this machine.

    A file that is missing, or has another SHA-256 than `digest`, is downloaded.

    Raises:
        UsageError: if a file cannot be downloaded, or is not the one with this digest in the store either.
    """
    if path.startswith(hub.PREFIX):
        return hub.local_path(path)
    file = _cached(path)

    def is_current() -> bool:
        return file.is_file() and (not digest or remembered_digest(file) == digest)

    if file.suffix in SUFFIXES and not is_current():
        folder, _, name = path.rpartition("/")
        location = parse_location(folder, "model")
        assert not isinstance(location, Path)
        _download(location, name, is_current)
        if not is_current():
            raise UsageError(
                f"{path} is not the file of which the ladder was made: its SHA-256 is not the one in ladder.json; "
                "restore it, or make the ladder again"
            )
    return file


def fetch_folder(location: UPath, what: str) -> Path:
    """The copy on this machine of the folder of a pipeline or of a model in a store, with the files that are used.

    Args:
        location: the folder.
        what: name of the folder's purpose in messages, such as "model".

    Raises:
        UsageError: if it is not such a folder, the store cannot be reached, or it has weights in other formats only.
    """
    url = f"{what} {str(location)!r}"
    with _sentence(url):
        files = _files(location, url)
        names = hub.needed_files(url, [*files])
        of_each(partial(_update, location, files), names)
    folder = str(location).rstrip("/")
    forget_others(f"{folder}/{name}" for name in names)
    return _cached(folder)


def forget_others(files: Iterable[str]) -> None:
    """Remove the files beside these from the cache of stores.

    They are of earlier models at the same URL, and diffusers would load such an index of shards instead of a new file.
    """
    known = {_cached(file) for file in files if not file.startswith(hub.PREFIX) and is_url(file)}
    for folder in {file.parent for file in known}:
        for file in folder.iterdir():
            if file.suffix in SUFFIXES and file not in known:
                file.unlink(missing_ok=True)


def _files(location: UPath, url: str) -> Mapping[str, Mapping[str, Any]]:
    """Metadata that the store has of each file in a folder and its subfolders, by relative path."""
    top = _listed(location)
    if not {"model_index.json", "config.json"} & {*top}:
        raise UsageError(f"{url} has neither model_index.json nor config.json, expected a folder of diffusers")
    folders = [name for name, entry in top.items() if entry["type"] == "directory"]
    below = of_each(lambda name: _listed(location / name), folders)
    inner = {
        f"{folder}/{name}": entry
        for folder, entries in zip(folders, below, strict=True)
        for name, entry in entries.items()
    }
    return {name: entry for name, entry in {**top, **inner}.items() if entry["type"] == "file"}


def _listed(folder: UPath) -> dict[str, Mapping[str, Any]]:
    with reached(folder):
        entries = folder.fs.ls(folder.path, detail=True)
    # Some tools mark a folder by an empty object with the folder's name.
    path = folder.path.rstrip("/")
    return {entry["name"].rpartition("/")[2]: entry for entry in entries if entry["name"].rstrip("/") != path}


def _update(location: UPath, files: Mapping[str, Mapping[str, Any]], name: str) -> None:
    """Download a file unless its copy has the same size and time of change."""
    file, entry = _cached(f"{location}/{name}"), files[name]

    def is_current() -> bool:
        with suppress(OSError):
            status = file.stat()
            return status.st_size == entry["size"] and int(status.st_mtime) == _time(entry)
        return False

    _download(location, name, is_current)


def _download(location: UPath, name: str, is_current: Callable[[], bool]) -> None:
    """Copy a file to this machine's cache, where it appears complete or not at all, unless its copy is current.

    Of several processes, one downloads.
    """
    url = f"{str(location).rstrip('/')}/{name}"
    file, path = _cached(url), f"{location.path.rstrip('/')}/{name}"
    with _sentence(url), _locked(file):
        if is_current():
            return
        for leftover in file.parent.iterdir():
            if leftover.name.startswith(f".{file.name}.") and leftover.suffix == ".tmp":
                leftover.unlink(missing_ok=True)
        temporary = file.with_name(f".{file.name}.{uuid4().hex[:12]}.tmp")
        try:
            with reached(location):
                entry = location.fs.info(path)
                location.fs.get_file(path, str(temporary))
            if (size := temporary.stat().st_size) != entry["size"]:
                raise UsageError(
                    f"{url} has changed while it was downloaded: {size} bytes came, expected {entry['size']}; give the "
                    "same command again"
                )
            if changed := _time(entry):
                utime(temporary, (changed, changed))
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)


def _time(entry: Mapping[str, Any]) -> int:
    """The time of a file's last change in whole seconds, as some answers have no more; 0 if it is not known."""
    times: Sequence[Any] = [entry[name] for name in TIMES if isinstance(entry.get(name), datetime)]
    return int(times[0].timestamp()) if times else 0


def _cached(url: str) -> Path:
    """The place in the cache of a file or folder in a store.

    Raises:
        UsageError: if a part of the URL would lead out of the cache.
    """
    kind, _, place = url.partition("://")
    parts = place.rstrip("/").split("/")
    if not kind.isalnum() or {"", ".", ".."} & {*parts}:
        raise UsageError(f"{url}: expected a URL such as s3://BUCKET/NAME, with names without . and ..")
    return cache_folder() / "models" / kind / Path(*parts)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold the lock of a file in the cache, whose folder is made if it is missing.

    Raises:
        UsageError: if the cache cannot be written.
    """
    locks = cache_folder() / "locks"
    try:
        for folder in (locks, file.parent):
            folder.mkdir(parents=True, exist_ok=True)
        lock = (locks / hashlib.sha256(str(file).encode()).hexdigest()).open("w", encoding="ascii")
    except OSError as error:
        raise UsageError(
            f"the cache {cache_folder()} cannot be written: {error.strerror}; let MLEM_DIST_CACHE name another folder"
        ) from None
    with lock:
        flock(lock, LOCK_EX)
        yield


@contextmanager
def _sentence(what: str) -> Iterator[None]:
    """Turn errors of a store into one sentence.

    Raises:
        UsageError: if the store cannot be reached, or does not have what is asked for.
    """
    try:
        yield
    except FileNotFoundError:
        raise UsageError(f"{what}: the store has no such bucket, folder or file; check the name") from None
    except OSError as error:
        raise UsageError(str(error)) from None
