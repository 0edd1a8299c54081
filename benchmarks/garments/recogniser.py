"""The judge of generated garments: a network that tells what is in an image, trained on real composites.

python benchmarks/garments/recogniser.py --data DIR --out benchmarks/garments/recogniser.safetensors

DIR is written by composites.py. *Adherence* is the share of a caption's attributes (garments, colours, patterns, place,
background, as far as it says them) that the recogniser sees in the image. Its features give the Fréchet distance
(Heusel et al., arXiv:1706.08500) and the recall (Kynkäänniemi et al., arXiv:1904.06991).
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from composites import BACKGROUNDS, COLOURS, GARMENTS, PATTERNS, PLACES, RELATIONS
from parts import read
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mlem_dist.models.pixels import to_range

FEATURES = 256

LAYOUTS = (*PLACES, "side by side", "above each other", "in front")
"""Places of a single garment, and arrangements of two."""

ARRANGEMENTS: dict[str, tuple[int, bool]] = {
    "to the left of": (9, False),
    "to the right of": (9, True),
    "above": (10, False),
    "below": (10, True),
    "in front of": (11, False),
}
"""The layout of each relation, and whether the second garment is the one at the left, the top or in front."""

HEADS = (len(LAYOUTS), len(BACKGROUNDS), *2 * (len(GARMENTS), len(COLOURS), len(PATTERNS)))
"""Number of classes of what is told of an image: layout, background, and of each garment kind, colour and pattern."""

Item = tuple[int, int, int | None]
"""Kind, colour and pattern of a garment, by index; None for a pattern that is not said."""


@dataclass(frozen=True)
class Said:
    """Content of a caption; the layout is None if the caption names none.

    The first of two garments is the one at the left, the top or in front, if the caption says so.
    """

    items: tuple[Item, ...]
    layout: int | None
    background: int

    @classmethod
    def of(cls, caption: str) -> Said:
        """The content of a caption of `composites`."""
        colours, kinds, patterns = ("|".join(names) for names in (COLOURS, GARMENTS, PATTERNS))
        garments = re.findall(rf"\ban? (?:({patterns}) )?({colours}) ({kinds})\b", caption)
        items = [
            (GARMENTS.index(kind), [*COLOURS].index(colour), PATTERNS.index(pattern) if pattern else None)
            for pattern, colour, kind in garments
        ]
        ground = re.search(r"on an? (\w+) background$", caption)
        assert ground
        # "at the top left" contains "at the top".
        places = sorted([*PLACES, *RELATIONS], key=len, reverse=True)
        place = next((place for place in places if f" {place} " in caption), None)
        layout, swapped = (None, False) if place is None else ARRANGEMENTS.get(place) or ([*PLACES].index(place), False)
        return cls(tuple(items[::-1] if swapped else items), layout, [*BACKGROUNDS].index(ground[1]))

    def right(self, seen: Sequence[int]) -> list[bool]:
        """For each attribute, whether it is what the recogniser has seen, the numbers of `HEADS`."""
        slots = [seen[2:5], seen[5:8]][: len(self.items)]
        orders = [slots] if self.layout is not None or len(slots) == 1 else [slots, slots[::-1]]
        matches = [
            [
                value == there
                for item, slot in zip(self.items, order, strict=True)
                for value, there in zip(item, slot, strict=True)
                if value is not None
            ]
            for order in orders
        ]
        place = [] if self.layout is None else [self.layout == seen[0]]
        return [*max(matches, key=sum), *place, self.background == seen[1]]


class Recogniser(nn.Module):
    """Convolutions and a layer of features; images uint8 (n, 3, 64, 64)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inner, outer, stride in ((3, 32, 2), (32, 64, 2), (64, 64, 1), (64, 96, 2), (96, 96, 1), (96, 128, 2)):
            layers += [nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, FEATURES), nn.ReLU())
        self.head = nn.Linear(FEATURES, sum(HEADS))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Scores of each head, (n, classes)."""
        return self.head(self.features(to_range(images))).split(HEADS, 1)


def targets(captions: Sequence[str], rows: Sequence[dict[str, Any]]) -> Tensor:
    """What is in the images, int64 (n, heads): all of it, also what captions leave unsaid; -100 for no garment."""
    numbers = []
    for row in rows:
        place = row["place"]
        layout, swapped = ARRANGEMENTS.get(place) or ([*PLACES].index(place), False)
        names = zip(row["garments"], row["colours"], row["patterns"], strict=True)
        items = [(GARMENTS.index(a), [*COLOURS].index(b), PATTERNS.index(c)) for a, b, c in names]
        items = [*(items[::-1] if swapped else items), (-100,) * 3][:2]
        numbers.append([layout, [*BACKGROUNDS].index(row["background"]), *items[0], *items[1]])
    assert len(captions) == len(numbers)
    return torch.tensor(numbers)


def train(images: Tensor, truth: Tensor, steps: int) -> Recogniser:
    """A recogniser, trained on images uint8 (n, 3, 64, 64) and `targets`."""
    torch.manual_seed(0)
    model = Recogniser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    began = time.monotonic()
    for step in range(steps):
        rows = torch.randint(len(images), (128,))
        scores = model(images[rows])
        loss = sum(nn.functional.cross_entropy(scores[i], truth[rows, i]) for i in range(len(HEADS)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 200 == 0:
            click.echo(f"step {step + 1:,} of {steps:,}, loss {loss.item():.3f}, {time.monotonic() - began:.0f} s")
    return model.eval()


def load(path: Path) -> Recogniser:
    """The recogniser in a file."""
    model = Recogniser()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.eval()


@torch.inference_mode()
def look(model: Recogniser, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Features float64 (n, 256) of images uint8 (n, 3, 64, 64), and what is seen, int64 (n, heads)."""
    features = torch.cat([model.features(to_range(part)) for part in images.split(250)])
    seen = torch.stack([scores.argmax(1) for scores in model.head(features).split(HEADS, 1)], 1)
    return features.double().numpy(), seen.numpy()


