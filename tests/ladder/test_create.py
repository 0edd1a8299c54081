"""Ladders of models of diffusers: what fits is made, and what does not is refused before anything is written."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline
from PIL import Image
from pipelines import make_pipeline
from safetensors.torch import load_file, save_file

import mlem_dist
from mlem_dist.errors import UsageError
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.save import save_ladder, save_level
from mlem_dist.ladder.schema import UNGUIDED, Guidance
from mlem_dist.models.guidance import GUIDANCE
from mlem_dist.models.level import new_unet_level
from mlem_dist.solver.condition import LABEL
from mlem_dist.solver.process import process_of


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory) -> Path:
    """Folders of pipelines, one of each kind but sd, of which there are two sizes."""
    root = tmp_path_factory.mktemp("pipelines")
    for kind in ("sd", "sdxl", "dit", "pixels", "pixart-sigma", "sana"):
        make_pipeline(kind, root / kind)
    make_pipeline("sd", root / "large", 2)
    return root


@pytest.fixture(scope="module")
def prompted(pipelines, tmp_path_factory) -> Ladder:
    return Ladder.create(tmp_path_factory.mktemp("ladders") / "sd", [pipelines / "sd"], guidance=3, measure=False)


@pytest.fixture
def copy(pipelines, tmp_path):
    """A function that copies a pipeline and changes a configuration in it."""

    def make(name: str, part: str = "", remove: tuple[str, ...] = (), **changes: object) -> Path:
        folder = tmp_path / f"copy-{name}"
        shutil.copytree(pipelines / name, folder)
        if part:
            path = folder / part
            config = {key: value for key, value in json.loads(path.read_text()).items() if key not in remove}
            path.write_text(json.dumps(config | changes))
        return folder

    return make


def test_a_ladder_refers_to_models_and_is_the_same_wherever_they_are(pipelines, tmp_path):
    ladder = Ladder.create(tmp_path / "ladder", [pipelines / "sd", pipelines / "large"], guidance=5, measure=False)
    assert {path.name for path in (tmp_path / "ladder").rglob("*") if path.is_file()} == {
        "ladder.json",
        "scheduler_config.json",
    }
    raw = json.loads((tmp_path / "ladder" / "ladder.json").read_text())
    assert [model["path"] for model in raw["models"]] == [str(pipelines / name / "unet") for name in ("sd", "large")]
    assert {level["model"] for level in raw["levels"]} == {"sd", "large"}
    for name in ("sd", "large"):
        shutil.copytree(pipelines / name, tmp_path / name)
    moved = Ladder.create(tmp_path / "moved", [tmp_path / "sd", tmp_path / "large"], guidance=5, measure=False)
    assert moved.digest == ladder.digest
    other = Ladder.create(tmp_path / "other", [pipelines / "sd", pipelines / "large"], guidance=6, measure=False)
    assert other.digest != ladder.digest


def test_copied_models_need_no_others(copy, pipelines, tmp_path):
    folder = copy("sd")
    reference = Ladder.create(tmp_path / "reference", [folder, pipelines / "large"], guidance=5, measure=False)
    copied = Ladder.create(tmp_path / "copied", [folder, pipelines / "large"], guidance=5, measure=False, copy=True)
    assert copied.digest == reference.digest
    shutil.rmtree(folder)
    (tmp_path / "copied").rename(tmp_path / "moved")
    ladder = Ladder.load(tmp_path / "moved")
    assert ladder.load_encoder("cpu")(["a"], [None])
    ladder.load_decoder("cpu")
    ladder.load_level(len(ladder.levels), "cpu")


def test_encoder_and_decoder_are_loaded_once_in_each_precision(pipelines, tmp_path):
    ladder = Ladder.create(tmp_path / "ladder", [pipelines / "sd"], measure=False)
    for load in (ladder.load_encoder, ladder.load_decoder):
        assert load("cpu") is load("cpu", "float32")
        assert load("cpu") is not load("cpu", "bfloat16")


def test_a_changed_file_is_noticed(copy, tmp_path):
    folder = copy("sd")
    Ladder.create(tmp_path / "ladder", [folder], measure=False)
    for name in ("vae/config.json", "tokenizer/tokenizer.json", "unet/config.json"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before + b" ")
        with pytest.raises(UsageError, match="is corrupted"):
            Ladder.load(tmp_path / "ladder")
        (folder / name).write_bytes(before)
    Ladder.load(tmp_path / "ladder")


def test_costs_are_measured_and_shared(pipelines, tmp_path):
    heard: list[str] = []
    models = [pipelines / "sd", pipelines / "large"]
    ladder = Ladder.create(tmp_path / "ladder", models, guidance=5, notify=heard.append)
    assert heard[-1] == "Levels are in the order of their costs, measured on this machine (cpu)."
    assert (np.diff(ladder.cost("cpu")[:-1]) >= 0).all()
    assert ladder.levels[-1].name == "large guided"
    assert set(ladder.stage_seconds("cpu")) == {"encode", "decode"}
    costs = ladder.costs("cpu")
    names = [level.name for level in ladder.levels]
    plain, guided = (names.index(name) + 1 for name in ("large", "large guided"))
    # With both at a step, the conditional evaluation is made once.
    assert costs.of([plain, guided]) == pytest.approx(costs.of([guided]))
    assert costs.of([guided]) == pytest.approx(2 * costs.of([plain]))
    others = [names.index(name) + 1 for name in ("sd", "sd guided")]
    assert costs.of([*others, guided]) == pytest.approx(costs.of([guided]) + costs.of(others))


@torch.inference_mode()
def test_guidance_by_another_model_and_in_an_interval(pipelines, tmp_path):
    models = [pipelines / "sd", pipelines / "large"]
    ladder = Ladder.create(
        tmp_path / "ladder", models, guidance=(3, 0.2, 0.6), guide_with=pipelines / "sd", measure=False
    )
    by_name = {level.name: number for number, level in enumerate(ladder.levels, 1)}
    assert set(by_name) == {"sd", "sd guided", "large", "large guided by sd"}
    names = ("sd", "sd guided", "large", "large guided by sd")
    small, guided, large, result = (ladder.load_level(by_name[name], "cpu") for name in names)
    encoder = ladder.load_encoder("cpu")
    condition = encoder(["a cat", "b"], ["ugly", None])
    x = torch.randn(2, *ladder.sample_shape, generator=torch.Generator().manual_seed(0))
    for t, inside in ((900.0, False), (700.0, True), (500.0, True), (300.0, False)):
        times = torch.full((2,), t)
        values = {
            name: level(x, times, condition) for name, level in zip(names, (small, guided, large, result), strict=True)
        }
        direction = values["sd guided"] - values["sd"]
        assert bool(direction.abs().max() > 0) == inside
        torch.testing.assert_close(values["large guided by sd"], values["large"] + direction)
        known = {}
        for level in (small, guided, large, result):
            level(x, times, condition, known)
        assert len(known) == 2 + inside
    mixed = result(x, torch.tensor([700.0, 900.0]), condition)
    torch.testing.assert_close(mixed[1:], large(x, torch.tensor([700.0, 900.0]), condition)[1:])


def test_without_guidance_there_is_no_unconditional_evaluation(pipelines, tmp_path):
    ladder = Ladder.create(tmp_path / "ladder", [pipelines / "sd"], guidance=3, measure=False)
    plain, guided = (ladder.load_level(number, "cpu") for number in (1, 2))
    condition = ladder.load_encoder("cpu")(["a cat", "b"], [None, None])
    x, times = torch.randn(2, *ladder.sample_shape), torch.full((2,), 700.0)
    for scales, evaluations in (([1.0, 1.0], 1), ([1.0, 3.0], 2)):
        known = {}
        value = guided(x, times, condition | {GUIDANCE: torch.tensor(scales)}, known)
        assert len(known) == evaluations
        assert torch.equal(value[0], plain(x, times, condition)[0])


def test_pipelines_of_a_variant_are_read(pipelines, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(pipelines / "sd", torch_dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    assert (tmp_path / "half" / "text_encoder" / "model.fp16.safetensors").exists()
    plans = {"prompts": ["a cat"], "seeds": [1], "steps": 4, "nfe": 4}
    images = [
        mlem_dist.sample(Ladder.create(tmp_path / name, [folder], guidance=3, measure=False), **plans).astype(int)
        for name, folder in (("whole", pipelines / "sd"), ("variant", tmp_path / "half"))
    ]
    assert np.abs(images[0] - images[1]).mean() < 2


def test_models_may_predict_different_things(pipelines, copy, tmp_path):
    scheduler = "scheduler/scheduler_config.json"
    other = copy("large", scheduler, prediction_type="v_prediction")
    for models in ([pipelines / "sd", other], [other, pipelines / "sd"]):
        ladder = Ladder.create(tmp_path / f"ladder-{models[0].name}", models, measure=False)
        assert {level.name: level.prediction for level in ladder.levels} == {
            "sd": "epsilon",
            "copy-large": "v_prediction",
        }
        ladder.load_level(1, "cpu")
    zero = copy("sd", scheduler, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    refuse("the noise schedule of its pipeline is not that of", tmp_path / "out", pipelines / "sd", zero)


@torch.inference_mode()
def test_unets_of_a_trained_ladder_are_guided_if_they_know_no_class(tmp_path):
    """The class after the last stands for none; the ladder says what its UNets predict, and their patch."""
    scheduler = {"_class_name": "DDPMScheduler", "clip_sample": False}
    process, levels = process_of(scheduler), []
    for name, classes, patch in (("small", 3, 2), ("large", 3, 1), ("other", 2, 1)):
        model = {"block_out_channels": [8], "norm_num_groups": 4, "layers_per_block": 1}
        model |= {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
        level = new_unet_level((1, 8, 8), classes, patch, "v_prediction", process, model, None)
        levels.append(save_level(tmp_path / "trained", name, level, torch.float32))
    trained = tmp_path / "trained"
    save_ladder(trained, "trained", (1, 8, 8), ["a", "b"], scheduler, levels)
    ladder = Ladder.create(tmp_path / "ladder", [trained / "small", trained / "large"], guidance=3, measure=False)
    assert ladder.labels == ("a", "b")
    assert {(level.prediction, level.patch) for level in ladder.levels} == {("v_prediction", 1), ("v_prediction", 2)}
    plain, guided = (
        ladder.load_level([level.name for level in ladder.levels].index(name) + 1, "cpu")
        for name in ("large", "large guided")
    )
    x, t, label = torch.randn(2, 1, 8, 8), torch.full((2,), 500.0), torch.tensor([0, 1])
    none = plain(x, t, {LABEL: torch.tensor([2, 2])})
    value = plain(x, t, {LABEL: label})
    assert not torch.equal(none, value)
    torch.testing.assert_close(guided(x, t, ladder.completed({LABEL: label})), value + 2 * (value - none))
    assert mlem_dist.sample(ladder, num=2, steps=4, nfe=4).shape == (2, 8, 8, 1)
    refuse("other was not trained without its condition", tmp_path / "out", trained / "other", guidance=3)


def test_each_model_computes_in_its_precision(pipelines, tmp_path):
    ladder = Ladder.create(
        tmp_path / "ladder",
        [pipelines / "sd", pipelines / "large"],
        precision=["bfloat16", "float32"],
        measure=False,
    )
    low, high = (ladder.load_level(number, "cpu") for number in (1, 2))
    assert next(low.parameters()).dtype == torch.bfloat16
    assert next(high.parameters()).dtype == torch.float32
    assert next(ladder.load_level(2, "cpu", "bfloat16").parameters()).dtype == torch.bfloat16
    # Whose first tensor is a buffer.
    sd3 = make_pipeline("sd3", tmp_path / "sd3")
    other = Ladder.create(tmp_path / "other", [sd3], precision="bfloat16", measure=False)
    assert {parameter.dtype for parameter in other.load_level(1, "cpu").parameters()} == {torch.bfloat16}


def refuse(message: str, out: Path, *models: object, **options: object) -> None:
    with pytest.raises(UsageError, match=message):
        Ladder.create(out, models, measure=False, **options)
    assert not out.exists()


def test_what_does_not_fit_is_named(pipelines, copy, tmp_path):
    out = tmp_path / "out"
    sd, large, sdxl, dit, pixels = (pipelines / name for name in ("sd", "large", "sdxl", "dit", "pixels"))
    refuse(
        "copy-sd: the noise schedule of its pipeline is not that of",
        out,
        copy("sd", "scheduler/scheduler_config.json", beta_end=0.02),
        large,
    )
    refuse("text of width 16, and the text encoders of .*sdxl give 40", out, sd, sdxl)
    refuse("noise schedule", out, pixels, sd)
    refuse("noise schedule", out, dit, sd)
    shutil.copytree(sd / "unet", tmp_path / "alone")
    refuse("alone: it takes text, which the DiTPipeline .* does not give", out, tmp_path / "alone", pipeline=dit)
    refuse("alone: its samples have 4 channels, expected 1 or 3", out, tmp_path / "alone", pipeline=pixels)
    refuse("guidance.*was not trained without its condition", out, pixels, guidance=3)
    refuse("`guidance` 0.5: expected a scale above 1", out, sd, guidance=0.5)
    refuse("expected a start and a stop", out, sd, guidance=(3, 0.5, 0.5))
    refuse("`guide_with` sdxl: expected one of the models, sd", out, sd, guidance=3, guide_with="sdxl")
    refuse("`guide_with` sd: no level is guided", out, sd, guide_with="sd")
    refuse("`size` 15x16: expected multiples of 2", out, sd, size=(16, 15))
    refuse("`precision` 'int8': expected float32", out, sd, precision="int8")
    refuse("`models` is empty", out)


def test_another_decoder_is_refused_but_not_a_model_alone(pipelines, copy, tmp_path):
    folder = copy("sd")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refuse("copy-sd: its decoder is not that of", tmp_path / "out", folder, pipelines / "large")
    shutil.copytree(folder / "unet", tmp_path / "alone")
    ladder = Ladder.create(tmp_path / "ladder", [tmp_path / "alone", pipelines / "large"], measure=False)
    assert [level.name for level in ladder.levels] == ["alone", "large"]


def test_models_that_are_no_drifts_are_refused(pipelines, copy, tmp_path):
    out = tmp_path / "out"
    refuse(
        "takes 9 channels and predicts 4, as models for inpainting", out, copy("sd", "unet/config.json", in_channels=9)
    )
    refuse("time_cond_proj_dim .* consistency models", out, copy("large", "unet/config.json", time_cond_proj_dim=8))
    refuse(
        "norm_type of its model is 'ada_norm_single'",
        out,
        copy("dit", "transformer/config.json", norm_type="ada_norm_single"),
    )
    refuse(
        "its class is 'Flux2Transformer2DModel', expected one of",
        out,
        copy("sdxl", "unet/config.json", _class_name="Flux2Transformer2DModel"),
    )
    refuse("SANA-Sprint is distilled", out, copy("sana", "model_index.json", _class_name="SanaSprintPipeline"))
    sprint = shutil.copytree(pipelines / "sana" / "transformer", tmp_path / "sprint")
    config = json.loads((sprint / "config.json").read_text())
    (sprint / "config.json").write_text(json.dumps(config | {"guidance_embeds": True}))
    refuse("guidance_embeds of its model is true", out, sprint, pipeline=pipelines / "sana")
    refuse(
        "it takes resolution, which the PixArtSigmaPipeline .* does not give",
        out,
        copy("pixart-sigma", "transformer/config.json", use_additional_conditions=True),
    )
    refuse("no such folder; expected the folder of a pipeline", out, tmp_path / "nothing" / "here" / "at all")
    (tmp_path / "empty").mkdir()
    refuse("neither model_index.json nor config.json", out, tmp_path / "empty")
    save_file({"unet.lora_A.weight": torch.zeros(1)}, tmp_path / "style.safetensors")
    refuse("a LoRA, expected a model; .*fuse_lora.*unload_lora_weights", out, tmp_path / "style.safetensors")
    (tmp_path / "style").mkdir()
    (tmp_path / "style.safetensors").rename(tmp_path / "style" / "pytorch_lora_weights.safetensors")
    refuse("a LoRA, expected a model; .*fuse_lora", out, tmp_path / "style")
    beside = shutil.copytree(pipelines / "dit", tmp_path / "beside")
    weights = beside / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(weights) | {"proj_out_1.lora_A.default_0.weight": torch.zeros(1)}, weights)
    refuse("hold a LoRA beside those of the model; .*unload_lora_weights", out, beside)
    save_file({"model.diffusion_model.weight": torch.zeros(1)}, tmp_path / "whole.safetensors")
    refuse("is a file without a UNet of Stable Diffusion", out, tmp_path / "whole.safetensors")
    config = {"_class_name": ControlNetModel.__name__}
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / "config.json").write_text(json.dumps(config))
    refuse("a ControlNet steers another model by a picture", out, tmp_path / "control", pipeline=pipelines / "sd")


def test_pixart_may_name_the_class_of_which_it_was_a_part(copy, tmp_path):
    folder = copy("pixart-sigma", "transformer/config.json", _class_name="Transformer2DModel", num_vector_embeds=None)
    ladder = Ladder.create(tmp_path / "ladder", [folder], measure=False)
    assert ladder.levels[0].kind == "PixArtTransformer2DModel"
    assert ladder.load_level(1, "cpu")


def test_models_that_take_the_guidance_scale_have_one_level(tmp_path):
    dev, schnell = (make_pipeline(f"flux-{name}", tmp_path / f"flux-{name}") for name in ("dev", "schnell"))
    given = {"size": (16, 16), "measure": False}
    for scale, options in ((3.5, {}), (5.0, {"guidance": 5.0})):
        ladder = Ladder.create(tmp_path / f"scale-{scale}", [schnell, dev], **options, **given)
        guidance = {level.name: level.guidance for level in ladder.levels}
        assert guidance == {"flux-schnell": UNGUIDED, "flux-dev": Guidance(scale, embedded=True)}
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"the best level .* takes the scale of guidance as an input"):
        mlem_dist.sample(ladder, prompts=["a"], negative_prompts="b")
    raw = json.loads((ladder.folder / "ladder.json").read_text())
    raw["levels"][-1]["guidance"] = {"scale": 3.0}
    (ladder.folder / "ladder.json").write_text(json.dumps(raw))
    with pytest.raises(UsageError, match="embedded of its guidance is false, expected true"):
        Ladder.load(ladder.folder)
    alone = tmp_path / "alone"
    shutil.copytree(dev / "transformer", alone)
    config = json.loads((alone / "config.json").read_text()) | {"in_channels": 384, "out_channels": 64}
    (alone / "config.json").write_text(json.dumps(config))
    sd3 = make_pipeline("sd3", tmp_path / "sd3")
    refuse("`true_guidance` 1: expected a scale above 1", out, dev, true_guidance=1, size=(16, 16))
    refuse("it is for models of FLUX; sd3 takes `guidance`", out, sd3, true_guidance=2, size=(16, 16))
    refuse("flux-schnell takes no guidance", out, dev, schnell, guidance=3, size=(16, 16))
    refuse("give it alone, without an interval", out, dev, guidance=(3, 0, 0.5), size=(16, 16))
    refuse("give it alone, .*`guide_with`", out, schnell, dev, guidance=3, guide_with="flux-dev", size=(16, 16))
    refuse("`size` 16x18: expected multiples of 4, 2 times the decoder's", out, dev, size=(18, 16))
    refuse("takes 384 channels and predicts 64, as models of FLUX for filling", out, alone, pipeline=dev)
    refuse("pooled of width 16, and the text encoders of .*sd3 give 40", out, dev, pipeline=sd3)
    for folder in (dev, sd3):
        index = json.loads((folder / "model_index.json").read_text())
        changed = {"flux-dev": "FluxFillPipeline", "sd3": "StableDiffusion3ControlNetPipeline"}[folder.name]
        (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": changed}))
        refuse(f"it is a {changed}, expected one of .*FluxPipeline", out, folder)


def test_weights_that_are_pickles_or_missing_are_refused(pipelines, copy, tmp_path):
    out = tmp_path / "out"
    folder = copy("sd")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    refuse("lacks diffusion_pytorch_model.safetensors; diffusion_pytorch_model.bin is not read", out, folder)
    folder = copy("sdxl")
    (folder / "text_encoder" / "model.safetensors").rename(folder / "text_encoder" / "pytorch_model.bin")
    refuse("text_encoder has no weights in safetensors files", out, folder)
    folder = copy("large")
    index = {"weight_map": {"some": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    refuse("names diffusion_pytorch_model-00001-of-00002.safetensors, which is not there", out, folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`prompts` is missing: ladder .* takes them"),
        ({"prompts": "a cat"}, "`prompts` is 'a cat', expected a list"),
        ({"prompts": []}, r"`prompts` is \[\], expected a list"),
        ({"prompts": ["a", None]}, "`prompts`: number 1 is None, expected a text"),
        ({"prompts": ["a", "b"], "negative_prompts": ["c"]}, "`negative_prompts`: 1 for 2 prompts, expected as many"),
        ({"prompts": ["a"], "negative_prompts": [3]}, "`negative_prompts`: number 0 is 3, expected a text or None"),
        ({"prompts": ["a"], "labels": [0]}, "`labels` 0: the ladder has no classes"),
        ({"prompts": ["a"], "num": 2}, "`num` 2: expected at most 1, the number of prompts"),
        ({"prompts": ["a"], "precision": "int8"}, "precision is 'int8', expected one of"),
    ],
)
def test_arguments_that_a_ladder_of_prompts_cannot_take_are_refused(prompted, arguments, message):
    with pytest.raises(UsageError, match=message):
        mlem_dist.sample(prompted, nfe=2, steps=2, **arguments)


def test_prompts_need_an_extra_and_a_ladder_that_takes_them(prompted, fashion, monkeypatch):
    with pytest.raises(UsageError, match="ladder 'fashion' is not conditioned on prompts; leave them out"):
        mlem_dist.sample(fashion, prompts=["a"])
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match="prompts need transformers, which is not installed: install the extra `text`"):
        mlem_dist.sample(prompted, prompts=["a"], nfe=2, steps=2)


def test_a_folder_that_holds_something_is_not_overwritten(pipelines, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds something else"):
        Ladder.create(tmp_path, [pipelines / "sd"], measure=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_gaussian_is_fitted_to_samples_of_the_best_level(pipelines, tmp_path):
    """Its mean depends on the prompt, and the same command fits the same Gaussian."""
    prompts = [f"{word} {number}" for number in range(10) for word in ("a", "bb", "ccc")]
    given = {"models": [pipelines / "sd"], "guidance": 3, "measure": False, "gaussian": 60, "prompts": prompts}
    ladder = Ladder.create(tmp_path / "sd", **given)
    assert [level.name for level in ladder.levels] == ["gaussian", "sd", "sd guided"]
    assert Ladder.create(tmp_path / "again", **given).digest == ladder.digest
    level = ladder.load_level(1, "cpu")
    samples = replace(ladder, prompts=tuple(prompts))
    means = level.means(samples.condition(torch.arange(30)), 30)
    assert means.shape == (30, np.prod(ladder.sample_shape))
    assert (means - means[0]).abs().max() > 0
    images = mlem_dist.sample(ladder, prompts=prompts[:4], seeds=range(4), nfe=3, steps=10)
    assert len(images) == 4


def test_the_mean_of_a_gaussian_depends_on_captions_of_images(pipelines, tmp_path, dark_and_bright):
    given = {"models": [pipelines / "sd"], "measure": False, "gaussian": dark_and_bright}
    ladder = replace(Ladder.create(tmp_path / "sd", **given), prompts=("dark", "bright"))
    level, decoder = ladder.load_level(1, "cpu"), ladder.load_decoder("cpu")
    means = level.means(ladder.condition(torch.arange(2)), 2).reshape(2, *ladder.sample_shape)
    shades = torch.stack([torch.full(ladder.image_shape, value / 127.5 - 1) for value in (20.0, 200.0)])
    distances = [[float((mean - latent).square().mean()) for latent in decoder.latents(shades)] for mean in means]
    assert distances[0][0] < distances[0][1]
    assert distances[1][1] < distances[1][0]


@pytest.mark.parametrize("kind", ["sd", "sana", "pixels"])
def test_a_gaussian_is_fitted_to_images(kind, pipelines, tmp_path):
    """To their latents in the unit of the pipeline, if samples are latents."""
    rng = np.random.default_rng(0)
    ladder = Ladder.create(tmp_path / "alone", [pipelines / kind], measure=False)
    channels, *size = ladder.image_shape
    (tmp_path / "images").mkdir()
    for number in range(40):
        shade = rng.integers(40, 200)
        pixels = np.full((*size, channels), shade, np.uint8) + rng.integers(0, 20, (*size, 1), np.uint8)
        Image.fromarray(pixels.squeeze()).save(tmp_path / "images" / f"{number}.png")
    made = Ladder.create(tmp_path / "made", [pipelines / kind], measure=False, gaussian=tmp_path / "images")
    assert made.levels[0].kind == "gaussian"
    level = made.load_level(1, "cpu")
    assert 0 < float(level.variance.max()) < level.mean.numel()
    decoder = made.load_decoder("cpu")
    if decoder is None:
        assert (level.mean[0] - level.mean[0].mean()).abs().max() < 0.3
    else:
        pictures = torch.stack([torch.full(made.image_shape, v) for v in (-0.5, 0.0, 0.5)])
        latents = decoder.latents(pictures)
        encoded = decoder.model.encode(pictures)
        again = encoded.latent if kind == "sana" else encoded.latent_dist.mode()
        torch.testing.assert_close(latents, again * decoder.config.scaling_factor)
    with pytest.raises(UsageError, match="expected a folder of images"):
        Ladder.create(tmp_path / "no", [pipelines / kind], measure=False, gaussian=tmp_path / "nowhere")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"gaussian": 3}, "at least 16"),
        ({"gaussian": 20}, "need prompts"),
        ({"prompts": ["a cat"]}, "give their number as `gaussian`"),
    ],
)
def test_samples_for_a_gaussian_that_cannot_be_made_are_refused(given, reason, pipelines, tmp_path):
    with pytest.raises(UsageError, match=reason):
        Ladder.create(tmp_path / "no", [pipelines / "sd"], measure=False, **given)
    assert not (tmp_path / "no").exists()
