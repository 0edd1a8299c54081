"""Exports of finished datasets for other tools: tar files for webdataset, folders of pictures for ImageFolder."""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from mlem_dist.dataset.manifest import Manifest, finished_shards, read_manifest, recorded_shards
from mlem_dist.dataset.shards import WORK, Shard
from mlem_dist.dataset.values import json_line, member_names, plain_type
from mlem_dist.errors import UsageError
from mlem_dist.files import listing, own_names, read_object
from mlem_dist.store import (
    Location,
    StoreError,
    check_location,
    listed,
    of_each,
    publish,
    reached,
    read_whole,
    remove_files,
)

RECORD, METADATA = "export.json", "metadata.jsonl"
RECORD_VERSION = 1

FOLDER = 10_000
"""Largest number of pictures in a folder."""

BATCH = 32
"""Number of rows in memory at a time, of images that may have megabytes each."""

KEY_WIDTH = 9
"""Smallest number of digits of a key."""

Row = dict[str, Any]
"""Values of a row by column, as JSON has them, but for the image's struct of bytes."""


@dataclass(frozen=True)
class ExportReport:
    """What an export has written.

    Attributes:
        target: the export's folder.
        images: number of images in it.
        files: number of tar files, or of folders of pictures.
        made: number of images that this call has written.
        paths: the tar files as webdataset names them, or the folder.
    """

    target: str
    images: int
    files: int
    made: int
    paths: str


@dataclass(frozen=True)
class Export(ABC):
    """A finished dataset and the folder of its export.

    Attributes:
        out: the dataset's location.
        manifest: the dataset's manifest.
        target: the export's location.
    """

    out: Location
    manifest: Manifest
    target: Location

    name: ClassVar[str]
    """The format's name."""

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The dataset's shards in order."""
        return self.manifest.shards

    @cached_property
    def images(self) -> int:
        """The number of images."""
        return sum(shard.rows for shard in self.shards)

    @property
    @abstractmethod
    def files(self) -> int:
        """The number of tar files or of folders."""

    @property
    @abstractmethod
    def paths(self) -> str:
        """The tar files as webdataset names them, or the folder."""

    @abstractmethod
    def missing(self) -> list[int]:
        """The numbers of the shards of which something is missing in the target."""

    @abstractmethod
    def write(self, number: int) -> int:
        """Write what is missing of a shard, and return the number of images written."""

    def finish(self) -> None:
        """Write what follows the last shard, and remove temporary files."""
        remove_files(self.target / WORK, keep=RECORD)

    def check_column(self, field: pa.Field) -> None:
        """Refuse a column that the format cannot have.

        Raises:
            TypeError: with the reason.
        """
        try:
            plain_type(field.type)
        except TypeError as error:
            raise TypeError(f"has values of type {error}, which JSON cannot have") from None

    def key(self, sample_id: int) -> str:
        """The name of a sample's files without extension; the order of names is that of sample ids."""
        return f"{sample_id:0{self.key_width}d}"

    @cached_property
    def key_width(self) -> int:
        """The number of digits of keys, the same for all rows."""
        return max(KEY_WIDTH, len(str(self.images - 1)))

    def schema(self, columns: pa.Schema) -> pa.Schema:
        """The columns with types whose values JSON has, but for the image.

        Raises:
            UsageError: if a column cannot be exported.
        """
        if not {"sample_id", "image"} <= {*columns.names}:
            raise UsageError(f"`dataset` {self.out} has no columns sample_id and image: {listing(columns.names)}")
        fields = []
        for field in columns:
            if field.name == "image":
                fields.append(field)
                continue
            try:
                self.check_column(field)
            except TypeError as error:
                raise UsageError(
                    f"`dataset` {self.out} cannot be exported as {self.name}: its column {field.name!r} {error}; read "
                    "its Parquet files instead, or make it without this column"
                ) from None
            fields.append(pa.field(field.name, plain_type(field.type)))
        return pa.schema(fields)

    def check_columns(self) -> None:
        """Refuse a dataset with a column that cannot be exported, by the first shard's columns.

        Raises:
            UsageError: as `schema`, or if the shard cannot be read.
        """
        with self._opened(self.shards[0]) as file:
            self.schema(file.schema_arrow)

    def batches(self, shard: Shard) -> Iterator[list[Row]]:
        """The rows of a shard, some at a time.

        Raises:
            UsageError: if the shard cannot be read, or a column cannot be exported.
            StoreError: if an object store does not answer, or refuses.
        """
        with self._opened(shard) as file:
            schema = self.schema(file.schema_arrow)
            for batch in file.iter_batches(BATCH, use_threads=False):
                yield batch.cast(schema).to_pylist()

    @contextmanager
    def _opened(self, shard: Shard) -> Iterator[pq.ParquetFile]:
        path = self.out / shard.path
        try:
            with reached(self.out), path.open("rb") as opened:
                # A thread of pyarrow that reads through Python can abort the interpreter at its exit.
                yield pq.ParquetFile(opened, pre_buffer=False, page_checksum_verification=True, buffer_size=2**20)
        except StoreError:
            raise
        except (OSError, pa.ArrowException) as error:
            why = " ".join(str(error).split())
            raise UsageError(f"{path} cannot be read ({why}); `mlem-dist verify {self.out}` says more") from None


