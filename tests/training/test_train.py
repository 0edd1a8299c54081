import gzip
import json

import numpy as np
import pytest
import torch
import yaml

from mlem_dist.errors import UsageError
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.training.assemble import train_ladder
from mlem_dist.training.config import read_config
from mlem_dist.training.data import load_images
from mlem_dist.training.train import DivergedError, denoising_error

CONFIG = {
    "name": "squares",
    "sample_shape": [1, 8, 8],
    "labels": ["left", "right"],
    "scheduler": {"num_train_timesteps": 100, "beta_schedule": "linear", "beta_start": 1e-3, "beta_end": 0.2},
    "levels": [
        {"name": "gaussian", "kind": "gaussian", "rank": 4},
        {
            "name": "unet",
            "kind": "unet",
            "patch": 2,
            "prediction": "v_prediction",
            "model": {
                "block_out_channels": [8, 16],
                "layers_per_block": 1,
                "down_block_types": ["DownBlock2D", "DownBlock2D"],
                "up_block_types": ["UpBlock2D", "UpBlock2D"],
                "norm_num_groups": 4,
            },
            "steps": 120,
            "batch_size": 16,
            "learning_rate": 3e-3,
            "ema": 0.9,
        },
    ],
}


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture
def data(tmp_path):
    """Bright squares on the left or the right, 6x6."""
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, n in (("train", 400), ("t10k", 100)):
        label = rng.integers(0, 2, n)
        images = np.zeros((n, 6, 6), np.uint8)
        for image, side in zip(images, label, strict=True):
            image[1:5, 3 * side : 3 * side + 3] = rng.integers(120, 255)
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", label)
    return folder


def config_file(tmp_path, **changes):
    path = tmp_path / "config.yaml"
    raw = json.loads(json.dumps(CONFIG))
    raw["levels"][1] |= changes
    path.write_text(yaml.safe_dump(raw))
    return read_config(path)


class KilledError(Exception):
    pass


def test_training_resumes_to_the_same_ladder(tmp_path, data, monkeypatch):
    config = config_file(tmp_path)
    images = load_images(data, config.sample_shape, 2)
    monkeypatch.setattr("mlem_dist.training.train.CHECKPOINT_SECONDS", 0.0)
    whole = train_ladder(config, images, tmp_path / "whole", lambda *progress: None)

    def kill(name: str, done: int, steps: int, loss: float) -> None:
        if done == 50:
            raise KilledError

    with pytest.raises(KilledError):
        train_ladder(config, images, tmp_path / "killed", kill)
    resumed: list[int] = []
    killed = train_ladder(config, images, tmp_path / "killed", lambda name, done, steps, loss: resumed.append(done))
    assert resumed[0] in (50, 51)
    assert killed.digest == whole.digest
    errors = [sum(level.denoising_error) for level in whole.levels]
    assert errors[0] < 10 * 0.9
    assert Ladder.load(tmp_path / "whole").cost("cpu").min() > 0


@pytest.mark.parametrize("changes", [{"prediction": "residual"}, {"prediction": "epsilon"}, {"teacher": "large"}])
def test_every_kind_of_level_comes_back_from_disk_as_it_was_trained(tmp_path, data, changes):
    path = tmp_path / "config.yaml"
    raw = json.loads(json.dumps(CONFIG))
    unet = raw["levels"].pop() | {"steps": 20}
    raw["levels"] += [unet | changes, unet | {"name": "large", "patch": 1}]
    path.write_text(yaml.safe_dump(raw))
    config = read_config(path)
    images = load_images(data, config.sample_shape, 2)
    ladder = train_ladder(config, images, tmp_path / "out", lambda *progress: None)
    assert [level.name for level in ladder.levels] == ["gaussian", "unet", "large"]
    for number, level in enumerate(ladder.levels, 1):
        found = denoising_error(ladder.load_level(number, "cpu"), images, ladder.alpha_bar)
        assert found == pytest.approx(level.denoising_error, rel=1e-6)
    log = [json.loads(line) for line in (tmp_path / "out/training/unet/log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 20
    assert len(log[-1]["denoising_error"]) == 10


def test_a_pupil_comes_closer_to_its_teacher_than_to_the_noise(tmp_path, data):
    """The noise that no model can know is not in what it learns from."""
    path = tmp_path / "config.yaml"
    raw = json.loads(json.dumps(CONFIG))
    unet = raw["levels"].pop()
    raw["levels"] += [unet | {"teacher": "large"}, unet | {"name": "large"}]
    path.write_text(yaml.safe_dump(raw))
    config = read_config(path)
    train_ladder(config, load_images(data, config.sample_shape, 2), tmp_path / "out", lambda *progress: None)
    losses = {
        name: json.loads((tmp_path / f"out/training/{name}/log.jsonl").read_text().splitlines()[-1])["loss"]
        for name in ("unet", "large")
    }
    assert losses["unet"] < 0.5 * losses["large"]


def test_a_diverging_loss_stops_at_once_and_keeps_the_checkpoint(tmp_path, data, monkeypatch):
    config = config_file(tmp_path)
    images = load_images(data, config.sample_shape, 2)
    monkeypatch.setattr("mlem_dist.training.train.CHECKPOINT_SECONDS", 0.0)
    real = torch.randn

    def poisoned(*shape, **options):
        out = real(*shape, **options)
        return out * float("nan") if poisoned.on else out

    poisoned.on = False

    def watch(name: str, done: int, steps: int, loss: float) -> None:
        poisoned.on = done >= 20

    monkeypatch.setattr(torch, "randn", poisoned)
    with pytest.raises(DivergedError, match="nan at step 20"):
        train_ladder(config, images, tmp_path / "out", watch)
    assert (tmp_path / "out" / "training" / "unet" / "checkpoint.safetensors").exists()
    assert not (tmp_path / "out" / "ladder.json").exists()


def test_missing_and_unfit_data_are_refused(tmp_path, data):
    with pytest.raises(UsageError, match="no training data"):
        load_images(tmp_path, (1, 8, 8), 2)
    with pytest.raises(UsageError, match="at most 4x4"):
        load_images(data, (1, 4, 4), 2)
    with pytest.raises(UsageError, match="label 1 is out of range"):
        load_images(data, (1, 8, 8), 1)
    path = data / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    with pytest.raises(UsageError, match="not a complete IDX file"):
        load_images(data, (1, 8, 8), 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"kind": "mlp"}, "mlp"),
        ({"size": 3}, "unknown keys 'size'"),
        ({"name": "gaussian"}, "twice"),
        ({"prediction": "x0"}, "x0"),
        ({"teacher": "unet"}, "teacher is 'unet'"),
    ],
)
def test_a_wrong_configuration_is_refused(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        config_file(tmp_path, **changes)
