import json
import os
import subprocess
import sys

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file

from mlem_dist.errors import UsageError
from mlem_dist.files import file_digest
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.models.level import new_unet_level, on_meta
from mlem_dist.models.weights import INDEX, WEIGHTS

MODEL = {
    "sample_size": 8,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
}
EMA = {"decay": 0.9999, "inv_gamma": 1.0, "optimization_step": 9, "power": 0.75, "update_after_step": 0}


@pytest.fixture
def make(tmp_path):
    """A function that makes a ladder of one untrained UNet, with what its folder then holds."""

    def make(labels=(), shards=False, **arguments):
        model = UNet2DModel(**(MODEL | arguments))
        model.save_pretrained(tmp_path / "unet", max_shard_size="20KB" if shards else "10GB")
        scheduler = tmp_path / "scheduler" / "scheduler_config.json"
        scheduler.parent.mkdir()
        scheduler.write_text("{}")
        size = arguments.get("sample_size", 8)
        entries = {"name": "one", "sample_shape": [3, size, size], "value_range": [-1, 1], "labels": labels}
        entries |= {"schema_version": 1, "parametrisation": "epsilon", "scheduler_sha256": file_digest(scheduler)}
        level = {"name": "some", "kind": "unet", "path": "unet", "parameters": 1, "sha256": {}}
        text = json.dumps(entries | {"levels": [level]}, ensure_ascii=False)
        (tmp_path / "ladder.json").write_bytes(text.encode())
        return enter(tmp_path)

    return make


def enter(folder, path="unet"):
    """List in the ladder what its level's folder holds."""
    raw = json.loads((folder / "ladder.json").read_bytes())
    listed = [file for file in (folder / path).iterdir() if file.suffix in (".json", ".safetensors")]
    raw["levels"][0] |= {"path": path, "sha256": {f"{path}/{file.name}": file_digest(file) for file in listed}}
    (folder / "ladder.json").write_bytes(json.dumps(raw, ensure_ascii=False).encode())
    return folder


def run(folder):
    """What the ladder's level predicts for two samples."""
    ladder = Ladder.load(folder)
    ladder.check_models()
    x, t = torch.randn(2, *ladder.sample_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 999])
    with torch.inference_mode():
        return ladder.load_level(1, "cpu")(x, t, ladder.condition(torch.arange(2)))


@pytest.mark.parametrize(
    ("labels", "arguments", "message"),
    [
        ([], {"class_embed_type": "timestep"}, "class_embed_type of its model is 'timestep', expected null"),
        ([], {"class_embed_type": "identity"}, "class_embed_type of its model is 'identity', expected null"),
        (["a", "b"], {"class_embed_type": "identity", "num_class_embeds": 2}, "class_embed_type of its model"),
        (["a", "b"], {"class_embed_type": "timestep"}, "its model has no classes, expected 2"),
        (["a", "b"], {}, "its model has no classes, expected 2"),
        ([], {"num_class_embeds": 2}, "its model has 2 classes, expected none"),
        ([], {"time_embedding_type": "fourier"}, "time_embedding_type of its model is 'fourier'"),
        ([], {"time_embedding_type": "learned", "num_train_timesteps": 999}, "num_train_timesteps of its model is 999"),
    ],
)
def test_a_model_that_wants_another_condition_than_a_ladders_is_refused(make, labels, arguments, message):
    folder = make(labels, **arguments)
    with pytest.raises(UsageError, match=f"level 'some'.*{message}"):
        Ladder.read(folder)


@pytest.mark.parametrize(
    ("labels", "arguments"),
    [
        (["a", "b"], {"class_embed_type": "timestep", "num_class_embeds": 2}),
        ([], {"time_embedding_type": "learned", "num_train_timesteps": 1000}),
    ],
)
def test_models_that_are_told_a_ladders_condition_otherwise_are_run(make, labels, arguments):
    assert run(make(labels, **arguments)).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sample_size": 7}, "samples of 3x7x7 with patch 1: Sizes of tensors must match"),
        ({"sample_size": 10, "block_out_channels": [8, 8, 8]}, "samples of 3x10x10 with patch 1: .*same number of"),
        ({"norm_num_groups": 3}, "samples of 3x8x8 with patch 1: num_channels .* must be divisible by num_groups"),
        ({"down_block_types": ["DownBlock2D", "Other"]}, "samples of 3x8x8 with patch 1: Other does not exist"),
    ],
)
def test_a_model_that_cannot_run_is_refused_before_it_is_loaded(make, arguments, message):
    folder = make(**{key: value for key, value in arguments.items() if key == "sample_size"})
    config = json.loads((folder / "unet/config.json").read_text()) | arguments
    (folder / "unet/config.json").write_text(json.dumps(config))
    ladder = Ladder.load(enter(folder))
    with pytest.raises(UsageError, match=f"level 'some': its model cannot be used for {message}"):
        ladder.check_models()


def test_a_condition_of_the_wrong_shape_is_not_taken_for_that_of_all_samples():
    def build():
        model = {key: value for key, value in MODEL.items() if key != "sample_size"}
        return new_unet_level((3, 8, 8), 2, 1, "epsilon", [0.5] * 20, model | {"class_embed_type": "identity"}, None)

    with pytest.raises(UsageError, match="level 'some': class_embed_type of its model is 'identity'"):
        on_meta("some", (3, 8, 8), 1, build)


