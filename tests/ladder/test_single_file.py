"""Checkpoints in single files: what is converted is exactly what the file holds."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hub import PROGRAM, serve
from pipelines import make_pipeline
from safetensors.torch import load_file, save_file
from single_files import single_file

import mlem_dist
from mlem_dist.errors import UsageError
from mlem_dist.ladder.ladder import Ladder

WEIGHTS = "diffusion_pytorch_model.safetensors"
PLAN = {"prompts": ["a cat", "b"], "seeds": [1, 2], "steps": 4, "nfe": 4}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pipelines")
    for name, kind, size in (("sd", "sd", 1), ("large", "sd", 2), ("sdxl", "sdxl", 1), ("pixels", "pixels", 1)):
        make_pipeline(kind, root / name, size)
    return root


@pytest.fixture
def file(pipelines, tmp_path) -> Path:
    return single_file(pipelines / "sd", tmp_path / "tuned.safetensors")


def create(out: Path, *models: Path, **options: object) -> Ladder:
    return Ladder.create(out, models, measure=False, **options)


def same_tensors(one: Path, other: Path) -> None:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name])


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_single_file_with_a_pipeline_is_the_model_of_the_folder(pipelines, tmp_path, kind):
    file, heard = single_file(pipelines / kind, tmp_path / "tuned.safetensors", "unet"), []
    ladder = create(tmp_path / "file", file, pipeline=pipelines / kind, guidance=3, notify=heard.append)
    assert heard[0] == f"Converting {file} to {tmp_path / 'file' / 'models' / 'tuned'}."
    same_tensors(tmp_path / "file" / "models" / "tuned" / "unet" / WEIGHTS, pipelines / kind / "unet" / WEIGHTS)
    reference = create(tmp_path / "folder", pipelines / kind, guidance=3)
    assert [level.name for level in ladder.levels] == ["tuned", "tuned guided"]
    np.testing.assert_array_equal(mlem_dist.sample(ladder, **PLAN), mlem_dist.sample(reference, **PLAN))
    # The file is not needed any longer, and the folder can move.
    file.unlink()
    (tmp_path / "file").rename(tmp_path / "moved")
    assert Ladder.load(tmp_path / "moved").digest == ladder.digest
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "moved"}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("sd", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0"),
    ],
)
def test_the_pipeline_of_the_file_has_the_configuration_of_the_hub(pipelines, tmp_path, kind, name):
    """All parts are exactly those of the pipeline of which the file was made, of which the hub has configurations."""
    file = single_file(pipelines / kind, tmp_path / "tuned.safetensors")
    shutil.copytree(pipelines / kind, tmp_path / "hub" / name, ignore=shutil.ignore_patterns("*.safetensors"))
    out = tmp_path / "out"
    with serve(tmp_path / "hub") as hub:
        done = command(out, file, HF_ENDPOINT=hub.address, HF_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    folder = out / "models" / "tuned"
    parts = [path.relative_to(folder) for path in folder.rglob("*.safetensors")]
    assert len(parts) == (3 if kind == "sd" else 4)
    for part in parts:
        same_tensors(folder / part, pipelines / kind / part)
        assert (folder / part).stat().st_mode == (folder / "unet" / "config.json").stat().st_mode
    raw = json.loads((out / "ladder.json").read_text())
    assert raw["models"][0]["path"] == "models/tuned/unet"
    assert (raw["decoder"]["path"], raw["encoder"]["path"]) == ("models/tuned/vae", "models/tuned")
    reference = create(tmp_path / "folder", pipelines / kind)
    np.testing.assert_array_equal(mlem_dist.sample(out, **PLAN), mlem_dist.sample(reference, **PLAN))


def test_a_hub_out_of_reach_is_one_sentence(file, tmp_path):
    before = {*tmp_path.iterdir()}
    done = command(tmp_path / "out", file, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "empty"))
    assert done.returncode == 2
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith(f"Error: model '{file}': its configuration is that of stable-diffusion-v1-5/")
    assert "cannot be reached" in error
    assert "give as --pipeline a folder" in error
    assert {*tmp_path.iterdir()} - {tmp_path / "empty"} == before


def command(out: Path, file: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    line = [*PROGRAM, "ladder", "create", str(out), "--model", str(file), "--no-measure"]
    return subprocess.run(line, env=os.environ | variables, capture_output=True, text=True)


def test_files_and_folders_are_mixed(pipelines, file, tmp_path):
    """Of a file that is not the last model, only the UNet is taken. Equal names are told apart."""
    (tmp_path / "more").mkdir()
    shutil.copy(file, tmp_path / "more" / file.name)
    models, around = [file, tmp_path / "more" / file.name, pipelines / "large"], pipelines / "sd"
    # The UNets of the files are not of the size of the last one.
    with pytest.raises(UsageError, match=r"tuned.safetensors' cannot be converted: .*give the pipeline"):
        create(tmp_path / "no", *models)
    ladder = create(
        tmp_path / "ladder", *models, pipeline=pipelines / "sd", precision=["float32", "bfloat16", "float32"]
    )
    raw = json.loads((tmp_path / "ladder" / "ladder.json").read_text())
    paths = {model["name"]: model["path"] for model in raw["models"]}
    assert {paths["tuned"], paths["tuned-2"]} == {"models/tuned/unet", "models/tuned-2/unet"}
    assert paths["large"] == str(pipelines / "large" / "unet")
    assert raw["decoder"]["path"] == str(pipelines / "sd" / "vae")
    copied = create(tmp_path / "copied", *models, pipeline=around, copy=True, precision="bfloat16")
    assert all((tmp_path / "copied" / "models" / name / WEIGHTS).is_file() for name in ("tuned", "tuned-2", "large"))
    assert len(ladder.levels) == len(copied.levels) == 3


def test_a_gaussian_is_fitted_to_samples_of_a_converted_model(pipelines, file, tmp_path):
    options = {"pipeline": pipelines / "sd", "gaussian": 20, "prompts": [f"a {number}" for number in range(20)]}
    ladder = create(tmp_path / "ladder", file, **options)
    assert [level.path for level in ladder.levels][1:] == ["models/tuned/unet"]
    assert ladder.levels[0].kind == "gaussian"


def test_a_file_in_half_precision_stays_so(pipelines, file, tmp_path):
    half = {name: tensor.half() for name, tensor in load_file(file).items()}
    save_file(half | {"position_ids": torch.arange(77)}, file)
    create(tmp_path / "ladder", file, pipeline=pipelines / "sd", precision="float16")
    whole = load_file(pipelines / "sd" / "unet" / WEIGHTS)
    stored = load_file(tmp_path / "ladder" / "models" / "tuned" / "unet" / WEIGHTS)
    assert all(torch.equal(tensor, whole[name].half()) for name, tensor in stored.items())


def test_what_a_file_lacks_is_not_left_at_random(pipelines, file, tmp_path):
    whole = load_file(file)
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    changed = [
        (
            {key: tensor for key, tensor in whole.items() if key != name},
            "it lacks .*attn2.to_k.weight of the unet",
        ),
        (whole | {"model.diffusion_model.more": torch.ones(3)}, "its UNet has 209 tensors, expected 208"),
        (whole | {name: torch.ones(3, 3)}, "cannot be converted: .*size mismatch"),
    ]
    for number, (tensors, message) in enumerate(changed):
        save_file(tensors, tmp_path / f"{number}.safetensors")
        refuse(message, tmp_path, tmp_path / f"{number}.safetensors", pipeline=pipelines / "sd")


def refuse(message: str, folder: Path, *models: Path, **options: object) -> None:
    """Expect one sentence, and nothing left behind."""
    before = {*folder.iterdir()}
    with pytest.raises(UsageError, match=message) as refused:
        create(folder / "out", *models, **options)
    assert "\n" not in str(refused.value)
    assert {*folder.iterdir()} == before


def test_what_is_no_checkpoint_is_refused_before_a_conversion(pipelines, file, tmp_path):
    for name, tensors in (("vae", ("vae",)), ("text", ("text_encoder",))):
        single_file(pipelines / "sd", tmp_path / f"{name}.safetensors", *tensors)
        refuse("is a file without a UNet of Stable Diffusion", tmp_path, tmp_path / f"{name}.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(file.read_bytes()[:1000])
    refuse("is a file without a UNet of Stable Diffusion", tmp_path, tmp_path / "broken.safetensors")
    for name in ("old.ckpt", "old.pt", "old.bin"):
        (tmp_path / name).write_bytes(b"pickle")
        refuse("is a pickle, which may run code when it is read; load it by", tmp_path, file, tmp_path / name)
    save_file({"lora_unet_down.weight": torch.zeros(1)}, tmp_path / "style.safetensors")
    refuse("is a LoRA, expected a model; .*fuse_lora", tmp_path, file, tmp_path / "style.safetensors")
    refuse("`pipeline` .* is a file, expected a folder", tmp_path, file, pipeline=file)
    refuse("is a UNet2DModel, expected that of a pipeline", tmp_path, file, pipeline=pipelines / "pixels")
    refuse("cannot be converted: it lacks 'label_emb", tmp_path, file, pipeline=pipelines / "sdxl")
    refuse("`precision`: 2 for 1 models", tmp_path, file, precision=["float16", "float32"])
    refuse("`size` 15x16: expected multiples of 2", tmp_path, file, pipeline=pipelines / "sd", size=(16, 15))
