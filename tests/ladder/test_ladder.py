import hashlib
import json
import os
import resource
import shutil
import stat
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from processes import process_of_betas, process_of_products
from safetensors.torch import load_file, save_file

from mlem_dist.errors import UsageError
from mlem_dist.ladder.ladder import Ladder, bundled
from mlem_dist.ladder.measure import denoising_errors
from mlem_dist.ladder.save import save_ladder, save_level
from mlem_dist.models.gaussian import GaussianLevel
from mlem_dist.models.pixels import to_range
from mlem_dist.models.weights import save_tensors


@pytest.fixture
def copy(tmp_path, fashion):
    """The bundled ladder as a folder, two levels of it."""
    folder = tmp_path / "copy"
    shutil.copytree(fashion.folder, folder)
    edit(folder, levels=json.loads((folder / "ladder.json").read_text())["levels"][:2])
    return folder


def edit(folder, **entries):
    path = folder / "ladder.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def edit_level(folder, **entries):
    first, *others = json.loads((folder / "ladder.json").read_text())["levels"]
    edit(folder, levels=[first, *others[:-1], others[-1] | entries])


@pytest.mark.parametrize(
    ("missing", "message"), [(True, "weights lack"), (False, "weights hold what it does not know")]
)
def test_weights_that_are_not_those_of_the_model_are_refused(copy, missing, message):
    """Diffusers would only warn, and leave at random what it does not find."""
    (path,) = (copy / "unet-1").glob("*.safetensors")
    weights = load_file(path)
    name = sorted(weights)[3]
    if missing:
        del weights[name]
    else:
        weights["another.weight"] = weights[name].clone()
    save_file(weights, path, {"format": "pt"})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    entry = json.loads((copy / "ladder.json").read_text())["levels"][-1]
    edit_level(copy, sha256=entry["sha256"] | {f"unet-1/{path.name}": digest})
    with pytest.raises(UsageError, match=f"level .unet-1. cannot be loaded: its {message}"):
        Ladder.load(copy).load_level(2, "cpu")


def test_a_dataset_named_like_a_bundled_ladder_is_none(tmp_path, fashion, copy, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "fashion" in bundled()
    (tmp_path / "fashion").mkdir()
    assert Ladder.load("fashion").folder == fashion.folder
    (tmp_path / "other").mkdir()
    for other in ("other", "./fashion"):
        with pytest.raises(UsageError, match="is not a ladder"):
            Ladder.load(other)
    shutil.copytree(copy, tmp_path / "fashion", dirs_exist_ok=True)
    assert Ladder.load("fashion").folder == tmp_path / "fashion"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"sample_shape": [2, 32, 32]}, r"sample_shape is \[2, 32, 32\], expected \[1 or 3, height, width\]"),
        ({"sample_shape": [1, 32]}, "malformed entry"),
        ({"value_range": [1, -1]}, r"value_range is \[1, -1\]"),
        ({"value_range": [0, 0]}, r"value_range is \[0, 0\]"),
        ({"value_range": [float("nan"), 1]}, "value_range is"),
        ({"value_range": None}, "malformed entry"),
        ({"labels": ["shoe"] * 10}, "labels has a name twice"),
        ({"labels": ["caf\udce9"]}, r"the name 'caf\\udce9' is not text"),
        ({"levels": ["unet"]}, "malformed entry"),
    ],
)
def test_a_malformed_ladder_is_refused(copy, entries, message):
    edit(copy, **entries)
    with pytest.raises(UsageError, match=message):
        Ladder.load(copy)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"patch": 0}, "malformed entry: patch of level 'unet-1' is 0, expected at least 1"),
        ({"patch": "2"}, "malformed entry: patch"),
        ({"sha256": "0" * 64}, "malformed entry: sha256"),
        ({"seconds": None}, "malformed entry: seconds"),
        ({"seconds": {"cpu": None}}, "malformed entry: level 'unet-1' has None"),
        ({"denoising_error": ["low"]}, "malformed entry: level 'unet-1' has 'low'"),
    ],
)
def test_a_malformed_level_is_refused(copy, entries, message):
    edit_level(copy, **entries)
    with pytest.raises(UsageError, match=message):
        Ladder.load(copy)


@pytest.mark.parametrize(
    "changes",
    [
        {"rescale_betas_zero_snr": True},
        {"beta_schedule": "sigmoid"},
        {"beta_start": "low"},
        {"trained_betas": ["a"]},
        {"beta_end": 0.99},
        {"beta_end": 0.2},
        {"beta_start": 1e-18},
        {"beta_schedule": "scaled_linear", "beta_start": -0.1},
    ],
)
def test_a_noise_schedule_that_cannot_be_used_is_refused(tmp_path, fashion, changes):
    with pytest.raises(UsageError, match=r"scheduler_config\.json: "):
        tiny(tmp_path, fashion.scheduler | changes)


def test_all_that_decides_the_samples_is_in_the_digest(fashion):
    first = fashion.levels[0]
    changes = [{"sample_shape": (3, 32, 32)}, {"labels": fashion.labels[:-1]}, {"value_range": (0.0, 1.0)}]
    changes += [{"scheduler_sha256": "0" * 64}, {"levels": fashion.levels[:-1]}]
    for entry in (
        {"prediction": "v_prediction"},
        {"patch": 2},
        {"path": "x"},
        {"kind": "unet"},
        {"sha256": {"x": "0"}},
    ):
        changes.append({"levels": (replace(first, **entry), *fashion.levels[1:])})
    found = [replace(fashion, **change).digest for change in changes]
    assert len({fashion.digest, *found}) == 1 + len(changes)
    measured = replace(first, seconds={"cpu": 1.0}, denoising_error=[1.0], name="other")
    assert replace(fashion, name="other", levels=(measured, *fashion.levels[1:])).digest == fashion.digest


