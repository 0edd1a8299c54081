"""Scores of images by the user's classes."""

import io
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

from mlem_dist import api
from mlem_dist.dataset import shards
from mlem_dist.dataset.keep import Condition
from mlem_dist.dataset.manifest import finished_shards, read_manifest
from mlem_dist.errors import ScoreError, UsageError
from mlem_dist.ladder.ladder import Ladder

MODULE = """
import numpy as np
from pathlib import Path

class Brightness:
    def __init__(self):
        Path("HERE/made").open("a").write("1")

    def __call__(self, batch):
        images = batch["image"].astype(np.float32)
        named = np.array([f"{label}/{seed}" for label, seed in zip(batch["label"], batch["seed"])])
        return {**batch, "mean": images.mean((1, 2, 3)), "named": named, "dark": images.mean((1, 2, 3)) < 60}

class Histogram:
    def __call__(self, batch):
        ids = batch["sample_id"]
        return {
            "histogram": [np.histogram(image, 4, (0, 256))[0] for image in batch["image"]],
            "boxes": [[0.5] * int(i % 3) for i in ids],
            "number": [int(i) if ids[0] else float(i) for i in ids],
        }

class Changes:
    def __call__(self, batch):
        batch["image"][:] = 0
        return {"zero": np.zeros(len(batch["image"]))}

class Empty:
    def __call__(self, batch):
        return {"nothing": [None] * len(batch["image"])}

class Mixed:
    def __call__(self, batch):
        first = batch["sample_id"][0]
        return {"mixed": ["low" if first == 20 else 1.5] * len(batch["image"])}

class Partly:
    def __call__(self, batch):
        return {"a": batch["seed"], **({"b": batch["seed"]} if batch["sample_id"][0] == 20 else {})}

class Large:
    def __call__(self, batch):
        return {"large": np.full(len(batch["image"]), 2**64 - 1, np.uint64)}

class Fails:
    def __call__(self, batch):
        if 27 in batch["sample_id"] and not Path("HERE/mended").exists():
            raise ValueError("no score for this")
        return {"fine": np.ones(len(batch["image"]))}

class Unmade:
    def __init__(self):
        raise OSError("no weights")

class Short:
    def __call__(self, batch):
        return {"short": [1]}

class Taken:
    def __call__(self, batch):
        return {"image": batch["image"], "label": batch["label"]}

class Text:
    def __call__(self, batch):
        return "high"

number = 3
"""

LISTS = ["histogram", "boxes", "number"]

