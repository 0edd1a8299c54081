"""Exports of a dataset hold its rows, and the readers of their formats open them."""

import hashlib
import io
import json
import tarfile
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import tree
from PIL import Image

from mlem_dist import api
from mlem_dist.dataset import export as exports
from mlem_dist.dataset.manifest import Manifest
from mlem_dist.dataset.shards import Shard
from mlem_dist.engine.completion import complete, open_dataset
from mlem_dist.engine.inline import run_inline
from mlem_dist.errors import UsageError
from mlem_dist.solver.plan import single_level

FORMATS = ("webdataset", "folder")
PROMPTS = ["a cat", "Ein Haus, groß\nund alt", "", 'she said "no"', "\N{BLACK SPADE SUIT}\u2028", "{}"]
EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}


def picture(number: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def columns(num: int, pictures: list[bytes] | None = None, **more) -> dict:
    return {
        "sample_id": list(range(num)),
        "image": [{"bytes": content, "path": None} for content in pictures or map(picture, range(num))],
        "label": [i % 3 for i in range(num)],
        "prompt": [PROMPTS[i % len(PROMPTS)] for i in range(num)],
        "seed": [7 + i for i in range(num)],
        **more,
    }


def write(out: Path, rows: dict, size: int = 4, config: dict | None = None) -> Path:
    """A finished dataset with any columns."""
    table, shards = pa.table(rows), []
    (out / "data").mkdir(parents=True)
    starts = range(0, table.num_rows, size)
    for number, start in enumerate(starts):
        path = out / f"data/train-{number:05d}-of-{len(starts):05d}.parquet"
        part = table.slice(start, size)
        pq.write_table(part, path, row_group_size=3, compression="none", use_dictionary=False, write_page_checksum=True)
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        shards.append(Shard(f"data/{path.name}", part.num_rows, len(content), digest))
    Manifest(config or {"seed": 7}, ("a", "b", "c"), {}, {}, tuple(shards)).write(out)
    return out


@pytest.fixture
def dataset(tmp_path) -> Path:
    """Ten rows in three shards."""
    return write(tmp_path / "dataset", columns(10))


@pytest.fixture
def made(fashion, make_job, tmp_path) -> Path:
    """A dataset that this program has generated: 44 images in three shards."""
    out, job = tmp_path / "made", make_job(single_level(1, len(fashion.levels), 12))
    list(complete(open_dataset(job, fashion, out), fashion, lambda shards: run_inline(job, fashion, out, shards, 1)))
    return out


def visible(folder: Path) -> dict[str, bytes]:
    """What readers see."""
    return {name: content for name, content in tree(folder).items() if not name.startswith(".")}


def members(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as opened:
        return {member.name: opened.extractfile(member).read() for member in opened}


def test_tar_files_hold_the_rows_of_their_shards(dataset, tmp_path):
    report = api.export(str(dataset), str(tmp_path / "tars"), format="webdataset")
    assert (report.images, report.files, report.made) == (10, 3, 10)
    assert {*visible(tmp_path / "tars")} == {"00000.tar", "00001.tar", "00002.tar"}
    for number, path in enumerate(sorted((tmp_path / "tars").glob("*.tar"))):
        content = members(path)
        assert [*content] == sorted(content)
        rows = pq.read_table(dataset / f"data/train-{number:05d}-of-00003.parquet").to_pylist()
        assert len(content) == 4 * len(rows)
        for row in rows:
            key = f"{row['sample_id']:09d}"
            assert content[f"{key}.png"] == row["image"]["bytes"]
            assert content[f"{key}.txt"].decode() == row["prompt"]
            assert content[f"{key}.cls"] == str(row["label"]).encode()
            assert json.loads(content[f"{key}.json"]) == {"sample_id": row["sample_id"], "seed": row["seed"]}


def test_a_folder_holds_pictures_and_a_table_of_the_other_columns(dataset, tmp_path):
    report = api.export(dataset, tmp_path / "folder", format="folder")
    assert (report.images, report.files, report.made) == (10, 3, 10)
    content = visible(tmp_path / "folder")
    table = [json.loads(line) for line in content.pop("metadata.jsonl").decode().split("\n")[:-1]]
    rows = pq.read_table(dataset / "data").to_pylist()
    assert {row["file_name"] for row in table} == {*content}
    assert [content[row.pop("file_name")] for row in table] == [row.pop("image")["bytes"] for row in rows]
    assert table == rows
    assert [*tree(tmp_path / "folder/.mlem")] == ["export.json"]


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_dataset_makes_the_same_bytes(dataset, tmp_path, form):
    moved = dataset.rename(tmp_path / "moved")
    for name in ("a", "b"):
        api.export(moved, tmp_path / name, format=form)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.mark.parametrize("form", FORMATS)
def test_image_files_keep_their_bytes_and_are_named_by_their_format(tmp_path, form):
    kinds = ["WEBP", "PNG", "JPEG"]
    pictures = [picture(i, kind) for i, kind in enumerate(kinds)]
    api.export(write(tmp_path / "dataset", columns(3, pictures)), tmp_path / "target", format=form)
    names = [f"{i:09d}.{EXTENSIONS[kind]}" for i, kind in enumerate(kinds)]
    target = tmp_path / "target"
    content = members(target / "00000.tar") if form == "webdataset" else visible(target)
    folder = "00000/" if form == "folder" else ""
    assert [content[f"{folder}{name}"] for name in names] == pictures


class Killed(BaseException):
    """The end of the process."""


@pytest.mark.parametrize(("form", "place"), [("webdataset", "tar"), ("folder", "picture"), ("folder", "table")])
@pytest.mark.parametrize("calls", [0, 1, 5])
def test_what_was_killed_goes_on_and_ends_with_the_same_bytes(dataset, tmp_path, monkeypatch, form, place, calls):
    whole, target = tmp_path / "whole", tmp_path / "target"
    api.export(dataset, whole, format=form)
    left = iter(range(calls))

    def killing(function, when):
        def call(*arguments, **options):
            if when(*arguments) and next(left, None) is None:
                raise Killed
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        if place == "tar":
            patch.setattr(tarfile.TarFile, "addfile", killing(tarfile.TarFile.addfile, lambda *_: True))
        else:
            end = ".png" if place == "picture" else "l"
            patch.setattr(exports, "publish", killing(exports.publish, lambda path, *_: path.name.endswith(end)))
        if (place, calls) == ("table", 5):
            # Three parts and their sum are four.
            api.export(dataset, target, format=form)
        else:
            with pytest.raises(Killed):
                api.export(dataset, target, format=form)
    # Whatever has its name is complete.
    begun = visible(target)
    assert begun.items() <= visible(whole).items()
    times = {name: (target / name).stat().st_mtime_ns for name in begun}
    report = api.export(dataset, target, format=form)
    assert tree(target) == tree(whole)
    assert times == {name: (target / name).stat().st_mtime_ns for name in times}
    pictures = [name for name in begun if name.endswith("png")]
    assert report.made == (10 - len(pictures) if form == "folder" else 10 - 4 * len(begun))


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_there_is_not_written_again(dataset, tmp_path, form):
    target = tmp_path / "target"
    api.export(dataset, target, format=form)
    whole, times = tree(target), {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    assert api.export(dataset, target, format=form).made == 0
    assert {
        path: path.stat().st_mtime_ns for path in target.rglob("*") if path.name != ".mlem"
    }.items() <= times.items()
    # What is lost is made again, beside files of one's own.
    (target / "README.md").write_text("mine")
    for name in ("00001.tar",) if form == "webdataset" else ("00001/000000005.png", "metadata.jsonl"):
        (target / name).unlink()
    assert api.export(dataset, target, format=form).made == (4 if form == "webdataset" else 1)
    assert tree(target) == whole | {"README.md": b"mine"}


def test_folders_have_no_more_than_a_number_of_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "FOLDER", 3)
    dataset, target = write(tmp_path / "dataset", columns(19), size=8), tmp_path / "target"
    # Shards of 8, 8 and 3 rows in folders of at most 3.
    assert api.export(dataset, target, format="folder").files == 7
    sizes = [len(list(folder.iterdir())) for folder in sorted(target.glob("0*"))]
    assert sizes == [3, 3, 2, 3, 3, 2, 3]
    (target / "00005/000000015.png").unlink()
    assert api.export(dataset, target, format="folder").made == 1
    names = [json.loads(line)["file_name"] for line in (target / "metadata.jsonl").read_text().splitlines()]
    assert names == sorted(str(path.relative_to(target)) for path in target.glob("0*/*"))


def values() -> dict:
    """Columns of many types, and what JSON makes of them."""
    return {
        "score": (pa.array([0.5, float("nan")]), [0.5, None]),
        "half": (pa.array([0.5, None], pa.float16()), [0.5, None]),
        "tags": (pa.array([["a", None], []]), [["a", None], []]),
        "box": (pa.array([{"x": [1, 2], "y": float("inf")}, None]), [{"x": [1, 2], "y": None}, None]),
        "when": (
            pa.array([datetime(2026, 1, 2), None], pa.timestamp("us")),
            ["2026-01-02 00:00:00.000000", None],
        ),
        "dates": (pa.array([[datetime(2026, 1, 2).date()], None]), [["2026-01-02"], None]),
        "price": (pa.array([Decimal("1.20"), Decimal("0.10")]), ["1.20", "0.10"]),
        "source": (pa.array(["web", "web"]).dictionary_encode(), ["web", "web"]),
        "fixed": (pa.array([[1, 2], [3, 4]], pa.list_(pa.int8(), 2)), [[1, 2], [3, 4]]),
        "nothing": (pa.nulls(2), [None, None]),
        "good": (pa.array([True, False]), [True, False]),
    }


@pytest.mark.parametrize("form", FORMATS)
def test_other_columns_become_json(tmp_path, form):
    rows = columns(2, **{name: array for name, (array, _) in values().items()})
    api.export(write(tmp_path / "dataset", rows), tmp_path / "target", format=form)
    if form == "webdataset":
        content = members(tmp_path / "target/00000.tar")
        lines = [content[f"{i:09d}.json"] for i in range(2)]
    else:
        lines = (tmp_path / "target/metadata.jsonl").read_bytes().split(b"\n")[:2]
    for i, line in enumerate(lines):
        row = json.loads(line, parse_constant=pytest.fail)
        assert {name: row[name] for name in values()} == {name: expected[i] for name, (_, expected) in values().items()}


def test_a_null_or_other_prompt_or_label_stays_with_the_other_columns(tmp_path):
    rows = columns(2) | {"prompt": [None, "x"], "label": ["cat", "dog"]}
    api.export(write(tmp_path / "dataset", rows), tmp_path / "target", format="webdataset")
    content = members(tmp_path / "target/00000.tar")
    assert [*content] == [f"00000000{name}" for name in ("0.json", "0.png", "1.json", "1.png", "1.txt")]
    first, second = (json.loads(content[f"00000000{i}.json"]) for i in range(2))
    assert (first["prompt"], first["label"]) == (None, "cat")
    assert second == {"sample_id": 1, "label": "dog", "seed": 8}


@pytest.mark.parametrize(
    ("form", "name", "array"),
    [
        ("webdataset", "thumb", pa.array([b"x", b"y"])),
        ("folder", "thumb", pa.array([b"x", b"y"])),
        ("webdataset", "deep", pa.array([[{"a": b"x"}], None])),
        ("webdataset", "map", pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int64()))),
        ("folder", "file_name", pa.array(["x", "y"])),
        ("folder", "source_file_name", pa.array(["x", "y"])),
        ("folder", "deep", pa.array([[{"file_names": ["x"]}], None])),
    ],
)
def test_a_column_that_a_format_cannot_have_is_named(tmp_path, form, name, array):
    dataset = write(tmp_path / "dataset", columns(2, **{name: array}))
    with pytest.raises(UsageError, match=f"cannot be exported as {form}: its column '{name}' has"):
        api.export(dataset, tmp_path / "target", format=form)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("content", [b"GIF89a", b"", None])
