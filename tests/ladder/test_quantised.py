"""Models whose weights diffusers has quantised are levels beside their originals."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DiTTransformer2DModel, TorchAoConfig
from pipelines import make_pipeline

import mlem_dist
from mlem_dist.errors import UsageError
from mlem_dist.ladder.ladder import Ladder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return make_pipeline("dit", tmp_path_factory.mktemp("dit") / "dit", 2)


@pytest.fixture(scope="module")
def quantised(pipeline):
    """The transformer of the pipeline in 8 bits, saved beside the pipeline."""
    pytest.importorskip("accelerate")
    quantisation = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(quantisation.Int8WeightOnlyConfig(version=2))
    folder = pipeline / "transformer"
    model = DiTTransformer2DModel.from_pretrained(folder, quantization_config=config, torch_dtype=torch.float32)
    model.save_pretrained(pipeline.parent / "int8")
    return pipeline.parent / "int8"


def test_an_8_bit_copy_stands_below_its_original(pipeline, quantised, tmp_path):
    ladder = Ladder.create(tmp_path / "ladder", [quantised, pipeline], guidance=3, measure=False)
    assert [level.name for level in ladder.levels] == ["int8", "dit", "int8 guided", "dit guided"]
    stored = (quantised / "diffusion_pytorch_model.safetensors").stat().st_size
    assert ladder.weight_bytes.seconds.tolist() == [stored, 4 * ladder.levels[1].parameters]
    x, t, label = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 900.0]), {"label": torch.tensor([1, 7])}
    exact = ladder.load_level(2, "cpu")(x, t, label)
    for precision in ("float32", "bfloat16"):
        with torch.inference_mode():
            value = ladder.load_level(1, "cpu", precision)(x, t, label)
        assert 1e-3 < (value - exact).norm() / exact.norm() < 0.1


def test_samples_are_those_of_the_quantised_pipeline(pipeline, quantised, tmp_path):
    transformer = DiTTransformer2DModel.from_pretrained(quantised, torch_dtype=torch.float32)
    theirs = DiffusionPipeline.from_pretrained(pipeline, transformer=transformer)
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config, timestep_spacing="trailing")
    theirs.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 8)]
    given = {"generator": generators, "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
    expected = 255 * theirs(class_labels=[1, 7], **given).images
    ladder = Ladder.create(tmp_path / "ladder", [quantised], pipeline=pipeline, guidance=3, measure=False)
    images = mlem_dist.sample(ladder, labels=[1, 7], seeds=[3, 8], steps=4, nfe=4)
    assert expected.std() > 20
    assert np.abs(images - expected).max() < 0.6


def test_what_cannot_be_loaded_is_one_sentence(pipeline, tmp_path, monkeypatch):
    config = json.loads((pipeline / "transformer" / "config.json").read_text())
    model = tmp_path / "model"
    model.mkdir()
    (model / "diffusion_pytorch_model.safetensors").symlink_to(
        pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
    )

    def refuse(method: str, message: str) -> None:
        (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
        with pytest.raises(UsageError, match=message):
            Ladder.create(tmp_path / "ladder", [model], pipeline=pipeline, measure=False)

    refuse("bitsandbytes", "is quantised by bitsandbytes, expected torchao.*; quantise the original by `TorchAoConfig`")
    monkeypatch.setattr(
        "mlem_dist.extras.importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    )
    refuse("torchao", "quantised models need accelerate, which is not installed: install the extra `quantised`")
