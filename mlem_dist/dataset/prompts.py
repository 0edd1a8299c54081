"""Tables of prompts: Parquet files whose rows are read where they are needed, a few at a time."""

from __future__ import annotations

import hashlib
import io
import json
import math
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from mlem_dist.dataset.schema import SCALE, SEED
from mlem_dist.errors import UsageError
from mlem_dist.files import file_digest, listing, remembered_digest
from mlem_dist.store import HUB, HubFile, Location, listed, parse_location, publish, reached

PROMPT, NEGATIVE_PROMPT = "prompt", "negative_prompt"
"""Columns that decide images, beside that of image seeds and that of scales of guidance."""

RESERVED = ("sample_id", "image", "label", "width", "height")
"""Columns that a dataset has of its own, and that a table must not have."""

BATCH_ROWS = 4096
"""Number of rows that a reader decodes and holds at a time."""

GROUP_ROWS = 50_000
"""Number of rows in a row group of a table that is converted."""

SEEDS = 2**32
"""Number of image seeds: torch's generator for CPUs takes 32 bits of a seed."""

TEXTS = 4096
"""Largest number of prompts that are taken for measurements."""


@dataclass(frozen=True, eq=False)
class PromptTable:
    """Rows that images are made from, each for `images` images in turn.

    Attributes:
        source: the Parquet file, which every node sees or downloads, or the rows in memory.
        prompt: name of the column of prompts.
        rows: number of rows.
        schema: the columns.
        digest: SHA-256 of the file or rows, as the user gave them.
        images: number of images per row.
    """

    source: Location | HubFile | pa.Table
    prompt: str
    rows: int
    schema: pa.Schema
    digest: str
    images: int = 1

    def __getstate__(self) -> dict[str, Any]:
        # Without the open file.
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def has(self, name: str) -> bool:
        """Whether there is a column of that name."""
        return name in self.schema.names

    @cached_property
    def _readers(self) -> dict[tuple[str, ...], RowReader]:
        return {}

    def read(self, samples: Sequence[int], columns: Sequence[str]) -> pa.Table:
        """The rows of samples with consecutive ids. Ids beyond the last row, which complete a block, have that row."""
        names = tuple(columns)
        rows = [min(sample // self.images, self.rows - 1) for sample in samples]
        first = rows[0]
        if isinstance(self.source, pa.Table):
            part = self.source.select(names).slice(first, rows[-1] + 1 - first)
        else:
            if names not in self._readers:
                self._readers[names] = RowReader(self.source, names)
            part = self._readers[names].read(first, rows[-1] + 1)
        # Not by `take`, which does not know every type.
        counts = [len(list(same)) for _, same in groupby(rows)]
        if all(count == 1 for count in counts):
            return part
        return pa.concat_tables(part.slice(row, 1) for row, count in enumerate(counts) for _ in range(count))

    def stored_schema(self, negative_prompt: str | None) -> pa.Schema:
        """The columns that a dataset takes from the table: the prompt and the negative prompt, if any, then the others.

        `negative_prompt` is that of all samples, if any.
        """
        own = [self.schema.field(self.prompt).with_name(PROMPT)]
        if self.has(NEGATIVE_PROMPT):
            own.append(self.schema.field(NEGATIVE_PROMPT))
        elif negative_prompt is not None:
            own.append(pa.field(NEGATIVE_PROMPT, pa.string()))
        return pa.schema([*own, *(field for field in self.schema if field.name not in (self.prompt, NEGATIVE_PROMPT))])

    def stored(self, samples: Sequence[int], negative_prompt: str | None) -> dict[str, pa.ChunkedArray]:
        """The columns of `stored_schema`, but for seeds and scales, for samples with consecutive ids."""
        table = self.read(samples, [name for name in self.schema.names if name not in (SEED, SCALE)])
        columns = {PROMPT if name == self.prompt else name: table[name] for name in table.column_names}
        if negative_prompt is not None and not self.has(NEGATIVE_PROMPT):
            columns[NEGATIVE_PROMPT] = pa.chunked_array([pa.array([negative_prompt] * len(samples))])
        return columns

    def texts(self, samples: Sequence[int], negative_prompt: str | None) -> dict[str, list[str | None]]:
        """The prompts and negative prompts of samples by name; `negative_prompt` is that of all, if any."""
        names = [self.prompt, *([NEGATIVE_PROMPT] if self.has(NEGATIVE_PROMPT) else [])]
        table = self.read(samples, names)
        negative = table[NEGATIVE_PROMPT].to_pylist() if len(names) > 1 else [negative_prompt] * len(samples)
        return {PROMPT: table[self.prompt].to_pylist(), NEGATIVE_PROMPT: negative}

    def seeds(self, samples: Sequence[int], default: Sequence[int]) -> list[int]:
        """The image seeds of samples: image j of a row has the row's seed + j, and the default without one."""
        if not self.has(SEED):
            return list(default)
        own = self.read(samples, [SEED])[SEED].to_pylist()
        return [
            other if seed is None else (seed + sample % self.images) % SEEDS
            for sample, seed, other in zip(samples, own, default, strict=True)
        ]

    def scales(self, samples: Sequence[int], default: Sequence[float]) -> list[float]:
        """The guidance scales of samples, the default for rows without one."""
        if not self.has(SCALE):
            return list(default)
        own = self.read(samples, [SCALE])[SCALE].to_pylist()
        return [other if scale is None else float(scale) for scale, other in zip(own, default, strict=True)]

    def first_texts(self) -> tuple[str, ...]:
        """The first prompts, for measurements."""
        return tuple(replace(self, images=1).read(range(min(self.rows, TEXTS)), [self.prompt])[self.prompt].to_pylist())

    def published(self, folder: Location) -> PromptTable:
        """The same table in a file in a folder that every node sees; it is written if the rows are in memory."""
        if not isinstance(self.source, pa.Table):
            return self
        place = converted_path(folder, self.digest)
        if place.name not in listed(folder):
            buffer = io.BytesIO()
            # Without new names for the items of lists: the columns are a part of the configuration.
            options = {"row_group_size": GROUP_ROWS, "compression": "zstd", "use_compliant_nested_type": False}
            pq.write_table(self.source, buffer, **options)
            publish(place, buffer.getvalue(), folder)
        return replace(self, source=place)


class RowReader:
    """Some columns of a Parquet file, by row number. It is fast forwards, and holds `BATCH_ROWS` rows in memory."""

    def __init__(self, place: Location | HubFile, columns: Sequence[str]) -> None:
        self._columns, self._lock = list(columns), threading.Lock()
        self._file = open_parquet(place)
        metadata = self._file.metadata
        self._ends = list(accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)))
        self._group, self._begin = -1, 0
        self._batch: pa.RecordBatch | None = None
        self._following: Iterator[pa.RecordBatch] = iter(())

    def read(self, start: int, stop: int) -> pa.Table:
        """Rows start ... stop - 1."""
        parts = []
        with self._lock:
            while start < stop:
                batch = self._batch_at(start)
                part = batch.slice(start - self._begin, stop - start)
                parts.append(part)
                start += len(part)
        return pa.Table.from_batches(parts)

    def _batch_at(self, row: int) -> pa.RecordBatch:
        """The batch that holds a row; `_begin` is its first row."""
        group = bisect_right(self._ends, row)
        if self._batch is None or group != self._group or row < self._begin:
            self._group, self._begin = group, self._ends[group - 1] if group else 0
            # Without threads and buffers of pyarrow's, which hold a row group, and may abort an interpreter that exits.
            self._following = self._file.iter_batches(BATCH_ROWS, [group], self._columns, use_threads=False)
            self._batch = next(self._following)
        while row >= self._begin + len(self._batch):
            self._begin += len(self._batch)
            self._batch = next(self._following)
        return self._batch


