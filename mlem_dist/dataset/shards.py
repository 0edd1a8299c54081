"""Write, list and verify shards: one Parquet file each, holding a fixed range of sample ids."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from mlem_dist.dataset.schema import schema
from mlem_dist.errors import UsageError
from mlem_dist.files import file_digest
from mlem_dist.store import Location, StoreError, listed, move, of_each, publish, reached, read_whole

# Unfinished work lies beside `data/`, never in it: readers take every file in `data/` for rows.
WORK = ".mlem"

DATA = "data"

FORMATS = ("png", "jpeg", "webp")

GROUP_BYTES = 100_000_000
"""Largest size of the images of a row group, in bytes."""

QUALITY = 95
"""Default quality of formats that lose something."""

Columns = Mapping[str, Sequence[int | float | None] | pa.ChunkedArray]
"""Values of each column but the image, one per sample."""


@dataclass(frozen=True)
class Shard:
    """A finished shard: `path` relative to the dataset folder, its number of rows and bytes, and its SHA-256."""

    path: str
    rows: int
    bytes: int
    sha256: str


def shard_path(index: int, shards: int) -> str:
    """The path of shard `index` of `shards`, relative to the dataset folder."""
    return f"{DATA}/train-{index:05d}-of-{shards:05d}.parquet"


def waiting_path(index: int) -> str:
    """The path of shard `index` while it is not known whether it has a place in the dataset."""
    return f"{WORK}/train-{index:05d}.parquet"


def shard_index(path: str) -> int | None:
    """The index in a path as of `shard_path` or `waiting_path`; None for other paths."""
    match = re.fullmatch(r"train-(\d+)(-of-\d+)?\.parquet", Path(path).name)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class Encoding:
    """The format of image files.

    Attributes:
        format: one of `FORMATS`; PNG loses nothing.
        quality: 1 to 100, for formats that lose something.

    Raises:
        UsageError: if there is no such format or quality.
    """

    format: str = "png"
    quality: int | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"`image_format` {self.format!r}: expected one of {', '.join(FORMATS)}")
        if self.quality is None:
            return
        if self.format == "png":
            raise UsageError(
                f"`image_quality` {self.quality}: a PNG has no quality; leave it out, or take jpeg or webp"
            )
        if not 1 <= self.quality <= 100:
            raise UsageError(f"`image_quality` {self.quality}: expected 1 to 100")

    def files(self, images: np.ndarray) -> list[bytes]:
        """Files of uint8 images (n, H, W, C) with C = 1 or 3."""
        options = {} if self.format == "png" else {"quality": self.quality or QUALITY}
        files = []
        for image in images:
            buffer = io.BytesIO()
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, self.format, **options)
            files.append(buffer.getvalue())
        return files


PNG = Encoding()


def encode_shard(
    files: Sequence[bytes],
    columns: Columns,
    labels: Sequence[str],
    prompts: pa.Schema | None = None,
    scores: Sequence[pa.Field] = (),
) -> bytes:
    """A Parquet file of images and the other columns of `schema`, of which these are the arguments."""
    fields = schema(labels, prompts, scores)
    values = {**columns, "image": [{"bytes": file, "path": None} for file in files]}
    return _encode_table(pa.table([typed(values[field.name], field) for field in fields], schema=fields))


def first_rows(data: bytes, rows: int) -> bytes:
    """The Parquet file that `encode_shard` makes of the first rows of a shard, given its file."""
    return _encode_table(pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False).slice(0, rows))


def _encode_table(table: pa.Table) -> bytes:
    """A Parquet file of a table with a column of images."""
    fields = table.schema
    small = [path for path in _leaves(fields) if not path.startswith("image.")]
    buffer = io.BytesIO()
    writer = pq.ParquetWriter(
        buffer,
        fields,
        compression={**dict.fromkeys(small, "zstd"), "image.bytes": "none", "image.path": "zstd"},
        use_dictionary=False,
        # Statistics of an image column would copy whole small images into the footer.
        write_statistics=small,
        write_page_index=True,
        write_page_checksum=True,
        use_content_defined_chunking=True,
    )
    # A row group without rows would break readers that take its size for that of their batches.
    with writer:
        if table.num_rows:
            largest = pc.max(pc.binary_length(pc.struct_field(table["image"], "bytes"))).as_py()
            writer.write_table(table, max(1, min(table.num_rows, GROUP_BYTES // largest)))
    return buffer.getvalue()


def typed(values: Any, field: pa.Field) -> Any:
    """Values of a column as an array, which one may be already."""
    return values if isinstance(values, pa.ChunkedArray) else pa.array(values, field.type)


def _leaves(fields: pa.Schema) -> list[str]:
    """The paths of a schema's columns in a Parquet file, of which a list or struct has some."""
    buffer = io.BytesIO()
    pq.write_table(fields.empty_table(), buffer)
    stored = pq.ParquetFile(buffer).schema
    return [stored.column(index).path for index in range(len(stored))]


