"""With as many evaluations as steps, images are those of the pipelines of diffusers, for every family."""

import inspect
import io
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pipelines import IMAGE_SIZES, make_pipeline
from torch.utils._python_dispatch import TorchDispatchMode

import mlem_dist
from mlem_dist import api
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.models.graphs import Graphed, as_run
from mlem_dist.models.guidance import Evaluation
from mlem_dist.models.level import ModelLevel, placeholder

STEPS, SEEDS, SCALE = 6, [3, 8], 7.0
PROMPTS, NEGATIVE = ["a cat", "dogs on a hill"], ["ugly", "bad hands, 7 fingers; TEXT"]
OTHER_PROMPTS = ["b", "mice"]
OTHER_NEGATIVE = ["rain on all the roofs of the old town, and no one there", "QQQQQQ#######"]
MEAN, MOST = 0.25, 3
"""Largest mean and single differences from a pipeline, in grey levels."""
ZERO = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@dataclass(frozen=True)
class Case:
    """A pipeline, and the arguments that ladders and the pipeline are given for the same images."""

    kind: str
    scheduler: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    true_guidance: float | None = None


def prompted(kind: str, negative: Any = NEGATIVE, **scheduler: Any) -> Case:
    texts = {"prompts": PROMPTS, "negative_prompts": negative}
    return Case(kind, scheduler, texts, {"prompt": PROMPTS, "negative_prompt": negative, "guidance_scale": SCALE})


def masked(kind: str, negative: Any = NEGATIVE, solver: str = "ode", **scheduler: Any) -> Case:
    """A case of a pipeline that has no difference between no negative prompts and empty ones."""
    height, width = IMAGE_SIZES.get(kind, (16, 16))
    case = prompted(kind, negative, **scheduler)
    case.ours.update(solver=solver)
    case.theirs.update(height=height, width=width, use_resolution_binning=False, negative_prompt=negative or "")
    return case


def flux(kind: str, guidance: dict[str, float], **scheduler: Any) -> Case:
    height, width = IMAGE_SIZES[kind]
    theirs = {"prompt": PROMPTS, "height": height, "width": width, **guidance}
    return Case(kind, scheduler, {"prompts": PROMPTS}, theirs)


def true_flux(kind: str, guidance: dict[str, float]) -> Case:
    """A case of FLUX with unconditional evaluations."""
    case = flux(kind, {**guidance, "true_cfg_scale": 2.5})
    case.ours.update(negative_prompts=NEGATIVE)
    case.theirs.update(negative_prompt=NEGATIVE)
    return replace(case, true_guidance=2.5)


def chroma(negative: Any, **scheduler: Any) -> Case:
    height, width = IMAGE_SIZES["chroma"]
    case = prompted("chroma", negative, **scheduler)
    case.theirs.update(height=height, width=width)
    return case


