"""Image datasets, as uint8 tensors: IDX files, folders of pictures, Parquet in the Hugging Face layout."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mlem_dist.errors import UsageError
from mlem_dist.files import check_text

HELD_OUT = ("test", "validation")
"""What the held-out part of a dataset is called, in this order of preference."""

HELD_OUT_SHARE = 0.1
MOST_HELD_OUT = 10_000

BATCH = 1000
"""So many encoded images of a Parquet file are in memory at a time."""

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Images:
    """Images as uint8 (n, C, H, W) with int64 labels (n,), in a training and a held-out part.

    Attributes:
        labels: class names; empty if the images are to be taken without their classes.
        resized: how many were larger than the sample shape and have been cropped and scaled down.
    """

    train: Tensor
    train_label: Tensor
    test: Tensor
    test_label: Tensor
    labels: tuple[str, ...] = ()
    resized: int = 0

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the training part."""
        digest = hashlib.sha256(str(self.train.shape).encode())
        for part in (self.train, self.train_label):
            digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True)
class _Part:
    """Images as uint8 (n, C, H, W), how many were resized, and their labels int64 (n,), if they have any."""

    pixels: np.ndarray
    resized: int
    label: np.ndarray | None


@dataclass(frozen=True)
class _Found:
    """What a reader found: one part or two, and the names of the classes, if they have names."""

    train: _Part
    test: _Part | None
    names: tuple[str, ...] | None


def load_images(folder: Path, sample_shape: Shape, labels: Sequence[str] | None) -> Images:
    """Read the image dataset in `folder`, in whichever of these forms it lies there:

    - the four IDX files of MNIST, plain or gzipped;
    - Parquet files, in `folder` or `folder`/data, with a column `image` (encoded files as binary, or as Hugging Face's
      struct of bytes and path) and, if there are classes, an integer column `label`; files named test* or validation*
      are the held-out part;
    - pictures in one folder per class, or directly in `folder` if there are no classes; or that in `folder`/train,
      with a held-out part of the same form in `folder`/test or `folder`/validation.

    Where no part is held out, a tenth of the images, at most 10,000, the same ones at every call, become that part.

    Pictures are turned upright and made grey (C = 1) or RGB (C = 3; transparency is dropped). Smaller ones than the
    sample shape are zero-padded to it, larger ones cropped to its aspect ratio around the centre and scaled down.

    `labels` are the class names in the order wanted, none to ignore the classes, or None to take the dataset's.

    Raises:
        UsageError: there is no such data, a file is not what it should be, or its classes are not `labels`.
    """
    if not folder.is_dir():
        raise UsageError(f"no training data: {folder} is not a folder")
    parquet = sorted(folder.glob("data/*.parquet")) or sorted(folder.glob("*.parquet"))
    if any(folder.glob("*-idx3-ubyte*")):
        found = _read_idx(folder, sample_shape)
    elif parquet:
        found = _read_parquet(parquet, sample_shape)
    else:
        found = _read_pictures(folder, sample_shape)
    return _assemble(found, labels, folder)


def _assemble(found: _Found, labels: Sequence[str] | None, source: Path) -> Images:
    """Hold a part out if there is none, and number the classes as `labels` does."""
    train = found.train
    if found.test is None:
        n = len(train.pixels)
        rows = np.random.default_rng(0).permutation(n)
        cut = min(max(1, int(n * HELD_OUT_SHARE)), MOST_HELD_OUT)
        test, train = _rows(train, np.sort(rows[:cut])), _rows(train, np.sort(rows[cut:]))
    else:
        test = found.test
    if not len(train.pixels):
        raise UsageError(f"no training data: {source} has only {len(test.pixels)} image; add more")
    resized = found.train.resized + (found.test.resized if found.test else 0)
    names, number = _classes(found, labels, source)
    tensors: list[Tensor] = []
    for part in (train, test):
        label = np.zeros(len(part.pixels), np.int64) if part.label is None or not names else number[part.label]
        tensors += [torch.from_numpy(part.pixels), torch.from_numpy(label)]
    return Images(tensors[0], tensors[1], tensors[2], tensors[3], names, resized)


def _rows(part: _Part, rows: np.ndarray) -> _Part:
    return _Part(part.pixels[rows], 0, None if part.label is None else part.label[rows])