def matches(captions: Sequence[str], seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of attributes that are seen and that the caption says, for each caption; int64 (n,) each."""
    rights = [Said.of(caption).right(row) for caption, row in zip(captions, seen.tolist(), strict=True)]
    return np.array([sum(right) for right in rights]), np.array([len(right) for right in rights])


def adherence(captions: Sequence[str], seen: np.ndarray) -> tuple[float, float]:
    """The share of the captions' attributes that are seen, and its standard error."""
    sums, counts = matches(captions, seen)
    share = sums.sum() / counts.sum()
    return float(share), float(np.sqrt(((sums - share * counts) ** 2).sum()) / counts.sum())


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of features (n, d); Heusel et al., arXiv:1706.08500."""
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    value, vector = np.linalg.eigh(cov_a)
    root = vector * np.sqrt(value.clip(0)) @ vector.T
    mixed = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * mixed)


def recall(real: np.ndarray, made: np.ndarray, neighbours: int = 3) -> float:
    """The share of real features within the distance of a made one to its third neighbour among the made."""
    a, b = (torch.from_numpy(features).float() for features in (real, made))
    radius = torch.cdist(b, b).kthvalue(neighbours + 1, 1).values
    return float((torch.cdist(a, b) <= radius).any(1).float().mean())


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--images", "rows", default=150_000, show_default=True)
@click.option("--steps", default=5_000, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(data: Path, rows: int, steps: int, out: Path) -> None:
    """Train the recogniser, and tell how much of real held-out images it recognises."""
    images, captions, truths = read(data, "train", rows)
    model = train(images, targets(captions, truths), steps)
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, out)
    model = load(out)
    for part in ("validation", "test"):
        images, captions, truths = read(data, part, 10_000)
        _, seen = look(model, images)
        truth = targets(captions, truths).numpy()
        known = truth >= 0
        click.echo(f"{part}: {(seen == truth)[known].mean():.4f} of everything")
        for name, column in zip(("layout", "background", "kind", "colour", "pattern"), range(5), strict=True):
            click.echo(f"  {name}: {(seen == truth)[:, column].mean():.4f}")
        share, error = adherence(captions, seen)
        click.echo(f"  adherence: {share:.4f} +- {error:.4f}")


if __name__ == "__main__":
    main()
