"""Datasets in an object store: S3's protocol, by a server in this process."""

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import boto3
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import EndpointConnectionError
from s3fs import S3FileSystem
from stores import serve

from mlem_dist import api
from mlem_dist.dataset.keep import Condition
from mlem_dist.dataset.manifest import Manifest, check_out, read_manifest
from mlem_dist.dataset.shards import damage, foreign, marked_shards
from mlem_dist.engine.completion import complete, open_dataset
from mlem_dist.engine.inline import run_inline
from mlem_dist.errors import UsageError
from mlem_dist.report.sheet import save_contact_sheet
from mlem_dist.solver.plan import single_level
from mlem_dist.store import Location, StoreError, check_location, parse_location

LOST = EndpointConnectionError(endpoint_url="http://nowhere")
SCRIPT = str(Path(sys.executable).with_name("mlem-dist"))
BUCKET = "images"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serve(BUCKET) as address:
        yield address


@pytest.fixture
def cheap(make_job, fashion):
    """A job that calls the Gaussian level only, but for its seed."""
    return partial(make_job, single_level(1, len(fashion.levels), 12))


def objects(folder: Location) -> dict[str, bytes]:
    """What is in a folder of the bucket, by a client of the store's own."""
    client, prefix = boto3.client("s3"), f"{str(folder).removeprefix(f's3://{BUCKET}/')}/"
    found = client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    return {
        one["Key"].removeprefix(prefix): client.get_object(Bucket=BUCKET, Key=one["Key"])["Body"].read()
        for one in found
    }


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make(job, fashion, out: Location) -> None:
    list(complete(open_dataset(job, fashion, out), fashion, lambda shards: run_inline(job, fashion, out, shards, 1)))


def test_a_dataset_in_a_store_is_that_in_a_folder_also_after_a_stop(server, fashion, make_job, tmp_path):
    job = make_job()
    local, out = tmp_path / "local", parse_location(f"s3://{BUCKET}/a/whole")
    make(job, fashion, local)
    dataset = open_dataset(job, fashion, out)
    dataset.manifest.write(out)
    list(run_inline(job, fashion, out, [1], 1))
    assert set(objects(out)) == {"mlem.json", "data/train-00001-of-00003.parquet", ".mlem/train-00001-of-00003.json"}
    # Another process would not see what this one has listed before.
    boto3.client("s3").put_object(Bucket=BUCKET, Key="a/whole/data/train-00002-of-00003.parquet", Body=b"cut short")
    assert open_dataset(job, fashion, out).missing == (0, 2)
    marked = marked_shards(out, dataset.manifest.fingerprint)
    assert [shard.path for shard in marked] == ["data/train-00001-of-00003.parquet"]
    make(job, fashion, out)
    assert objects(out) == files(local)
    assert open_dataset(job, fashion, out).missing == ()
    read = pq.read_table(
        f"{BUCKET}/a/whole/data", filesystem=pyarrow.fs.S3FileSystem(endpoint_override=f"http://{server}")
    )
    assert read["sample_id"].to_pylist() == list(range(44))


def test_shards_that_wait_in_a_store_get_their_places(server, fashion, make_job, tmp_path):
    job = replace(make_job(), keep=Condition("sample_id >= 3"), until=20)
    local, out = tmp_path / "local", parse_location(f"s3://{BUCKET}/until")
    make(job, fashion, local)
    dataset = open_dataset(job, fashion, out)
    dataset.manifest.write(out)
    list(run_inline(job, fashion, out, [1], 1))
    assert set(objects(out)) == {"mlem.json", ".mlem/train-00001.parquet", ".mlem/train-00001.json"}
    make(job, fashion, out)
    assert objects(out) == files(local)
    assert sum(pq.read_metadata(file).num_rows for file in (local / "data").iterdir()) == 20


