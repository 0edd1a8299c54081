import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from commands import SCRIPT, assert_refused
from PIL import Image

from mlem_dist.cli import main
from mlem_dist.engine.job import Job
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.runtime.cluster import QUIET_ENVIRONMENT
from mlem_dist.solver.plan import Plan, Recipe


@pytest.fixture(scope="session")
def fashion() -> Ladder:
    return Ladder.load("fashion")


@pytest.fixture(scope="session")
def part_of() -> Callable[..., Path]:
    """A function that copies some levels of a ladder, by their numbers, to a folder; not what was measured of all."""

    def copy(ladder: Ladder, numbers: Sequence[int], folder: Path) -> Path:
        measured = shutil.ignore_patterns("calibration.json", "plan-*", "frontier-*", "*.png")
        shutil.copytree(ladder.folder, folder, ignore=measured)
        raw = json.loads((folder / "ladder.json").read_text())
        raw["levels"] = [raw["levels"][number - 1] for number in numbers]
        (folder / "ladder.json").write_text(json.dumps(raw))
        return folder

    return copy


@pytest.fixture(scope="session")
def three(fashion: Ladder, part_of, tmp_path_factory: pytest.TempPathFactory) -> Ladder:
    """Three levels of the bundled ladder, a small and a wide UNet among them: fewer processes, and less to compute."""
    return Ladder.load(part_of(fashion, (1, 2, 4), tmp_path_factory.mktemp("ladders") / "three"))


@pytest.fixture
def dark_and_bright(tmp_path: Path) -> Path:
    """Images in turn dark and bright, with captions that say so, as a Parquet file."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(80):
        pixels = np.full((16, 16, 3), 180 * (number % 2), np.uint8) + rng.integers(0, 40, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
        rows.append({"image": file.getvalue(), "prompt": ("dark", "bright")[number % 2]})
    (folder := tmp_path / "images").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return folder


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray for all tests: a fresh one takes seconds. It looks for log files as seldom as that of a run."""
    os.environ.update(QUIET_ENVIRONMENT)
    # The same tests where there are GPUs.
    resources = {"num_cpus": 3, "num_gpus": 0, "labels": {"site": "here"}}
    ray.init(address="local", include_dashboard=False, log_to_driver=False, **resources)
    yield
    ray.shutdown()


@pytest.fixture
def make_job(fashion: Ladder):
    """Small jobs of the default ladder or another, with every level called."""

    def make(plan: Plan | Recipe | None = None, of: Ladder = fashion, **changes) -> Job:
        levels = len(of.levels)
        steps = changes.get("steps", 12)
        p = np.repeat(0.5 ** np.arange(levels)[:, None], steps, axis=1)
        values = {
            "ladder": of.source,
            "digest": of.digest,
            "num": 44,
            "labels": tuple(range(10)),
            "solver": "sde",
            "steps": 12,
            "plan": plan or Recipe(p, "systematic", "held", collapse=True),
            "seed": 3,
            "block_size": 8,
            "shard_size": 16,
            "device": "cpu",
        }
        return Job(**(values | changes))

    return make


@pytest.fixture
def write_data(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a folder of IDX files, with the images and labels of each part."""

    def write(**parts: tuple[np.ndarray, np.ndarray]) -> Path:
        folder = tmp_path / "data"
        folder.mkdir()
        for part, (images, label) in parts.items():
            for name, array in ((f"{part}-images-idx3-ubyte.gz", images), (f"{part}-labels-idx1-ubyte.gz", label)):
                header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
                (folder / name).write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))
        return folder

    return write


@pytest.fixture
def data(write_data):
    """Bright squares on the left or the right, 6x6."""
    rng = np.random.default_rng(0)
    parts = {}
    for part, n in (("train", 400), ("t10k", 100)):
        label = rng.integers(0, 2, n)
        images = np.zeros((n, 6, 6), np.uint8)
        for image, side in zip(images, label, strict=True):
            image[1:5, 3 * side : 3 * side + 3] = rng.integers(120, 255)
        parts[part] = images, label
    return write_data(**parts)


@pytest.fixture
def here(monkeypatch, capfd) -> Callable[..., subprocess.CompletedProcess[str]]:
    """As `command`, in this process: one of its own takes seconds to start."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments])
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as ended:
            main()
        signal.signal(signal.SIGTERM, handler)
        return subprocess.CompletedProcess(arguments, ended.value.code, *capfd.readouterr())

    return run


@pytest.fixture
def refuses(here) -> Callable[..., None]:
    """A function that gives a command to this process and expects one sentence."""

    def check(*arguments: str, message: str) -> None:
        assert_refused(here(*arguments), message)

    return check
