"""Images of one or two coloured garments with captions, from Fashion-MNIST.

python benchmarks/garments/composites.py --out DIR
python benchmarks/garments/composites.py --sheet sheet.png

DIR has the layout of Hugging Face: `data/train-*`, `data/validation-*` (garments that are not in `train`, combinations
that are) and `data/test-*` (the same garments, combinations of garment and colour that `train` does not have). Columns
are the image, its caption and what the caption says. The same seed makes the same rows, whatever their number.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mlem_dist.dataset.schema import IMAGE
from mlem_dist.dataset.shards import PNG

SIZE = 64
"""Height and width of an image, in pixels."""

GARMENTS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
"""Garments in the order of the classes of Fashion-MNIST."""

COLOURS = {
    "black": (20, 20, 22),
    "white": (248, 248, 246),
    "grey": (128, 128, 130),
    "red": (205, 25, 35),
    "orange": (245, 130, 20),
    "yellow": (250, 220, 40),
    "green": (30, 140, 60),
    "blue": (30, 70, 190),
    "purple": (120, 40, 150),
    "brown": (110, 65, 30),
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "grey": (170, 172, 175),
    "red": (240, 120, 115),
    "yellow": (250, 240, 150),
    "green": (150, 215, 160),
    "blue": (150, 195, 245),
    "purple": (200, 165, 225),
    "pink": (250, 190, 215),
}
"""Colours of garments and of backgrounds, RGB; those of backgrounds are lighter."""

PATTERNS = ("plain", "striped")

PLACES = {
    "in the middle": (32, 32),
    "on the left": (18, 32),
    "on the right": (46, 32),
    "at the top": (32, 18),
    "at the bottom": (32, 46),
    "at the top left": (18, 18),
    "at the top right": (46, 18),
    "at the bottom left": (18, 46),
    "at the bottom right": (46, 46),
}
"""Places of the centre of a single garment, x and y in pixels."""

RELATIONS = {
    "to the left of": ((17, 32), (47, 32)),
    "to the right of": ((47, 32), (17, 32)),
    "above": ((32, 17), (32, 47)),
    "below": ((32, 47), (32, 17)),
    "in front of": ((25, 38), (39, 26)),
}
"""Places of the first and of the second of two garments; "in front of" overlaps."""

SINGLE, PAIR = 40, 30
"""Height of a single garment and of one of two, in pixels, before a random factor."""

HELD_OUT = frozenset((garment, (3 * garment + 2) % len(COLOURS)) for garment in range(len(GARMENTS)))
"""Combinations of a garment and a colour, by index, that are in no row of `train` and `validation`."""

STREAMS = {"train": 0, "validation": 1, "test": 2}
"""Parts of the dataset, with a number for the seeds of their rows."""

SHARD, GROUP = 20_000, 1_000

FASHION = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Garment:
    """A garment of a scene, and whether its pattern is a part of the caption.

    Attributes:
        kind, colour, pattern: indices in `GARMENTS`, `COLOURS` and `PATTERNS`.
        said: whether the caption says the pattern.
    """

    kind: int
    colour: int
    pattern: int
    said: bool

    def __str__(self) -> str:
        words = [PATTERNS[self.pattern]] * self.said + [[*COLOURS][self.colour], GARMENTS[self.kind]]
        return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


@dataclass(frozen=True)
class Scene:
    """What is in an image: one or two garments, their place or relation by name, and the background by index."""

    garments: tuple[Garment, ...]
    place: str
    said: bool
    background: int

    @property
    def caption(self) -> str:
        """The caption."""
        first, *second = map(str, self.garments)
        ground = f"on a{'n' * ([*BACKGROUNDS][self.background][0] in 'aeiou')} {[*BACKGROUNDS][self.background]}"
        if second:
            return f"{first} {self.place if self.said else 'and'} {second[0]} {ground} background"
        return f"{first} {f'{self.place} ' * self.said}{ground} background"


def scene(rng: np.random.Generator, held_out: bool) -> Scene:
    """A random scene; at least one of its combinations of garment and colour is held out, or none."""
    while True:
        number = 1 + int(rng.random() < 0.7)
        garments = tuple(
            Garment(
                int(rng.integers(len(GARMENTS))),
                int(rng.integers(len(COLOURS))),
                int(rng.integers(2)),
                bool(rng.random() < 0.7),
            )
            for _ in range(number)
        )
        if any((garment.kind, garment.colour) in HELD_OUT for garment in garments) == held_out:
            break
    places = [*(RELATIONS if number == 2 else PLACES)]
    place = places[int(rng.integers(len(places)))]
    return Scene(garments, place, bool(rng.random() < 0.8), int(rng.integers(len(BACKGROUNDS))))


@cache
def pictures(folder: Path, part: str) -> list[np.ndarray]:
    """The images of each class of a part of Fashion-MNIST, uint8 (n, 28, 28)."""

    def read(name: str) -> np.ndarray:
        data = gzip.decompress((folder / f"{part}-{name}-ubyte.gz").read_bytes())
        shape = np.frombuffer(data, ">u4", data[3], 4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)

    images, labels = read("images-idx3"), read("labels-idx1")
    return [images[labels == kind] for kind in range(len(GARMENTS))]


def render(scene: Scene, rng: np.random.Generator, crops: list[np.ndarray]) -> np.ndarray:
    """An image of a scene, uint8 (SIZE, SIZE, 3), with random garments of `crops`."""
    ground = np.array([*BACKGROUNDS.values()][scene.background], float)
    slope = rng.uniform(-12, 12, 2)
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE - 0.5
    image = ground + (slope[0] * x + slope[1] * y)[..., None]
    pair = len(scene.garments) == 2
    centres = RELATIONS[scene.place] if pair else (PLACES[scene.place],)
    # The first garment of a pair is in front.
    for garment, centre in reversed([*zip(scene.garments, centres, strict=True)]):
        images = crops[garment.kind]
        crop = images[int(rng.integers(len(images)))]
        height = (PAIR if pair else SINGLE) * rng.uniform(0.9, 1.1)
        place = np.array(centre) + rng.uniform(-2.5, 2.5, 2)
        paste(image, crop, garment, height, place)
    return image.clip(0, 255).round().astype(np.uint8)


def paste(image: np.ndarray, crop: np.ndarray, garment: Garment, height: float, place: np.ndarray) -> None:
    """Draw a garment, uint8 (28, 28), into an image, float (SIZE, SIZE, 3), with its centre at a place (x, y)."""
    rows, columns = np.nonzero(crop > 25)
    box = crop[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    factor = height / max(box.shape)
    shape = max(6, round(box.shape[1] * factor)), max(6, round(box.shape[0] * factor))
    light = np.asarray(Image.fromarray(box).resize(shape, Image.Resampling.BICUBIC), float) / 255
    cover = ((light - 0.06) / 0.12).clip(0, 1)[..., None]
    colour = np.array([*COLOURS.values()][garment.colour], float)
    paint = np.broadcast_to(colour, (*light.shape, 3))
    if garment.pattern:
        other = colour + (0.62 * (255 - colour) if colour.mean() < 150 else -0.45 * colour)
        stripe = (np.arange(light.shape[0]) // 3 % 2).astype(float)[:, None, None]
        paint = paint * (1 - stripe) + other * stripe
    # Folds and seams are darker; light colours keep an outline on a light background.
    shade = (0.6 + 0.4 * (light / max(float(np.quantile(light, 0.9)), 0.1)).clip(0, 1))[..., None]
    top, left = (round(float(place[i]) - light.shape[1 - i] / 2) for i in (1, 0))
    top, left = (min(max(0, first), SIZE - side) for first, side in ((top, light.shape[0]), (left, light.shape[1])))
    part = image[top : top + light.shape[0], left : left + light.shape[1]]
    part[:] = part * (1 - cover) + paint * shade * cover


def row(seed: int, part: str, index: int, folder: Path) -> dict[str, Any]:
    """A row of the dataset."""
    rng = np.random.default_rng((seed, STREAMS[part], index))
    made = scene(rng, part == "test")
    image = render(made, rng, pictures(folder, "train" if part == "train" else "t10k"))
    names = [*COLOURS]
    return {
        "image": {"bytes": PNG.files(image[None])[0], "path": None},
        "prompt": made.caption,
        "garments": [GARMENTS[garment.kind] for garment in made.garments],
        "colours": [names[garment.colour] for garment in made.garments],
        "patterns": [PATTERNS[garment.pattern] for garment in made.garments],
        "place": made.place,
        "background": [*BACKGROUNDS][made.background],
    }


TEXTS = pa.list_(pa.string())
SCHEMA = pa.schema(
    {
        "image": IMAGE,
        "prompt": pa.string(),
        "garments": TEXTS,
        "colours": TEXTS,
        "patterns": TEXTS,
        "place": pa.string(),
        "background": pa.string(),
    },
    metadata={"huggingface": '{"info": {"features": {"image": {"_type": "Image"}}}}'},
)


def write_shard(seed: int, folder: Path, out: Path, part: str, num: int, index: int) -> None:
    """Write a shard of a part of `num` rows, unless it is there."""
    path = out / "data" / f"{part}-{index:05d}-of-{-(-num // SHARD):05d}.parquet"
    if path.exists():
        return
    rows = range(index * SHARD, min(num, (index + 1) * SHARD))
    table = pa.Table.from_pylist([row(seed, part, i, folder) for i in rows], SCHEMA)
    temporary = out / f"{path.name}.tmp"
    pq.write_table(table, temporary, row_group_size=GROUP, compression="zstd")
    temporary.rename(path)


def shards(num: int) -> Iterator[tuple[str, int, int]]:
    """The shards of all parts: part, its number of rows, index."""
    for part, rows in (("train", num), ("validation", max(1, num // 50)), ("test", max(1, num // 50))):
        for index in range(-(-rows // SHARD)):
            yield part, rows, index


@click.command()
@click.option("--num", default=800_000, show_default=True, help="Rows of `train`.")
@click.option("--seed", default=0, show_default=True)
@click.option("--data", "folder", type=click.Path(path_type=Path), default=FASHION, show_default=True)
@click.option("--workers", default=2, show_default=True)
@click.option("--sheet", type=click.Path(path_type=Path), help="Only a picture of 48 rows of `train`.")
@click.option("--out", type=click.Path(path_type=Path))
def main(num: int, seed: int, folder: Path, workers: int, sheet: Path | None, out: Path | None) -> None:
    """Write the dataset; the same command again writes what is missing."""
    if sheet:
        rows = [row(seed, "train", i, folder) for i in range(48)]
        picture = Image.new("RGB", (12 * SIZE * 2, 4 * SIZE * 2))
        for i, made in enumerate(rows):
            tile = Image.open(io.BytesIO(made["image"]["bytes"])).resize((2 * SIZE, 2 * SIZE))
            picture.paste(tile, (i % 12 * SIZE * 2, i // 12 * SIZE * 2))
            click.echo(made["prompt"])
        picture.save(sheet)
        return
    if out is None:
        raise click.UsageError("--out is missing")
    (out / "data").mkdir(parents=True, exist_ok=True)
    work = partial(write_shard, seed, folder, out)
    with ProcessPoolExecutor(workers) as pool:
        for _ in pool.map(work, *zip(*shards(num), strict=True)):
            pass


if __name__ == "__main__":
    main()