def test_damage_and_foreign_files_in_a_store_are_found(server, fashion, cheap):
    job, out = cheap(), parse_location(f"s3://{BUCKET}/damaged")
    make(job, fashion, out)
    shards = read_manifest(out).shards
    assert damage(out, shards) == []
    assert foreign(out, shards) == []
    client = boto3.client("s3")
    client.put_object(Bucket=BUCKET, Key=f"damaged/{shards[0].path}", Body=b"x" * shards[0].bytes)
    client.put_object(Bucket=BUCKET, Key="damaged/data/more.parquet", Body=b"x")
    client.delete_object(Bucket=BUCKET, Key=f"damaged/{shards[1].path}")
    assert damage(out, shards) == [
        f"{shards[0].path} is not what was written: its SHA-256 differs",
        f"{shards[1].path} is missing",
    ]
    assert foreign(out, shards) == ["data/more.parquet"]
    assert open_dataset(job, fashion, out).missing == (1,)


def test_the_contact_sheet_lies_with_the_dataset(server, fashion, cheap):
    job, out = cheap(), parse_location(f"s3://{BUCKET}/sheet")
    make(job, fashion, out)
    assert str(save_contact_sheet(out)) == f"s3://{BUCKET}/sheet/preview.png"
    assert objects(out)["preview.png"].startswith(b"\x89PNG")


def test_another_configuration_and_something_else_are_refused(server, fashion, cheap):
    job, out = cheap(), parse_location(f"s3://{BUCKET}/begun")
    open_dataset(job, fashion, out).manifest.write(out)
    with pytest.raises(UsageError, match="seed was 3, now 4"):
        open_dataset(cheap(seed=4), fashion, out)
    boto3.client("s3").put_object(Bucket=BUCKET, Key="else/file", Body=b"x")
    with pytest.raises(UsageError, match="holds something else"):
        open_dataset(job, fashion, parse_location(f"s3://{BUCKET}/else"))


def test_any_name_will_do(server, fashion, cheap):
    """Some mean something in patterns, and some tools mark a folder by an empty object."""
    job = cheap()
    client = boto3.client("s3")
    client.put_object(Bucket=BUCKET, Key="run[1]/a b*/", Body=b"")
    neighbours = {f"{name}/.mlem/train-0.json" for name in ("run[1]/a bc", "run1/a b*", "run1/a b")}
    for key in neighbours:
        client.put_object(Bucket=BUCKET, Key=key, Body=b"")
    out = parse_location(f"S3://{BUCKET}/run[1]/a b*/")
    make(job, fashion, out)
    shards = read_manifest(out).shards
    assert len(shards) == 3
    assert foreign(out, shards) == []
    assert open_dataset(job, fashion, out).missing == ()
    left = {one["Key"] for one in client.list_objects_v2(Bucket=BUCKET, Prefix="run")["Contents"]}
    assert {key for key in left if "/.mlem/" in key} == neighbours


@pytest.fixture
def failing(monkeypatch):
    """A function by which requests of a kind, for keys that hold a text, fail with an error."""

    def fail(operation: str, part: str, error: Exception) -> None:
        whole = S3FileSystem._call_s3

        async def call(self, method, *arguments, **options):
            if method == operation and part in options.get("Key", options.get("Prefix", "")):
                raise error
            return await whole(self, method, *arguments, **options)

        monkeypatch.setattr(S3FileSystem, "_call_s3", call)

    return fail


@pytest.mark.parametrize(("part", "marked"), [("data/", 0), (".mlem/", 0), ("nothing", 3)])
def test_a_marker_follows_its_shard(server, fashion, cheap, failing, part, marked):
    job, out = cheap(), parse_location(f"s3://{BUCKET}/cut/{part}{marked}")
    open_dataset(job, fashion, out).manifest.write(out)
    failing("put_object", f"{part}train-", LOST)
    if not marked:
        with pytest.raises(OSError, match=r"train-00000-of-00003.* cannot be written: Could not connect"):
            list(run_inline(job, fashion, out, range(3), 1))
    else:
        list(run_inline(job, fashion, out, range(3), 1))
    assert len(marked_shards(out, read_manifest(out).fingerprint)) == marked
    assert len(open_dataset(job, fashion, out).missing) == 3 - marked


