"""Training of ladders of pipelines: on latents, with captions or classes."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from pipelines import make_pipeline

from mlem_dist.errors import UsageError
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.models.devices import one_thread
from mlem_dist.training import data as training_data
from mlem_dist.training.assemble import train_ladder
from mlem_dist.training.config import read_config
from mlem_dist.training.data import conditions_of, training_images
from mlem_dist.training.resume import WORK, check_training
from mlem_dist.training.tasks import train_on_ray
from mlem_dist.training.train import denoising_error

COLOURS = {"red": (230, 20, 20), "blue": (20, 20, 230)}

PIXART = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "cross_attention_dim": 16,
    "sample_size": 8,
    "caption_channels": 16,
    "use_additional_conditions": False,
}
DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "norm_num_groups": 4,
    "num_embeds_ada_norm": 2,
}
NETWORK = {"steps": 150, "batch_size": 16, "learning_rate": 3e-3, "ema": 0.9, "condition_dropout": 0.2}
SMALL = {"name": "small", "kind": "PixArtTransformer2DModel", "model": PIXART} | NETWORK
FLOW = {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True}


class KilledError(Exception):
    pass


@pytest.fixture
def pictures(tmp_path):
    """Plain pictures of two colours, 16x16, with captions and labels, 120 to train on and 40 held out."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 120), ("test", 40)):
        rows = []
        for _ in range(n):
            label = int(rng.integers(2))
            name = [*COLOURS][label]
            pixels = np.clip(np.array(COLOURS[name]) + rng.normal(0, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
            rows.append({"image": file.getvalue(), "label": label, "prompt": f"{name} {rng.integers(9)}"})
        (tmp_path / "pictures").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pictures" / f"{part}.parquet")
    return tmp_path / "pictures"


@pytest.fixture
def prompted(tmp_path):
    """The pipeline of a flow with prompts."""
    folder = make_pipeline("pixart-sigma", tmp_path / "prompted")
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(FLOW))
    # Latents of a random autoencoder are small.
    decoder = json.loads((folder / "vae/config.json").read_text()) | {"scaling_factor": 5.0}
    (folder / "vae/config.json").write_text(json.dumps(decoder))
    return folder


def configure(folder, pipeline, *levels, **changes):
    raw = {"name": "plain", "pipeline": str(pipeline), "sample_shape": [4, 8, 8], "levels": [*levels]} | changes
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return read_config(path)


def test_a_ladder_of_captions_is_trained_and_resumed(tmp_path, pictures, prompted, monkeypatch):
    """Equal digests after a kill, latents made once, levels with guidance, and errors that captions lower."""
    config = configure(
        tmp_path,
        prompted,
        {"name": "gaussian", "kind": "gaussian", "rank": 4},
        {"name": "small", "kind": "PixArtTransformer2DModel", "model": PIXART, "noise_levels": "logit-normal"}
        | NETWORK,
        guidance=3.0,
    )
    images = training_images(config, pictures, tmp_path / "whole" / WORK)
    assert images.train.shape == (120, 4, 8, 8)
    assert len(images.captions) == 18
    whole = train_ladder(config, images, tmp_path / "whole", lambda *progress: None)
    assert [level.name for level in whole.levels] == ["gaussian", "small", "small guided"]
    assert whole.levels[2].guidance.scale == 3

    def kill(name, done, loss):
        if done == 75:
            raise KilledError

    monkeypatch.setattr("mlem_dist.training.train.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(training_data, "load_decoder", None)
    again = training_images(config, pictures, tmp_path / "whole" / WORK)
    with pytest.raises(KilledError):
        train_ladder(config, again, tmp_path / "killed", kill)
    killed = train_ladder(config, again, tmp_path / "killed", lambda *progress: None)
    assert killed.digest == whole.digest
    assert check_training(config, again, tmp_path / "killed")

    conditions = conditions_of(config, images, "cpu")
    level, process = killed.load_level(2, "cpu"), killed.process
    right = denoising_error(level, images, process, conditions)
    # The captions in order are nine of blue, then nine of red.
    wrong = denoising_error(level, images, process, lambda label: conditions((label + 9) % 18))
    assert right == pytest.approx(killed.levels[1].denoising_error)
    assert sum(right) < 0.97 * sum(wrong)


def test_captions_reach_the_levels_on_ray(tmp_path, pictures, prompted, local_ray, monkeypatch):
    config = configure(tmp_path, prompted, SMALL | {"steps": 20})
    images = training_images(config, pictures, tmp_path / "ray" / WORK)
    with one_thread():
        whole = train_ladder(config, images, tmp_path / "whole", lambda *progress: None)
    monkeypatch.setattr("mlem_dist.training.tasks.level_share", lambda config: (1, 0))
    assert [*train_on_ray(config, images, tmp_path / "ray", "cpu")]
    assert Ladder.load(tmp_path / "ray").digest == whole.digest


def test_a_ladder_of_classes_is_trained_on_latents(tmp_path, pictures):
    pipeline = make_pipeline("dit", tmp_path / "dit")
    level = {"name": "small", "kind": "DiTTransformer2DModel", "model": DIT} | NETWORK
    config = configure(tmp_path, pipeline, level, guidance=2.0)
    images = training_images(config, pictures, tmp_path / "out" / WORK)
    ladder = train_ladder(config, images, tmp_path / "out", lambda *progress: None)
    assert ladder.labels == ("0", "1")
    assert [level.name for level in ladder.levels] == ["small", "small guided"]
    assert ladder.sample_shape == (4, 8, 8)
    # The folder is a ladder of its own, without the pipeline.
    pipeline.rename(tmp_path / "elsewhere")
    assert Ladder.load(tmp_path / "out").load_decoder("cpu") is not None


def test_a_level_starts_from_the_weights_of_a_model(tmp_path, pictures, prompted):
    """A level with `start` needs no arguments, and is refused where its own are those of another model."""
    config = configure(tmp_path, prompted, SMALL | {"steps": 30})
    images = training_images(config, pictures, tmp_path / "first" / WORK)
    first = train_ladder(config, images, tmp_path / "first", lambda *progress: None)
    start = {"start": str(tmp_path / "first/models/small"), "learning_rate": 1e-9, "steps": 2}
    other = {key: value for key, value in SMALL.items() if key != "model"} | start
    again = train_ladder(configure(tmp_path, prompted, other), images, tmp_path / "again", lambda *progress: None)
    assert again.levels[0].denoising_error == pytest.approx(first.levels[0].denoising_error, rel=1e-3)
    unlike = configure(tmp_path, prompted, SMALL | start | {"model": PIXART | {"num_layers": 3}})
    with pytest.raises(UsageError, match=r"level 'small': transformer_blocks.2\S+ is None in start"):
        check_training(unlike, images, tmp_path / "out")
    with pytest.raises(UsageError, match=r"its kind is 'DiTTransformer2DModel', and start .* is a PixArt"):
        configure(tmp_path, prompted, other | {"kind": "DiTTransformer2DModel"})


@pytest.mark.parametrize(
    ("changes", "level", "message"),
    [
        ({"scheduler": {"num_train_timesteps": 10}}, {}, "scheduler is given beside a pipeline"),
        ({"guidance": 0.5}, {}, r"guidance is 0\.5, expected a scale above 1"),
        ({"sample_shape": [3, 8, 8]}, {}, r"sample_shape is \[3, 8, 8\], expected \[4, height, width\]"),
        ({}, {"kind": "unet"}, "kind is 'unet', expected one of .*PixArtTransformer2DModel.* with a pipeline"),
        ({}, {"patch": 2}, "patch is 2, expected 1 with a pipeline"),
        (
            {},
            {"prediction": "residual", "condition_dropout": 0},
            "prediction is residual, expected another one",
        ),
        ({}, {"model": PIXART | {"caption_channels": 24}}, "takes text of width 24, and the text encoders .* give 16"),
        ({}, {"model": PIXART | {"in_channels": 3}}, "level 'small': its model cannot be used for samples of 4x8x8"),
        ({"captions": "caption"}, {}, "expected a column 'caption' with captions as text"),
    ],
)
def test_what_does_not_fit_a_pipeline_is_refused(tmp_path, pictures, prompted, changes, level, message):
    def check():
        config = configure(tmp_path, prompted, SMALL | level, **changes)
        check_training(config, training_images(config, pictures, tmp_path / "work"), tmp_path / "out")

    with pytest.raises(UsageError, match=message):
        check()
    assert not (tmp_path / "out").exists()


def test_pictures_without_captions_are_refused(tmp_path, prompted):
    config = configure(tmp_path, prompted, SMALL)
    (tmp_path / "folder").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "folder" / "one.png")
    with pytest.raises(UsageError, match="has no Parquet files with captions"):
        training_images(config, tmp_path / "folder", tmp_path / "work")
