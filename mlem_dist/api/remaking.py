"""An image of a dataset, made again from its row."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlem_dist.api.arguments import Device, load_ladder, local_device
from mlem_dist.dataset.prompts import NEGATIVE_PROMPT, PROMPT, table_of_texts
from mlem_dist.dataset.schema import SCALE, SEED
from mlem_dist.dataset.shards import Encoding
from mlem_dist.engine.job import Job
from mlem_dist.errors import UsageError
from mlem_dist.files import check_writable
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.schema import UNGUIDED
from mlem_dist.models.encoder import BINNED
from mlem_dist.solver.plan import plan_from_dict, recipe_from_dict
from mlem_dist.store import Location, parse_location


@dataclass(frozen=True, eq=False)
class Remade:
    """An image made again.

    Attributes:
        row: the row of the dataset, without the image.
        stored, remade: both images as their files have them, uint8 (H, W, C).
        lines: lines of Python that begin with the same noise by diffusers.
        picture: path of a PNG of both images and ten times their difference.
    """

    row: dict[str, Any]
    stored: np.ndarray
    remade: np.ndarray
    lines: str
    picture: Path

    @property
    def difference(self) -> np.ndarray:
        """Absolute difference of the images, in grey levels, int64 (H, W, C)."""
        return np.abs(self.stored.astype(np.int64) - self.remade)


def remake(
    dataset: str | Location,
    id: int,
    *,
    ladder: str | Path | Ladder | None = None,
    out: Path | None = None,
    device: Device = "auto",
) -> Remade:
    """Make an image of a dataset again from its row, in this process, and write a picture of both.

    Args:
        dataset: the dataset's folder, or its URL in an object store.
        id: the image's sample id.
        ladder: the ladder, if it is no longer where it was.
        out: path of the PNG file; by default `remake-ID.png` in the current folder.
        device: "cpu", "cuda", or "auto" for a GPU if there is one.

    Raises:
        UsageError: if there is no such image, the ladder is another one, or `out` cannot be written.
    """
    from mlem_dist.dataset.manifest import read_manifest
    from mlem_dist.dataset.rows import row_of
    from mlem_dist.engine.inline import sample_blocks
    from mlem_dist.report.sheet import save_comparison

    place = parse_location(dataset) if isinstance(dataset, str) else dataset
    picture = out or Path(f"remake-{id}.png")
    check_writable(picture.parent)
    manifest = read_manifest(place)
    row = row_of(place, manifest, id)
    config = manifest.config
    loaded = load_ladder(config["ladder"] if ladder is None else ladder)
    if loaded.digest != config["digest"]:
        raise UsageError(f"ladder {loaded.source!r} is not the one that {place} was made with; give that as `ladder`")
    stored = _pixels(row.pop("image")["bytes"], loaded)
    loaded.check_models()
    job = _job(config, row, id, loaded, local_device(device))
    (images,) = sample_blocks(job, loaded, lambda _: row[SEED])
    # Formats that lose something change both alike.
    (file,) = Encoding(config.get("image_format", "png"), config.get("image_quality")).files(images)
    remade = _pixels(file, loaded)
    save_comparison(stored, remade, picture)
    return Remade(row, stored, remade, diffusers_lines(loaded, job, row), picture)


def _pixels(file: bytes, ladder: Ladder) -> np.ndarray:
    """The image in a file, uint8 (H, W, C)."""
    from PIL import Image

    with Image.open(io.BytesIO(file)) as opened:
        # WebP knows no grey images.
        pixels = np.array(opened.convert("L" if ladder.image_shape[0] == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], -1)


def _job(config: dict[str, Any], row: dict[str, Any], id: int, ladder: Ladder, device: str) -> Job:
    """The job of the row alone, by the plan of its block."""
    raw = config["plan"]
    fitted = "fire" in raw
    plan = plan_from_dict(raw, len(ladder.levels)) if fitted else recipe_from_dict(raw)
    labels = (row["label"],) if "label" in row else ()
    prompts = table_of_texts([row[PROMPT]], [row.get(NEGATIVE_PROMPT)]) if PROMPT in row else None
    job = Job(
        ladder=ladder.source,
        digest=ladder.digest,
        num=1,
        labels=labels,
        solver=config["solver"],
        steps=config["steps"],
        plan=plan,
        seed=config["seed"],
        block_size=1,
        shard_size=1,
        device=device,
        precision=config["precision"],
        grid=config["grid"],
        prompts=prompts,
        guidance=row.get(SCALE, config.get("guidance")),
    )
    return replace(job, plan=job.block_plan(id // config["block_size"]))


def diffusers_lines(ladder: Ladder, job: Job, row: dict[str, Any]) -> str:
    """Lines of Python that begin with a row's noise by diffusers.

    They go on with the pipeline of the prompts, if the best level's model is its own.
    """
    shape = ", ".join(map(str, ladder.sample_shape))
    generator = f'torch.Generator("cpu").manual_seed({row[SEED]})'
    lines = ["import torch", f"generator = {generator}"]
    own = ladder.encoder is not None and Path(ladder.levels[-1].path).is_relative_to(ladder.encoder.path)
    if ladder.encoder is None or not own or not Path(ladder.encoder.path).is_absolute():
        return "\n".join([*lines, f"noise = torch.randn((1, {shape}), generator=generator)"])
    guidance = ladder.levels[-1].guidance
    scale = job.guidance if job.guidance is not None else guidance.scale if guidance != UNGUIDED else 1.0
    _, height, width = ladder.image_shape
    arguments = [repr(row[PROMPT])]
    if row.get(NEGATIVE_PROMPT) is not None:
        arguments.append(f"negative_prompt={row[NEGATIVE_PROMPT]!r}")
    arguments += [f"guidance_scale={scale:g}", f"num_inference_steps={job.steps}", f"height={height}"]
    arguments += [f"width={width}", "generator=generator"]
    if ladder.encoder.kind in BINNED:
        arguments.append("use_resolution_binning=False")
    return "\n".join(
        [
            *lines,
            "from diffusers import DiffusionPipeline",
            f"pipeline = DiffusionPipeline.from_pretrained({ladder.encoder.path!r})",
            f"image = pipeline({', '.join(arguments)}).images[0]",
        ]
    )
