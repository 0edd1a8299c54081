import json
import shutil
from pathlib import Path

import pytest
import torch

from mlem_dist.ladder.ladder import Ladder
from mlem_dist.tuning.calibrate import calibrate, store


@pytest.fixture
def small(tmp_path, fashion) -> Path:
    """The two lowest levels of the bundled ladder, as a folder without what was measured of more levels."""
    folder = tmp_path / "small"
    shutil.copytree(fashion.folder, folder)
    for measured in ("calibration.json", "plan-*.json", "frontier-*", "*.png"):
        for path in folder.glob(measured):
            path.unlink()
    raw = json.loads((folder / "ladder.json").read_text())
    (folder / "ladder.json").write_text(json.dumps(raw | {"levels": raw["levels"][:2]}))
    return folder


@pytest.fixture
def calibrated(small) -> Path:
    """The small ladder, calibrated on noise: the effects of its increments do not need real images."""
    ladder = Ladder.load(small)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, *ladder.sample_shape), dtype=torch.uint8, generator=generator)
    store(small, ladder, calibrate(ladder, images, torch.arange(40) % 10, "cpu", per_band=4, steps=40, samples=16))
    return small


@pytest.fixture
def three(tmp_path, fashion) -> Ladder:
    """The three lowest levels of the bundled ladder."""
    folder = tmp_path / "three"
    shutil.copytree(fashion.folder, folder, ignore=shutil.ignore_patterns("calibration.json", "plan-*", "*.png"))
    raw = json.loads((folder / "ladder.json").read_text())
    (folder / "ladder.json").write_text(json.dumps(raw | {"levels": raw["levels"][:3]}))
    return Ladder.load(folder)
