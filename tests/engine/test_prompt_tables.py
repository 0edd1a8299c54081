"""Datasets made from tables of prompts."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pipelines import make_pipeline

import mlem_dist
from mlem_dist import api
from mlem_dist.api import generate
from mlem_dist.errors import UsageError
from mlem_dist.ladder.ladder import Ladder

ODD = ["", "x" * 2000, "two\nlines", "\r\n tabs\t", "שלום עולם", "🐟🐠", "a\u2028b", 'say "no"', "null", "a cat"]
ROWS = 1000
ONE_STEP = {"steps": 1, "nfe": 1, "device": "cpu"}
SCHEMA = pa.schema(
    {
        "caption": pa.large_string(),
        "id": pa.int16(),
        "tags": pa.list_(pa.string()),
        "source": pa.struct({"page": pa.int32(), "url": pa.string()}),
        "guidance_scale": pa.float32(),
        "seed": pa.uint32(),
        "kind": pa.dictionary(pa.int8(), pa.string()),
    }
)


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """A tiny Stable Diffusion with guidance of scale 3."""
    folder = tmp_path_factory.mktemp("sd")
    return Ladder.create(folder / "ladder", [make_pipeline("sd", folder / "sd")], guidance=3.0, measure=False)


@pytest.fixture(scope="module")
def rows():
    return [
        {
            "caption": ODD[i % len(ODD)] + (f" {i}" if i % 7 else ""),
            "id": i - 500,
            "tags": [f"t{i % 3}"] * (i % 4) if i % 5 else None,
            "source": {"page": i, "url": None} if i % 6 else None,
            "guidance_scale": [None, 1.0, 5.5][i % 3],
            "seed": None if i % 4 else 7 * i,
            "kind": "ab"[i % 2],
        }
        for i in range(ROWS)
    ]


@pytest.fixture(scope="module")
def table(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "prompts.parquet"
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path, row_group_size=300)
    return path


def read(out) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted((out / "data").iterdir()))


def pixels(record: dict) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(record["image"]["bytes"])))


@pytest.fixture(scope="module")
def out(ladder, table, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "out"
    sizes = {"block_size": 50, "shard_size": 400}
    generate(ladder, prompts=table, prompt_column="caption", out=out, seed=100, engine="inline", **ONE_STEP, **sizes)
    return out


def test_rows_come_out_in_order_with_the_columns_that_went_in(out, rows):
    made = read(out)
    assert made.num_rows == ROWS
    others = [name for name in SCHEMA.names if name not in ("caption", "seed", "guidance_scale")]
    after = ["seed", "guidance_scale", "width", "height"]
    assert made.column_names == ["sample_id", "image", "prompt", *others, *after]
    assert made["prompt"].type == pa.large_string()
    assert all(made[name].type == SCHEMA.field(name).type for name in others)
    assert made["sample_id"].to_pylist() == [*range(ROWS)]
    assert made["prompt"].to_pylist() == [row["caption"] for row in rows]
    for name in others:
        assert made[name].to_pylist() == [row[name] for row in rows]
    assert made["seed"].to_pylist() == [100 + i if row["seed"] is None else row["seed"] for i, row in enumerate(rows)]
    assert made["guidance_scale"].to_pylist() == [row["guidance_scale"] or 3.0 for row in rows]
    assert {*made["width"].to_pylist()} == {*made["height"].to_pylist()} == {16}


def test_each_image_is_that_of_its_row_alone(out, ladder, rows):
    records = read(out).to_pylist()
    for i in (0, 1, 2, 499, 998, 999):
        row = records[i]
        alone = mlem_dist.sample(
            ladder, prompts=[row["prompt"]], seeds=[row["seed"]], guidance=row["guidance_scale"], **ONE_STEP
        )
        assert np.abs(pixels(row).astype(int) - alone[0]).max() <= 1
    # Each of the columns that are used decides images.
    other = mlem_dist.sample(ladder, prompts=[row["prompt"]], seeds=[row["seed"]], guidance=9, **ONE_STEP)
    assert np.abs(pixels(row).astype(int) - other[0]).mean() > 2


def test_datasets_shows_pictures_and_columns(out, rows):
    import datasets

    datasets.disable_progress_bars()
    made = datasets.load_dataset("parquet", data_files=str(out / "data" / "*"), split="train")
    assert isinstance(made.features["image"], datasets.Image)
    assert made[1]["image"].size == (16, 16)
    assert made[3]["tags"] == rows[3]["tags"]
    assert made[3]["source"] == rows[3]["source"]
    card = (out / "README.md").read_text()
    assert "| tags | list<" in card
    assert "| prompt | large_string | what the image shows |" in card


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_other_formats_make_the_same_images(kind, ladder, rows, tmp_path):
    chosen = [{"prompt": row["caption"], "id": row["id"], "seed": row["seed"] or 5} for row in rows[:12]]
    path, parquet = tmp_path / f"prompts.{kind}", tmp_path / "prompts.parquet"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    else:
        import csv

        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "id", "seed"])
            writer.writeheader()
            writer.writerows(chosen)
    pq.write_table(pa.Table.from_pylist(chosen), parquet)
    for source in (path, parquet):
        generate(
            ladder,
            prompts=source,
            out=tmp_path / source.suffix[1:],
            engine="inline",
            block_size=5,
            shard_size=10,
            **ONE_STEP,
        )
    converted, parquet = (read(tmp_path / name) for name in (kind, "parquet"))
    assert converted.equals(parquet)
    assert not (tmp_path / kind / ".mlem").exists()


def test_images_of_a_prompt_have_the_seeds_that_follow(ladder, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "seed": 40}\n{"prompt": "b", "seed": null}\n')
    generate(
        ladder,
        prompts=path,
        images_per_prompt=3,
        out=tmp_path / "out",
        engine="inline",
        block_size=2,
        shard_size=2,
        **ONE_STEP,
    )
    made = read(tmp_path / "out").to_pylist()
    assert [(row["prompt"], row["seed"]) for row in made] == [
        *(("a", s) for s in (40, 41, 42)),
        *(("b", s) for s in (3, 4, 5)),
    ]
    alone = mlem_dist.sample(ladder, prompts=["a"], seeds=[41], **ONE_STEP)
    assert np.abs(pixels(made[1]).astype(int) - alone[0]).max() <= 1


def test_ray_makes_the_bytes_of_the_reference_and_resumes_with_the_same_table_only(ladder, rows, tmp_path, local_ray):
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": row["caption"], "tags": row["tags"]}) + "\n" for row in rows[:20]]
    path.write_text("".join(lines))
    given = {"prompts": str(path), "guidance": 4.0, "block_size": 4, "shard_size": 8, **ONE_STEP}
    generate(ladder, out=tmp_path / "reference", engine="inline", **given)
    out = tmp_path / "out"
    generate(ladder, out=out, placement="pools", devices=1, **given)
    for shard in sorted((tmp_path / "reference" / "data").iterdir()):
        assert (out / "data" / shard.name).read_bytes() == shard.read_bytes()
    (out / "data" / shard.name).unlink()
    path.write_text("".join(lines[1:] + lines[:1]))
    with pytest.raises(UsageError, match=r"prompts_sha256 was .*, now .*; choose another folder"):
        generate(ladder, out=out, **given)
    path.write_text("".join(lines))
    with pytest.raises(UsageError, match=r"guidance was 4\.0, now 5\.0"):
        generate(ladder, out=out, **given | {"guidance": 5.0})
    generate(ladder, out=out, engine="inline", **given)
    assert (out / "data" / shard.name).read_bytes() == shard.read_bytes()


def test_block_size_and_placement_change_images_by_rounding_only(ladder, rows, out, tmp_path, local_ray):
    """`out` is of other blocks, and its tests compare rows with those that are made alone."""
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows[:40], SCHEMA), path)
    first = [pixels(record) for record in read(out).slice(0, 40).to_pylist()]
    for block_size, placement in ((3, "together"), (8, "pools")):
        job = {
            "block_size": block_size,
            "shard_size": 24,
            "placement": placement,
            "devices": 1,
            "prompt_column": "caption",
            "seed": 100,
        }
        generate(ladder, prompts=str(path), out=str(tmp_path / placement), **job, **ONE_STEP)
        records = read(tmp_path / placement).to_pylist()
        for image, record in zip(first, records, strict=True):
            assert np.abs(pixels(record).astype(int) - image).max() <= 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": ["a"], "prompt_column": "caption"}, "`prompt_column` caption: expected a file of prompts"),
        ({"prompts": ["a"], "images_per_prompt": 0}, "`images_per_prompt` 0: expected at least 1"),
        ({"prompts": ["a"], "num": 2}, "`num` 2: expected at most 1, the number of prompts"),
        (
            {"prompts": ["a"], "images_per_prompt": 2, "num": 3},
            "`num` 3: expected at most 2, the number of prompts times 2",
        ),
        ({"prompts": ["a"], "guidance": -1.0}, "`guidance` -1.0: expected a number from 0 on"),
        ({"prompts": ["a"], "guidance": float("nan")}, "`guidance` nan: expected a number from 0 on"),
        ({"prompts": []}, r"`prompts` is \[\], expected a list"),
        ({"prompts": [None]}, "`prompts`: number 0 is None, expected a text"),
        ({"prompts": ["a"], "negative_prompts": ["b", "c"]}, "`negative_prompts`: 2 for 1 prompts"),
        ({}, "`prompts` is missing: ladder .* takes them"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(ladder, tmp_path, given, message):
    with pytest.raises(UsageError, match=message):
        generate(ladder, out=tmp_path / "out", engine="inline", **ONE_STEP, **given)
    assert not (tmp_path / "out").exists()


def test_guidance_is_refused_where_there_is_none(table, tmp_path):
    plain = Ladder.create(tmp_path / "ladder", [make_pipeline("sd", tmp_path / "sd")], measure=False)
    with pytest.raises(UsageError, match="`guidance` 5: the best level of ladder 'ladder' has no guidance"):
        generate(plain, prompts=["a"], guidance=5, out=tmp_path / "out", **ONE_STEP)
    with pytest.raises(UsageError, match="the column 'guidance_scale': the best level"):
        generate(plain, prompts=table, prompt_column="caption", out=tmp_path / "out", **ONE_STEP)
    assert not (tmp_path / "out").exists()


def test_negative_prompts_come_from_one_place(ladder, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "negative_prompt": "b"}')
    with pytest.raises(UsageError, match=r"has negative prompts of its own; leave out either"):
        generate(ladder, prompts=path, negative_prompts="ugly", out=tmp_path / "out", **ONE_STEP)
    with pytest.raises(UsageError, match=r"expected one text for all rows"):
        generate(ladder, prompts=path, negative_prompts=["ugly"], out=tmp_path / "out", **ONE_STEP)


def test_an_image_is_made_again_from_its_row(out, ladder, tmp_path):
    from diffusers import DDIMScheduler, DiffusionPipeline

    remade = api.remake(str(out), 998, out=tmp_path / "998.png")
    assert remade.row["id"] == 498
    assert remade.row["seed"] == 1098
    assert remade.difference.max() <= 1
    assert Image.open(tmp_path / "998.png").size[1] == 16
    # The lines that are printed, but for the scheduler.
    scope = {}
    lines = remade.lines.splitlines()
    exec("\n".join(lines[:-1]), scope)
    assert isinstance(scope["pipeline"], DiffusionPipeline)
    scope["pipeline"].set_progress_bar_config(disable=True)
    config = {**scope["pipeline"].scheduler.config, "timestep_spacing": "trailing"}
    scope["pipeline"].scheduler = DDIMScheduler.from_config(config)
    exec(lines[-1], scope)
    assert np.abs(np.array(scope["image"]).astype(int) - remade.stored).max() <= 3


def test_what_cannot_be_made_again_is_refused(out, ladder, tmp_path):
    for given, message in (
        ({"id": 1000}, "`id` 1000: expected 0 to 999"),
        ({"id": 1, "ladder": "fashion"}, "ladder 'fashion' is not the one"),
        ({"id": 1, "out": out / "README.md" / "1.png"}, "is a file"),
    ):
        with pytest.raises(UsageError, match=message):
            api.remake(str(out), **given)
    with pytest.raises(UsageError, match="not a dataset"):
        api.remake(str(tmp_path), 1)


@pytest.mark.parametrize("engine", ["inline", "ray"])
def test_a_preview_shows_the_first_images_and_touches_nothing(engine, out, table, ladder, rows, tmp_path, local_ray):
    given = {"prompts": table, "prompt_column": "caption", "seed": 100, "engine": engine, **ONE_STEP}
    made = api.preview(ladder, picture=tmp_path / "four.png", out=tmp_path / "out", **given)
    assert {path.name for path in tmp_path.iterdir()} == {"four.png"}
    assert (made.num, made.shards) == (ROWS, 1)
    files = [image["bytes"] for image in read(out)["image"].to_pylist()[:4]]
    assert made.image_bytes == pytest.approx(np.mean([*map(len, files)]), rel=0.02)
    assert made.seconds * made.images_per_second == pytest.approx(ROWS, rel=0.5)
    assert {"sd guided", "encode", "decode"} <= {*made.hours} | {"encode", "decode"}
    assert sum(made.hours.values()) * 3600 < made.devices * made.seconds * 1.01
    with Image.open(tmp_path / "four.png") as picture:
        assert picture.size[0] == 4 * 160
        first = np.asarray(picture.crop((0, 0, 160, 160)).resize((16, 16), Image.Resampling.NEAREST))
    assert np.abs(first.astype(int) - pixels(read(out).slice(0, 1).to_pylist()[0])).max() <= 1
    with pytest.raises(UsageError, match="another configuration"):
        api.preview(ladder, picture=tmp_path / "four.png", out=out, **given | {"seed": 1})


def test_the_command_previews(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = here("generate", "--num", "1e6", "--out", "out", "--nfe", "2", "--engine", "inline", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1,000,000 images in 500 shards, about ")
    assert "unet-5" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"dry-run.png"}


def test_a_plan_for_another_guidance_is_told_of(ladder, tmp_path):
    plan = tmp_path / "plan.json"
    api.draw(ladder, out=plan, steps=2, nfe=2)
    told = []
    given = {"prompts": ["a"], "plan": plan, "engine": "inline", "device": "cpu", "notify": told.append}
    generate(ladder, out=tmp_path / "same", guidance=3, **given)
    assert not any("guidance" in sentence for sentence in told)
    generate(ladder, out=tmp_path / "other", guidance=5, **given)
    assert "The plan was made for guidance 3; with other scales it errs more." in told


def test_relative_paths_are_those_of_the_command_on_any_ray(ladder, tmp_path, monkeypatch, local_ray):
    """Its workers have another current folder."""
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"prompt": ["a", "b"]}), "prompts.parquet")
    for name, prompts in (("of-file", "prompts.parquet"), ("of-list", ["a", "b"])):
        generate(ladder, prompts=prompts, out=name, placement="together", devices=1, **ONE_STEP)
        assert read(tmp_path / name)["prompt"].to_pylist() == ["a", "b"]


def test_what_would_decide_nothing_is_refused_or_said(tmp_path):
    plain = Ladder.create(tmp_path / "ladder", [make_pipeline("sd", tmp_path / "sd")], measure=False)
    given = {"out": tmp_path / "out", "engine": "inline", **ONE_STEP}
    with pytest.raises(UsageError, match="`negative_prompts`: the best level of ladder 'ladder' has no guidance"):
        generate(plain, prompts=["a"], negative_prompts="ugly", **given)
    for further in ({"images_per_prompt": 2}, {"prompt_column": "caption"}):
        with pytest.raises(UsageError, match="is not conditioned on prompts"):
            generate("fashion", num=2, **further, **given)
    told = []
    generate(plain, prompts=["a"], negative_prompts=["ugly"], notify=told.append, **given)
    assert any("Negative prompts decide nothing: the best level" in sentence for sentence in told)


def test_the_images_of_a_preview_are_those_of_the_dataset_for_drawn_plans(tmp_path):
    given = {"num": 12, "steps": 20, "nfe": 2, "draw": "systematic", "block_size": 6, "shard_size": 12}
    api.generate(out=tmp_path / "out", engine="inline", **given)
    api.preview(picture=tmp_path / "four.png", out=tmp_path / "none", engine="inline", **given)
    stored = [pixels(row) for row in read(tmp_path / "out").to_pylist()[:4]]
    with Image.open(tmp_path / "four.png") as picture:
        grey = picture.convert("L")
        shown = [
            grey.crop((160 * i, 0, 160 * (i + 1), 160)).resize((32, 32), Image.Resampling.NEAREST) for i in range(4)
        ]
    for image, other in zip(stored, shown, strict=True):
        assert np.abs(image.astype(int) - np.asarray(other)).max() <= 1