@pytest.mark.parametrize("error", [LOST, PermissionError("Forbidden"), OSError(121, "InternalError")])
@pytest.mark.parametrize(("operation", "part"), [("list_objects_v2", "told"), ("get_object", ".mlem/")])
def test_what_is_out_of_reach_is_not_missing(server, fashion, cheap, failing, operation, part, error):
    job, out = cheap(), parse_location(f"s3://{BUCKET}/told")
    open_dataset(job, fashion, out).manifest.write(out)
    list(run_inline(job, fashion, out, range(3), 1))
    failing(operation, part, error)
    with pytest.raises((StoreError, UsageError), match=f"s3://{BUCKET}/told.* cannot be reached: ") as raised:
        open_dataset(job, fashion, out)
    assert str(error).split("] ")[-1].partition(":")[0] in str(raised.value)


def test_a_shard_out_of_reach_is_not_damaged(server, fashion, cheap, failing):
    job, out = cheap(), parse_location(f"s3://{BUCKET}/far")
    make(job, fashion, out)
    shards = read_manifest(out).shards
    failing("get_object", "data/train-00001", LOST)
    assert damage(out, shards[:1]) == []
    with pytest.raises(StoreError, match="cannot be reached: Could not connect"):
        damage(out, shards)


def test_a_marked_shard_of_another_size_is_made_again(server, fashion, cheap):
    job, out = cheap(), parse_location(f"s3://{BUCKET}/size")
    open_dataset(job, fashion, out).manifest.write(out)
    list(run_inline(job, fashion, out, range(3), 1))
    boto3.client("s3").put_object(Bucket=BUCKET, Key="size/data/train-00002-of-00003.parquet", Body=b"cut short")
    boto3.client("s3").put_object(Bucket=BUCKET, Key="size/.mlem/train-00000-of-00003.json", Body=b"{")
    assert open_dataset(job, fashion, out).missing == (0, 2)


def test_who_may_see_no_more_of_a_bucket_than_the_folder_may_write_there(server, failing):
    out = parse_location(f"s3://{BUCKET}/mine")
    failing("head_bucket", "", PermissionError("Forbidden"))
    check_location(out)
    failing("list_objects_v2", "mine", PermissionError("Forbidden"))
    with pytest.raises(UsageError, match=f"`out` {out} cannot be reached: Forbidden"):
        check_location(out)


def test_two_configurations_begun_at_once_do_not_both_end_well(server, fashion, cheap):
    job, out = cheap(), parse_location(f"s3://{BUCKET}/both")

    other = cheap(seed=4)

    def before(shards):
        Manifest(other.config, fashion.labels, other.versions, {}, ()).write(out)
        yield from run_inline(job, fashion, out, shards, 1)

    def meanwhile(shards):
        for progress in run_inline(job, fashion, out, shards, 1):
            Manifest(other.config, fashion.labels, other.versions, {}, ()).write(out)
            yield progress

    with pytest.raises(UsageError, match="holds another dataset on node"):
        list(complete(open_dataset(job, fashion, out), fashion, before))
    (out / "mlem.json").unlink()
    with pytest.raises(RuntimeError, match="another configuration has begun"):
        list(complete(open_dataset(job, fashion, out), fashion, meanwhile))
    # All shards are there, and none of them is the other's.
    assert set(objects(out)) > {f"data/train-{i:05d}-of-00003.parquet" for i in range(3)}
    assert open_dataset(other, fashion, out).missing == (0, 1, 2)
    make(other, fashion, out)
    assert damage(out, read_manifest(out).shards) == []


