import json

import numpy as np
import pytest

from mlem_dist.dataset.manifest import Manifest
from mlem_dist.dataset.shards import shard_path, waiting_path, write_shard
from mlem_dist.errors import UsageError
from mlem_dist.report.sheet import COLUMNS, SCALE, contact_sheet


@pytest.mark.parametrize(("num", "rows"), [(30, 3), (200, 10)])
def test_a_sheet_without_classes_shows_images_in_order_of_sample_id(tmp_path, num, rows):
    """Whatever the shards, and wherever they are."""
    manifest = Manifest({"labels": []}, (), {}, {}, ())
    manifest.write(tmp_path)
    size = 5
    for shard in range(num // size):
        ids = range(shard * size, (shard + 1) * size)
        images = np.stack([np.full((2, 2, 1), i, dtype=np.uint8) for i in ids])
        columns = {"sample_id": ids, "seed": ids}
        path = shard_path(shard, num // size) if shard < 2 else waiting_path(shard)
        write_shard(tmp_path, path, images, columns, (), manifest.fingerprint)
    assert json.loads((tmp_path / "mlem.json").read_text())["labels"] == []
    sheet = np.array(contact_sheet(tmp_path).convert("L"))
    pixels = sheet[:: 2 * SCALE, :: 2 * SCALE]
    assert pixels.shape == (rows, COLUMNS)
    shown = min(num, rows * COLUMNS)
    assert pixels.flatten()[:shown].tolist() == list(range(shown))


def test_a_dataset_without_images_has_no_sheet(tmp_path):
    """Shards that are not finished, and shards that keep no row, are told apart."""
    manifest = Manifest({"labels": []}, (), {}, {}, ())
    manifest.write(tmp_path)
    with pytest.raises(UsageError, match="has no finished shard yet"):
        contact_sheet(tmp_path)
    columns = {"sample_id": [], "seed": []}
    write_shard(tmp_path, shard_path(0, 1), np.zeros((0, 2, 2, 1), np.uint8), columns, (), manifest.fingerprint)
    with pytest.raises(UsageError, match="`keep` left out all rows"):
        contact_sheet(tmp_path)
