"""Models in object stores, of which each machine keeps copies: S3's protocol, by a server in this process."""

import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest
import torch
from botocore.exceptions import EndpointConnectionError
from diffusers import UNet2DConditionModel
from pipelines import make_pipeline
from s3fs import S3FileSystem
from stores import serve

import mlem_dist
from mlem_dist.errors import UsageError
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.remote import local_path

BUCKET = "models"
URL = f"s3://{BUCKET}/tiny-1.5"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PLAN = {"prompts": ["a cat", "b"], "seeds": [1, 2], "steps": 4, "nfe": 4}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serve(BUCKET) as address:
        yield address


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return make_pipeline("sd", tmp_path_factory.mktemp("pipelines") / "tiny-1.5")


def upload(folder: Path, name: str) -> None:
    for file in filter(Path.is_file, folder.rglob("*")):
        put(f"{name}/{file.relative_to(folder).as_posix()}", file.read_bytes())


def put(key: str, body: bytes) -> None:
    boto3.client("s3").put_object(Bucket=BUCKET, Key=key, Body=body)


@pytest.fixture
def store(server, pipeline) -> None:
    """The pipeline in the store, with what is not used: another variant, a pickle of another part, folders' marks."""
    upload(pipeline, "tiny-1.5")
    put("tiny-1.5/", b"")
    put("tiny-1.5/unet/", b"")
    put("tiny-1.5/all-in-one.safetensors", b"large")
    put("tiny-1.5/unet/diffusion_pytorch_model.fp16.safetensors", b"large")
    put("tiny-1.5/safety_checker/pytorch_model.bin", b"large")


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Callable[[str], Path]:
    """A function that gives this process the cache of another machine."""

    def use(name: str) -> Path:
        monkeypatch.setenv("MLEM_DIST_CACHE", str(tmp_path / name))
        return tmp_path / name / "models" / "s3" / BUCKET

    use("cache")
    return use


@pytest.fixture
def served(caplog) -> Callable[[], Counter[str]]:
    """A function that tells how often the store has sent each object since its last call."""
    caplog.set_level(logging.INFO, "werkzeug")

    def count() -> Counter[str]:
        lines = [record.getMessage() for record in caplog.records if record.name == "werkzeug"]
        caplog.clear()
        requests = (re.search(rf'"GET /{BUCKET}/([^? ]+) HTTP', line) for line in lines)
        return Counter(match[1].removeprefix("tiny-1.5/") for match in requests if match)

    return count


def create(out: Path, *models: str | Path, **options: object) -> Ladder:
    return Ladder.create(out, models, measure=False, **options)


def test_a_ladder_refers_to_a_url_and_each_machine_downloads_once(store, pipeline, cache, served, tmp_path):
    ladder = create(tmp_path / "ladder", f"{URL}/", guidance=3)
    sent = served()
    assert set(sent.values()) == {1}
    assert WEIGHTS in sent
    assert not {"all-in-one.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"} & {*sent}
    assert not [name for name in sent if name.endswith(".bin")]
    raw = json.loads((tmp_path / "ladder" / "ladder.json").read_text())
    assert raw["models"][0]["path"] == f"{URL}/unet"
    assert (raw["decoder"]["path"], raw["encoder"]["path"]) == (f"{URL}/vae", URL)
    # The same models are the same ladder wherever they are.
    here = create(tmp_path / "here", pipeline, guidance=3)
    assert ladder.digest == here.digest
    np.testing.assert_array_equal(mlem_dist.sample(ladder, **PLAN), mlem_dist.sample(here, **PLAN))
    create(tmp_path / "again", URL, guidance=3)
    assert not served()
    # Another machine downloads what the ladder needs.
    cache("node")
    images = mlem_dist.sample(tmp_path / "ladder", **PLAN)
    np.testing.assert_array_equal(images, mlem_dist.sample(here, **PLAN))
    assert set(served().values()) == {1}
    copied = create(tmp_path / "copied", URL, guidance=3, copy=True)
    assert copied.digest == ladder.digest


