import itertools
import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from pipelines import make_pipeline
from processes import process_of_betas

from mlem_dist.cli import cli
from mlem_dist.errors import UsageError
from mlem_dist.ladder.calibration import stored
from mlem_dist.ladder.images import load_images
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.ladder.save import save_level
from mlem_dist.models.pixels import to_range
from mlem_dist.report.tables import calibration_table
from mlem_dist.solver.condition import take
from mlem_dist.solver.integrate import integrate
from mlem_dist.solver.noise import coarse_noise, image_noise
from mlem_dist.solver.plan import impulse, single_level
from mlem_dist.solver.steps import solver_table, step_table
from mlem_dist.tuning.calibrate import HeldOut, best_trajectory, calibrate, products_of, propagate, store
from mlem_dist.tuning.neyman import coin_error, neyman

FIGURES = ("error-against-time-cpu.png", "increments-cpu.png")
SCHEDULE = process_of_betas(np.linspace(1e-3, 0.1, 100))


def silent(stage: str, done: int, total: int) -> None:
    pass


def linear(matrix: torch.Tensor):
    """The drift f(x, t) = M x of samples with as many values as M has rows."""
    return lambda x, t, *_: (x.flatten(1) @ matrix.T).view_as(x)


def signs(samples: int) -> torch.Tensor:
    """All sixteen sign probes of four values, (16, samples, 1, 2, 2)."""
    return (
        torch.tensor([*itertools.product((-1.0, 1.0), repeat=4)]).reshape(16, 1, 1, 2, 2).expand(-1, samples, 1, 2, 2)
    )


@pytest.fixture
def toy():
    """Three linear levels of four values, cheapest first; matrices that do not commute."""
    rng = torch.Generator().manual_seed(0)
    matrices = [0.03 * torch.randn(4, 4, generator=rng) for _ in range(2)]
    matrices = [0.5 * torch.eye(4), 0.5 * torch.eye(4) + matrices[0], 0.5 * torch.eye(4) + matrices[0] + matrices[1]]
    return {k: linear(m) for k, m in enumerate(matrices, 1)}, [m.double().numpy() for m in matrices]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_effect_of_linear_levels_is_the_exact_propagated_one(toy, eta):
    """Averaged over all sixteen sign probes, it is |J_i b_i D|^2 with J_i = prod_{j > i} (a_j I + b_j M)."""
    levels, matrices = toy
    table = step_table(SCHEDULE.grid(10), eta)
    condition = {}
    states = best_trajectory(levels, table, image_noise(range(3), (1, 2, 2), "cpu"), condition, silent)
    measurements = [propagate(levels, table, states, condition, probe) for probe in signs(3)]
    effect = np.mean([change**2 for _, change in measurements], axis=0)
    below = [np.zeros((4, 4)), *matrices]
    for i in range(10):
        onward = np.eye(4)
        for j in range(i + 1, 10):
            onward = (table.a[j] * np.eye(4) + table.b[j] * matrices[-1]) @ onward
        x = states[i].double().flatten(1).numpy()
        for k in range(3):
            increment = x @ (matrices[k] - below[k]).T
            np.testing.assert_allclose(measurements[0][0][k, i], (increment**2).mean(1), rtol=1e-4)
            exact = ((table.b[i] * increment @ onward.T) ** 2).mean(1)
            np.testing.assert_allclose(effect[k, i], exact, rtol=1e-3)


def test_coins_make_the_error_that_their_effects_predict(toy):
    """ML-EM with Neyman probabilities against the best level, over many plans; to first order, so within a tenth."""
    levels, _ = toy
    table = solver_table(SCHEDULE, 20, "sde")
    condition = {}
    noise = image_noise(range(100), (1, 2, 2), "cpu")
    states = best_trajectory(levels, table, noise, condition, silent)
    changes = np.concatenate([propagate(levels, table, states, condition, v)[1] for v in signs(100)], axis=2)
    effect = np.einsum("kki->ki", products_of(changes))
    rng = np.random.default_rng(0)
    p = neyman(effect, np.array([0.01, 1.0, 4.0]), 2 * effect[1:].sum())
    assert p[1:].mean() < 0.5
    errors = []
    for _ in range(800):
        fire = rng.random(p.shape) < p
        plan = impulse(fire, p)
        errors.append(float((integrate(levels, table, plan, noise, condition) - states[-1]).square().mean()))
    assert np.mean(errors) == pytest.approx(coin_error(p, effect), rel=0.1)