def test_the_models_of_the_bundled_ladder_are_well(fashion, monkeypatch, tmp_path):
    """As is taken for granted where it is run."""
    monkeypatch.setattr("mlem_dist.ladder.ladder.PACKAGE", tmp_path)
    fashion.check_models()


@pytest.mark.parametrize("shards", [False, True])
def test_weights_of_a_variant_are_read_where_there_are_no_others(make, shards):
    folder = make(shards=shards)
    before = run(folder)
    model = UNet2DModel.from_pretrained(folder / "unet")
    for file in (folder / "unet").iterdir():
        if file.name != "config.json":
            file.unlink()
    model.half().save_pretrained(folder / "unet", variant="fp16", max_shard_size="10KB" if shards else "10GB")
    torch.testing.assert_close(run(enter(folder)), before, atol=1e-2, rtol=1e-2)
    names = (INDEX, f"{WEIGHTS}.index.fp16.json") if shards else (WEIGHTS, f"{WEIGHTS[:-12]}.fp16.safetensors")
    for variant in ("bf16", "other"):
        path = folder / "unet" / names[1].replace("fp16", variant)
        path.write_bytes((folder / "unet" / names[1]).read_bytes())
    with pytest.raises(UsageError, match=f"level 'some': .*unet lacks {WEIGHTS}; .*rename"):
        Ladder.read(enter(folder))
    (folder / "unet" / names[1]).rename(folder / "unet" / names[0])
    torch.testing.assert_close(run(enter(folder)), before, atol=1e-2, rtol=1e-2)


def test_weights_in_a_pickle_are_to_be_converted(make):
    folder = make()
    before, path = run(folder), folder / "unet"
    torch.save(load_file(path / WEIGHTS), path / "diffusion_pytorch_model.bin")
    (path / WEIGHTS).unlink()
    with pytest.raises(UsageError, match=r"diffusion_pytorch_model\.bin is not read; convert it by `(.*)` and `(.*)`"):
        Ladder.read(enter(folder))
    model = UNet2DModel.from_pretrained(path, use_safetensors=False)
    model.save_pretrained(path)
    assert torch.equal(run(enter(folder)), before)


def test_the_folder_of_a_pipeline_is_not_that_of_its_model(make):
    folder = make()
    DDPMPipeline(UNet2DModel.from_pretrained(folder / "unet"), DDPMScheduler()).save_pretrained(folder / "whole")
    with pytest.raises(UsageError, match=r"level 'some': .*whole pipeline, .* set its path to whole/unet$"):
        Ladder.read(enter(folder, "whole"))
    assert torch.equal(run(enter(folder, "whole/unet")), run(enter(folder)))


def test_a_model_without_weights_or_without_a_folder_is_refused(make):
    folder = make()
    (folder / "unet" / WEIGHTS).rename(folder / "weights.safetensors")
    with pytest.raises(UsageError, match=f"level 'some': .*unet lacks {WEIGHTS}; restore it"):
        Ladder.read(enter(folder))
    raw = json.loads((folder / "ladder.json").read_text())
    raw["levels"][0]["path"] = "weights.safetensors"
    (folder / "ladder.json").write_text(json.dumps(raw))
    with pytest.raises(
        UsageError, match=r"level 'some': its path .*weights\.safetensors is a file, expected the folder"
    ):
        Ladder.read(folder)


def test_shards_that_the_index_names_are_there(make):
    folder = make(shards=True)
    shards = sorted((folder / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    run(folder)
    shards[1].unlink()
    with pytest.raises(UsageError, match=f"level 'some': .*{INDEX} names {shards[1].name}, which is not there"):
        Ladder.read(enter(folder))
    (folder / "unet" / INDEX).write_text('{"weight_map": []}')
    with pytest.raises(UsageError, match=f"level 'some': .*{INDEX} has no weight_map"):
        Ladder.read(enter(folder))


def test_diffusers_says_nothing_where_a_level_is_loaded(make):
    """No bars, and no warning of what an average of weights keeps in its configuration; after that it may again."""
    folder = make(shards=True)
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | EMA))
    work = """
import sys
from diffusers.utils import logging
from mlem_dist.ladder.ladder import Ladder
states = []
for _ in range(2):
    states.append((logging.get_verbosity(), logging.is_progress_bar_enabled()))
    ladder = Ladder.load(sys.argv[1])
    ladder.check_models()
    ladder.load_level(1, "cpu")
print(states[0] == states[1] == (logging.WARNING, True))
"""
    done = subprocess.run([sys.executable, "-c", work, str(enter(folder))], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_a_ladder_is_the_same_in_every_locale(make):
    folder = make(["Käse", "猫"], num_class_embeds=2)
    ladder = Ladder.load(folder)
    assert ladder.labels == ("Käse", "猫")
    work = "import sys; from mlem_dist.ladder.ladder import Ladder; ladder = Ladder.load(sys.argv[1]); "
    work += "print(ascii(ladder.labels), ladder.digest)"
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", work, str(folder)], env=ascii_only, capture_output=True, text=True)
    assert done.stdout == f"{ladder.labels!a} {ladder.digest}\n", done.stderr
