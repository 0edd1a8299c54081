"""The same images for a table of prompts by mlem-dist, by a pipeline of diffusers in a loop, and by Ray Data around it.

python benchmarks/runtime/prompt_peers.py --out benchmarks/results/prompt_peers.json

The pipeline is Stable Diffusion 1.5 at an eighth of its width with random weights, for images of 256x256: text encoder,
UNet and decoder take about the shares of time that they take in the original. All ways evaluate the guided UNet at each
of 20 steps. Each way runs in a process of its own, one after the other, with one thread per process but for the loop,
which has both cores.
"""

import json
import os
import platform
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from processes import SCRIPT, watched

STEPS, SCALE, BATCH, SIZE = 20, 7.5, 4, 256


def save_pipeline(folder: Path) -> None:
    """A pipeline with random weights."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    folder.mkdir()
    characters = [c for c in string.printable if not c.isspace()]
    tokens = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    end = len(tokens) - 1
    text = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=12,
        num_attention_heads=12,
        eos_token_id=end,
        bos_token_id=end - 1,
        pad_token_id=end,
    )
    unet = UNet2DConditionModel(
        sample_size=SIZE // 8,
        block_out_channels=(40, 80, 160, 160),
        cross_attention_dim=96,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=8,
        sample_size=SIZE,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    pipeline = StableDiffusionPipeline(
        vae, CLIPTextModel(text), tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder)


class Pipeline:
    """The pipeline as its documentation has it, with a generator for each image."""

    def __init__(self, folder: str, threads: int = 1) -> None:
        import torch
        from diffusers import DiffusionPipeline

        torch.set_num_threads(threads)
        self.pipeline: Any = DiffusionPipeline.from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        import torch

        images = self.pipeline(
            list(batch["prompt"]),
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
            generator=[torch.Generator("cpu").manual_seed(int(i)) for i in batch["id"]],
            output_type="np",
        ).images
        from mlem_dist.dataset.shards import PNG

        return {"id": batch["id"], "image": PNG.files((images * 255).round().astype(np.uint8))}


def loop(folder: Path, prompts: Sequence[str], out: Path, cores: int) -> dict[str, Any]:
    """A loop over batches in one process, with all cores."""
    make = Pipeline(f"{folder}/pipeline", cores)
    began = time.monotonic()
    parts = []
    for first in range(0, len(prompts), BATCH):
        ids = np.arange(first, min(first + BATCH, len(prompts)))
        made = make({"id": ids, "prompt": np.array([prompts[i] for i in ids])})
        parts.append(pa.table({"id": ids, "image": made["image"]}))
    out.mkdir()
    pq.write_table(pa.concat_tables(parts), out / "images.parquet")
    return {"seconds": time.monotonic() - began}


def ray_data(folder: Path, prompts: Sequence[str], out: Path, cores: int) -> dict[str, Any]:
    """A pool of actors with a pipeline each; the seconds are without loading."""
    import ray

    ray.init(address="local", num_cpus=cores, include_dashboard=False, log_to_driver=False)
    rows = [{"id": i, "prompt": prompt} for i, prompt in enumerate(prompts)]
    marks = str(folder / "marks")
    Path(marks).mkdir()

    class Marked(Pipeline):
        """Notes when it is ready."""

        def __init__(self) -> None:
            super().__init__(f"{folder}/pipeline")
            Path(marks, str(os.getpid())).write_text(str(time.time()))

    made = ray.data.from_items(rows, override_num_blocks=len(rows) // BATCH).map_batches(
        Marked, batch_size=BATCH, concurrency=cores, num_cpus=0.5
    )
    made.write_parquet(str(out))
    return {"seconds": time.time() - min(float(mark.read_text()) for mark in Path(marks).iterdir())}


def ours(folder: Path, prompts: Sequence[str], out: Path, cores: int, placement: str = "auto") -> dict[str, Any]:
    """The command line; the seconds are without loading, as its report has them."""
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    command = [SCRIPT, "generate", "--ladder", f"{folder}/ladder", "--prompts", f"{folder}/prompts.jsonl"]
    command += ["--out", str(out), "--nfe", str(STEPS), "--steps", str(STEPS), "--devices", str(cores)]
    command += ["--block-size", str(BATCH), "--shard-size", str(BATCH), "--address", "local"]
    done = subprocess.run([*command, "--placement", placement, "--json"], check=True, stdout=subprocess.PIPE, text=True)
    report = json.loads(done.stdout)
    return {"seconds": report["sampling_seconds"], "busy_seconds": report["busy_seconds"]}


def pools(folder: Path, prompts: Sequence[str], out: Path, cores: int) -> dict[str, Any]:
    """As `ours`, with encoder and decoder in pools of their own, so that their seconds are known."""
    return ours(folder, prompts, out, cores, "pools")


WAYS: dict[str, Callable[[Path, Sequence[str], Path, int], dict[str, Any]]] = {
    "mlem-dist on Ray": ours,
    "mlem-dist on Ray, a pool for each stage": pools,
    "DiffusionPipeline in a loop": loop,
    "Ray Data around DiffusionPipeline": ray_data,
}


def images_of(out: Path) -> np.ndarray:
    """The images of a way in the order of their ids, (B, H, W, 3)."""
    import io

    from PIL import Image

    table = pq.read_table(out / "data" if (out / "data").exists() else out)
    ids, values = (table["sample_id" if "sample_id" in table.column_names else "id"], table["image"].to_pylist())
    files = [value["bytes"] if isinstance(value, dict) else value for value in values]
    return np.stack([np.array(Image.open(io.BytesIO(files[i]))) for i in np.argsort(ids.to_numpy())])


@click.command()
@click.option("--num", default=48, show_default=True)
@click.option("--cores", default=2, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="For one way, in this process.")
@click.option("--only", type=click.Choice(list(WAYS)))
@click.option("--out", type=click.Path(path_type=Path))
def main(num: int, cores: int, folder: Path | None, only: str | None, out: Path | None) -> None:
    """Compare all ways."""
    prompts = [f"picture {i} of {['a red house', 'an old tree', 'two dogs'][i % 3]}" for i in range(num)]
    if folder and only:
        print(json.dumps(WAYS[only](folder, prompts, folder / str(list(WAYS).index(only)), cores)))
        return
    assert out, "--out is missing"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        from mlem_dist.ladder.ladder import Ladder

        save_pipeline(Path(work) / "pipeline")
        Ladder.create(Path(work) / "ladder", [Path(work) / "pipeline"], guidance=SCALE)
        for index, name in enumerate(WAYS):
            command = [sys.executable, __file__, "--num", str(num), "--cores", str(cores), "--folder", work]
            output, used, memory = watched([*command, "--only", name], os.environ | {"OMP_NUM_THREADS": "1"})
            row = {"way": name, "num": num, **json.loads(output.splitlines()[-1])}
            row |= {"images_per_second": num / row["seconds"], "cpu_seconds": used, "memory_mib": memory}
            difference = np.abs(images_of(Path(work) / str(index)).astype(int) - images_of(Path(work) / "0"))
            rows.append(row | {"mean_difference": difference.mean(), "largest_difference": int(difference.max())})
            print(rows[-1], flush=True)
    out.write_text(json.dumps({"machine": f"{platform.machine()}, {cores} cores", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
