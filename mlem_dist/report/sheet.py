"""Contact sheets."""

import io
import os
import textwrap
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from mlem_dist.dataset.manifest import finished_shards, read_manifest
from mlem_dist.errors import UsageError
from mlem_dist.store import Location, publish, reached

COLUMNS, SCALE = 12, 2
MARGIN = 110

CAPTION = 52
"""Height of the captions of a row of images, in pixels."""


def contact_sheet(out: Location) -> Image.Image:
    """A picture of a dataset: a row of twelve images for each class; without classes, rows in order of sample id.

    Raises:
        UsageError: if the folder is no dataset, has no image yet, or has a shard that cannot be read.
    """
    manifest = read_manifest(out)
    classes: list[int] = manifest.config["labels"] if manifest.labels else list(range(10))
    rows: dict[int, list[bytes]] = {i: [] for i in range(len(classes))}
    number = 0
    shards = [*finished_shards(out, manifest)]
    if not shards:
        raise UsageError(f"{out} has no finished shard yet; run `mlem-dist generate` again to finish it")
    for path in shards:
        try:
            with reached(out), (out / path).open("rb") as opened:
                # A thread of pyarrow that reads through Python can abort the interpreter at its exit.
                file = pq.ParquetFile(opened, pre_buffer=False)
                groups = (file.read_row_group(group, use_threads=False) for group in range(file.num_row_groups))
                for record in chain.from_iterable(group.to_pylist() for group in groups):
                    row = classes.index(record["label"]) if manifest.labels else number // COLUMNS
                    number += 1
                    if row < len(classes) and len(rows[row]) < COLUMNS:
                        rows[row].append(record["image"]["bytes"])
        except (OSError, pa.ArrowException) as error:
            raise UsageError(f"{out / path} cannot be read ({error}); `mlem-dist verify {out}` says more") from None
        if all(len(row) == COLUMNS for row in rows.values()):
            break
    if not any(rows.values()):
        raise UsageError(f"{out} has no image in its finished shards, as `keep` left out all rows; relax the condition")
    first = Image.open(io.BytesIO(next(row[0] for row in rows.values() if row)))
    if not manifest.labels:
        rows = {row: pngs for row, pngs in rows.items() if pngs}
    width, height = first.width * SCALE, first.height * SCALE
    margin = MARGIN if manifest.labels else 0
    sheet = Image.new("RGB", (margin + COLUMNS * width, len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for y, pngs in rows.items():
        if manifest.labels:
            draw.text((6, y * height + height // 2 - 6), manifest.labels[classes[y]][:18], fill="black")
        for x, png in enumerate(pngs):
            image = Image.open(io.BytesIO(png)).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(image, (margin + x * width, y * height))
    return sheet


def save_comparison(stored: np.ndarray, remade: np.ndarray, path: Path) -> None:
    """Write a PNG of two images, uint8 (H, W, C), and of ten times their difference, side by side."""
    difference = np.abs(stored.astype(np.int64) - remade)
    parts = [stored, remade, np.minimum(255, 10 * difference).astype(np.uint8)]
    gap = np.full((stored.shape[0], max(2, stored.shape[1] // 32), stored.shape[2]), 255, np.uint8)
    joined = np.concatenate([parts[0], gap, parts[1], gap, parts[2]], axis=1)
    buffer = io.BytesIO()
    Image.fromarray(joined[..., 0] if joined.shape[-1] == 1 else joined).save(buffer, "PNG")
    publish(path, buffer.getvalue(), path.parent)


def save_row(images: np.ndarray, captions: Sequence[str], path: Path) -> None:
    """Write a PNG of images, uint8 (n, H, W, C), side by side, with their captions below, as far as they fit."""
    side = max(160, images.shape[2])
    height = round(images.shape[1] * side / images.shape[2])
    sheet = Image.new("RGB", (len(images) * side, height + CAPTION), "white")
    draw = ImageDraw.Draw(sheet)
    for number, image in enumerate(images):
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        sheet.paste(picture.resize((side, height), Image.Resampling.NEAREST), (number * side, 0))
        lines = textwrap.wrap(captions[number], side // 7)[:3] if captions else []
        draw.multiline_text((number * side + 4, height + 4), "\n".join(lines), fill="black")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    publish(path, buffer.getvalue(), path.parent)


def save_contact_sheet(out: Location, picture: Path | None = None) -> Location:
    """Write the contact sheet of a dataset as a PNG file, `preview.png` in its folder by default, and return its path.

    Raises:
        UsageError: as `contact_sheet`, or if the picture's folder cannot be written.
    """
    path = picture or out / "preview.png"
    if isinstance(path, Path) and not os.access(path.parent, os.W_OK):
        raise UsageError(
            f"{path.parent} cannot be written; choose another place for the contact sheet by `out` FILE.png"
        )
    buffer = io.BytesIO()
    contact_sheet(out).save(buffer, "PNG")
    publish(path, buffer.getvalue(), path.parent)
    return path
