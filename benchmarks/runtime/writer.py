"""How fast one core writes shards: images as they come, PNG files alone, and Parquet of finished PNG files alone.

python benchmarks/runtime/writer.py --data /usr/share/datasets/fashion-mnist --out benchmarks/results/writer.json
"""

import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlem_dist.dataset.shards import PNG, encode_shard, shard_path, write_shard
from mlem_dist.ladder.images import load_images
from mlem_dist.ladder.ladder import Ladder

SHARD, ROUNDS = 2000, 5


def rate(run: Callable[[], Any], size: int) -> dict[str, float]:
    """The median of five rounds, by the time that this process had a core."""
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return {"images_per_second": SHARD / median(times), "mb_per_second": size / 1e6 / median(times)}


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(data: Path, out: Path) -> None:
    """Megabytes are of the finished shard, but for pixels."""
    ladder = Ladder.load("fashion")
    images = (
        load_images(data, ladder.sample_shape, ladder.labels).train[:SHARD].permute(0, 2, 3, 1).contiguous().numpy()
    )
    columns = {"sample_id": range(SHARD), "label": [0] * SHARD, "seed": range(SHARD)}
    pngs = PNG.files(images)
    size = len(encode_shard(pngs, columns, ladder.labels))
    pixels = pa.table({"image": pa.array([image.tobytes() for image in images], pa.binary())})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        found = {
            "shard": rate(lambda: write_shard(path, shard_path(0, 1), images, columns, ladder.labels, ""), size),
            "png alone": rate(lambda: PNG.files(images), size),
            "parquet of finished png": rate(lambda: encode_shard(pngs, columns, ladder.labels), size),
            "pyarrow, pixels as bytes": rate(lambda: pq.write_table(pixels, path / "pixels.parquet"), np.size(images)),
        }
    for name, numbers in found.items():
        print(f"{name}: {numbers['images_per_second']:,.0f} images/s, {numbers['mb_per_second']:.1f} MB/s")
    result = {"machine": platform.machine(), "cores": 1, "shard": SHARD, "bytes": size, "rates": found}
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