def test_a_level_is_compared_with_its_digest_when_it_is_loaded(copy):
    (path,) = (copy / "unet-1").glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    ladder = Ladder.read(copy)
    ladder.load_level(1, "cpu")
    with pytest.raises(UsageError, match="is corrupted"):
        ladder.load_level(2, "cpu")
    with pytest.raises(UsageError, match="is corrupted"):
        Ladder.load(copy)


@pytest.mark.parametrize(
    ("level", "name"),
    [
        ("gaussian", "gaussian.safetensors"),
        ("unet-1", "config.json"),
        ("unet-1", "model.safetensors"),
    ],
)
def test_what_a_level_is_read_from_has_a_digest(copy, level, name):
    """A change of it would go unnoticed, and a dataset end with the images of two models."""
    raw = json.loads((copy / "ladder.json").read_text())
    entry = next(entry for entry in raw["levels"] if entry["name"] == level)
    entry["sha256"] = {file: digest for file, digest in entry["sha256"].items() if not file.endswith(name)}
    (copy / "ladder.json").write_text(json.dumps(raw))
    with pytest.raises(UsageError, match=f"sha256 of level '{level}' lacks .*{name}"):
        Ladder.load(copy)


def test_levels_on_a_device_share_one_gaussian(copy):
    ladder = Ladder.load(copy)
    unet, gaussian = (ladder.load_level(k, "cpu") for k in (2, 1))
    assert unet.gaussian is gaussian
    assert np.array_equal(ladder.weight_bytes.alone, [4 * level.parameters for level in ladder.levels])


@torch.inference_mode()
def test_a_residual_takes_the_value_of_the_level_that_it_names(copy):
    before = Ladder.load(copy)
    gaussian, unet = json.loads((copy / "ladder.json").read_text())["levels"]
    edit_level(copy, corrects=gaussian["name"])
    assert Ladder.load(copy).digest == before.digest
    edit(copy, levels=[gaussian | {"name": "other"}, gaussian, unet | {"corrects": gaussian["name"]}])
    ladder = Ladder.load(copy)
    assert [ladder.corrected(number) for number in (1, 2, 3)] == [0, 0, 2]
    assert np.array_equal(ladder.cost_beside(ladder.cost("cpu")), ladder.cost("cpu"))
    level = ladder.load_level(3, "cpu")
    assert level.takes == (2,)
    assert level.gaussian is ladder.load_level(2, "cpu")
    x, t = torch.randn(2, *ladder.sample_shape, generator=torch.Generator().manual_seed(0)), torch.full((2,), 500.0)
    condition = ladder.condition(torch.arange(2))
    alone = level(x, t, condition)
    assert torch.equal(level(x, t, condition, {1: torch.zeros_like(x)}), alone)
    assert not torch.equal(level(x, t, condition, {2: torch.zeros_like(x)}), alone)


@pytest.mark.parametrize("name", ["unet-1", "nothing"])
def test_a_residual_that_does_not_name_a_gaussian_below_it_is_refused(copy, name):
    edit_level(copy, corrects=name)
    with pytest.raises(UsageError, match=f"corrects is '{name}', expected the name of a Gaussian level below it"):
        Ladder.load(copy)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"parametrisation": "v"}, "parametrisation is 'v'"),
        ({"value_range": [0, 1]}, "residual needs a Gaussian level to correct, .* and the value range"),
        ({"schema_version": 3}, "schema_version is 3"),
    ],
)
def test_a_ladder_that_this_program_cannot_use_is_refused(copy, entries, message):
    edit(copy, **entries)
    with pytest.raises(UsageError, match=message):
        Ladder.load(copy)


def test_levels_that_do_not_fit_are_refused(copy):
    for entries, message in (({"seconds": {"cpu": 0}}, "positive cost"), ({"patch": 3}, "not divisible by patch 3")):
        before = (copy / "ladder.json").read_text()
        edit_level(copy, **entries)
        with pytest.raises(UsageError, match=message):
            Ladder.load(copy)
        (copy / "ladder.json").write_text(before)


def tiny(folder, scheduler):
    level = GaussianLevel(1, 16, 2, process_of_products(np.linspace(0.999, 0.01, 1000)))
    entry = save_level(folder, "gaussian", level, torch.float32)
    return save_ladder(folder, "tiny", (1, 4, 4), [], scheduler, [entry])


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_ladder_may_be_read_by_those_who_may_read_any_new_file(tmp_path, fashion, umask, mode):
    before = os.umask(umask)
    try:
        tiny(tmp_path, fashion.scheduler)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"gaussian.safetensors", "ladder.json", "scheduler_config.json"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode}


def test_what_does_not_fit_on_the_disk_is_an_os_error_and_leaves_what_was_there(tmp_path):
    path = tmp_path / "some.safetensors"
    save_tensors(path, {"some": torch.zeros(3)})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(OSError, match=r"some\.safetensors cannot be written"):
            save_tensors(path, {"some": torch.zeros(2**20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before


def test_images_are_mapped_to_the_ladders_range():
    seen = []

    def level(x, t, condition):
        seen.append(x)
        return x

    images = torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8)
    # Almost without noise.
    process = process_of_betas(np.full(10, 1e-7))
    for value_range in ((-1.0, 1.0), (0.0, 1.0), (-2.0, 3.0)):
        denoising_errors(level, images, {}, process, 1, 1, partial(to_range, value_range=value_range))
        low, high = value_range
        torch.testing.assert_close(
            seen[-1].flatten(), low + (high - low) * torch.tensor([0, 0.2, 1]), atol=0.01, rtol=0
        )