def test_the_effect_of_a_trained_ladder_is_that_of_a_small_push(fashion):
    """Push a step of the best level by a little of an increment, run on, and compare along the probe."""
    levels = {k: fashion.load_level(k, "cpu") for k in (1, len(fashion.levels))}
    # A ladder of its first and last level.
    levels = dict(enumerate(levels.values(), 1))
    table = solver_table(fashion.process, 5, "ode")
    condition = {"label": torch.tensor([2, 7])}
    noise = image_noise(range(2), fashion.sample_shape, "cpu")
    states = best_trajectory(levels, table, noise, condition, silent)
    probe = torch.randint(2, states[0].shape, generator=torch.Generator().manual_seed(1)) * 2.0 - 1
    _, change = propagate(levels, table, states, condition, probe)
    step, push = 2, 0.02
    ends = []
    for sign in (-push, push):
        x = states[step]
        for i in range(step, len(table)):
            t = torch.full((2,), int(table.t[i]))
            with torch.inference_mode():
                drift = levels[2](x, t, condition)
                if i == step:
                    drift = drift + sign * (drift - levels[1](x, t, condition))
            x = float(table.a[i]) * x + float(table.b[i]) * drift
        ends.append(x)
    moved = ((ends[1] - ends[0]) / (2 * push) * probe).flatten(1).sum(1).numpy() ** 2 / probe[0].numel()
    np.testing.assert_allclose(change[1, step] ** 2, moved, rtol=0.02)