def write_shard(
    out: Location,
    path: str,
    images: np.ndarray,
    columns: Columns,
    labels: Sequence[str],
    run: str,
    prompts: pa.Schema | None = None,
    encoding: Encoding = PNG,
    scores: Sequence[pa.Field] = (),
) -> Shard:
    """Encode and commit the shard at `path`: images uint8 (n, H, W, C), and the other columns of `schema`.

    The file appears under its name complete or not at all. A marker in `.mlem/` follows it, and names the `run`
    by the fingerprint of its configuration.

    Raises:
        ValueError: if images and values of a column differ in number.
        OSError: as `publish`.
    """
    if {len(images)} != {*map(len, columns.values())}:
        counts = ", ".join(f"{len(values)} of {name}" for name, values in columns.items())
        raise ValueError(f"{path}: {len(images)} images, {counts}")
    data = encode_shard(encoding.files(images), columns, labels, prompts, scores)
    shard = _shard(path, len(images), data)
    publish(out / path, data, out / WORK)
    publish(out / WORK / _marker(path), json.dumps({"run": run, **asdict(shard)}), out / WORK)
    return shard


def _shard(path: str, rows: int, data: bytes) -> Shard:
    return Shard(path, rows, len(data), hashlib.sha256(data).hexdigest())


def place_shard(out: Location, waiting: Shard, path: str, rows: int) -> Shard:
    """Give a waiting shard its place in the dataset, with its first rows only; it may have it already."""
    if rows < waiting.rows:
        data = first_rows(read_whole(out / waiting.path), rows)
        publish(out / path, data, out / WORK)
        return _shard(path, rows, data)
    if waiting.path != path:
        try:
            move(out / waiting.path, out / path)
        except FileNotFoundError:
            # Another run of the same command may have moved it.
            if Path(path).name not in listed(out / DATA):
                raise
    return replace(waiting, path=path)


def marked_shards(out: Location, run: str, of: Iterable[str] | None = None) -> list[Shard]:
    """The shards that an unfinished run has written: all, or those with the paths `of`.

    A marker that names another run or another shard does not count. A marker of an earlier version names no run, and
    counts. A marker that cannot be read does not count, so that its shard is made again, unless an object store fails
    to answer.

    Raises:
        StoreError: if an object store does not answer, or refuses.
    """

    def read(name: str) -> Shard | None:
        try:
            raw = json.loads(read_whole(out / WORK / name))
            its_own = raw.pop("run", run) == run and _marker(raw["path"]) == name
            return Shard(**raw) if its_own else None
        except StoreError:
            raise
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            return None

    names = listed(out / WORK) if of is None else map(_marker, of)
    markers = sorted(name for name in names if name.startswith("train-") and name.endswith(".json"))
    return [shard for shard in of_each(read, markers) if shard]


def _marker(path: str) -> str:
    return f"{Path(path).stem}.json"


def whole_shards(out: Location, shards: Iterable[Shard]) -> dict[str, Shard]:
    """The shards whose files exist with the recorded sizes, keyed by path.

    A waiting shard may have its place already, and counts there.
    """
    recorded = [*shards]
    folders = {DATA, *(str(Path(shard.path).parent) for shard in recorded)}
    sizes = {f"{folder}/{name}": size for folder in folders for name, size in listed(out / folder).items()}
    places = {shard_index(path): path for path in sizes if path.startswith(DATA)}
    whole = {}
    for shard in recorded:
        place = places.get(shard_index(shard.path)) if shard.path.startswith(WORK) else None
        path = place if place and sizes[place] == shard.bytes else shard.path
        if sizes.get(path) == shard.bytes:
            whole[path] = replace(shard, path=path)
    return whole


def damage(out: Location, shards: Sequence[Shard]) -> list[str]:
    """Damage to the shards' files, compared by content: a sentence for each file that differs from what was written.

    Raises:
        StoreError: if an object store does not answer, or refuses.
    """

    def look(shard: Shard) -> str | None:
        try:
            with reached(out):
                digest = file_digest(out / shard.path)
        except FileNotFoundError:
            return f"{shard.path} is missing"
        except StoreError:
            raise
        except OSError as error:
            return f"{shard.path} cannot be read: {error.strerror}"
        return None if digest == shard.sha256 else f"{shard.path} is not what was written: its SHA-256 differs"

    return [problem for problem in of_each(look, shards) if problem]


def foreign(out: Location, shards: Sequence[Shard]) -> list[str]:
    """Paths of entries in `data/` other than the shards: readers would take them for rows."""
    known = {shard.path for shard in shards}
    paths = (f"{DATA}/{name}" for name in listed(out / DATA))
    return sorted(path for path in paths if path not in known)