def test_an_image_of_another_format_is_named(tmp_path, content):
    dataset = write(tmp_path / "dataset", columns(2, [picture(0), content]))
    with pytest.raises(UsageError, match=r"the image of sample 1 begins with b'.*', expected PNG, JPEG or WebP"):
        api.export(dataset, tmp_path / "target", format="webdataset")
    assert visible(tmp_path / "target") == {}


def test_bad_input_is_refused_by_the_command(dataset, tmp_path, refuses):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("")
    (tmp_path / "link").symlink_to(dataset)
    other = write(tmp_path / "other", columns(10), config={"seed": 8})
    again = write(tmp_path / "again", columns(10, seed=[0] * 10))
    api.export(dataset, tmp_path / "tars", format="webdataset")
    for out, form, target, message in (
        ("nothing", "webdataset", "new", "nothing is not a dataset of mlem-dist"),
        ("dataset", "tar", "new", "'tar' is not one of 'webdataset', 'folder'"),
        ("dataset", "webdataset", "file", "`target` {}/file is a file, expected a folder"),
        ("dataset", "webdataset", "full", "`target` {}/full holds something else (mine.txt)"),
        ("dataset", "webdataset", "other", "`target` {}/other holds something else (data, mlem.json)"),
        ("dataset", "folder", "tars", "`target` {}/tars holds an export in the format webdataset"),
        ("other", "webdataset", "tars", "`target` {}/tars holds an export of another dataset"),
        ("again", "webdataset", "tars", "`target` {}/tars holds an export of another dataset"),
        ("dataset", "webdataset", "dataset", "is in the dataset"),
        ("dataset", "webdataset", "link/tars", "is in the dataset"),
        ("link", "folder", "dataset/data/x", "is in the dataset"),
    ):
        before = tree(tmp_path)
        arguments = [str(tmp_path / out), "--format", form, str(tmp_path / target)]
        refuses("export", *arguments, message=message.format(tmp_path))
        assert tree(tmp_path) == before
    assert other != again
    with pytest.raises(UsageError, match="`format` 'tar': expected webdataset or folder"):
        api.export(dataset, tmp_path / "new", format="tar")


