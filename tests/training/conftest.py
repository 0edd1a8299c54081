import json

import pytest
import yaml

from mlem_dist.training.config import read_config

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
                "block_out_channels": [8],
                "layers_per_block": 1,
                "down_block_types": ["DownBlock2D"],
                "up_block_types": ["UpBlock2D"],
                "norm_num_groups": 4,
            },
            "steps": 120,
            "batch_size": 16,
            "learning_rate": 3e-3,
            "ema": 0.9,
        },
    ],
}


@pytest.fixture
def configure(tmp_path):
    """A function that reads a configuration: a Gaussian level, and a small UNet with changes for each mapping given."""

    def make(*unets, **changes):
        raw = json.loads(json.dumps(CONFIG)) | changes
        unet = raw["levels"].pop()
        raw["levels"] += [unet | changed for changed in unets]
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(raw))
        return read_config(path)

    return make
