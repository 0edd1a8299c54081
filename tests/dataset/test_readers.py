"""The dataset opens in the tools that its users have."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from mlem_dist.dataset.shards import PNG
from mlem_dist.engine.completion import complete, open_dataset
from mlem_dist.engine.inline import run_inline
from mlem_dist.engine.job import Job
from mlem_dist.solver.plan import Recipe


def make(fashion) -> Job:
    p = np.repeat(0.4 ** np.arange(len(fashion.levels))[:, None], 10, axis=1)
    plan = Recipe(p, "systematic", "held", collapse=True)
    return Job("fashion", fashion.digest, 44, tuple(range(10)), "sde", 10, plan, 0, 8, 16, "cpu")


@pytest.fixture(scope="module")
def dataset(fashion, tmp_path_factory):
    out = tmp_path_factory.mktemp("dataset")
    job = make(fashion)
    list(complete(open_dataset(job, fashion, out), fashion, lambda shards: run_inline(job, fashion, out, shards, 1)))
    return out


def check(png: bytes) -> None:
    image = Image.open(io.BytesIO(png))
    assert image.size == (32, 32)
    assert np.asarray(image).std() > 0


def test_hugging_face_datasets_by_folder_and_by_files(dataset, fashion, tmp_path):
    from datasets import load_dataset

    for source in ({"path": str(dataset)}, {"path": "parquet", "data_files": str(dataset / "data" / "*.parquet")}):
        found = load_dataset(**source, split="train", cache_dir=str(tmp_path))
        assert found.num_rows == 44
        assert found.features["label"].names == list(fashion.labels)
        row = found[13]
        assert row["sample_id"] == 13
        assert found.features["label"].int2str(row["label"]) == fashion.labels[3]
        assert row["image"].size == (32, 32)


@pytest.mark.usefixtures("local_ray")
def test_ray_data(dataset):
    import ray

    rows = ray.data.read_parquet(str(dataset / "data"), override_num_blocks=1).take_all()
    assert sorted(row["sample_id"] for row in rows) == list(range(44))
    check(rows[0]["image"]["bytes"])


def test_pandas(dataset):
    import pandas

    frame = pandas.read_parquet(dataset / "data")
    assert frame.sample_id.tolist() == list(range(44))
    assert frame.label.tolist() == [i % 10 for i in range(44)]
    check(frame.image[5]["bytes"])


def test_polars(dataset):
    import polars

    frame = polars.scan_parquet(dataset / "data").sort("sample_id").collect()
    assert frame["sample_id"].to_list() == list(range(44))
    check(frame["image"][5]["bytes"])


def test_duckdb(dataset):
    import duckdb

    rows = duckdb.sql(
        f"select label, count(*), any_value(image.bytes) from '{dataset}/data/*.parquet' group by 1 order by 1"
    )
    found = rows.fetchall()
    assert [count for _, count, _ in found] == [5, 5, 5, 5, 4, 4, 4, 4, 4, 4]
    check(found[0][2])


@pytest.mark.parametrize("channels", [1, 3])
def test_png_keeps_every_value(channels):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 6, channels), dtype=np.uint8)
    decoded = np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in PNG.files(images)])
    assert np.array_equal(decoded.reshape(images.shape), images)


def test_pages_have_an_index_and_checksums_that_readers_find(dataset):
    import pyarrow.parquet as pq

    path = min((dataset / "data").iterdir())
    columns = pq.read_metadata(path).row_group(0)
    assert all(columns.column(i).has_offset_index for i in range(columns.num_columns))
    assert pq.read_table(path, page_checksum_verification=True).num_rows == 16


def test_a_shard_that_has_lost_its_end_is_made_again(dataset, fashion):
    job = make(fashion)
    assert open_dataset(job, fashion, dataset).missing == ()
    path = min((dataset / "data").iterdir())
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    try:
        assert open_dataset(job, fashion, dataset).missing == (0,)
    finally:
        path.write_bytes(whole)


def test_the_manifest_holds_the_recipe_and_the_files(dataset, fashion):
    raw = json.loads((dataset / "mlem.json").read_text())
    assert raw["config"]["digest"] == fashion.digest
    assert raw["config"]["plan"]["increments"] == "held"
    assert [shard["rows"] for shard in raw["shards"]] == [16, 16, 12]
    assert sorted(path.name for path in dataset.iterdir()) == ["README.md", "data", "mlem.json"]


def test_the_footer_holds_no_images(dataset):
    import pyarrow.parquet as pq

    path = next((dataset / "data").iterdir())
    assert pq.read_metadata(path).serialized_size < 5000
    columns = pq.read_metadata(path).row_group(0)
    statistics = {columns.column(i).path_in_schema: columns.column(i).is_stats_set for i in range(columns.num_columns)}
    assert statistics == {"sample_id": True, "image.bytes": False, "image.path": False, "label": True, "seed": True}