def test_a_dataset_that_is_unfinished_or_damaged_is_refused(dataset, tmp_path, refuses):
    target, shard = tmp_path / "target", dataset / "data/train-00001-of-00003.parquet"
    whole = shard.read_bytes()
    arguments = [str(dataset), "--format", "webdataset", str(target)]
    shard.write_bytes(whole[:-1])
    refuses(
        "export", *arguments, message=f"is damaged (missing or of another size than was written: data/{shard.name})"
    )
    shard.unlink()
    refuses(
        "export", *arguments, message=f"is damaged (missing or of another size than was written: data/{shard.name})"
    )
    assert not target.exists()
    # A changed byte of an image.
    place = whole.index(picture(5)) + 50
    shard.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    refuses("export", *arguments, message=f"{shard} cannot be read")
    assert [*visible(target)] == ["00000.tar"]
    shard.write_bytes(whole)
    assert api.export(dataset, target, format="webdataset").made == 6
    raw = json.loads((dataset / "mlem.json").read_text())
    (dataset / "mlem.json").write_text(json.dumps(raw | {"shards": []}))
    refuses("export", *arguments, message="is not finished (0 shards are there); run its `mlem-dist generate` again")


def test_the_command_says_what_it_has_written(made, tmp_path, here):
    tars, folder = tmp_path / "tars", tmp_path / "folder"
    commands = [("webdataset", tars), ("folder", folder)]
    first, second = (here("export", str(made), str(target), "--format", form) for form, target in commands)
    hint = f"; read it by webdataset.WebDataset('{tars}/{{00000..00002}}.tar')\n"
    assert (first.returncode, first.stdout) == (0, f"Wrote 44 images to {tars} in 3 tar files{hint}")
    assert second.stdout.startswith(f"Wrote 44 images to {folder} in 3 folders; read it by datasets.load_dataset(")
    (tars / "00001.tar").unlink()
    again = [here("export", str(made), str(tars), "--format", "webdataset").stdout for _ in range(2)]
    assert again == [
        f"Wrote 16 images to {tars}, which has all 44 images in 3 tar files now{hint}",
        f"{tars} is complete already: 44 images in 3 tar files{hint}",
    ]