JOB = {"num": 45, "steps": 4, "nfe": 1, "seed": 5, "block_size": 5, "shard_size": 20, "device": "cpu"}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A current folder with a module of score classes of a name that no other test has imported."""
    name = f"scores_{tmp_path.name}".replace("[", "_").replace("]", "_").replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE.replace("HERE", str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    return name


def read(out) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted((out / "data").iterdir()))


def test_scores_are_written_beside_images_the_same_by_both_engines(place, tmp_path, local_ray):
    scores = [f"{place}:Brightness", f"{place}:Histogram"]
    api.generate(out=str(tmp_path / "inline"), engine="inline", scores=scores, **JOB)
    made = read(tmp_path / "inline")
    assert made.column_names == ["sample_id", "image", "label", "seed", "mean", "named", "dark", *LISTS]
    types = [made.schema.field(name).type for name in made.column_names[-6:]]
    lists = [pa.list_(pa.int64()), pa.list_(pa.float64())]
    assert types == [pa.float64(), pa.string(), pa.bool_(), *lists, pa.float64()]
    for row in made.to_pylist():
        image = np.array(Image.open(io.BytesIO(row["image"]["bytes"])))
        assert row["mean"] == pytest.approx(image.mean(), rel=1e-5)
        assert row["dark"] == (row["mean"] < 60)
        assert row["named"] == f"{row['label']}/{row['seed']}"
        assert sum(row["histogram"]) == image.size
        assert row["boxes"] == [0.5] * (row["sample_id"] % 3)
        assert row["number"] == row["sample_id"]
    # One instance to be timed, one to score.
    assert (tmp_path / "made").read_text() == "11"
    for placement, devices in (("together", 2), ("1-5,6", 1)):
        out = tmp_path / placement
        api.generate(out=str(out), placement=placement, devices=devices, scores=scores, **JOB)
        for shard in (tmp_path / "inline" / "data").iterdir():
            assert (out / "data" / shard.name).read_bytes() == shard.read_bytes()
    with pytest.raises(UsageError, match="another configuration"):
        api.generate(out=str(tmp_path / "inline"), engine="inline", scores=scores[:1], **JOB)


@pytest.mark.parametrize("engine", ["inline", "ray"])
def test_a_score_that_raises_ends_the_run_and_loses_nothing(place, tmp_path, here, engine, local_ray):
    options = "--num 45 --steps 4 --nfe 1 --block-size 5 --shard-size 5 --device cpu --engine"
    command = ["generate", "--out", str(tmp_path / "out"), "--score", f"{place}:Fails", *options.split(), engine]
    command += ["--devices", "2"] if engine == "ray" else []
    done = here(*command)
    assert done.returncode == 1
    assert done.stderr.count("Traceback") <= 1
    assert done.stderr.count('raise ValueError("no score for this")') == 1
    assert f"Error: score {place}:Fails raises ValueError: no score for this" in done.stderr
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "data").glob("*")}
    assert len(kept) < 9
    assert engine == "ray" or len(kept) >= 3
    (tmp_path / "mended").touch()
    done = here(*command)
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "out")["fine"].to_pylist() == [1.0] * 45
    assert all((tmp_path / "out" / "data" / name).stat().st_mtime_ns == time for name, time in kept.items())


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("nowhere:Class", UsageError, "'nowhere:Class' cannot be imported"),
        ("{}:Nothing", UsageError, "cannot be imported"),
        ("{}", UsageError, "expected MODULE:CLASS"),
        ("{}:number", UsageError, "is 3, expected a class"),
        ("{}:Unmade", ScoreError, "raises OSError: no weights"),
        ("{}:Short", ScoreError, "'short' is not a value for each of the images"),
        ("{}:Taken", ScoreError, "no new column is returned"),
        ("{}:Text", ScoreError, "returns str, expected a dict of columns"),
        ("{}:Changes", ScoreError, "raises ValueError: assignment destination is read-only"),
        ("{}:Empty", ScoreError, "'nothing' of scores is null for 4 images of noise"),
        ("{}:Large", ScoreError, "'large' of scores cannot be written: .*18446744073709551615"),
        ("broken:Class", ScoreError, "raises SyntaxError"),
        (".broken:Class", UsageError, "expected MODULE:CLASS"),
    ],
)
def test_classes_that_cannot_be_used_are_refused_before_anything_is_written(place, tmp_path, name, kind, message):
    (tmp_path / "broken.py").write_text("class Class\n")
    with pytest.raises(kind, match=message):
        api.generate(out=str(tmp_path / "out"), engine="inline", scores=[name.format(place)], **JOB)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("Mixed", "'mixed' of scores is of string, expected double"), ("Partly", "'b' of scores is not there for all")],
)
def test_all_shards_have_the_same_columns_or_the_run_ends(place, tmp_path, name, message):
    with pytest.raises(ScoreError, match=message):
        api.generate(out=str(tmp_path / "out"), engine="inline", scores=[f"{place}:{name}"], **JOB)
    assert len([*(tmp_path / "out" / "data").iterdir()]) == 1


def test_scores_of_prompts_know_their_rows(place, tmp_path):
    from pipelines import make_pipeline

    (tmp_path / "by_prompt.py").write_text(
        "class Length:\n    def __call__(self, batch):\n        return {'length': [len(p) for p in batch['prompt']]}\n"
    )
    ladder = Ladder.create(tmp_path / "ladder", [make_pipeline("sd", tmp_path / "sd")], measure=False)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": "x" * i}) + "\n" for i in range(7)))
    job = {"steps": 1, "nfe": 1, "block_size": 3, "shard_size": 3, "engine": "inline", "scores": ["by_prompt:Length"]}
    api.generate(ladder, out=str(tmp_path / "out"), prompts=str(tmp_path / "prompts.jsonl"), **job)
    assert read(tmp_path / "out")["length"].to_pylist() == [*range(7)]


def safety_checker(extractor: CLIPImageProcessor, images: np.ndarray) -> StableDiffusionSafetyChecker:
    """A tiny safety checker with random weights, to which half of the images, uint8 (B, H, W, 3), are unsafe."""
    torch.manual_seed(1)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    size = {"image_size": 16, "patch_size": 8}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision | size, projection_dim=8)).eval()
    torch.nn.init.normal_(checker.concept_embeds)
    # Cosines are 1 at most, so that all concepts but the first are never seen.
    checker.concept_embeds_weights.data[:], checker.special_care_embeds_weights.data[:] = 2, 2
    values = extractor([*images], return_tensors="pt").pixel_values
    seen = checker.visual_projection(checker.vision_model(values)[1])
    cosines = torch.cosine_similarity(seen, checker.concept_embeds[:1])
    checker.concept_embeds_weights.data[0] = cosines.median() + 1e-3
    assert cosines.std() > 1e-2
    return checker


def test_a_safety_checker_gives_a_column_and_no_black_image(tmp_path, local_ray):
    from pipelines import make_pipeline

    folder = make_pipeline("sd", tmp_path / "sd")
    job = {"prompts": list("abcdefgh"), "steps": 4, "nfe": 4, "block_size": 4, "shard_size": 8}
    unchecked = Ladder.create(tmp_path / "unchecked", [folder], measure=False, guidance=3)
    images = api.sample(unchecked, prompts=job["prompts"], steps=4, nfe=4)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    extractor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    pipeline.register_modules(safety_checker=safety_checker(extractor, images), feature_extractor=extractor)
    pipeline.save_pretrained(folder)
    ladder = Ladder.create(tmp_path / "ladder", [folder], measure=False, guidance=3)
    api.generate(ladder, out=str(tmp_path / "inline"), engine="inline", **job)
    rows = read(tmp_path / "inline").to_pylist()
    stored = np.stack([np.array(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in rows])
    assert np.abs(stored.astype(int) - images).max() <= 1
    pixels = torch.tensor(stored).permute(0, 3, 1, 2) / 127.5 - 1
    checked, unsafe = pipeline.run_safety_checker(pixels.clone(), "cpu", torch.float32)
    assert 0 < sum(unsafe) < 8
    assert not checked[unsafe].any()
    assert [row["nsfw"] for row in rows] == unsafe
    api.generate(ladder, out=str(tmp_path / "ray"), keep="not nsfw", devices=1, **job)
    assert read(tmp_path / "ray").to_pylist() == [row for row in rows if not row["nsfw"]]
    copied = Ladder.create(tmp_path / "copied", [folder], measure=False, guidance=3, copy=True)
    assert copied.digest == ladder.digest
    assert copied.load_checker("cpu")(stored).tolist() == unsafe
    (tmp_path / "prompts.csv").write_text("prompt,nsfw\na,0\n")
    with pytest.raises(UsageError, match="`prompts` has a column 'nsfw'"):
        api.generate(ladder, out=str(tmp_path / "taken"), prompts=str(tmp_path / "prompts.csv"))
    assert not (tmp_path / "taken").exists()
    (folder / "feature_extractor").rename(tmp_path / "feature_extractor")
    with pytest.raises(UsageError, match="has a safety checker, but no feature_extractor/preprocessor_config"):
        Ladder.create(tmp_path / "none", [folder], measure=False)
    for file in (folder / "safety_checker").glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(UsageError, match="safety_checker has no weights in safetensors files"):
        Ladder.create(tmp_path / "none", [folder], measure=False)


def test_rows_are_left_out_by_a_condition_the_same_by_both_engines(place, tmp_path, local_ray):
    """One shard keeps nothing, and counts as done."""
    given = {"scores": [f"{place}:Brightness"], **JOB}
    api.generate(out=str(tmp_path / "all"), engine="inline", **given)
    every = read(tmp_path / "all").to_pylist()
    condition = "mean > 40 and not (label in (1, 2) or dark) and (sample_id < 20 or sample_id >= 40)"
    wanted = [
        row
        for row in every
        if row["mean"] > 40 and row["label"] not in (1, 2) and not row["dark"] and not 20 <= row["sample_id"] < 40
    ]
    assert 0 < len(wanted) < 25
    report = api.generate(out=str(tmp_path / "inline"), engine="inline", keep=condition, **given)
    assert (report.made, report.kept) == (45, len(wanted))
    assert read(tmp_path / "inline").to_pylist() == wanted
    assert pq.read_metadata(tmp_path / "inline" / "data" / "train-00001-of-00003.parquet").num_rows == 0
    assert api.verify(str(tmp_path / "inline"))[1:] == ([], True)
    shown = datasets.load_dataset(str(tmp_path / "inline"), split="train")
    assert shown["named"] == [row["named"] for row in wanted]
    assert isinstance(shown.features["image"], datasets.Image)
    api.generate(out=str(tmp_path / "ray"), keep=condition, devices=1, **given)
    for shard in (tmp_path / "inline" / "data").iterdir():
        assert (tmp_path / "ray" / "data" / shard.name).read_bytes() == shard.read_bytes()
    again = api.generate(out=str(tmp_path / "ray"), keep=condition, **given)
    assert (again.made, again.kept) == (0, len(wanted))
    with pytest.raises(UsageError, match="another configuration"):
        api.generate(out=str(tmp_path / "ray"), keep="mean > 41", **given)
    with pytest.raises(UsageError, match="does not have it"):
        api.remake(str(tmp_path / "ray"), 1)


def test_a_dataset_ends_when_so_many_rows_are_kept(place, tmp_path, local_ray, monkeypatch):
    """The first rows by id, also after a stop at any moment, of a run on Ray and of the placing of shards."""
    given = {"scores": [f"{place}:Brightness"], "keep": "mean > 50 and sample_id > 4", **JOB, "shard_size": 5}
    api.generate(out=str(tmp_path / "all"), engine="inline", **given)
    every = read(tmp_path / "all").to_pylist()
    until = len(every) // 2
    last = every[until - 1]["sample_id"] // 5
    assert [row["sample_id"] // 5 for row in every].count(last) > 1
    made = {"out": str(tmp_path / "inline"), "engine": "inline", "until": until, **given}
    assert api.preview(picture=tmp_path / "preview.png", **made).num == 45
    report = api.generate(**made)
    assert report.kept == until
    assert last < report.made // 5 < 9
    assert read(tmp_path / "inline").to_pylist() == every[:until]
    names = [f"train-{index:05d}-of-{last + 1:05d}.parquet" for index in range(last + 1)]
    assert sorted(path.name for path in (tmp_path / "inline" / "data").iterdir()) == names
    assert not (tmp_path / "inline" / ".mlem").exists()
    assert api.verify(str(tmp_path / "inline"))[1:] == ([], True)
    whole = {path: path.read_bytes() for path in (tmp_path / "inline" / "data").iterdir()}
    # A missing shard is made again, and no others.
    (tmp_path / "inline" / "data" / names[1]).unlink()
    assert api.generate(out=str(tmp_path / "inline"), engine="inline", until=until, **given).made == 5
    assert {path: path.read_bytes() for path in (tmp_path / "inline" / "data").iterdir()} == whole

    on_ray = {"out": str(tmp_path / "ray"), "devices": 2, "until": until, **given}

    class StoppedError(Exception):
        pass

    def stop(_: object) -> None:
        if len([*(tmp_path / "ray").glob("**/train-*.parquet")]) >= 2:
            raise StoppedError

    def interrupted(*arguments: object) -> None:
        if len([*(tmp_path / "ray" / "data").glob("*")]) >= 2:
            raise StoppedError
        moved(*arguments)

    with pytest.raises(StoppedError):
        api.generate(progress=stop, **on_ray)
    assert not (tmp_path / "ray" / "data").exists()
    moved = shards.move
    monkeypatch.setattr(shards, "move", interrupted)
    with pytest.raises(StoppedError):
        api.generate(**on_ray)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert api.verify(str(tmp_path / "ray"))[1:] == ([], False)
    assert api.generate(**on_ray).made == 0
    for path, data in whole.items():
        assert (tmp_path / "ray" / "data" / path.name).read_bytes() == data
    assert (tmp_path / "ray" / "mlem.json").read_bytes() == (tmp_path / "inline" / "mlem.json").read_bytes()
    with pytest.raises(UsageError, match="ends before it, with"):
        api.remake(str(tmp_path / "ray"), 44)
    # A repair that was stopped has left a shard that waits, which is no part of the finished dataset.
    (tmp_path / "ray" / "data" / names[1]).unlink()
    monkeypatch.setattr(shards, "move", interrupted)
    with pytest.raises(StoppedError):
        api.generate(**on_ray)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    manifest = read_manifest(tmp_path / "ray")
    assert [*finished_shards(tmp_path / "ray", manifest)] == [f"data/{name}" for name in names if name != names[1]]
    assert api.generate(out=str(tmp_path / "ray"), engine="inline", until=until, **given).made == 5
    assert (tmp_path / "ray" / "data" / names[1]).read_bytes() == whole[tmp_path / "inline" / "data" / names[1]]


def test_a_dataset_of_too_few_rows_says_so(place, tmp_path):
    notes: list[str] = []
    given = {"keep": "sample_id >= 43", "until": 3, "engine": "inline", "notify": notes.append, **JOB}
    report = api.generate(out=str(tmp_path / "out"), **given)
    assert (report.made, report.kept) == (45, 2)
    assert "Only 2 of the 45 images are kept, fewer than the 3 of `until`." in notes
    assert read(tmp_path / "out")["sample_id"].to_pylist() == [43, 44]
    assert "Of 45 images, those with `sample_id >= 43`." in (tmp_path / "out" / "README.md").read_text()
    assert api.generate(out=str(tmp_path / "out"), **given).made == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"until": 3}, "expected `keep` beside it"),
        ({"until": 46, "keep": "label < 3"}, "`until` 46: expected 1 to 45, the number of images to choose from"),
        ({"until": 0, "keep": "label < 3"}, "`until` 0: expected 1 to 45"),
    ],
)
def test_numbers_of_rows_that_cannot_be_met_are_refused(tmp_path, given, message):
    with pytest.raises(UsageError, match=message):
        api.generate(out=str(tmp_path / "out"), engine="inline", **given, **JOB)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("scor > 1", "there is no column 'scor'; expected one of sample_id, label, seed"),
        ("image == 1", "there is no column 'image'"),
        ("label >", "invalid syntax"),
        ("label", "expected a condition such as"),
        ("1 < 2", "names no column"),
        ("label > 'a'", "expected a condition such as"),
        ("abs(label) > 1", r"'abs\(label\)' is not understood"),
        ("label in names", "is not understood there"),
        ("", "expected a condition such as"),
        ("1 in (1, 2)", "expected a condition such as"),
        ("label > 1 / 0", "division by zero"),
        ("label > -'a'", "bad operand"),
    ],
)
def test_conditions_that_cannot_be_used_are_refused(tmp_path, keep, message):
    with pytest.raises(UsageError, match=message):
        api.generate(out=str(tmp_path / "out"), engine="inline", keep=keep, **JOB)
    assert not (tmp_path / "out").exists()


def test_conditions_on_scores_are_checked_before_anything_is_written(place, tmp_path):
    for keep, message in (("meen > 1", "there is no column 'meen'"), ("named > 1", "expected a condition such as")):
        with pytest.raises(UsageError, match=message):
            api.generate(out=str(tmp_path / "o"), engine="inline", keep=keep, scores=[f"{place}:Brightness"], **JOB)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "keep",
    [
        "0 < number <= 3",
        "number + 1 == 2 * 2",
        "text != 'b'",
        "number is None",
        "text is not None or number == -1",
        "flag",
    ],
)
def test_conditions_mean_what_they_mean_in_python(keep):
    rows = [
        {"number": number, "text": text, "flag": flag}
        for number in (None, -1, 0, 1, 3, 4)
        for text in (None, "a", "b")
        for flag in (True, False)
    ]
    table = pa.Table.from_pylist(rows, pa.schema({"number": pa.int64(), "text": pa.string(), "flag": pa.bool_()}))

    def holds(row: dict) -> bool:
        try:
            return bool(eval(keep, {}, row)) and not (keep == "text != 'b'" and row["text"] is None)
        except TypeError:
            return False

    assert Condition(keep).rows(table) == [number for number, row in enumerate(rows) if holds(row)]