def test_two_processes_at_once_download_once(store, cache, served, slow, tmp_path):
    line = [sys.executable, "-m", "mlem_dist", "ladder", "create", "--model", URL, "--no-measure"]
    both = [
        subprocess.Popen([*line, str(tmp_path / name)], stdout=subprocess.DEVNULL, env=os.environ)
        for name in ("one", "other")
    ]
    assert [process.wait() for process in both] == [0, 0]
    assert set(served().values()) == {1}


@pytest.fixture
def slow() -> Iterator[None]:
    """The store takes its time for weights: it logs a request before it sends what is asked for."""

    def wait(record: logging.LogRecord) -> bool:
        if f"GET /{BUCKET}/tiny-1.5/{WEIGHTS}" in record.getMessage():
            time.sleep(3)
        return True

    logging.getLogger("werkzeug").addFilter(wait)
    yield
    logging.getLogger("werkzeug").removeFilter(wait)


def test_a_pipeline_by_its_url_is_around_a_model(store, pipeline, cache, tmp_path):
    ladder = create(tmp_path / "ladder", pipeline / "unet", f"{URL}/unet", pipeline=URL)
    assert {level.path for level in ladder.levels} == {str(pipeline / "unet"), f"{URL}/unet"}
    assert ladder.encoder.path == URL
    with pytest.raises(UsageError, match="unet is a model alone: give a pipeline as `pipeline`"):
        create(tmp_path / "no", f"{URL}/unet")


def test_a_file_url_is_a_path(pipeline, tmp_path):
    ladder = create(tmp_path / "ladder", pipeline.as_uri())
    assert ladder.levels[0].path == str(pipeline / "unet")