def test_image_folder_of_hugging_face(made, tmp_path):
    from datasets import load_dataset

    folder = tmp_path / "pictures"
    api.export(made, folder, format="folder")
    loaded = load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    rows = pq.read_table(made / "data").to_pylist()
    assert loaded.column_names == ["image", "sample_id", "label", "seed"]
    assert loaded.remove_columns("image").to_list() == [
        {name: row[name] for name in ("sample_id", "label", "seed")} for row in rows
    ]
    for row, original in zip(loaded, rows, strict=True):
        assert np.array_equal(row["image"], Image.open(io.BytesIO(original["image"]["bytes"])))


def test_image_folder_reads_columns_of_many_types(tmp_path):
    from datasets import load_dataset

    dataset = write(tmp_path / "dataset", columns(2, **{name: array for name, (array, _) in values().items()}))
    api.export(dataset, tmp_path / "pictures", format="folder")
    cache = str(tmp_path / "cache")
    loaded = load_dataset("imagefolder", data_dir=str(tmp_path / "pictures"), split="train", cache_dir=cache)
    assert [row["prompt"] for row in loaded] == PROMPTS[:2]
    expected = {name: plain for name, (_, plain) in values().items()}
    # The reader takes texts that look like dates for times.
    assert {name: [*loaded[name]] for name in expected} == expected | {"dates": [[datetime(2026, 1, 2)], None]}


def test_webdataset(made, tmp_path):
    import webdataset

    report = api.export(made, tmp_path / "tars", format="webdataset")
    samples = [*webdataset.WebDataset(report.paths, shardshuffle=False).decode("pil")]
    rows = pq.read_table(made / "data").to_pylist()
    assert [sample["__key__"] for sample in samples] == [f"{i:09d}" for i in range(44)]
    for sample, row in zip(samples, rows, strict=True):
        assert np.array_equal(sample["png"].convert("L"), Image.open(io.BytesIO(row["image"]["bytes"])))
        assert sample["cls"] == row["label"]
        assert sample["json"] == {"sample_id": row["sample_id"], "seed": row["seed"]}


def test_tar_files_by_hugging_face_datasets(dataset, tmp_path):
    from datasets import load_dataset

    api.export(dataset, tmp_path / "tars", format="webdataset")
    cache = str(tmp_path / "cache")
    loaded = load_dataset("webdataset", data_dir=str(tmp_path / "tars"), split="train", cache_dir=cache)
    assert [row["txt"] for row in loaded] == pq.read_table(dataset / "data")["prompt"].to_pylist()
    assert loaded[3]["png"].size == (6, 8)