class Tars(Export):
    """Tar files as img2dataset writes and webdataset reads them, one for each shard."""

    name: ClassVar[str] = "webdataset"

    @property
    def files(self) -> int:
        """The number of tar files."""
        return len(self.shards)

    @property
    def paths(self) -> str:
        """The pattern of the tar files."""
        numbers = [_numbered(number, self.files) for number in (0, self.files - 1)]
        return f"{self.target}/{{{'..'.join(numbers)}}}.tar"

    def path(self, number: int) -> Location:
        """The tar file of a shard."""
        return self.target / f"{_numbered(number, self.files)}.tar"

    def missing(self) -> list[int]:
        """The numbers of the shards that have no tar file."""
        names = listed(self.target)
        return [number for number in range(self.files) if self.path(number).name not in names]

    def write(self, number: int) -> int:
        """Write a shard's tar file, and return the number of its images."""
        publish(self.path(number), lambda path: self._fill(path, self.shards[number]), self.target / WORK)
        return self.shards[number].rows

    def _fill(self, path: Path, shard: Shard) -> None:
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in (row for rows in self.batches(shard) for row in rows):
                key = self.key(row["sample_id"])
                for extension, content in sorted(_members(row).items()):
                    # Nothing of this machine or moment, so that another export has the same bytes.
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


