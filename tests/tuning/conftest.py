import json
import shutil
from pathlib import Path

import pytest


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
