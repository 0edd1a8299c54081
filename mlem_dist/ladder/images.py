"""Image datasets, as uint8 tensors: IDX files, folders of pictures, Parquet in the Hugging Face layout."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mlem_dist.errors import UsageError
from mlem_dist.files import check_text, listing, own_names
from mlem_dist.models.pixels import to_range
from mlem_dist.solver.condition import LABEL, Condition

TRAIN = "train"

HELD_OUT = ("test", "validation")
"""Kinds of held-out parts of a dataset, in order of preference."""

KINDS = frozenset({TRAIN, *HELD_OUT})
"""Kinds of parts of a dataset."""

PART_NAMES = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("validation", "validate", "valid", "val", "dev", "eval", "evaluation"), "validation"),
}
"""Kinds of parts of a dataset, by the names of parts in lower case."""

NOT_PICTURES = frozenset({"BUFR", "GRIB", "HDF5", "MPEG", "PDF"})
"""Formats that Pillow names, but that hold no pictures or none that Pillow can read."""

UNREAD_SUFFIXES = frozenset({".avif", ".heic", ".heif", ".jxl"})
"""Suffixes of pictures that Pillow may be unable to read. Files that it cannot read are refused, not skipped."""

HELD_OUT_SHARE = 0.1
MAX_HELD_OUT = 10_000

FIRST_MODES = {"LAB": "RGB", "La": "LA"}
"""Pixel modes that Pillow cannot convert to grey directly, each with the mode to convert to first."""

BATCH = 1000
"""Number of images that are decoded and encoded together."""

CAPTIONS = "prompt"
"""Usual name of the column of captions."""

Shape = tuple[int, int, int]

Encode = Callable[[np.ndarray], np.ndarray]
"""Function from images, uint8 (n, C, H, W), to latents, float16 (n, c, h, w)."""


@dataclass(frozen=True)
class Images:
    """Images as uint8 or latents as float16 (n, C, H, W) with int64 labels (n,), in a training and a held-out part.

    Attributes:
        labels: class names; empty if the images are used without classes.
        captions: captions, of which labels are the numbers; empty if the images are used without captions.
        resized: number of images larger than the sample shape, which have been cropped and scaled down.
        skipped: number of files among the pictures that are not pictures.
    """

    train: Tensor
    train_label: Tensor
    test: Tensor
    test_label: Tensor
    labels: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    resized: int = 0
    skipped: int = 0

    def samples(self, part: Tensor) -> Tensor:
        """Samples, float32 (B, C, H, W), of images or latents: images in [-1, 1], latents as they are."""
        return to_range(part) if part.dtype == torch.uint8 else part.float()

    def condition(self, label: Tensor) -> Condition:
        """The condition of images with classes `label`, int64 (B,); empty if they are used without classes."""
        return {LABEL: label} if self.labels else {}

    def notes(self) -> list[str]:
        """Sentences for the user on resized images and skipped files."""
        notes = []
        if self.resized:
            notes.append(f"{self.resized:,} images are larger than the samples: cropped and scaled down.")
        if self.skipped:
            notes.append(f"{self.skipped:,} files are no pictures: passed over.")
        return notes

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the training part."""
        digest = hashlib.sha256(str(self.train.shape).encode())
        for part in (self.train, self.train_label):
            digest.update(part.contiguous().numpy().data)
        digest.update("\n".join(self.captions).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Part:
    """One part of a dataset: images or latents (n, C, H, W), and their labels as int64 (n,), if they have labels.

    Attributes:
        captions: the caption of each image; empty if they have none.
        resized: number of images that were resized.
        skipped: number of files among the pictures that are not pictures.
        sources: the files from which the labels are read, each with its number of rows.
    """

    pixels: np.ndarray
    resized: int
    label: np.ndarray | None
    skipped: int = 0
    captions: tuple[str, ...] = ()
    sources: tuple[tuple[Path, int], ...] = ()

    def origin(self, row: int) -> str:
        """File and row in this file from which the label of image `row` is read."""
        for file, rows in self.sources:
            if row < rows:
                return f"{file}: row {row}"
            row -= rows
        raise IndexError(row)


@dataclass(frozen=True)
class _Dataset:
    """Dataset as read: one or two parts, and the names of the classes or None if they have no names."""

    train: _Part
    test: _Part | None
    names: tuple[str, ...] | None


def load_images(
    folder: Path,
    sample_shape: Shape,
    labels: Sequence[str] | None,
    captions: str = "",
    encode: Encode | None = None,
) -> Images:
    """Read the image dataset in `folder`, in any of these forms:

    - the four IDX files of MNIST, plain or gzipped;
    - Parquet files, in `folder`/data, else in `folder`, else in one folder further down, with a column `image` (encoded
      files as binary, or as Hugging Face's struct of bytes and path) and, if there are classes, an integer column
      `label`. A word in the name of the file, or of a folder above it, gives the part that the file belongs to;
    - pictures in one folder per class, or directly in `folder` if there are no classes;
    - folders of pictures in the previous form, each named as a part of the dataset.

    `PART_NAMES` lists the names of parts, in any case. The test part is held out, or else the validation part. If the
    training part has classes, held-out parts without labels, or with the label -1 throughout, are ignored. If no
    held-out part is left, a tenth of the images, at most 10,000, is held out: the same images at every call.

    Hidden files and folders are ignored at every depth; links to files and folders are followed. Among pictures, a file
    is skipped if neither its suffix nor its first bytes are those of a picture.

    Pictures are turned upright and converted to grey (C = 1) or RGB (C = 3; transparency is dropped). Pictures smaller
    than the sample shape are zero-padded to it. Larger ones are cropped to its aspect ratio around the centre and
    scaled down.

    `labels` are the class names in the order wanted, empty to ignore the classes, or None to take the dataset's.
    `captions` is the column of Parquet files with the captions of the images, which then take the place of classes.
    `encode` turns images into latents, `BATCH` at a time, so that the images are not in memory together.

    Raises:
        UsageError: if there is no such dataset, a file is broken, the parts cannot be told from the classes, the
            classes are not `labels`, or there are no captions in `captions`.
    """
    if not folder.is_dir():
        raise UsageError(f"no training data: {folder} is not a folder")
    classes = not captions and (labels is None or len(labels) > 0)
    with warnings.catch_warnings():
        # Pillow warns of large pictures that it reads nevertheless.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        files = _parquet_files(folder)
        if captions and not files:
            raise UsageError(
                f"{folder} has no Parquet files with captions; `datasets.load_dataset` reads pictures with captions, "
                "and `to_parquet` of a part of the dataset writes such a file"
            )
        if any("-idx3-ubyte" in path.name for path in _visible(folder)[0]):
            dataset = _read_idx(folder, sample_shape, encode)
        elif files:
            dataset = _read_parquet(folder, files, sample_shape, classes, captions, encode)
        else:
            dataset = _read_pictures(folder, sample_shape, classes, encode)
    return _assemble(dataset, () if captions else labels, folder)


def has_captions(folder: Path, column: str) -> bool:
    """Whether an image dataset in a folder is one of Parquet files with a column of captions."""
    files = _parquet_files(folder)
    return bool(files) and all(column in _schema(file).names for file in files)


def _assemble(dataset: _Dataset, labels: Sequence[str] | None, source: Path) -> Images:
    """Hold out a part if there is none, and number the classes in the order of `labels`."""
    train = dataset.train
    if dataset.test is None:
        n = len(train.pixels)
        rows = np.random.default_rng(0).permutation(n)
        cut = min(max(1, int(n * HELD_OUT_SHARE)), MAX_HELD_OUT)
        test, train = _rows(train, np.sort(rows[:cut])), _rows(train, np.sort(rows[cut:]))
    else:
        test = dataset.test
    if not len(train.pixels):
        raise UsageError(f"no training data: {source} has only {len(test.pixels)} image; add more")
    read = [part for part in (dataset.train, dataset.test) if part is not None]
    names, number = _classes(dataset, labels, source)
    tensors: list[Tensor] = []
    for part in (train, test):
        label = np.zeros(len(part.pixels), np.int64) if part.label is None or not names else number[part.label]
        tensors += [torch.from_numpy(part.pixels), torch.from_numpy(label)]
    resized, skipped = sum(part.resized for part in read), sum(part.skipped for part in read)
    captions = tuple(sorted({*train.captions, *test.captions}))
    if captions:
        numbers = {caption: number for number, caption in enumerate(captions)}
        tensors[1::2] = [torch.tensor([numbers[caption] for caption in part.captions]) for part in (train, test)]
    return Images(tensors[0], tensors[1], tensors[2], tensors[3], names, captions, resized, skipped)


def _rows(part: _Part, rows: np.ndarray) -> _Part:
    label = None if part.label is None else part.label[rows]
    captions = tuple(part.captions[row] for row in rows.tolist()) if part.captions else ()
    return _Part(part.pixels[rows], 0, label, captions=captions)


def _stacked(images: Iterable[tuple[np.ndarray, bool]], encode: Encode | None) -> tuple[np.ndarray, int]:
    """Images, or their latents, as an array, and the number of those that were resized."""
    iterator, parts, resized = iter(images), [], 0
    while batch := [*islice(iterator, BATCH)]:
        pixels, larger = zip(*batch, strict=True)
        parts.append(np.stack(pixels) if encode is None else encode(np.stack(pixels)))
        resized += sum(larger)
    return np.concatenate(parts), resized


def _classes(dataset: _Dataset, labels: Sequence[str] | None, source: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names, and the index among them of each class of the dataset, int64 (classes,)."""
    parts = [(part, part.label) for part in (dataset.train, dataset.test) if part and part.label is not None]
    if not parts or (labels is not None and not labels):
        if labels:
            raise UsageError(
                f"{source} has no classes, the configuration has the labels {listing(labels)}; leave `labels` out"
            )
        return (), np.zeros(0, np.int64)
    high = max(int(label.max()) for _, label in parts)
    names = dataset.names or tuple(map(str, labels if labels is not None else range(high + 1)))
    for part, label in parts:
        wrong = np.flatnonzero((label < 0) | (label >= len(names)))
        if len(wrong):
            raise UsageError(
                f"{part.origin(int(wrong[0]))}: label {label[wrong[0]]} is out of range for {len(names)} labels; "
                "correct the labels there or the configuration's `labels`, which are [] to train without classes"
            )
    check_text(names, str(source))
    if labels is None:
        return names, np.arange(len(names))
    wanted = tuple(map(str, labels))
    if set(wanted) != set(names):
        raise UsageError(
            f"{source} has the classes {listing(names)}, the configuration has the labels {listing(wanted)}; "
            "make them equal, or leave `labels` out to take those of the data"
        )
    return wanted, np.array([wanted.index(name) for name in names])


def _names(folders: Sequence[Path]) -> str:
    return listing([folder.name for folder in folders])


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Files and folders in a folder, and links to them, by name, without hidden entries and system folders."""
    try:
        with os.scandir(folder) as scan:
            entries = sorted((entry for entry in scan if not entry.name.startswith(".")), key=lambda entry: entry.name)
        dangling_links = [entry.path for entry in entries if entry.is_symlink() and not Path(entry.path).exists()]
        visible_entries = [
            entry for entry in entries if entry.is_file() or (entry.is_dir() and own_names([entry.name]))
        ]
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be read: {error.strerror}; mend or remove it") from None
    if dangling_links:
        raise UsageError(f"{dangling_links[0]} is a link to nothing; mend or remove it")
    return visible_entries


def _visible(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files and folders in a folder, each by name; see `_entries`."""
    entries = _entries(folder)
    return [folder / entry.name for entry in entries if entry.is_file()], [
        folder / entry.name for entry in entries if entry.is_dir()
    ]


def _files_below(folder: Path, above: tuple[os.stat_result, ...] = ()) -> Iterator[Path]:
    """Files in a folder at every depth, by path; `above` are the folders that contain the folder."""
    status = folder.stat()
    if any(os.path.samestat(status, other) for other in above):
        raise UsageError(f"{folder} is a link to a folder that it lies in; remove it")
    for entry in _entries(folder):
        if entry.is_file():
            yield folder / entry.name
        else:
            yield from _files_below(folder / entry.name, (*above, status))


def _words(name: str) -> tuple[str, ...]:
    """Words of a name, in lower case; a word that names a part of a dataset is replaced by the part's kind."""

    def word(text: str) -> str:
        plain = text.casefold()
        return PART_NAMES.get(re.sub("(set|data|images)$", "", plain), plain)

    # Digits and signs separate words. In runs of letters that name no part, a capital after a small letter does so too,
    # as in trainA.
    runs: list[str] = re.findall(r"[^\W\d_]+", name)
    parts = [[run] if word(run) in KINDS else re.split("(?<=[a-z])(?=[A-Z])", run) for run in runs]
    return tuple(word(text) for part in parts for text in part)


def _kinds(names: Sequence[str]) -> set[str]:
    """Kinds of the parts of a dataset that the words in these names stand for."""
    return {word for name in names for word in _words(name)} & KINDS


def _pad(pixels: np.ndarray, sample_shape: Shape) -> np.ndarray:
    """Images (..., C, h, w), centred in black images (..., C, H, W)."""
    height, width = (large - small for large, small in zip(sample_shape[1:], pixels.shape[-2:], strict=True))
    sides = ((height // 2, height - height // 2), (width // 2, width - width // 2))
    return np.pad(pixels, ((0, 0),) * (pixels.ndim - 2) + sides)


def _fit(image: Image.Image, sample_shape: Shape) -> tuple[np.ndarray, bool]:
    """Picture as uint8 (C, H, W), and whether it was resized."""
    channels, height, width = sample_shape
    image = ImageOps.exif_transpose(image)
    if first := FIRST_MODES.get(image.mode):
        image = image.convert(first)
    image = image.convert("L" if channels == 1 else "RGB")
    larger = image.width > width or image.height > height
    if larger:
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(image).reshape(image.height, image.width, channels)
    return _pad(pixels.transpose(2, 0, 1), sample_shape), larger


@cache
def _formats() -> tuple[str, ...]:
    """Picture formats that this installation of Pillow reads."""
    Image.init()
    return tuple(name for name in Image.ID if name not in NOT_PICTURES)


@cache
def _suffixes() -> frozenset[str]:
    """Suffixes of pictures, in lower case."""
    known = Image.registered_extensions()
    return UNREAD_SUFFIXES | {suffix for suffix, name in known.items() if name not in NOT_PICTURES}


def _is_picture(path: Path) -> bool:
    """Whether a file is a picture by its suffix or, failing that, by its first bytes."""
    if path.suffix.lower() in _suffixes():
        return True
    with path.open("rb") as file:
        try:
            Image.open(file, formats=_formats())
        except Image.DecompressionBombError:
            return True
        except (OSError, SyntaxError, ValueError, EOFError):
            return False
    return True


def _has_pictures(folder: Path) -> bool:
    """Whether a folder contains pictures, at any depth."""
    return any(map(_is_picture, _files_below(folder)))


def _decode(data: bytes, name: str, sample_shape: Shape) -> tuple[np.ndarray, bool]:
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            if image.mode.startswith(("I", "F")):
                raise UsageError(f"{name} has pixels of more than 8 bits (mode {image.mode}); convert it to 8 bits")
            return _fit(image, sample_shape)
    except UsageError:
        raise
    except UnidentifiedImageError:
        raise UsageError(
            f"{name} is not an image of a format and mode that can be read; convert or remove it"
        ) from None
    except Image.DecompressionBombError as error:
        size = str(error).partition(",")[0]
        raise UsageError(f"{name} is of a size that cannot be taken ({size}); scale it down or remove it") from None
    # Errors that Pillow raises for broken files.
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UsageError(f"{name} is a broken image ({error}); remove or replace it") from None


def _idx_file(folder: Path, stem: str) -> Path:
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.is_file():
            return path
    raise UsageError(f"no training data: {folder} has neither {stem} nor {stem}.gz (the four IDX files of MNIST)")


def _idx(path: Path) -> np.ndarray:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        dims = raw[3]
        shape = np.frombuffer(raw, ">u4", dims, 4)
    except (OSError, EOFError, IndexError, ValueError, zlib.error):
        raise UsageError(f"{path} is not a complete IDX file of bytes") from None
    if raw[:3] != b"\0\0\x08" or len(raw) != 4 + 4 * dims + int(shape.prod(dtype=np.int64)):
        raise UsageError(f"{path} is not a complete IDX file of bytes")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _read_idx(folder: Path, sample_shape: Shape, encode: Encode | None) -> _Dataset:
    parts = []
    for name in ("train", "t10k"):
        file = _idx_file(folder, f"{name}-labels-idx1-ubyte")
        images, label = _idx(_idx_file(folder, f"{name}-images-idx3-ubyte")), _idx(file)
        if images.ndim != 3 or label.shape != images.shape[:1] or not images.size:
            raise UsageError(
                f"{folder}: {name} has images {images.shape} and labels {label.shape}, expected as many of each"
            )
        larger = images.shape[1] > sample_shape[1] or images.shape[2] > sample_shape[2]
        if larger:
            pixels = np.stack([_fit(Image.fromarray(image), sample_shape)[0] for image in images])
        else:
            pixels = _pad(images[:, None].repeat(sample_shape[0], axis=1), sample_shape)
        if encode:
            pixels, _ = _stacked(((image, False) for image in pixels), encode)
        resized = larger * len(images)
        parts.append(_Part(pixels, resized, label.astype(np.int64), sources=((file, len(label)),)))
    return _Dataset(parts[0], parts[1], None)


def _parquet_files(folder: Path) -> list[Path]:
    """Parquet files of a dataset; empty if there are none, or if they only describe pictures."""
    configs: dict[Path, list[Path]] = {}
    for base in (folder / "data", folder):
        configs = _configs(base) if base.is_dir() else {}
        if base in configs:
            configs = {base: configs[base]}
            break
    files = [file for group in configs.values() for file in group]
    if files and all(map(_describes, files)) and _has_pictures(folder):
        return []
    if len(configs) > 1:
        raise UsageError(
            f"{folder} has Parquet files of several datasets, in {listing(list(map(str, configs)))}; "
            "give one of these folders instead"
        )
    return files


def _configs(base: Path) -> dict[Path, list[Path]]:
    """Parquet files in a folder at every depth, by the folder of their dataset, which contains the folders of parts."""
    configs: dict[Path, list[Path]] = {}
    for file in _files_below(base):
        if file.suffix.lower() == ".parquet":
            folders = file.relative_to(base).parts[:-1]
            dataset = base.joinpath(*takewhile(lambda name: not _kinds([name]), folders))
            configs.setdefault(dataset, []).append(file)
    return configs


def _describes(file: Path) -> bool:
    """Whether a Parquet file is a table without pictures."""
    try:
        return "image" not in pq.read_schema(file).names
    except (OSError, pa.ArrowException):
        return False


def _parquet_parts(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Files of each part of a dataset, by kind; files whose names give no part belong to the training part."""
    parts: dict[str, list[Path]] = {}
    unnamed: list[Path] = []
    for file in files:
        kinds = sorted(_kinds(file.relative_to(folder).parts))
        if len(kinds) > 1:
            raise UsageError(f"{file} is by its name of several parts of a dataset, {', '.join(kinds)}; rename it")
        (parts.setdefault(kinds[0], []) if kinds else unnamed).append(file)
    if unnamed and TRAIN in parts:
        raise UsageError(
            f"{parts[TRAIN][0]} is of the training part of a dataset by its name and {unnamed[0]} of none; "
            "rename or remove either"
        )
    parts.setdefault(TRAIN, unnamed)
    if not parts[TRAIN]:
        raise UsageError(
            f"no training data: every Parquet file in {folder} is of a held-out part by its name, as {files[0]}; "
            "rename one for training to train.parquet"
        )
    return parts


def _read_parquet(
    folder: Path, files: Sequence[Path], sample_shape: Shape, classes: bool, captions: str, encode: Encode | None
) -> _Dataset:
    parts = _parquet_parts(folder, files)
    train = parts[TRAIN]
    schemas = [_schema(file, captions) for file in train]
    labelled = classes and any("label" in schema.names for schema in schemas)
    wanted = (parts[kind] for kind in HELD_OUT if kind in parts)
    test = next((part for part in wanted if not (labelled and _unlabelled(part))), [])
    schemas += [_schema(file, captions) for file in test]
    if classes and len({"label" in schema.names for schema in schemas}) > 1:
        raise UsageError(
            f"some Parquet files in {folder} have a column `label` and others have none; "
            "add it, or train without classes (`labels: []`)"
        )
    return _Dataset(
        _parquet_part(train, labelled, sample_shape, captions, encode),
        _parquet_part(test, labelled, sample_shape, captions, encode) if test else None,
        _class_names(schemas[0]) if labelled else None,
    )


def _schema(file: Path, captions: str = "") -> pa.Schema:
    try:
        schema = pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{file} is not a Parquet file that can be read: {' '.join(str(error).split())}") from None
    kind = schema.field("image").type if "image" in schema.names else pa.null()
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise UsageError(
            f"{file} has the columns {columns}, expected `image`: encoded pictures, as binary or a struct with `bytes`"
        )
    label = schema.field("label").type if "label" in schema.names else pa.null()
    if not (pa.types.is_integer(label) or pa.types.is_null(label)):
        raise UsageError(f"{file}: the column `label` is {label}, expected integers")
    text = schema.field(captions).type if captions in schema.names else pa.null()
    if captions and not any(kind(text) for kind in (pa.types.is_string, pa.types.is_large_string)):
        raise UsageError(
            f"{file} has the columns {', '.join(schema.names)}, expected a column {captions!r} with captions as text"
        )
    return schema


def _class_names(schema: pa.Schema) -> tuple[str, ...] | None:
    """Class names of a Hugging Face ClassLabel, or None."""
    info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = info.get("info", {}).get("features", {}).get("label", {}).get("names")
    return tuple(names) if names else None


def _unlabelled(files: Sequence[Path]) -> bool:
    """Whether the images of a part have no labels, or only the label -1, as in Hugging Face's test parts."""
    return all("label" not in _schema(file).names or set(_labels(file)) <= {None, -1} for file in files)


def _labels(file: Path) -> list[int | None]:
    try:
        labels: list[int | None] = pq.ParquetFile(file).read(["label"])["label"].to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UsageError(
            f"{file}: its column `label` cannot be read: {' '.join(str(error).split())}; replace it"
        ) from None
    return labels


def _parquet_part(
    files: Sequence[Path], labelled: bool, sample_shape: Shape, captions: str, encode: Encode | None
) -> _Part:
    """A part of a dataset in Parquet files; `captions` is the column of captions, "" for none."""
    named = "label" if labelled else captions
    values: list[Any] = []
    sources: list[tuple[Path, int]] = []

    def read(numbered: tuple[str, dict[str, Any]]) -> tuple[np.ndarray, bool]:
        origin, record = numbered
        data = record["image"]["bytes"] if isinstance(record["image"], dict) else record["image"]
        if data is None or (named and record[named] is None):
            raise UsageError(f"{origin} has no {'image bytes' if data is None else named}; leave it out")
        return _decode(data, origin, sample_shape)

    def images(pool: ThreadPoolExecutor) -> Iterator[tuple[np.ndarray, bool]]:
        for file in files:
            row = 0
            try:
                for batch in pq.ParquetFile(file).iter_batches(BATCH, columns=["image", *filter(None, [named])]):
                    records = batch.to_pylist()
                    yield from pool.map(read, ((f"{file}: row {row + i}", records[i]) for i in range(len(records))))
                    values.extend(record[named] for record in records if named)
                    row += len(records)
            except (OSError, pa.ArrowException) as error:
                raise UsageError(
                    f"{file} cannot be read beyond row {row}: {' '.join(str(error).split())}; replace it"
                ) from None
            sources.append((file, row))

    if not any(pq.read_metadata(file).num_rows for file in files):
        raise UsageError(f"no training data: {', '.join(map(str, files))} has no rows")
    with ThreadPoolExecutor() as pool:
        pixels, resized = _stacked(images(pool), encode)
    numbers = np.array(values, np.int64) if labelled else None
    return _Part(pixels, resized, numbers, captions=() if labelled else tuple(values), sources=tuple(sources))


def _named_parts(folders: Sequence[Path]) -> list[tuple[str, Path]]:
    """Folders that are parts of a dataset by their names, each with its kind.

    `Train` and `val2017` are parts. `birds_train` and `birds_test` are parts if both exist; `bullet_train` alone is a
    class.
    """
    by_other_words: dict[tuple[str, ...], list[tuple[str, Path]]] = {}
    for folder in folders:
        words = _words(folder.name)
        kinds = _kinds([folder.name])
        if len(kinds) == 1:
            by_other_words.setdefault(tuple(word for word in words if word not in kinds), []).append(
                (kinds.pop(), folder)
            )
    return [
        named
        for others, group in by_other_words.items()
        if not others or len({kind for kind, _ in group}) > 1
        for named in group
    ]


def _part_folders(folder: Path) -> dict[str, Path]:
    """Folders of the parts of a dataset of pictures, by kind; empty if its folders are classes."""
    _, folders = _visible(folder)
    named = _named_parts(folders)
    parts = dict(named)
    listed = _names([path for _, path in named])
    if len(parts) < len(named):
        raise UsageError(f"{folder} has several folders for the same part of a dataset by name, {listed}; join them")
    rest = [path for path in folders if named and path not in parts.values() and _has_pictures(path)]
    if rest:
        raise UsageError(
            f"{folder} has folders named as parts of a dataset, {listed}, and others with pictures, {_names(rest)}; "
            f"move the others elsewhere or, if all are classes, all into a folder {TRAIN}"
        )
    if parts and TRAIN not in parts:
        raise UsageError(
            f"no training data: {folder} has only held-out parts by name, {listed}; "
            f"rename the folder to train on to {TRAIN}"
        )
    return parts


def _read_pictures(folder: Path, sample_shape: Shape, classes: bool, encode: Encode | None) -> _Dataset:
    parts = _part_folders(folder)
    train, names = _picture_part(parts.get(TRAIN, folder), sample_shape, classes, encode)
    for kind in HELD_OUT:
        held = parts.get(kind)
        # Held-out pictures without classes are of no use if the training part has classes.
        if held is None or (names and not _visible(held)[1]):
            continue
        test, others = _picture_part(held, sample_shape, classes, encode)
        if others != names:
            raise UsageError(
                f"{held} has the classes {listing(others or ['none'])}, expected those of {parts[TRAIN]}: "
                f"{listing(names or ['none'])}"
            )
        return _Dataset(train, test, names)
    return _Dataset(train, None, names)


def _picture_part(
    folder: Path, sample_shape: Shape, classes: bool, encode: Encode | None
) -> tuple[_Part, tuple[str, ...] | None]:
    """Pictures of a folder, and the class names if `classes` is set and the pictures lie in class folders."""
    loose_files, folders = _visible(folder)
    groups = [list(_files_below(group)) for group in folders]
    if folders:
        _check_classes(folder, loose_files, folders, groups)
    else:
        loose_files, groups = [], [loose_files]
    with ThreadPoolExecutor() as pool:
        pictures = [
            [file for file, taken in zip(files, pool.map(_is_picture, files), strict=True) if taken] for files in groups
        ]
        for place, files, taken in zip(folders or [folder], groups, pictures, strict=True):
            if not taken:
                others = f" (files in it that are no pictures: {len(files)})" if files else ""
                raise UsageError(
                    f"no training data in the class folder {place}{others}; add pictures or remove it"
                    if folders
                    else f"no training data: {place} has no pictures, no Parquet files and not the four IDX files of "
                    f"MNIST{others}"
                )
        paths = [file for files in pictures for file in files]
        images = pool.map(lambda path: _decode(path.read_bytes(), str(path), sample_shape), paths)
        pixels, resized = _stacked(images, encode)
    skipped = len(loose_files) + sum(map(len, groups)) - len(paths)
    if not folders or not classes:
        return _Part(pixels, resized, None, skipped), None
    label = np.repeat(np.arange(len(pictures)), list(map(len, pictures)))
    return _Part(pixels, resized, label, skipped), tuple(path.name for path in folders)


def _check_classes(
    folder: Path, loose_files: Sequence[Path], folders: Sequence[Path], groups: Sequence[Sequence[Path]]
) -> None:
    """Refuse pictures beside class folders, and parts of a dataset as class folders or inside them.

    Args:
        folder: the folder that contains the class folders.
        beside: the files beside the class folders.
        folders: the class folders.
        groups: the files in each class folder.
    """
    # Other files beside them may describe the dataset, but pictures would be skipped silently.
    if stray := next(filter(_is_picture, loose_files), None):
        raise UsageError(f"{stray} lies beside the class folders of {folder}; move it into one of them")
    if len(_named_parts(folders)) == len(folders):
        raise UsageError(
            f"{folder} has no class folders but {_names(folders)}, parts of a dataset by their names; "
            "move what is in them up, or rename them if they are classes"
        )
    for group, files in zip(folders, groups, strict=True):
        parents = {file.parent for file in files}
        inner = {path for parent in parents for path in (parent, *parent.parents) if group in path.parents}
        if held := sorted(path for path in inner if _words(path.name) in {(kind,) for kind in HELD_OUT}):
            raise UsageError(
                f"{held[0]}, by its name a held-out part of a dataset, is in the class folder {group}; "
                f"move it out, or give {held[0].parent} instead if that is the dataset"
            )
