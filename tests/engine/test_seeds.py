"""An image is a function of its class, its image seed and the plan, whatever it is made beside."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import mlem_dist
from mlem_dist.dataset.prompts import SEEDS
from mlem_dist.errors import UsageError

SMALL = {"nfe": 4, "steps": 20}


def assert_equal_to_rounding(a: np.ndarray, b: np.ndarray) -> None:
    """Equal but for single grey levels."""
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seeds=st.lists(st.integers(0, SEEDS - 1), min_size=1, max_size=7),
    solver=st.sampled_from(["ode", "sde", "dpm++"]),
    data=st.data(),
)
def test_an_image_does_not_depend_on_those_beside_it(three, seeds, solver, data):
    """In blocks of any size, at any place."""
    settings = {"labels": [3], "solver": solver, **SMALL}
    together = mlem_dist.sample(three, seeds=seeds, **settings)
    place = data.draw(st.integers(0, len(seeds) - 1))
    assert_equal_to_rounding(mlem_dist.sample(three, seeds=[seeds[place]], **settings), together[place : place + 1])


def rows(out) -> list[dict]:
    return [row for path in sorted((out / "data").iterdir()) for row in pq.read_table(path).to_pylist()]


def pixels(row: dict) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(row["image"]["bytes"])))


@pytest.mark.parametrize("solver", ["ode", "sde"])
def test_a_row_says_how_its_image_is_made_again(three, tmp_path, solver):
    """By `sample` with its seed and class; and in other blocks and shards it is the same."""
    settings = {"solver": solver, "labels": [2, 0, 9], **SMALL}
    for name, block_size, shard_size in (("one", 4, 8), ("other", 7, 21)):
        mlem_dist.generate(
            three,
            num=20,
            out=str(tmp_path / name),
            seed=SEEDS - 20,
            block_size=block_size,
            shard_size=shard_size,
            engine="inline",
            **settings,
        )
    made, other = rows(tmp_path / "one"), rows(tmp_path / "other")
    assert [row["seed"] for row in made] == list(range(SEEDS - 20, SEEDS)) == [row["seed"] for row in other]
    for row, same in zip(made, other, strict=True):
        assert_equal_to_rounding(pixels(row), pixels(same))
    row = made[13]
    again = mlem_dist.sample(three, seeds=[row["seed"]], **(settings | {"labels": [row["label"]]}))
    assert_equal_to_rounding(again[0, :, :, 0], pixels(row))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num": 2, "seed": SEEDS - 1}, "`seed` 4294967295: expected 0 to 4294967294"),
        ({"num": 2, "seed": -1}, "`seed` -1: expected 0 to 4294967294"),
        ({"seeds": [5, SEEDS]}, "`seeds`: 4294967296 is out of range, expected 0 to 4294967295"),
        ({"seeds": []}, "`seeds` is empty"),
        ({"seeds": [1, 2], "num": 3}, "`seeds` and `num` or `seed` exclude each other"),
        ({"seeds": [1, 2], "seed": 3}, "`seeds` and `num` or `seed` exclude each other"),
        ({}, "`num` is missing"),
    ],
)
def test_seeds_that_there_are_not_are_refused(three, arguments, message):
    with pytest.raises(UsageError, match=message):
        mlem_dist.sample(three, **arguments, **SMALL)


def test_impulses_are_drawn(three):
    with pytest.raises(UsageError, match="`draw` quantiles and `increments` impulse exclude each other"):
        mlem_dist.generate(three, num=2, out="unused", draw="quantiles", increments="impulse", engine="inline", **SMALL)
