import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.save import save_ladder, save_level
from mlem_dist.models.gaussian import GaussianLevel
from mlem_dist.models.level import new_unet_level
from mlem_dist.solver.process import process_of
from mlem_dist.tuning.calibrate import calibrate, store


@pytest.fixture
def small(tmp_path, fashion, part_of) -> Path:
    """The two lowest levels of the bundled ladder."""
    return part_of(fashion, (1, 2), tmp_path / "small")


@pytest.fixture(scope="session")
def calibration(tmp_path_factory, fashion, part_of) -> Path:
    """The same, calibrated without images."""
    small = part_of(fashion, (1, 2), tmp_path_factory.mktemp("calibrated") / "small")
    ladder = Ladder.load(small)
    store(small, ladder, calibrate(ladder, "cpu", steps=40, samples=16))
    return small


@pytest.fixture
def calibrated(tmp_path, calibration) -> Path:
    """A copy of it, to write into."""
    return shutil.copytree(calibration, tmp_path / "calibrated")


@pytest.fixture(scope="session")
def lowest(tmp_path_factory, fashion, part_of) -> Ladder:
    """The three lowest levels of the bundled ladder."""
    return Ladder.load(part_of(fashion, (1, 2, 3), tmp_path_factory.mktemp("ladders") / "lowest"))


@pytest.fixture
def many(tmp_path) -> Ladder:
    """Two Gaussian levels of 40 classes far apart, with values in [0, 1]."""
    return two_gaussians(tmp_path / "many", {"num_train_timesteps": 100, "beta_start": 1e-3, "beta_end": 0.2})


@pytest.fixture
def late(tmp_path) -> Ladder:
    """The same with the schedule of Stable Diffusion, which does not begin at pure noise."""
    betas = {"beta_start": 0.0085, "beta_end": 0.12, "beta_schedule": "scaled_linear"}
    return two_gaussians(tmp_path / "late", {"num_train_timesteps": 100, **betas})


@pytest.fixture(scope="session")
def two_unets(tmp_path_factory) -> Ladder:
    """Two untrained UNets, without a Gaussian level and without classes, of costs as one to five; calibrated."""
    folder = tmp_path_factory.mktemp("ladders") / "unets"
    ladder = untrained(folder, {"num_train_timesteps": 200, "beta_start": 1e-3, "beta_end": 0.1})
    store(folder, ladder, calibrate(ladder, "cpu", steps=20, samples=2))
    kept = json.loads((folder / "ladder.json").read_text())
    for level in kept["levels"]:
        level["seconds"]["cpu"] = 1e-5 if level["name"] == "small" else 5e-5
    (folder / "ladder.json").write_text(json.dumps(kept))
    return Ladder.load(folder)


@pytest.fixture
def two_flows(tmp_path) -> Ladder:
    """The same with a flow, which begins at pure noise; not calibrated."""
    return untrained(tmp_path / "flows", {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})


def untrained(folder: Path, scheduler: dict) -> Ladder:
    """Two untrained UNets, of costs as one to five."""
    folder.mkdir()
    process, levels = process_of(scheduler), []
    for name, channels, seconds in (("small", 8, 1e-5), ("large", 16, 5e-5)):
        torch.manual_seed(0)
        model = {"block_out_channels": [channels], "norm_num_groups": 4, "layers_per_block": 1}
        model |= {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
        level = new_unet_level((1, 8, 8), 0, 1, process.prediction, process, model, None)
        entry = save_level(folder, name, level, torch.float32)
        levels.append(replace(entry, seconds={"cpu": seconds}, denoising_error=[0.1]))
    save_ladder(folder, "unets", (1, 8, 8), [], scheduler, levels)
    return Ladder.load(folder)


@pytest.fixture
def flow(tmp_path) -> Ladder:
    """The same with a flow, which begins at pure noise."""
    return two_gaussians(tmp_path / "flow", {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})


def two_gaussians(folder: Path, scheduler: dict) -> Ladder:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(2000) % 40
    x0 = torch.rand(40, 1, 4, 4, generator=generator)[label] + 0.1 * torch.randn(2000, 1, 4, 4, generator=generator)
    levels = []
    for name, rank, seconds in (("small", 1, 1e-5), ("large", 8, 1e-3)):
        level = GaussianLevel(40, 16, rank, process_of(scheduler))
        level.fit(x0.clamp(0, 1), {"label": label})
        entry = save_level(folder, name, level, torch.float32)
        levels.append(replace(entry, seconds={"cpu": seconds}, denoising_error=[0.1]))
    save_ladder(folder, "many", (1, 4, 4), [str(c) for c in range(40)], scheduler, levels)
    raw = json.loads((folder / "ladder.json").read_text())
    (folder / "ladder.json").write_text(json.dumps(raw | {"value_range": [0, 1]}))
    return Ladder.load(folder)
