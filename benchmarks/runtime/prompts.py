"""Memory of processes and time to the first shard with a table of ten prompts and with one of ten million.

python benchmarks/runtime/prompts.py --ladder DIR --out benchmarks/results/prompts.json

DIR holds a ladder that takes prompts. Each run is `mlem-dist generate --placement pools` on a new local Ray, stopped
after its first shards. The large table is read when its digest is not known yet, when it is, and as JSON lines.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

WORDS = ("red", "blue", "green", "cat", "dog", "house", "tree", "river", "hill", "with", "under", "near", "old", "two")
GROUP, LENGTH, SHARDS = 1_000_000, 18, 4
NAMES = ("Coordinator", "StageActor", "TrajectoryActor", "LevelActor", "Writer")


def texts(first: int, stop: int) -> list[str]:
    """Prompts of `LENGTH` words."""
    return [
        " ".join(WORDS[(i * 7919 + k * k * 31) % len(WORDS)] for k in range(LENGTH)) + f" {i}"
        for i in range(first, stop)
    ]


def write_table(path: Path, rows: int) -> None:
    """A Parquet file of prompts, numbers and lists."""
    schema = pa.schema({"prompt": pa.string(), "number": pa.int64(), "tags": pa.list_(pa.string())})
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, rows, GROUP):
            stop = min(rows, first + GROUP)
            columns = [texts(first, stop), range(first, stop), [["x", "y"]] * (stop - first)]
            writer.write_table(pa.table(columns, schema), row_group_size=GROUP)


def measured(ladder: Path, table: Path, cache: Path) -> dict[str, Any]:
    """Seconds to the first shard, and the largest memory of each kind of process until some are written, in MB."""
    most: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [sys.executable, "-m", "mlem_dist", "generate", "--ladder", str(ladder), "--prompts", str(table)]
        command += ["--out", str(out), "--nfe", "1", "--steps", "1", "--placement", "pools"]
        command += ["--block-size", "20", "--shard-size", "100"]
        began, first = time.monotonic(), None
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
        run = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        driver = psutil.Process(run.pid)
        while run.poll() is None:
            for process in (driver, *driver.children(recursive=True)):
                with suppress(psutil.NoSuchProcess, IndexError):
                    title = "".join(process.cmdline()[:1])
                    name = next((name for name in NAMES if f"ray::{name}" in title), "")
                    kind = "driver" if process.pid == run.pid else name
                    if kind:
                        most[kind] = max(most.get(kind, 0.0), process.memory_info().rss / 1e6)
            shards = len([*out.glob("data/*.parquet")])
            if shards and first is None:
                first = time.monotonic() - began
            if shards >= SHARDS:
                run.send_signal(signal.SIGINT)
                run.wait()
            time.sleep(0.05)
    return {"first_shard_s": first, "memory_mb": {name: round(value) for name, value in sorted(most.items())}}


@click.command()
@click.option("--ladder", type=click.Path(path_type=Path), required=True)
@click.option("--rows", default=10_000_000)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(ladder: Path, rows: int, out: Path) -> None:
    """Write OUT, with an entry for each table."""
    result: dict[str, Any] = {"machine": platform.machine(), "rows": rows}
    with tempfile.TemporaryDirectory() as folder:
        small, large, lines = (Path(folder) / name for name in ("small.parquet", "large.parquet", "large.jsonl"))
        cache = Path(folder) / "cache"
        write_table(small, SHARDS * 100)
        write_table(large, rows)
        runs = {"small, first": small, "small": small, "large, first": large, "large, seen before": large}
        for name, table in runs.items():
            result[name] = measured(ladder, table, cache)
            print(name, result[name], flush=True)
        with lines.open("w", encoding="utf-8") as file:
            for first in range(0, rows, GROUP):
                stop = min(rows, first + GROUP)
                file.writelines(f'{{"prompt": "{text}"}}\n' for text in texts(first, stop))
        result["large, JSON lines"] = measured(ladder, lines, cache)
        print(result["large, JSON lines"], flush=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