def test_an_interrupted_download_goes_on_with_the_files_that_are_there(store, cache, served, tmp_path, monkeypatch):
    whole = S3FileSystem._call_s3

    async def call(self, method, *arguments, **options):
        if method == "get_object" and options.get("Key", "").endswith(WEIGHTS):
            raise EndpointConnectionError(endpoint_url="http://nowhere")
        return await whole(self, method, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(S3FileSystem, "_call_s3", call)
        with pytest.raises(UsageError, match=f"{URL} cannot be reached: Could not connect"):
            create(tmp_path / "ladder", URL)
    assert not (tmp_path / "ladder").exists()
    first, folder = served(), cache("cache") / "tiny-1.5" / "unet"
    assert first["vae/diffusion_pytorch_model.safetensors"] == 1
    # What a killed process leaves behind goes away.
    (folder / f".{Path(WEIGHTS).name}.123.tmp").write_bytes(b"half")
    create(tmp_path / "ladder", URL)
    assert served() == {WEIGHTS: 1}
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", Path(WEIGHTS).name]


def test_digests_decide_whether_a_copy_is_the_right_one(store, pipeline, cache, served, tmp_path):
    first = create(tmp_path / "ladder", URL).digest
    copy = cache("cache") / "tiny-1.5" / WEIGHTS
    whole = copy.read_bytes()
    copy.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    served()
    Ladder.load(tmp_path / "ladder")
    assert served() == {WEIGHTS: 1}
    assert copy.read_bytes() == whole
    # Who has the right copy does not need the store's.
    config = json.loads((pipeline / "unet" / "config.json").read_text()) | {"dropout": 0.5}
    put("tiny-1.5/unet/config.json", json.dumps(config).encode())
    Ladder.load(tmp_path / "ladder")
    cache("node")
    with pytest.raises(UsageError, match=r"unet/config.json is not the file of which the ladder was made"):
        Ladder.load(tmp_path / "ladder")
    # A new ladder takes what is there now, here too, where the first one was made.
    cache("cache")
    other = create(tmp_path / "other", URL)
    assert json.loads((cache("cache") / "tiny-1.5" / "unet" / "config.json").read_text()) == config
    assert other.digest != first
    with pytest.raises(UsageError, match="is not the file of which the ladder was made"):
        Ladder.load(tmp_path / "ladder")


def test_an_earlier_model_at_the_same_url_leaves_nothing_behind(server, cache, tmp_path):
    """Its weights were in shards, whose index would be found first."""
    client, name = boto3.client("s3"), "changing"
    large = make_pipeline("sd", tmp_path / "large", 2)
    model = UNet2DConditionModel.from_pretrained(large / "unet")
    shutil.rmtree(large / "unet")
    model.save_pretrained(large / "unet", max_shard_size="100KB")
    assert len([*(large / "unet").glob("*.safetensors")]) > 1
    upload(large, name)
    create(tmp_path / "first", f"s3://{BUCKET}/{name}")
    cache("node")
    Ladder.load(tmp_path / "first").load_level(1, "cpu")
    for file in client.list_objects_v2(Bucket=BUCKET, Prefix=f"{name}/unet/")["Contents"]:
        client.delete_object(Bucket=BUCKET, Key=file["Key"])
    model.conv_out.bias.data += 1
    model.save_pretrained(tmp_path / "whole")
    upload(tmp_path / "whole", f"{name}/unet")
    cache("cache")
    create(tmp_path / "second", f"s3://{BUCKET}/{name}")
    for machine in ("cache", "node", "new"):
        cache(machine)
        ladder = Ladder.load(tmp_path / "second")
        assert [Path(file).name for file in ladder.levels[0].sha256] == ["config.json", Path(WEIGHTS).name]
        assert torch.equal(ladder.load_level(1, "cpu").level.model.conv_out.bias, model.conv_out.bias)


def test_what_a_store_does_not_give_is_one_sentence(store, cache, tmp_path, monkeypatch):
    put("empty/notes.txt", b"x")
    put("pickles/model_index.json", b'{"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}')
    put("pickles/unet/diffusion_pytorch_model.bin", b"x")
    for model, message in (
        ("s3://no-such-bucket/x", "'s3://no-such-bucket/x': the store has no such bucket, folder or file"),
        (f"s3://{BUCKET}/nothing", "the store has no such bucket, folder or file; check the name"),
        (f"s3://{BUCKET}/empty", "has neither model_index.json nor config.json"),
        (f"{URL}/{WEIGHTS}", "has neither model_index.json nor config.json"),
        (f"s3://{BUCKET}/pickles", "unet/diffusion_pytorch_model.bin may run code when it is read"),
        ("s3://a/../b", "expected a bucket"),
        ("https://host/model", "https://host/model: expected a path or a URL of the kinds s3"),
        ("gs://bucket/model", "needs the package gcsfs"),
    ):
        for given in ({"models": [model]}, {"models": [URL], "pipeline": model}):
            with pytest.raises(UsageError, match=message) as refused:
                Ladder.create(tmp_path / "out", measure=False, **given)
            assert "\n" not in str(refused.value)
            assert not (tmp_path / "out").exists()

    async def forbidden(self, method, *arguments, **options):
        raise PermissionError("Forbidden")

    monkeypatch.setattr(S3FileSystem, "_call_s3", forbidden)
    with pytest.raises(UsageError, match=f"{URL} cannot be reached: Forbidden; check the name and the credentials"):
        create(tmp_path / "out", URL)
    assert not (tmp_path / "out").exists()


def test_a_cache_that_cannot_be_written_is_named(store, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLEM_DIST_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"the cache .*file cannot be written: .*; let MLEM_DIST_CACHE name another"):
        create(tmp_path / "out", URL)
    assert not (tmp_path / "out").exists()


def test_a_store_out_of_reach_is_one_sentence(store, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with socket.socket() as closed:
        # Nobody else can listen there.
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        S3FileSystem.clear_instance_cache()
        with pytest.raises(UsageError, match=f"{URL} cannot be reached: Could not connect"):
            create(tmp_path / "out", URL)
    S3FileSystem.clear_instance_cache()
    assert not (tmp_path / "out").exists()


def test_a_path_does_not_lead_out_of_the_cache(cache):
    for path in ("s3://bucket/../../x.json", "s3:///x.json", "../x://y.json"):
        with pytest.raises(UsageError, match=r"expected a URL such as s3://BUCKET/NAME"):
            local_path(path)
