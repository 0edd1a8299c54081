"""The scripts in `examples/` run as they stand."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import HANGS
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(tmp_path):
    def run(name: str, *arguments: str) -> str:
        command = [sys.executable, str(EXAMPLES / name), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANGS, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_images_are_sampled_in_process(example, tmp_path):
    example("sample_in_process.py", "some.png")
    assert Image.open(tmp_path / "some.png").size == (8 * 32, 32)


def test_a_dataset_is_generated_and_read(example):
    said = example("generate_and_read.py", "out").splitlines()
    assert said[0].startswith("60 images, ")
    assert said[-10:] == [f"{label} 6" for label in range(10)]


def test_a_ladder_is_trained_from_pictures(example, tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for i in range(6):
            pixels = np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / label / f"{i}.png")
    (tmp_path / "work").mkdir()
    example("own_ladder.py", "pictures", "work")
    assert Image.open(tmp_path / "work" / "own.png").size == (8 * 8, 8)


def test_every_example_is_run():
    tested = Path(__file__).read_text("utf-8")
    assert all(f'"{path.name}"' in tested for path in EXAMPLES.glob("*.py"))
