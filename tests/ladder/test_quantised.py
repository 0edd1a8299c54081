"""Models whose weights diffusers has quantised are levels beside their originals."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import BitsAndBytesConfig, DDIMScheduler, DiffusionPipeline, DiTTransformer2DModel, TorchAoConfig
from pipelines import make_pipeline

import mlem_dist
from mlem_dist.errors import UsageError
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.models.weights import bitsandbytes_without_gpu

PLACES = {"torchao": {}, "bitsandbytes": {"device_map": {"": "cpu"}}, "nf4": {"device_map": {"": "cpu"}}}
"""Arguments with which diffusers loads quantised models on a CPU."""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    # Blocks of 64 weights share a scale in 4 bits.
    return make_pipeline("dit", tmp_path_factory.mktemp("dit") / "dit", 4)


@pytest.fixture(scope="module", params=["torchao", "bitsandbytes", "nf4"])
def method(request):
    return request.param


@pytest.fixture(scope="module")
def quantised(pipeline, method):
    """The transformer of the pipeline in 8 bits, or in 4 by bitsandbytes, saved beside the pipeline."""
    pytest.importorskip("accelerate")
    if method == "torchao":
        quantisation = pytest.importorskip("torchao.quantization")
        config = TorchAoConfig(quantisation.Int8WeightOnlyConfig(version=2))
    else:
        pytest.importorskip("bitsandbytes")
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
        config = BitsAndBytesConfig(**four if method == "nf4" else {"load_in_8bit": True})
    folder = pipeline / "transformer"
    with bitsandbytes_without_gpu():
        model = DiTTransformer2DModel.from_pretrained(
            folder, quantization_config=config, torch_dtype=torch.float32, **PLACES[method]
        )
    model.save_pretrained(pipeline.parent / "quantised")
    return pipeline.parent / "quantised"


def test_a_quantised_copy_stands_below_its_original(pipeline, quantised, method, tmp_path):
    ladder = Ladder.create(tmp_path / "ladder", [quantised, pipeline], guidance=3, measure=False)
    assert [level.name for level in ladder.levels] == ["quantised", "dit", "quantised guided", "dit guided"]
    stored = (quantised / "diffusion_pytorch_model.safetensors").stat().st_size
    assert ladder.weight_bytes.seconds.tolist() == [stored, 4 * ladder.levels[1].parameters]
    x, t, label = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 900.0]), {"label": torch.tensor([1, 7])}
    exact = ladder.load_level(2, "cpu")(x, t, label)
    for precision in ("float32", "bfloat16"):
        with torch.inference_mode():
            value = ladder.load_level(1, "cpu", precision)(x, t, label)
        assert 1e-3 < (value - exact).norm() / exact.norm() < (0.4 if method == "nf4" else 0.1)


def test_samples_are_those_of_the_quantised_pipeline(pipeline, quantised, method, tmp_path):
    with bitsandbytes_without_gpu():
        transformer = DiTTransformer2DModel.from_pretrained(quantised, torch_dtype=torch.float32, **PLACES[method])
    theirs = DiffusionPipeline.from_pretrained(pipeline, transformer=transformer)
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config, timestep_spacing="trailing")
    theirs.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 8)]
    given = {"generator": generators, "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
    expected = 255 * theirs(class_labels=[1, 7], **given).images
    ladder = Ladder.create(tmp_path / "ladder", [quantised], pipeline=pipeline, guidance=3, measure=False)
    images = mlem_dist.sample(ladder, labels=[1, 7], seeds=[3, 8], steps=4, nfe=4)
    assert expected.std() > 20
    # 8-bit layers of bitsandbytes round activations, too, and treat outliers of a whole batch apart.
    assert np.abs(images - expected).max() < (4 if method == "bitsandbytes" else 0.6)


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

    refuse("gguf", "is quantised by gguf, expected bitsandbytes or torchao; quantise the original by `TorchAoConfig`")
    monkeypatch.setattr(
        "mlem_dist.extras.importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    )
    for method in ("bitsandbytes", "torchao"):
        refuse(method, "quantised models need accelerate, which is not installed: install the extra `quantised`")