CASES = {
    "pixels": Case("pixels", theirs={"batch_size": 2}),
    "dit": Case("dit", ours={"labels": [1, 7]}, theirs={"class_labels": [1, 7], "guidance_scale": SCALE}),
    "sd": prompted("sd"),
    "sd without negative prompts": prompted("sd", None),
    "sd of v, zero terminal SNR": prompted("sd", **ZERO),
    "sdxl": prompted("sdxl"),
    "sdxl without negative prompts": prompted("sdxl", None),
    "sdxl with empty negative prompts": prompted("sdxl", ["", ""]),
    "pixart-alpha": masked("pixart-alpha"),
    "pixart-sigma without negative prompts": masked("pixart-sigma", None),
    "sana": masked("sana", solver="dpm++"),
    "sana of first order, without negative prompts": masked("sana", None, solver_order=1),
    "sd3": prompted("sd3"),
    "sd3 without negative prompts, dynamic shift": prompted("sd3", None, use_dynamic_shifting=True),
    "sd3 without T5": prompted("sd3-clip"),
    "flux-dev": flux("flux-dev", {"guidance_scale": SCALE}),
    "flux-dev, static shift": flux("flux-dev", {"guidance_scale": SCALE}, use_dynamic_shifting=False),
    "flux-schnell": flux("flux-schnell", {}),
    "flux-dev, true guidance": true_flux("flux-dev", {"guidance_scale": SCALE}),
    "flux-schnell, true guidance": true_flux("flux-schnell", {}),
    "chroma": chroma(NEGATIVE),
    "chroma without negative prompts, dynamic shift": chroma(None, use_dynamic_shifting=True),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders of a case's pipeline and of a ladder of it."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(case: Case) -> tuple[Path, Path]:
        key = repr((case.kind, case.scheduler, case.true_guidance))
        if key not in made:
            folder = tmp_path_factory.mktemp("pipelines")
            pipeline = make_pipeline(case.kind, folder / case.kind, **case.scheduler)
            guidance = None if case.kind in ("pixels", "flux-schnell") else SCALE
            options = {"guidance": guidance, "true_guidance": case.true_guidance, "size": IMAGE_SIZES.get(case.kind)}
            Ladder.create(folder / "ladder", [pipeline], measure=False, **options)
            made[key] = pipeline, folder / "ladder"
        return made[key]

    return get


def run_pipeline(folder: Path, change: Callable[..., Any] | None = None, **arguments: Any) -> np.ndarray:
    """The images of a pipeline, float (2, H, W, C) from 0 to 255; `change` is a hook before its transformer."""
    parts = json.loads((folder / "model_index.json").read_text()).items()
    absent = {name: None for name, value in parts if value == [None, None]}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **absent)
    if isinstance(pipeline, diffusers.DDPMPipeline):
        pipeline = diffusers.DDIMPipeline(pipeline.unet, pipeline.scheduler)
    if change:
        pipeline.transformer.register_forward_pre_hook(change, with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    images = pipeline(generator=generators, num_inference_steps=STEPS, output_type="np", **arguments).images
    return np.asarray(images) * 255


def assert_same(images: np.ndarray, expected: np.ndarray) -> None:
    difference = np.abs(images - expected.round())
    assert difference.mean() <= MEAN
    assert difference.max() <= MOST


@pytest.fixture(params=CASES, scope="module")
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def expected(case, folders):
    images = run_pipeline(folders(case)[0], **case.theirs)
    assert images.std() > 20
    return images


def test_samples_are_those_of_the_pipeline(case, folders, expected):
    ladder = Ladder.load(folders(case)[1])
    images = mlem_dist.sample(ladder, seeds=SEEDS, nfe=STEPS, steps=STEPS, grid="model", **case.ours)
    assert images.shape == expected.shape
    assert_same(images, expected)


def stored_images(out: Path) -> list[np.ndarray]:
    """The images of a dataset, uint8 (H, W, C) each."""
    images = pq.read_table(out / "data")["image"].to_pylist()
    return [np.asarray(Image.open(io.BytesIO(image["bytes"]))) for image in images]


# That Ray writes the bytes of one process is tested for all families in test_family_ladders.py.
@pytest.mark.parametrize(
    ("name", "choice"),
    [
        ("dit", {"engine": "inline"}),
        ("sdxl", {"placement": "pools"}),
        ("flux-dev", {"engine": "inline"}),
        ("sana", {"placement": "together"}),
    ],
)
def test_datasets_are_those_of_the_pipeline(name, choice, folders, tmp_path, local_ray):
    case = CASES[name]
    pipeline, ladder = folders(case)
    # Sample i has the seed 3 + i, and the sixth the second's of the pipeline.
    take = {"num": 6, "seed": SEEDS[0], "block_size": 3, "shard_size": 6, "devices": 1}
    ours = {
        key: [values[i == 5] for i in range(6)] if key.endswith("prompts") else values
        for key, values in case.ours.items()
    }
    mlem_dist.generate(
        ladder, out=str(tmp_path / "out"), nfe=STEPS, steps=STEPS, grid="model", **choice, **take, **ours
    )
    table, images = pq.read_table(tmp_path / "out" / "data"), stored_images(tmp_path / "out")
    assert_same(np.stack([images[0], images[5]]), run_pipeline(pipeline, **case.theirs))
    if "prompts" in ours:
        assert table["prompt"].to_pylist() == ours["prompts"]
    if "negative_prompts" in ours:
        assert table["negative_prompt"].to_pylist() == ours["negative_prompts"]


def test_lines_of_a_remade_image_make_it_by_the_pipeline(folders, tmp_path):
    given = {"num": 1, "seed": SEEDS[0], "steps": STEPS, "nfe": STEPS, "engine": "inline", "grid": "model"}
    ladder = folders(CASES["sana"])[1]
    mlem_dist.generate(ladder, out=str(tmp_path / "out"), prompts=PROMPTS[:1], solver="dpm++", **given)
    remade = api.remake(str(tmp_path / "out"), 0, out=tmp_path / "0.png")
    made: dict[str, Any] = {}
    exec(remade.lines, made)
    assert_same(remade.stored, np.asarray(made["image"], float))


MASKED = ("pixart-alpha", "sana", "chroma")
"""Cases whose models take a mask of the tokens."""


def moved(case: Case, folders: Any, expected: np.ndarray, **changes: Any) -> float:
    """Mean change of the pipeline's images by other arguments, relative to `MEAN`."""
    return float(np.abs(run_pipeline(folders(case)[0], **case.theirs | changes) - expected).mean()) / MEAN


def instruction(pipeline: Any) -> dict[str, Any]:
    """The instruction before prompts that is the default of a pipeline's call, if there is one."""
    name = "complex_human_instruction"
    defaults = inspect.signature(type(pipeline).__call__).parameters
    return {name: defaults[name].default} if name in defaults else {}


def masks(case: Case, folders: Any, expected: np.ndarray) -> dict[str, dict[str, Any]]:
    """Arguments of a pipeline with masks that hide nothing, after a check that its own give the same images."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folders(case)[0])
    encoded = pipeline.encode_prompt(PROMPTS, negative_prompt=NEGATIVE, device="cpu", **instruction(pipeline))
    names = ["prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"]
    # Pipelines of packed latents also return the places of tokens.
    texts = [tensor for tensor in encoded if tensor.shape[0] == len(PROMPTS)]
    given = dict(zip(names, texts, strict=True)) | {"prompt": None, "negative_prompt": None}
    assert moved(case, folders, expected, **given) < 0.01
    return {name: {**given, name: torch.ones_like(given[name])} for name in names if "mask" in name}


def doubled_times(_: Any, arguments: Any, keywords: Any) -> Any:
    """Arguments of a transformer with another scale of times."""
    return arguments, {**keywords, "timestep": 2 * keywords["timestep"]}


def scaled(name: str, _: Any, arguments: Any, keywords: Any) -> Any:
    """Arguments of a transformer with another size or aspect ratio."""
    added = keywords["added_cond_kwargs"]
    return arguments, {**keywords, "added_cond_kwargs": {**added, name: 1.5 * added[name]}}


def test_guidance_as_an_input_may_differ_by_row(folders, tmp_path):
    case = CASES["flux-dev"]
    pipeline, ladder = folders(case)
    rows = zip(PROMPTS, SEEDS, (SCALE, 2.0), strict=True)
    lines = [json.dumps(dict(zip(("prompt", "seed", "guidance_scale"), row, strict=True))) for row in rows]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    arguments = {"nfe": STEPS, "steps": STEPS, "grid": "model", "engine": "inline"}
    mlem_dist.generate(ladder, prompts=tmp_path / "prompts.jsonl", out=tmp_path / "out", **arguments)
    images = stored_images(tmp_path / "out")
    expected = [run_pipeline(pipeline, **case.theirs | {"guidance_scale": scale}) for scale in (SCALE, 2.0)]
    assert_same(np.stack(images), np.stack([expected[0][0], expected[1][1]]))


class HostCopies(TorchDispatchMode):
    """Fails at a copy between devices, which a CUDA graph cannot record."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.device != args[0].device:
            raise RuntimeError("a copy between devices")
        return out


@pytest.mark.parametrize("name", ["pixels", "dit", "sd", "sdxl", "pixart-alpha", "sana", "sd3", "flux-dev", "chroma"])
def test_evaluations_that_copy_between_devices_are_not_recorded(name, folders):
    ladder = Ladder.load(folders(CASES[name])[1])
    level = ladder.load_level(len(ladder.levels), "cpu")
    evaluation = next(module for module in level.modules() if isinstance(module, Evaluation)).to("meta")
    model = next(module for module in level.modules() if isinstance(module, ModelLevel))
    with torch.device("meta"):
        x, t = torch.empty(2, *ladder.sample_shape), torch.ones(2)
        condition = placeholder(model.family.inputs(model.model.config), 2)
    # As before recording, the first evaluation makes what is kept for others.
    evaluation(x, t, condition)
    with HostCopies(), nullcontext() if model.family.recorded else pytest.raises(RuntimeError, match="between devices"):
        evaluation(x, t, condition)
    recorded = any(isinstance(module, Graphed) for module in as_run(level, "cuda").modules())
    assert recorded == model.family.recorded


@pytest.mark.parametrize(
    "name", ["dit", "sd", "sd of v, zero terminal SNR", "sdxl", "sd3", "flux-dev", "flux-dev, true guidance", *MASKED]
)
def test_every_input_moves_the_images(name, folders):
    """Otherwise the tests above would show nothing of it."""
    case = CASES[name]
    expected = run_pipeline(folders(case)[0], **case.theirs)
    changes: dict[str, dict[str, Any]] = {"guidance": {"guidance_scale": 1.0}}
    if name == "dit":
        changes["labels"] = {"class_labels": [7, 1]}
    else:
        changes["prompts"] = {"prompt": OTHER_PROMPTS}
    if "negative_prompt" in case.theirs:
        changes |= {
            "negative prompts": {"negative_prompt": OTHER_NEGATIVE},
            "no negative prompts": {"negative_prompt": "" if name in MASKED else None},
        }
    if name in ("sdxl", "sd3"):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folders(case)[0])
        others = (None, None)[: 1 + (name == "sd3")]
        text, negative, pooled, negative_pooled = pipeline.encode_prompt(PROMPTS, *others, negative_prompt=NEGATIVE)
        embedded = {"prompt": None, "negative_prompt": None, "prompt_embeds": text, "negative_prompt_embeds": negative}
        embedded |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": negative_pooled}
        changes |= {
            "pooled embeddings": {**embedded, "pooled_prompt_embeds": pooled.flip(0)},
            "negative pooled embeddings": {**embedded, "negative_pooled_prompt_embeds": negative_pooled.flip(0)},
        }
        assert moved(case, folders, expected, **embedded) < 0.01
    if name == "sdxl":
        changes |= {
            "original sizes": {"original_size": (64, 64)},
            "crops": {"crops_coords_top_left": (5, 5)},
            "target sizes": {"target_size": (64, 32)},
        }
    if name in MASKED:
        changes |= masks(case, folders, expected)
    if name == "sana":
        changes |= {
            "instruction": {"complex_human_instruction": None},
            "scale of times": {"change": doubled_times},
        }
    if name == "pixart-alpha":
        changes |= {
            "resolution": {"change": partial(scaled, "resolution")},
            "aspect ratio": {"change": partial(scaled, "aspect_ratio")},
        }
    if name == "sd3":
        clip = torch.cat([text[:, :77].flip(0), text[:, 77:]], 1)
        changes |= {"CLIP": {**embedded, "prompt_embeds": clip}, "T5": {"prompt_3": OTHER_PROMPTS}}
    if case.true_guidance:
        changes |= {"true guidance": {"true_cfg_scale": 4.0}}
    elif name == "flux-dev":
        changes |= {"CLIP": {"prompt": OTHER_PROMPTS, "prompt_2": PROMPTS}, "T5": {"prompt_2": OTHER_PROMPTS}}
    for what, arguments in changes.items():
        assert moved(case, folders, expected, **arguments) > 20, what
