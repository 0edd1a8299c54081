"""Models of the hub, by its own client, from a small server on loopback."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from hub import COMMIT, PROGRAM, Hub, serve
from pipelines import make_pipeline

from mlem_dist.ladder.hub import weights_of
from mlem_dist.ladder.ladder import Ladder

CHUNK = 10 * 2**20
"""Bytes that the client writes at a time."""
WEIGHTS = "org/tiny.sd/unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    make_pipeline("sd", root / "org" / "tiny.sd", size=8)
    (root / "org" / "pickles").mkdir()
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    (root / "org" / "pickles" / "model_index.json").write_text(json.dumps(index))
    (root / "org" / "pickles" / "unet").mkdir()
    config = {"_class_name": "UNet2DModel", "in_channels": 3, "sample_size": 8}
    (root / "org" / "pickles" / "unet" / "config.json").write_text(json.dumps(config))
    (root / "org" / "pickles" / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    return root


@pytest.fixture
def hub(repositories):
    with serve(repositories) as server:
        yield server


@pytest.fixture
def command(hub: Hub, tmp_path):
    """A function that starts a command with the hub's address and a cache of its own."""

    def start(*arguments: str, **variables: str) -> subprocess.Popen[str]:
        environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "cache")} | variables
        line = [*PROGRAM, *arguments]
        return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    return start


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate()
    assert process.returncode == code, err
    return err if code else out


def create(out: Path, model: str) -> tuple[str, ...]:
    return "ladder", "create", str(out), "--model", model, "--no-measure"


def test_a_ladder_of_the_hub_is_pinned_and_downloads_once(hub, command, repositories, tmp_path):
    """By two processes at once, with a connection that breaks off and goes on from the last part."""
    size = (repositories / WEIGHTS).stat().st_size
    assert size > 1.2 * CHUNK
    hub.break_after = CHUNK + 1000
    both = [command(*create(tmp_path / name, "org/tiny.sd")) for name in ("one", "other")]
    for process in both:
        finish(process)
    assert hub.break_after is None
    assert size <= hub.served[WEIGHTS] <= size + 1000
    raw = json.loads((tmp_path / "one" / "ladder.json").read_text())
    assert raw["models"][0]["path"] == f"hub:org/tiny.sd@{COMMIT}/unet"
    # The same models are the same ladder wherever they are.
    Ladder.create(tmp_path / "here", [repositories / "org" / "tiny.sd"], measure=False)
    digest = Ladder.load(tmp_path / "here").digest[:12]
    assert digest in finish(command("ladder", "show", str(tmp_path / "one"), HF_HUB_OFFLINE="1"))
    # A node with an empty cache downloads the files of the commit.
    assert digest in finish(command("ladder", "show", str(tmp_path / "one"), HF_HOME=str(tmp_path / "node")))
    assert hub.served[WEIGHTS] >= 2 * size


@pytest.mark.parametrize(
    ("model", "variables", "message"),
    [
        ("org/nothing", {}, "org/nothing: the hub has no such repository, or it is private"),
        ("org/tiny.sd@other", {}, "org/tiny.sd@other: the repository has no such branch, tag or commit"),
        ("org/secret", {}, "org/secret: its authors give access on request"),
        ("org/tiny.sd", {"HF_HUB_OFFLINE": "1"}, "org/tiny.sd: it is not in this machine's cache, and HF_HUB_OFFLINE"),
        ("org/tiny.sd", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "org/tiny.sd: the hub cannot be reached"),
        ("org/pickles", {}, "unet/diffusion_pytorch_model.bin may run code when it is read"),
    ],
)
def test_what_the_hub_does_not_give_is_one_sentence(hub, command, tmp_path, repositories, model, variables, message):
    hub.gated = {"org/secret"}
    (repositories / "org" / "secret").mkdir(exist_ok=True)
    error = finish(command(*create(tmp_path / "out", model), **variables), 2)
    line = error.strip().splitlines()[-1]
    assert line.startswith("Error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_variants_are_downloaded_only_where_there_is_nothing_else():
    files = ["model_index.json", "all-in-one.safetensors", "unet/config.json", "text_encoder/model.fp16.safetensors"]
    files += ["unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.safetensors"]
    files += ["unet/diffusion_pytorch_model.non_ema.safetensors", "unet/diffusion_pytorch_model.bin"]
    files += ["safety_checker/model.safetensors", "safety_checker/pytorch_model.bin"]
    assert weights_of("some", files) == [
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "safety_checker/model.safetensors",
    ]
    assert weights_of("some", ["config.json", "diffusion_pytorch_model.safetensors"]) == [
        "diffusion_pytorch_model.safetensors"
    ]