def _classes(found: _Found, labels: Sequence[str] | None, source: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """The class names, and each of the dataset's class numbers in their order."""
    present = [part.label for part in (found.train, found.test) if part is not None and part.label is not None]
    if not present or (labels is not None and not labels):
        if labels:
            raise UsageError(
                f"{source} has no classes, the configuration has the labels {_listed(labels)}; leave `labels` out"
            )
        return (), np.zeros(0, np.int64)
    low, high = min(int(label.min()) for label in present), max(int(label.max()) for label in present)
    names = found.names or tuple(map(str, labels if labels is not None else range(high + 1)))
    if low < 0 or high >= len(names):
        raise UsageError(f"{source}: label {low if low < 0 else high} is out of range for {len(names)} labels")
    check_text(names, str(source))
    if labels is None:
        return names, np.arange(len(names))
    wanted = tuple(map(str, labels))
    if set(wanted) != set(names):
        raise UsageError(
            f"{source} has the classes {_listed(names)}, the configuration has the labels {_listed(wanted)}; "
            "make them equal, or leave `labels` out to take those of the data"
        )
    return wanted, np.array([wanted.index(name) for name in names])


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _pad(pixels: np.ndarray, sample_shape: Shape) -> np.ndarray:
    """Images (..., C, h, w) in the middle of black ones (..., C, H, W)."""
    height, width = (large - small for large, small in zip(sample_shape[1:], pixels.shape[-2:], strict=True))
    sides = ((height // 2, height - height // 2), (width // 2, width - width // 2))
    return np.pad(pixels, ((0, 0),) * (pixels.ndim - 2) + sides)


def _fit(image: Image.Image, sample_shape: Shape) -> tuple[np.ndarray, bool]:
    """A picture as uint8 (C, H, W), and whether it was resized."""
    channels, height, width = sample_shape
    image = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
    larger = image.width > width or image.height > height
    if larger:
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(image).reshape(image.height, image.width, channels)
    return _pad(pixels.transpose(2, 0, 1), sample_shape), larger


def _decode(data: bytes, name: str, sample_shape: Shape) -> tuple[np.ndarray, bool]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith(("I", "F")):
                raise UsageError(f"{name} has pixels of more than 8 bits (mode {image.mode}); convert it to 8 bits")
            return _fit(image, sample_shape)
    except UsageError:
        raise
    except UnidentifiedImageError:
        raise UsageError(f"{name} is not an image of a known format; remove or replace it") from None
    # What Pillow raises for broken files.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UsageError(f"{name} is a broken image ({error}); remove or replace it") from None


def _idx(folder: Path, stem: str) -> np.ndarray:
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.is_file():
            try:
                raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                dims = raw[3]
                shape = np.frombuffer(raw, ">u4", dims, 4)
            except (OSError, EOFError, IndexError, ValueError, zlib.error):
                raise UsageError(f"{path} is not a complete IDX file of bytes") from None
            if raw[:3] != b"\0\0\x08" or len(raw) != 4 + 4 * dims + int(shape.prod(dtype=np.int64)):
                raise UsageError(f"{path} is not a complete IDX file of bytes")
            return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)
    raise UsageError(f"no training data: {folder} has neither {stem} nor {stem}.gz (the four IDX files of MNIST)")


def _read_idx(folder: Path, sample_shape: Shape) -> _Found:
    parts = []
    for name in ("train", "t10k"):
        images, label = _idx(folder, f"{name}-images-idx3-ubyte"), _idx(folder, f"{name}-labels-idx1-ubyte")
        if images.ndim != 3 or label.shape != images.shape[:1] or not images.size:
            raise UsageError(
                f"{folder}: {name} has images {images.shape} and labels {label.shape}, expected as many of each"
            )
        larger = images.shape[1] > sample_shape[1] or images.shape[2] > sample_shape[2]
        if larger:
            pixels = np.stack([_fit(Image.fromarray(image), sample_shape)[0] for image in images])
        else:
            pixels = _pad(images[:, None].repeat(sample_shape[0], axis=1), sample_shape)
        parts.append(_Part(pixels, larger * len(images), label.astype(np.int64)))
    return _Found(parts[0], parts[1], None)


def _read_parquet(files: Sequence[Path], sample_shape: Shape) -> _Found:
    test = next((held for name in HELD_OUT if (held := [file for file in files if file.name.startswith(name)])), [])
    train = [file for file in files if not file.name.startswith(HELD_OUT)]
    if not train:
        raise UsageError(f"no training data: every Parquet file in {files[0].parent} is a held-out one by its name")
    schemas = [_schema(file) for file in train + test]
    labelled = {"label" in schema.names for schema in schemas}
    if len(labelled) > 1:
        raise UsageError(f"some Parquet files in {files[0].parent} have a column `label` and others have none")
    parts = [_parquet_part(part, labelled == {True}, sample_shape) for part in (train, test) if part]
    return _Found(parts[0], parts[1] if test else None, _class_names(schemas[0]) if labelled == {True} else None)


def _schema(file: Path) -> pa.Schema:
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
    if "label" in schema.names and not pa.types.is_integer(schema.field("label").type):
        raise UsageError(f"{file}: the column `label` is {schema.field('label').type}, expected integers")
    return schema


def _class_names(schema: pa.Schema) -> tuple[str, ...] | None:
    """The names of a Hugging Face ClassLabel."""
    info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = info.get("info", {}).get("features", {}).get("label", {}).get("names")
    return tuple(names) if names else None


def _parquet_part(files: Sequence[Path], labelled: bool, sample_shape: Shape) -> _Part:
    columns = ["image", "label"] if labelled else ["image"]
    images: list[tuple[np.ndarray, bool]] = []
    label: list[int] = []

    def read(numbered: tuple[int, dict[str, Any]]) -> tuple[np.ndarray, bool]:
        row, record = numbered
        data = record["image"]["bytes"] if isinstance(record["image"], dict) else record["image"]
        if data is None or (labelled and record["label"] is None):
            raise UsageError(f"{file}: row {row} has no {'image bytes' if data is None else 'label'}; leave it out")
        return _decode(data, f"{file}: row {row}", sample_shape)

    with ThreadPoolExecutor() as pool:
        for file in files:
            row = 0
            try:
                for batch in pq.ParquetFile(file).iter_batches(BATCH, columns=columns):
                    records = batch.to_pylist()
                    images += pool.map(read, enumerate(records, row))
                    label += [record["label"] for record in records] if labelled else []
                    row += len(records)
            except (OSError, pa.ArrowException) as error:
                raise UsageError(
                    f"{file} cannot be read beyond row {row}: {' '.join(str(error).split())}; replace it"
                ) from None
    if not images:
        raise UsageError(f"no training data: {', '.join(map(str, files))} has no rows")
    pixels, resized = zip(*images, strict=True)
    return _Part(np.stack(pixels), sum(resized), np.array(label, np.int64) if labelled else None)


def _visible(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files and the folders in a folder, by name, without hidden ones."""
    found = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    return [path for path in found if path.is_file()], [path for path in found if path.is_dir()]


def _read_pictures(folder: Path, sample_shape: Shape) -> _Found:
    _, folders = _visible(folder)
    names = {path.name for path in folders}
    if "train" not in names or not names <= {"train", *HELD_OUT}:
        part, classes = _picture_part(folder, sample_shape)
        return _Found(part, None, classes)
    train, classes = _picture_part(folder / "train", sample_shape)
    held = next((name for name in HELD_OUT if name in names), None)
    if held is None:
        return _Found(train, None, classes)
    test, others = _picture_part(folder / held, sample_shape)
    if others != classes:
        raise UsageError(
            f"{folder / held} has the classes {_listed(others or ['none'])}, expected those of {folder / 'train'}: "
            f"{_listed(classes or ['none'])}"
        )
    return _Found(train, test, classes)


def _picture_part(folder: Path, sample_shape: Shape) -> tuple[_Part, tuple[str, ...] | None]:
    """The pictures of a folder, and their classes if they lie in class folders."""
    files, folders = _visible(folder)
    if folders:
        # Files beside the class folders may describe the dataset; pictures there would be left out silently.
        if stray := [path for path in files if path.suffix.lower() in Image.registered_extensions()]:
            raise UsageError(f"{stray[0]} lies beside the class folders of {folder}; move it into one of them")
        groups = [
            [path for path in sorted(group.rglob("*")) if path.is_file() and not path.name.startswith(".")]
            for group in folders
        ]
        if empty := [group for group, paths in zip(folders, groups, strict=True) if not paths]:
            raise UsageError(f"no training data in the class folder {empty[0]}; add pictures or remove it")
    else:
        groups = [files]
        if not files:
            raise UsageError(
                f"no training data: {folder} has no pictures, no Parquet files and not the four IDX files of MNIST"
            )
    paths = [path for group in groups for path in group]
    with ThreadPoolExecutor() as pool:
        images = pool.map(lambda path: _decode(path.read_bytes(), str(path), sample_shape), paths)
        pixels, resized = zip(*images, strict=True)
    label = np.repeat(np.arange(len(groups)), list(map(len, groups))) if folders else None
    return _Part(np.stack(pixels), sum(resized), label), tuple(group.name for group in folders) if folders else None