def open_parquet(place: Location | HubFile) -> pq.ParquetFile:
    """A Parquet file, read through small buffers."""
    path = place.path() if isinstance(place, HubFile) else place
    return pq.ParquetFile(path.open("rb"), pre_buffer=False, buffer_size=2**18)


def converted_path(folder: Location, digest: str) -> Location:
    """The path of a table that is converted to Parquet."""
    return folder / f"prompts-{digest[:16]}.parquet"


def table_of_texts(prompts: Sequence[str], negative_prompts: Sequence[str | None] | None = None) -> PromptTable:
    """A table in memory of prompts and, if given, negative prompts."""
    columns: dict[str, Sequence[str | None]] = {PROMPT: prompts}
    if negative_prompts is not None:
        columns[NEGATIVE_PROMPT] = negative_prompts
    table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    digest = hashlib.sha256(json.dumps({name: list(values) for name, values in columns.items()}).encode()).hexdigest()
    return PromptTable(table, PROMPT, len(table), table.schema, digest)


def open_prompts(
    file: Location | HubFile,
    prompt: str = PROMPT,
    images: int = 1,
    work: Location | None = None,
    carried: bool = True,
) -> PromptTable:
    """The table of prompts in a file: Parquet, JSON lines (.jsonl), CSV (.csv), or a text with a prompt per line.

    Other formats than Parquet are read into memory, unless the folder `work` has the file converted.

    Args:
        file: the file.
        prompt: name of the column of prompts.
        images: number of images per row.
        work: folder of an earlier run's work.
        carried: whether the other columns are carried into a dataset.

    Raises:
        UsageError: if the file cannot be read, lacks the column, has a column to carry that a dataset has of its own,
            or a value that cannot be used; the message says which.
    """
    pinned = file.pinned() if isinstance(file, HubFile) else None
    place = file.path() if isinstance(file, HubFile) else file
    with _readable(place):
        digest = remembered_digest(place) if isinstance(place, Path) else file_digest(place)
        source: Location | HubFile | pa.Table = pinned or place.absolute()
        if place.suffix.lower() != ".parquet":
            earlier = converted_path(work, digest) if work is not None else None
            if earlier is not None and earlier.name in listed(earlier.parent):
                source = earlier
            else:
                source = _as_kept(_reader(place)(place, prompt))
        if isinstance(source, pa.Table):
            schema, rows = source.schema, len(source)
        else:
            opened = open_parquet(source)
            schema, rows = opened.schema_arrow.remove_metadata(), opened.metadata.num_rows
        table = PromptTable(source, prompt, rows, schema, digest, images)
        _check_columns(place, table, carried)
        _check_values(place, table)
    return table


