"""The scripts in `examples/` run as they stand."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pipelines import make_pipeline, tokenizer

from mlem_dist import api
from mlem_dist.ladder.ladder import Ladder

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(tmp_path, monkeypatch, capsys, local_ray):
    """A function that runs an example in this process: one of its own takes long to start, as does a Ray of its own."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

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


def test_images_are_scored_by_their_prompts(tmp_path, monkeypatch):
    """`clip_similarity.py`, with a tiny CLIP with random weights."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    words = tokenizer(tmp_path / "words")
    special = {name: getattr(words, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
    part = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**part, "image_size": 32, "patch_size": 8}
    text = {**part, **special, "vocab_size": len(words)}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**sides), words).save_pretrained(tmp_path / "clip")
    monkeypatch.setenv("CLIP_MODEL", str(tmp_path / "clip"))
    monkeypatch.chdir(EXAMPLES)
    ladder = Ladder.create(tmp_path / "ladder", [make_pipeline("sd", tmp_path / "sd")], measure=False)
    job = {"steps": 1, "nfe": 1, "engine": "inline", "scores": ["clip_similarity:ClipSimilarity"]}
    api.generate(ladder, out=str(tmp_path / "out"), prompts=["a cat", "a dog", "x" * 500], **job)
    values = pq.read_table(tmp_path / "out" / "data")["clip_similarity"].to_numpy()
    assert len({*values}) == 3
    assert (abs(values) <= 1).all()


def test_every_example_is_run():
    tested = Path(__file__).read_text("utf-8")
    assert all(path.name in tested for path in EXAMPLES.glob("*.py"))