def test_stores_that_cannot_be_used_are_refused(server, monkeypatch):
    for text, message in (
        ("s3://no-such-bucket/x", "there is no bucket no-such-bucket"),
        ("s3:///x", "expected a bucket"),
        ("s3://", "expected a bucket"),
        ("s3://a//b", "expected a bucket"),
        ("s3://a/../b", "expected a bucket"),
        ("s3://a/b::c", "expected a name without ::"),
        ("file://host/x", "file://host/x: expected file:///PATH"),
        ("a\udcff", r"`out`: the name 'a\\udcff' is not text in UTF-8"),
        ("s3://key:secret@a/b", "s3://...@...: .*credentials belong in the environment"),
        ("gs://a/b", "needs the package gcsfs"),
        ("memory://x", "memory://x: expected a path or a URL of the kinds s3"),
    ):
        with pytest.raises(UsageError, match=message):
            check_out(parse_location(text), {})
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    out = parse_location(f"s3://{BUCKET}/x")
    with socket.socket() as closed:
        # Nobody else can listen there.
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        out.fs.clear_instance_cache()
        for refused in (lambda out: check_out(out, {}), read_manifest):
            with pytest.raises(UsageError, match="cannot be reached: Could not connect"):
                refused(parse_location(f"s3://{BUCKET}/x"))
        out.fs.clear_instance_cache()


def test_a_file_url_is_a_path(tmp_path):
    assert parse_location(f"file://{tmp_path}/x") == tmp_path / "x"
    assert parse_location((tmp_path / "a b").as_uri()) == tmp_path / "a b"
    assert parse_location("a/b") == Path("a/b")
    assert str(parse_location("s3://a/b/") / "data") == "s3://a/b/data"


@pytest.mark.parametrize("form", ["webdataset", "folder"])
def test_an_export_to_a_store_is_that_to_a_folder_also_after_a_stop(
    server, fashion, cheap, failing, monkeypatch, tmp_path, form
):
    job, out = cheap(), parse_location(f"s3://{BUCKET}/exports/{form}/dataset")
    make(job, fashion, out)
    local, target = tmp_path / "local", f"s3://{BUCKET}/exports/{form}/target"
    api.export(str(out), str(local), format=form)
    failing("put_object", f"target/0000{'1.tar' if form == 'webdataset' else '1/000000020'}", LOST)
    with pytest.raises(StoreError, match=f"{target}/00001.* cannot be written: Could not connect"):
        api.export(str(out), target, format=form)
    monkeypatch.undo()
    begun = objects(parse_location(target))
    assert 0 < len(begun) < len(files(local))
    whole = files(local)
    # The first part of the table is there.
    assert {name: whole[name] for name in begun if name != ".mlem/00000.jsonl"}.items() <= begun.items()
    failing("get_object", "dataset/data/train-00002", LOST)
    with pytest.raises(OSError, match=r"dataset/?.* cannot be reached: Could not connect"):
        api.export(str(out), target, format=form)
    monkeypatch.undo()
    assert 0 < api.export(str(out), target, format=form).made < 44
    assert objects(parse_location(target)) == whole
    assert api.export(str(out), target, format=form).made == 0
    with pytest.raises(UsageError, match="is in the dataset"):
        api.export(str(out), f"{out}/tars", format=form)
    with pytest.raises(UsageError, match="`target` s3://no-such-bucket/x: there is no bucket"):
        api.export(str(out), "s3://no-such-bucket/x", format=form)


def test_ray_writes_to_a_store(server, here, three):
    """The command whole, its actors other processes."""
    out = f"s3://{BUCKET}/by-ray"
    command = [SCRIPT, "generate", "--ladder", str(three.folder), "--num", "40", "--out", out, "--steps", "20"]
    command += ["--nfe", "4", "--block-size", "8", "--shard-size", "16", "--device", "cpu", "--devices", "1"]
    command += ["--address", "local"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.startswith(f"Wrote 40 images to {out} (40 in 3 shards)")
    look = shlex.split(done.stdout.partition("Open it:")[2].splitlines()[0])
    printed = subprocess.run([sys.executable, *look[1:]], capture_output=True, text=True, check=True)
    assert "sample_id" in printed.stdout
    assert set(objects(parse_location(out))) == {
        "README.md",
        "mlem.json",
        *(f"data/train-{i:05d}-of-00003.parquet" for i in range(3)),
    }
    again = here("verify", out)
    assert again.stdout == f"{out}: all 3 shards are as they were written.\n"