def prompts_file(text: str) -> Location | HubFile:
    """The file of a path or URL, or of hf://datasets/OWNER/NAME/FILE.

    Raises:
        UsageError: if there can be none.
    """
    return HubFile.parse(text) if text.startswith(HUB) else parse_location(text, "prompts")


def first_prompts(text: str, prompt: str) -> tuple[str, ...]:
    """The first prompts of the file of a path or URL, for measurements; `prompt` is the column's name.

    Raises:
        UsageError: as `open_prompts`.
    """
    return open_prompts(prompts_file(text), prompt, carried=False).first_texts()


@contextmanager
def _readable(place: Location) -> Iterator[None]:
    """Turn errors of reading into one sentence."""
    try:
        with reached(place):
            yield
    except UsageError:
        raise
    except (OSError, pa.ArrowException, UnicodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        elif isinstance(error, UnicodeError):
            reason = "it is not text in UTF-8"
        raise UsageError(f"`prompts` {place} cannot be read: {reason}") from None


def _lines(place: Location) -> list[str]:
    text = place.read_bytes().decode("utf-8-sig")
    if not text:
        raise UsageError(f"`prompts` {place} is empty, expected a prompt in each line")
    # `splitlines` would also split at characters that prompts may hold.
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")


def _read_text(place: Location, prompt: str) -> pa.Table:
    if prompt != PROMPT:
        raise UsageError(f"`prompt_column` {prompt}: {place} is a text, which has no columns; leave it out")
    return pa.table({PROMPT: pa.array(_lines(place), pa.string())})


def _read_json(place: Location, prompt: str) -> pa.Table:
    rows = [_json_row(place, number, line) for number, line in enumerate(_lines(place), 1) if line.strip()]
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except (pa.ArrowException, OverflowError) as error:
            raise UsageError(f"`prompts` {place}: the values of {name!r} have no common type: {error}") from None
    return pa.table(columns)


def _json_row(place: Location, number: int, line: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            names = [name for name, _ in pairs]
            double = next(name for name in names if names.count(name) > 1)
            raise UsageError(f"`prompts` {place}: line {number} has {double!r} twice")
        return row

    try:
        row = json.loads(line, object_pairs_hook=unique)
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"`prompts` {place}: line {number} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UsageError(f"`prompts` {place}: line {number} is not an object with a prompt")
    return row


def _read_csv(place: Location, prompt: str) -> pa.Table:
    texts = {name: pa.string() for name in (prompt, NEGATIVE_PROMPT)}
    # A thread of pyarrow that reads through Python can abort the interpreter at its exit.
    return pyarrow.csv.read_csv(
        pa.BufferReader(place.read_bytes()),
        read_options=pyarrow.csv.ReadOptions(use_threads=False),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=texts),
    )


_READERS = {".jsonl": _read_json, ".ndjson": _read_json, ".csv": _read_csv, ".txt": _read_text, "": _read_text}


def _reader(place: Location) -> Callable[[Location, str], pa.Table]:
    """The function that reads a file, by its suffix."""
    if (reader := _READERS.get(place.suffix.lower())) is None:
        raise UsageError(f"`prompts` {place}: expected a name that ends in .parquet, .jsonl, .csv or .txt")
    return reader


def _as_kept(table: pa.Table) -> pa.Table:
    """The table with the types that it has as a Parquet file, which differ for some times and for nothing but null."""
    nothing = {SEED: pa.int64(), SCALE: pa.float64()}
    fields = [
        field.with_type(nothing.get(field.name, pa.string())) if pa.types.is_null(field.type) else field
        for field in table.schema
    ]
    stored = pa.schema(fields)
    buffer = io.BytesIO()
    pq.write_table(stored.empty_table(), buffer, use_compliant_nested_type=False)
    return table.cast(pq.read_schema(pa.BufferReader(buffer.getvalue())).remove_metadata())


def _check_columns(place: Location, table: PromptTable, carried: bool) -> None:
    names = table.schema.names
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"`prompts` {place}: it has the column {double[0]!r} twice; rename one")
    if not table.has(table.prompt):
        raise UsageError(
            f"`prompts` {place}: it has no column {table.prompt!r}; expected one of its columns, {listing(names)}, as "
            "`prompt_column`"
        )
    if not table.rows:
        raise UsageError(f"`prompts` {place}: it has no rows, expected at least one")
    own = [name for name in names if name in RESERVED or (name == PROMPT and name != table.prompt)]
    if own and carried:
        raise UsageError(f"`prompts` {place}: the dataset has a column {own[0]!r} of its own; rename that of the table")
    for field in table.schema:
        if isinstance(field.type, pa.FixedShapeTensorType):
            raise UsageError(f"`prompts` {place}: the column {field.name!r} is of tensors; make lists of them")
    for name, kind, is_kind in (
        (table.prompt, "texts", _is_text),
        (NEGATIVE_PROMPT, "texts", _is_text),
        (SEED, "integers", pa.types.is_integer),
        (SCALE, "numbers", lambda type_: pa.types.is_integer(type_) or pa.types.is_floating(type_)),
    ):
        if table.has(name) and not is_kind(type_ := table.schema.field(name).type):
            raise UsageError(f"`prompts` {place}: the column {name!r} is of {type_}, expected {kind}")


