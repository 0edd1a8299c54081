"""The bundled ladder `garments`: flow-matching transformers on latents, with prompts and guidance."""

from pathlib import Path

import composites
import numpy as np
import pytest
import recogniser
import torch

from mlem_dist import api
from mlem_dist.ladder.ladder import Ladder

ROOT = Path(__file__).parents[2]
NETWORKS = ("small", "medium", "large")


@pytest.fixture(scope="module")
def garments() -> Ladder:
    return Ladder.load("garments")


def test_larger_models_have_smaller_errors(garments):
    errors = {level.name: np.mean(level.denoising_error) for level in garments.levels if level.denoising_error}
    assert [*errors] == ["gaussian", *NETWORKS]
    assert [*errors.values()] == sorted(errors.values(), reverse=True)


def test_the_largest_model_costs_more_than_twenty_of_the_smallest(garments):
    operations = {level.name: level.seconds["operations"] for level in garments.levels}
    assert operations["large"] > 20 * operations["small"]


def test_the_package_has_at_most_25_mebibytes_of_it(garments):
    assert sum(path.stat().st_size for path in garments.folder.rglob("*")) <= 25 * 2**20


def test_prompts_are_followed(garments):
    captions = (ROOT / "examples" / "prompts.txt").read_text().splitlines()[:32]
    images = api.sample(garments, prompts=captions)
    assert images.shape == (32, 64, 64, 3)
    edges = np.median(images[:, 0], 1)
    colours = np.array([*composites.BACKGROUNDS.values()])
    seen = np.abs(edges[:, None] - colours).sum(-1).argmin(1)
    assert [[*composites.BACKGROUNDS][number] for number in seen] == [caption.split()[-2] for caption in captions]
    judge = recogniser.load(ROOT / "benchmarks/garments/recogniser.safetensors")
    _, attributes = recogniser.look(judge, torch.from_numpy(images).permute(0, 3, 1, 2))
    share, _ = recogniser.adherence(captions, attributes)
    assert share > 0.85
