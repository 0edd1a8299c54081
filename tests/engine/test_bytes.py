"""Images of a few configurations stay the same to the last bit, on one kind of processor."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mlem_dist.api.arguments import find_plan
from mlem_dist.engine.inline import sample_blocks
from mlem_dist.engine.job import Job
from mlem_dist.ladder.ladder import Ladder

CONFIGURATIONS = {
    "pools": {"num": 60, "seed": 1, "nfe": 4},
    "inline, sde": {"num": 60, "seed": 2, "nfe": 4, "solver": "sde"},
    "together, bfloat16": {"num": 40, "seed": 3, "nfe": 4, "precision": "bfloat16"},
    "ranges, drawn impulses": {
        "num": 60,
        "seed": 4,
        "nfe": 6,
        "solver": "sde",
        "increments": "impulse",
        "draw": "independent",
    },
    "inline, dpm++": {"num": 40, "nfe": 6, "solver": "dpm++", "labels": (0, 3, 9)},
    "auto, tuned plan": {"num": 60, "nfe": 10, "steps": 250},
}
"""Arguments of the datasets by name."""

DIGESTS = json.loads(Path(__file__).with_name("digests.json").read_text("utf-8"))
"""SHA-256 of the pixels of each dataset, by processor and version of torch: others round otherwise."""


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    kinds = ["amx_bf16", "avx512_bf16", "avx512f", "avx2"]
    return f"{next((kind for kind in kinds if kind in flags), 'other')}, torch {torch.__version__}"


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_images_are_the_same_to_the_last_bit(fashion: Ladder, name: str):
    if processor() not in DIGESTS:
        pytest.skip(f"no digests of {processor()}")
    arguments = {"labels": tuple(range(10)), "solver": "ode", "steps": 40, "seed": 0} | CONFIGURATIONS[name]
    budget = {key: arguments.pop(key, None) for key in ("nfe", "probabilities", "increments", "draw")}
    place = {key: arguments[key] for key in ("solver", "steps")}
    plan, _ = find_plan(fashion, fashion.cost("cpu"), **place, **budget)
    job = Job(
        ladder=fashion.source,
        digest=fashion.digest,
        plan=plan,
        block_size=20,
        shard_size=20,
        device="cpu",
        **arguments,
    )
    images = np.concatenate(list(sample_blocks(job, fashion)))
    assert hashlib.sha256(images.tobytes()).hexdigest() == DIGESTS[processor()][name]