def _is_text(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_))


def _check_values(place: Location, table: PromptTable) -> None:
    """Refuse prompts that are null, and seeds and scales that are out of range, by the number of their row."""
    last = SEEDS - table.images
    for name, bad, wanted in (
        (table.prompt, pc.is_null, "a text, which may be empty"),
        (SEED, lambda column: _outside(column, 0, last), f"0 to {last}"),
        (SCALE, lambda column: _outside(column, 0.0, math.inf), "a number from 0 on"),
    ):
        if not table.has(name):
            continue
        first = 0
        for column, rows, statistics in _groups(table, name):
            if not _harmless(statistics, name, last):
                values = column()
                index = pc.index(pc.fill_null(bad(values), False), True).as_py()
                if index >= 0:
                    value = "null" if (value := values[index].as_py()) is None else value
                    row = f"row {first + index}, counted from 0"
                    raise UsageError(f"`prompts` {place}: {name} of {row}, is {value}, expected {wanted}")
            first += rows


def _outside(column: pa.ChunkedArray, low: float, high: float) -> pa.ChunkedArray:
    """Whether values are out of an interval, or not finite."""
    outside = pc.or_(pc.less(column, low), pc.greater(column, high))
    if pa.types.is_floating(column.type):
        outside = pc.or_(outside, pc.invert(pc.is_finite(column)))
    return outside


def _harmless(statistics: Any, name: str, last: int) -> bool:
    """Whether a row group's statistics show that none of its values is to be refused."""
    if statistics is None or not statistics.has_null_count:
        return False
    if name == SEED:
        return bool(statistics.has_min_max and statistics.min >= 0 and statistics.max <= last)
    # Statistics leave out NaN.
    return name != SCALE and statistics.null_count == 0


def _groups(table: PromptTable, name: str) -> Iterator[tuple[Callable[[], pa.ChunkedArray], int, Any]]:
    """For each row group, a function that reads a column, its number of rows, and the column's statistics, if any."""
    if isinstance(table.source, pa.Table):
        column = table.source[name]
        yield lambda: column, len(column), None
        return
    file = open_parquet(table.source)
    paths = [file.schema.column(index).path for index in range(len(file.schema))]
    for group in range(file.metadata.num_row_groups):
        described = file.metadata.row_group(group)
        statistics = described.column(paths.index(name)).statistics
        yield partial(_column, file, group, name), described.num_rows, statistics


def _column(file: pq.ParquetFile, group: int, name: str) -> pa.ChunkedArray:
    return file.read_row_group(group, [name], use_threads=False)[name]