class Pictures(Export):
    """Folders of pictures with a table of the other columns, as ImageFolder of Hugging Face reads them.

    Each shard has folders of its own. Its part of the table lies in `.mlem/` until all parts are there.
    """

    name: ClassVar[str] = "folder"

    @property
    def paths(self) -> str:
        """The folder."""
        return str(self.target)

    @cached_property
    def folders_each(self) -> int:
        """The number of folders of a shard."""
        return math.ceil(max(shard.rows for shard in self.shards) / FOLDER)

    @property
    def files(self) -> int:
        """The number of folders."""
        return (len(self.shards) - 1) * self.folders_each + math.ceil(self.shards[-1].rows / FOLDER)

    def missing(self) -> list[int]:
        """The numbers of the shards of which a picture or the part of the table is missing."""
        numbers = range(len(self.shards))
        parts = {*listed(self.target / WORK)}
        if METADATA in listed(self.target):
            parts |= {self._part(number).name for number in numbers}
        return [n for n in numbers if self._part(n).name not in parts or not self._pictures(n) <= {*self._present(n)}]

    def write(self, number: int) -> int:
        """Write a shard's missing pictures, then its part of the table; return the number of pictures written."""
        present, lines, made = {*self._present(number)}, list[str](), 0
        for rows in self.batches(self.shards[number]):
            pictures = []
            for row in rows:
                content = _image(row)
                picture = self._picture(number, len(lines), row["sample_id"])
                name = f"{picture}.{_extension(content, row)}"
                lines.append(json_line({"file_name": name, **row}) + "\n")
                if picture not in present:
                    pictures.append((name, content))
            of_each(lambda picture: publish(self.target / picture[0], picture[1], self.target / WORK), pictures)
            made += len(pictures)
        if METADATA not in listed(self.target):
            publish(self._part(number), "".join(lines), self.target / WORK)
        return made

    def finish(self) -> None:
        """Write the table of all pictures, unless it exists, then remove its parts and temporary files."""
        if METADATA not in listed(self.target):
            publish(self.target / METADATA, self._join, self.target / WORK)
        super().finish()

    def check_column(self, field: pa.Field) -> None:
        """Refuse a column that JSON or ImageFolder cannot have.

        Raises:
            TypeError: with the reason.
        """
        super().check_column(field)
        for name in sorted({field.name} | member_names(field.type)):
            if name in ("file_name", "file_names") or name.endswith(("_file_name", "_file_names")):
                raise TypeError(f"has the name {name!r}, which ImageFolder takes for that of a picture")

    def _part(self, number: int) -> Location:
        return self.target / WORK / f"{_numbered(number, len(self.shards))}.jsonl"

    @cached_property
    def _starts(self) -> list[int]:
        """The first sample id of each shard."""
        return [*accumulate((shard.rows for shard in self.shards), initial=0)]

    def _folder(self, number: int, position: int) -> str:
        return _numbered(number * self.folders_each + position // FOLDER, self.files)

    def _picture(self, number: int, position: int, sample_id: int) -> str:
        """The path without extension of the picture at a position of a shard, relative to the target."""
        return f"{self._folder(number, position)}/{self.key(sample_id)}"

    def _pictures(self, number: int) -> set[str]:
        """The paths without extension of a shard's pictures, relative to the target."""
        first = self._starts[number]
        return {self._picture(number, i, first + i) for i in range(self.shards[number].rows)}

    def _present(self, number: int) -> Iterator[str]:
        """The paths without extension of the files in a shard's folders, relative to the target."""
        for position in range(0, self.shards[number].rows, FOLDER):
            folder = self._folder(number, position)
            for name in listed(self.target / folder):
                yield f"{folder}/{name.rpartition('.')[0]}"

    def _join(self, path: Path) -> None:
        with path.open("wb") as table:
            for number in range(len(self.shards)):
                table.write(read_whole(self._part(number)))


FORMATS: Mapping[str, type[Export]] = {kind.name: kind for kind in (Tars, Pictures)}


def export_dataset(out: Location, target: Location, form: str) -> ExportReport:
    """Write what is missing of an export of a finished dataset.

    Args:
        out: the dataset's location.
        target: the export's location, new or empty, or with a part of this export.
        form: a name in `FORMATS`.

    Raises:
        UsageError: if the format is unknown, there is no dataset, it is not finished, its shards are damaged or have
            a column that cannot be exported, or the target is in it, holds something else or cannot be written.
        OSError: as `publish` and `listed`.
    """
    if form not in FORMATS:
        raise UsageError(f"`format` {form!r}: expected {' or '.join(FORMATS)}")
    _check_outside(out, target)
    manifest = read_manifest(out)
    _check_whole(out, manifest)
    export = FORMATS[form](out, manifest, target)
    begun = _check_target(export)
    export.check_columns()
    missing = export.missing()
    if missing or not begun:
        check_location(target, "target")
    if not begun:
        publish(target / WORK / RECORD, json.dumps(_record(export), indent=1) + "\n", target / WORK)
    made = sum(map(export.write, missing))
    export.finish()
    return ExportReport(str(target), export.images, export.files, made, export.paths)


def _check_outside(out: Location, target: Location) -> None:
    """Refuse a target that is the dataset's folder or lies in it, where readers would take its files for theirs."""
    if isinstance(out, Path) != isinstance(target, Path):
        return
    inner, outer = (
        place.resolve() if isinstance(place, Path) else Path("/", place.path.strip("/")) for place in (target, out)
    )
    same_store = isinstance(out, Path) or isinstance(target, Path) or type(out.fs) is type(target.fs)
    if same_store and inner.is_relative_to(outer):
        raise UsageError(f"`target` {target} is in the dataset {out} itself; choose a folder outside of it")


def _check_whole(out: Location, manifest: Manifest) -> None:
    """Refuse a dataset that is not finished, or whose shards are missing or have other sizes than were written."""
    if not manifest.shards:
        number = len(recorded_shards(out, manifest))
        raise UsageError(
            f"`dataset` {out} is not finished ({number} shards are there); run its `mlem-dist generate` again to "
            "finish it, then export it"
        )
    whole = finished_shards(out, manifest)
    if damaged := [shard.path for shard in manifest.shards if shard.path not in whole]:
        raise UsageError(
            f"`dataset` {out} is damaged (missing or of another size than was written: {listing(damaged)}); run its "
            "`mlem-dist generate` again to mend it, then export it"
        )


def _check_target(export: Export) -> bool:
    """Whether the target holds a part of this export.

    Raises:
        UsageError: if it holds something else, or cannot be written.
    """
    target = export.target
    try:
        names = [name for name in own_names(listed(target)) if name != WORK]
        begun = RECORD in listed(target / WORK)
    except OSError:
        check_location(target, "target")
        raise
    if not begun:
        if names:
            raise UsageError(
                f"`target` {target} holds something else ({listing(names)}); choose an empty or new folder"
            )
        return False
    with reached(target):
        record = read_object(target / WORK / RECORD, "record of an export")
    expected = _record(export)
    if other := [key for key in expected if record.get(key) != expected[key]]:
        what = {
            "format": f"in the format {record.get('format')}",
            "record_version": "by another version of mlem-dist",
        }.get(other[0], "of another dataset")
        raise UsageError(f"`target` {target} holds an export {what}; choose an empty or new folder")
    return True


def _record(export: Export) -> dict[str, Any]:
    """The content of an export's record, which says what the export is of."""
    digests = "".join(shard.sha256 for shard in export.shards)
    return {
        "record_version": RECORD_VERSION,
        "fingerprint": export.manifest.fingerprint,
        "shards": hashlib.sha256(digests.encode()).hexdigest(),
        "format": export.name,
    }


def _numbered(number: int, total: int) -> str:
    return f"{number:0{max(5, len(str(total - 1)))}d}"


def _members(row: Row) -> dict[str, bytes]:
    """The content of a row's files by extension; a prompt or class that is null stays with the other columns."""
    content = _image(row)
    files = {_extension(content, row): content}
    if isinstance(row.get("prompt"), str):
        files["txt"] = row.pop("prompt").encode()
    if type(row.get("label")) is int:
        files["cls"] = str(row.pop("label")).encode()
    return {**files, "json": json_line(row).encode()}


def _image(row: Row) -> bytes:
    """The content of a row's image file, which the row no longer holds then."""
    return (row.pop("image") or {}).get("bytes") or b""


def _extension(content: bytes, row: Row) -> str:
    """The extension for the format of an image file, by its first bytes.

    Raises:
        UsageError: if it is none of PNG, JPEG and WebP.
    """
    start = content[:12]
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if start.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if start[:4] == b"RIFF" and start[8:] == b"WEBP":
        return "webp"
    raise UsageError(f"the image of sample {row['sample_id']} begins with {start!r}, expected PNG, JPEG or WebP")