def test_coarse_steps_on_the_same_path_converge_to_the_fine_ones():
    """Strong order 1, as the noise is additive: half the step, a quarter of the squared error."""
    table = solver_table(SCHEDULE, 100, "sde")
    levels = {1: lambda x, t, *_: torch.tanh(x)}
    condition = {}
    noise = image_noise(range(500), (1, 2, 2), "cpu")
    fine = best_trajectory(levels, table, noise, condition, silent)[-1]

    def error(steps: int, noise) -> float:
        coarse = integrate(levels, solver_table(SCHEDULE, steps, "sde"), single_level(1, 1, steps), noise, condition)
        return float((coarse - fine).square().mean())

    errors = [error(steps, coarse_noise(noise, table, 100 // steps)) for steps in (5, 10, 20)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.1 * error(20, noise)
    z = coarse_noise(noise, table, 5)(3)
    assert float(z.var()) == pytest.approx(1, abs=0.1)


def test_the_ode_has_no_coarse_noise():
    noise = image_noise(range(2), (1, 2, 2), "cpu")
    coarse = coarse_noise(noise, solver_table(SCHEDULE, 100, "ode"), 5)
    assert torch.equal(coarse(-1), noise(-1))
    assert not coarse(3).any()


@pytest.fixture(scope="module")
def measured(fashion):
    """The bundled ladder, measured very little."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (20, *fashion.sample_shape), generator=rng, dtype=torch.uint8)
    held_out = HeldOut(images, fashion.condition(torch.arange(20)))
    return calibrate(fashion, "cpu", held_out=held_out, per_band=4, steps=10, samples=3)


def test_the_bundled_ladder_is_measured(fashion, measured):
    assert all(level.seconds[batch] > 0 for batch in (1, 8, 64) for level in measured.levels)
    assert [level.name for level in measured.levels] == [level.name for level in fashion.levels]
    for solver in measured.solvers.values():
        k, n = len(fashion.levels), 10
        assert solver.increments.shape == solver.effect.shape == (k, n)
        assert (solver.increments > 0).all()
        assert (solver.effect >= 0).all()
        assert [row.em_steps for row in solver.speed_up] == [5]
        assert solver.speed_up[0].rungs[0] == 1
        assert solver.speed_up[0].rungs[-1] == k
    assert {*measured.gamma} == {"error", "increments"}


def test_each_level_is_timed_per_sample_of_each_batch(fashion, monkeypatch):
    """By a clock that goes on while a level is evaluated, by its number of weights for each sample."""
    now = 0.0

    def clocked(module, device):
        weights = sum(map(torch.numel, module.state_dict().values()))

        def level(x, t, *_):
            nonlocal now
            now += len(x) * weights

        return level

    monkeypatch.setattr("mlem_dist.tuning.calibrate.as_run", clocked)
    monkeypatch.setattr("mlem_dist.ladder.measure.time", SimpleNamespace(thread_time=lambda: now))
    calibration = calibrate(fashion, "cpu", steps=5, samples=1)
    for number, level in enumerate(calibration.levels, 1):
        weights = sum(map(torch.numel, fashion.load_level(number, "cpu").state_dict().values()))
        assert level.seconds == dict.fromkeys((1, 8, 64), weights)


def test_unets_are_timed_compiled_where_that_is_asked_for(small, measured):
    assert not any(level.compiled for level in measured.levels)
    ladder = Ladder.load(small)
    # Compiling itself takes a minute.
    with torch.compiler.set_stance("force_eager"):
        calibration = calibrate(ladder, "cpu", steps=10, samples=3, compiled=True)
    gaussian, unet = calibration.levels
    assert gaussian.compiled == {}
    assert {*unet.compiled} == {*unet.seconds}
    in_file = json.loads(store(small, ladder, calibration).read_text())["devices"][calibration.device]["levels"]
    assert in_file[1]["compiled"]["8"] == pytest.approx(unet.compiled[8], rel=1e-5)
    assert f"{unet.compiled[8] * 1e3:.3f} ({unet.seconds[8] / unet.compiled[8]:.2f})" in calibration_table(
        ladder, calibration
    )
    assert "torch.compile" not in calibration_table(ladder, measured)


def test_images_are_in_the_ladders_range_and_trajectories_of_all_its_classes(many, monkeypatch):
    chosen = []

    def watched(levels, table, noise, condition, progress):
        chosen.append(condition["label"].tolist())
        return best_trajectory(levels, table, noise, condition, progress)

    monkeypatch.setattr("mlem_dist.tuning.calibrate.best_trajectory", watched)
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (20, *many.sample_shape), generator=rng, dtype=torch.uint8)
    held_out = HeldOut(images, {"label": torch.arange(20)}, partial(to_range, value_range=(0.0, 1.0)))
    calibration = calibrate(many, "cpu", held_out=held_out, per_band=4, steps=10, samples=4)
    assert chosen[0] == [0, 10, 20, 30]
    exact = held_out.errors(many.load_level(1, "cpu"), many, "cpu", 4)
    np.testing.assert_array_equal(calibration.levels[0].denoising_error, exact.mean(1))


def test_other_devices_keep_their_entries(tmp_path, fashion, measured):
    other = replace(measured, device="cuda/Some GPU", samples=77)
    path = store(tmp_path / "new", fashion, measured)
    store(tmp_path / "new", fashion, other)
    store(tmp_path / "new", fashion, measured)
    raw = json.loads(path.read_text())
    assert raw["ladder"] == fashion.digest
    assert {*raw["devices"]} == {measured.device, "cuda/Some GPU"}
    assert raw["devices"]["cuda/Some GPU"]["samples"] == 77
    mine = raw["devices"][measured.device]
    np.testing.assert_allclose(mine["solvers"]["sde"]["products"], measured.solvers["sde"].products, rtol=1e-5)
    assert mine["gamma"]["error"]["htmc"] == measured.gamma["error"].htmc
    assert [*(tmp_path / "new").iterdir()] == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw | {"ladder": "0" * 64}, "belongs to another ladder"),
        (lambda raw: raw | {"schema_version": 99}, "schema_version is 99"),
        (lambda raw: {}, "not a calibration"),
        (lambda raw: [], "not a JSON object"),
    ],
)
def test_another_ladders_calibration_is_never_overwritten(tmp_path, fashion, measured, change, message):
    path = store(tmp_path, fashion, measured)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    before = path.read_bytes()
    for refused in (lambda: stored(tmp_path, fashion), lambda: store(tmp_path, fashion, measured)):
        with pytest.raises(UsageError, match=message):
            refused()
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_used_is_refused(tmp_path, fashion):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="`out`"):
        stored(tmp_path / "file", fashion)


@pytest.fixture
def data(write_data):
    rng = np.random.default_rng(0)
    return write_data(
        **{part: (rng.integers(0, 256, (40, 28, 28)), rng.integers(0, 10, 40)) for part in ("train", "t10k")}
    )


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["calibrate", *arguments], standalone_mode=False, catch_exceptions=False)


@pytest.mark.parametrize("images", [True, False])
def test_the_command_stores_in_the_ladder_and_leaves_its_digest(small, data, images, monkeypatch):
    little = partial(calibrate, per_band=4, steps=10, samples=3)
    monkeypatch.setattr("mlem_dist.tuning.calibrate.calibrate", little)
    digest = Ladder.load(small).digest
    done = run(str(small), "--device", "cpu", *(["--data", str(data)] if images else []))
    assert ("held-out images" in done.stdout) == images
    assert all(level.name in done.stdout for level in Ladder.load(small).levels)
    assert "at least three UNets" in done.stdout
    assert Ladder.load(small).digest == digest
    assert json.loads((small / "calibration.json").read_text())["ladder"] == digest
    for figure in FIGURES:
        assert (small / figure).read_bytes().startswith(b"\x89PNG")


def test_budgets_are_spent_by_the_calibration_where_there_is_one(small, fashion, measured):
    def drawn(out: str, *options: str) -> list[list[int]]:
        plan = small / out
        arguments = ["draw", "--ladder", str(small), "--out", str(plan), "--nfe", "90", *options]
        CliRunner().invoke(cli, arguments, standalone_mode=False, catch_exceptions=False)
        return json.loads(plan.read_text())["fire"]

    theory = drawn("theory.json")
    assert drawn("same.json", "--probabilities", "theory") == theory
    with pytest.raises(UsageError, match="mlem-dist calibrate"):
        drawn("refused.json", "--probabilities", "neyman")
    products = np.zeros((2, 2, 10))
    products[1, 1, 5:] = 1.0
    solvers = {name: replace(solver, products=products) for name, solver in measured.solvers.items()}
    store(small, Ladder.load(small), replace(measured, solvers=solvers))
    tuned = drawn("neyman.json")
    assert drawn("default.json", "--probabilities", "neyman") == tuned
    assert sum(tuned[1][:100]) == 0 < sum(tuned[1][150:])
    assert sum(theory[1][:100]) > 0


def test_images_with_captions_calibrate_a_ladder_with_prompts(dark_and_bright, data, tmp_path, monkeypatch):
    make_pipeline("sd", tmp_path / "sd")
    ladder = Ladder.create(tmp_path / "ladder", [tmp_path / "sd"], measure=False, gaussian=dark_and_bright)
    held_out = HeldOut.of(load_images(dark_and_bright, ladder.image_shape, (), "prompt"), ladder)
    # The Gaussian's mean depends on the caption: with those of other images, it errs more.
    bright = held_out.images.flatten(1).mean(1) > held_out.images.mean()
    assert 0 < bright.sum() < len(bright)
    swapped = take(held_out.condition, torch.stack([(bright != its).nonzero()[0, 0] for its in bright]))
    level = ladder.load_level(1, "cpu")
    own, others = (
        replace(held_out, condition=condition).errors(level, ladder, "cpu", 4)[-1].mean()
        for condition in (held_out.condition, swapped)
    )
    assert own < others

    monkeypatch.setattr("mlem_dist.tuning.calibrate.calibrate", partial(calibrate, per_band=4, steps=10, samples=3))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("dark\nbright\n")
    arguments = [str(ladder.folder), "--device", "cpu", "--prompts", str(prompts), "--data"]
    assert "held-out images" in run(*arguments, str(dark_and_bright)).stdout
    with pytest.raises(UsageError, match="expected Parquet files with a column 'prompt'"):
        run(*arguments, str(data))


def test_without_matplotlib_nothing_is_begun(small, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    before = [*small.iterdir()]
    with pytest.raises(UsageError, match="install the extra `train`"):
        run(str(small), "--data", str(data))
    assert [*small.iterdir()] == before


def test_bad_input_is_refused_before_anything_is_measured(tmp_path, small, data, monkeypatch):
    monkeypatch.setattr("mlem_dist.tuning.calibrate.calibrate", lambda *arguments: pytest.fail("measured"))
    (small / "calibration.json").write_text(json.dumps({"schema_version": 2, "ladder": "0" * 64, "devices": {}}))
    for arguments, message in (
        (["nonesuch", "--data", str(data)], "nonesuch"),
        (["fashion", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")], "no training data"),
        ([str(small), "--data", str(data)], "belongs to another ladder"),
        (["fashion", "--data", str(data), "--out", str(data / "t10k-labels-idx1-ubyte.gz")], "is a file"),
    ):
        with pytest.raises(UsageError, match=message):
            run(*arguments)
    assert not (tmp_path / "out").exists()


def test_a_ladder_of_one_level_is_refused(small):
    raw = json.loads((small / "ladder.json").read_text())
    (small / "ladder.json").write_text(json.dumps(raw | {"levels": raw["levels"][:1]}))
    with pytest.raises(UsageError, match="one level"):
        calibrate(Ladder.load(small), "cpu")


def test_a_level_that_is_not_finite_is_named(two_unets, tmp_path):
    folder = shutil.copytree(two_unets.folder, tmp_path / "unets")
    level = two_unets.load_level(2, "cpu")
    level.model.conv_out.bias.data.fill_(float("nan"))
    entry = save_level(folder, "large", level, torch.float32)
    raw = json.loads((folder / "ladder.json").read_text())
    raw["levels"][1]["sha256"] = entry.sha256
    (folder / "ladder.json").write_text(json.dumps(raw))
    with pytest.raises(ArithmeticError, match="level 'large' does not end in finite numbers"):
        calibrate(Ladder.load(folder), "cpu", steps=10, samples=2)
