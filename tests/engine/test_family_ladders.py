"""Ladders of two sizes of each family have the properties of the bundled ladder."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import IMAGE_SIZES, make_pipeline

import mlem_dist
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.solver.integrate import integrate
from mlem_dist.solver.noise import image_noise
from mlem_dist.solver.plan import held, impulse, single_level
from mlem_dist.solver.steps import solver_table

PROMPTS = ["a cat", "dogs on a hill", "a cat", "", "x" * 100]
SOURCES: dict[str, dict[str, Any]] = {
    "pixels": {},
    "dit": {"labels": [1, 7]},
    **{kind: {"prompts": PROMPTS} for kind in ("sd", "sdxl", "sd3", "flux-dev", "pixart-alpha", "sana")},
}
POOLS = {"pixels": "pools", "sd": "1-3,4-6", "flux-dev": "pools"}
"""Placements of kinds that are made in several pools, and not in one for all: each actor imports its libraries."""

UNDIRECTED = ("pixels", "flux-dev")
"""Kinds without levels of several evaluations: models of FLUX take the scale of guidance as an input."""


@pytest.fixture(scope="module", params=SOURCES)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def ladder(kind, tmp_path_factory):
    """Both models without and, except for `UNDIRECTED`, with guidance, and the larger guided by the smaller.

    For Stable Diffusion there is also a Gaussian, whose mean depends on the prompt.
    """
    folder = tmp_path_factory.mktemp(kind)
    models = [make_pipeline(kind, folder / f"size-{size}", size) for size in (1, 2)]
    guidance = None if kind == "pixels" else 3.0
    below = {"gaussian": 40, "prompts": PROMPTS} if kind == "sd" else {}
    size = IMAGE_SIZES.get(kind)
    return Ladder.create(folder / "ladder", models, guidance=guidance, size=size, measure=False, **below)


def test_levels_are_in_order_and_share_what_is_loaded(ladder, kind):
    names = ["size-1", "size-2"]
    if kind not in UNDIRECTED:
        names = ["size-1", "size-1 guided", "size-2", "size-2 guided", "size-2 guided by size-1"]
        by_name = {level.name: ladder.load_level(number, "cpu") for number, level in enumerate(ladder.levels, 1)}
        small, _, large, guided, by_small = (by_name[name] for name in names)
        assert guided.value.level is guided.unconditional.level is large.level
        assert by_small.value.level is large.level
        assert by_small.unconditional.level is small.level
    assert sorted(level.name for level in ladder.levels) == ["gaussian"] * (kind == "sd") + names
    assert ladder.levels[-1].name == ("size-2" if kind in UNDIRECTED else "size-2 guided")
    assert (np.diff(ladder.cost("cpu")) > 0).all()
    assert Path(ladder.levels[-1].path).parent.name.startswith("size")


@torch.inference_mode()
def test_impulses_over_all_plans_have_the_mean_of_the_best_level(ladder, kind):
    """The expectation over every outcome of the coins of a step is the best level's step."""
    count = len(ladder.levels)
    table = solver_table(ladder.process, 2, "ode")
    # The second step: its plan is drawn, and the first takes the best level.
    p = np.array([1.0, *(0.3, 0.6, 0.45, 0.5, 0.4)[: count - 1]])[:, None].repeat(2, 1)
    p[:, 0] = 1
    levels = {number: ladder.load_level(number, "cpu") for number in range(1, count + 1)}
    noise, encoder = image_noise([1, 2], ladder.sample_shape, "cpu"), ladder.load_encoder("cpu")
    condition = encoder(PROMPTS[:2], ["ugly", None]) if encoder else ladder.condition(torch.arange(2))
    best = integrate(levels, table, single_level(count, count, 2), noise, condition)
    mean, seen = torch.zeros_like(best), []
    for coins in product((False, True), repeat=count - 1):
        fire = np.ones((count, 2), dtype=bool)
        fire[1:, 1] = coins
        chance = np.prod(np.where(fire[:, 1], p[:, 1], 1 - p[:, 1]))
        seen.append(integrate(levels, table, impulse(fire, p), noise, condition))
        mean += float(chance) * seen[-1]
    scale = torch.stack(seen).std(0).mean()
    assert scale > 100 * (mean - best).abs().max()


def test_engines_and_a_resumed_run_write_the_same_bytes(ladder, kind, local_ray, tmp_path):
    # Level k's increment is evaluated at every k-th step, and held.
    steps, levels = np.arange(6), np.arange(1, len(ladder.levels) + 1)
    plan = held(steps % levels[:, None] == 0)
    if ladder.levels[0].kind == "gaussian":
        plan = replace(plan, collapse=True)
    arguments = {"steps": 6, "block_size": 2, "shard_size": 2, "plan": plan, "num": 5, "seed": 3, **SOURCES[kind]}
    # How many actors there are for each level is the subject of test_engines.py.
    placed = {"placement": POOLS.get(kind, "together"), "devices": 1}
    for name, choice in (("inline", {"engine": "inline"}), ("ray", placed)):
        report = mlem_dist.generate(ladder, out=str(tmp_path / name), **arguments, **choice)
        assert all(count > 0 for count in report.calls_per_sample.values())
    files = {path.name: path.read_bytes() for path in (tmp_path / "inline" / "data").iterdir()}
    assert len(files) == 3
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "ray" / "data").iterdir()}
    name = sorted(files)[1]
    (tmp_path / "inline" / "data" / name).unlink()
    assert mlem_dist.generate(ladder, out=str(tmp_path / "inline"), engine="inline", **arguments).made == 2
    assert (tmp_path / "inline" / "data" / name).read_bytes() == files[name]
