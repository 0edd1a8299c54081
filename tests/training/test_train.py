import json
from dataclasses import replace

import pytest
import torch

from mlem_dist.errors import UsageError
from mlem_dist.ladder.images import load_images
from mlem_dist.solver.process import BetaProcess, process_of
from mlem_dist.training.assemble import train_ladder
from mlem_dist.training.resume import check_training
from mlem_dist.training.train import DivergedError, _batch, denoising_error, training_times


class KilledError(Exception):
    pass


def test_training_resumes_to_the_same_ladder(tmp_path, data, configure, monkeypatch):
    config = configure({})
    images = load_images(data, config.sample_shape, config.labels)
    monkeypatch.setattr("mlem_dist.training.train.CHECKPOINT_SECONDS", 0.0)
    whole = train_ladder(config, images, tmp_path / "whole", lambda *progress: None)

    def kill(name: str, done: int, loss: float) -> None:
        if done == 50:
            raise KilledError

    with pytest.raises(KilledError):
        train_ladder(config, images, tmp_path / "killed", kill)
    resumed: list[int] = []
    killed = train_ladder(config, images, tmp_path / "killed", lambda name, done, loss: resumed.append(done))
    assert resumed[0] in (50, 51)
    assert killed.digest == whole.digest
    # Untrained it has 2.9 to 3.0.
    assert sum(whole.levels[1].denoising_error) < 2


def test_a_level_that_is_finished_is_not_stored_again(tmp_path, data, configure):
    config = configure({"steps": 20}, {"steps": 20, "name": "large"})
    images = load_images(data, config.sample_shape, config.labels)

    def kill(name: str, done: int, loss: float) -> None:
        if name == "unet":
            raise KilledError

    with pytest.raises(KilledError):
        train_ladder(config, images, tmp_path / "out", kill)
    weights = "large/diffusion_pytorch_model.safetensors"
    written = (tmp_path / "out/training/large/stored" / weights).stat().st_mtime_ns
    ladder = train_ladder(config, images, tmp_path / "out", lambda *progress: None)
    assert (tmp_path / "out" / weights).stat().st_mtime_ns == written
    assert ladder.digest == train_ladder(config, images, tmp_path / "whole", lambda *progress: None).digest
    longer = configure({"steps": 20}, {"steps": 30, "name": "large"})
    assert train_ladder(longer, images, tmp_path / "out", lambda *progress: None).digest != ladder.digest


def test_hidden_classes_train_a_class_that_stands_for_none(tmp_path, data, configure):
    """So that the ladder has levels with guidance, and the data's classes only."""
    config = configure({"steps": 20, "prediction": "v_prediction", "condition_dropout": 0.5})
    images = load_images(data, config.sample_shape, config.labels)
    ladder = train_ladder(config, images, tmp_path / "out", lambda *progress: None)
    assert ladder.labels == images.labels
    classes = len(images.labels)
    embedding = ladder.load_level(2, "cpu").model.class_embedding.weight
    assert len(embedding) == classes + 1
    process = process_of(config.scheduler)
    label = torch.cat([_batch(images, 0, config.levels[1], process, step)[1] for step in range(100)])
    share = (label == classes).float().mean()
    assert 0.4 < share < 0.6
    with pytest.raises(UsageError, match=r"condition_dropout is 0\.5, expected 0 for a residual"):
        configure({"prediction": "residual", "condition_dropout": 0.5})
    none = replace(images, labels=())
    with pytest.raises(UsageError, match=r"condition_dropout is 0\.5, expected 0: the dataset has no classes"):
        check_training(config, none, tmp_path / "other")


@pytest.mark.parametrize("changes", [{"prediction": "residual"}, {"prediction": "epsilon"}, {"teacher": "large"}])
def test_every_kind_of_level_comes_back_from_disk_as_it_was_trained(tmp_path, data, configure, changes):
    config = configure({"steps": 20} | changes, {"steps": 20, "name": "large", "patch": 1})
    images = load_images(data, config.sample_shape, config.labels)
    ladder = train_ladder(config, images, tmp_path / "out", lambda *progress: None)
    assert [level.name for level in ladder.levels] == ["gaussian", "unet", "large"]
    for number, level in enumerate(ladder.levels, 1):
        errors = denoising_error(ladder.load_level(number, "cpu"), images, ladder.process, images.condition)
        assert errors == pytest.approx(level.denoising_error, rel=1e-6)
    log = [json.loads(line) for line in (tmp_path / "out/training/unet/log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 20
    assert len(log[-1]["denoising_error"]) == 10


@pytest.mark.parametrize(
    ("scheduler", "prediction"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0}, "flow_prediction"),
        ({"_class_name": "EDMEulerScheduler"}, "edm"),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, "v_prediction"),
    ],
    ids=["flow", "EDM", "zero terminal SNR"],
)
def test_a_ladder_of_another_process_is_trained(tmp_path, data, configure, scheduler, prediction):
    config = configure({"steps": 200, "prediction": prediction}, scheduler=scheduler)
    images = load_images(data, config.sample_shape, config.labels)
    ladder = train_ladder(config, images, tmp_path / "out", lambda *progress: None)
    assert ladder.process.prediction == prediction
    errors = denoising_error(ladder.load_level(2, "cpu"), images, ladder.process, images.condition)
    assert errors == pytest.approx(ladder.levels[1].denoising_error, rel=1e-6)
    log = [json.loads(line) for line in (tmp_path / "out/training/unet/log.jsonl").read_text().splitlines()]
    assert log[1]["loss"] < 0.9 * log[0]["loss"]


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    ("noise_levels", "shares"), [("uniform", (0.25, 0.5, 0.75)), ("logit-normal", (0.337, 0.5, 0.663))]
)
def test_a_flow_is_trained_at_the_times_of_the_shifted_steps(configure, shift, noise_levels, shares):
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift}
    network = {"prediction": "flow_prediction", "batch_size": 20_000, "noise_levels": noise_levels}
    config = configure(network, scheduler=scheduler)
    times = training_times(config.process, config.levels[1], torch.Generator().manual_seed(0))
    steps = torch.from_numpy(config.process.grid(1000).t).float()
    quartiles = times.quantile(torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quartiles, steps.quantile(torch.tensor(shares)), rtol=0.03, atol=0)


@pytest.mark.parametrize(
    ("scheduler", "prediction", "message"),
    [
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "epsilon",
            "is 'epsilon', expected 'flow_prediction'",
        ),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "residual", "is residual, expected flow_prediction"),
        ({}, "score", "is 'score', which models of this noise schedule do not make"),
        ({}, "noise", "is 'noise', expected residual or one of epsilon, sample"),
    ],
)
def test_a_prediction_that_the_process_does_not_have_is_refused(configure, scheduler, prediction, message):
    with pytest.raises(UsageError, match=f"level 'unet': prediction {message}"):
        configure({"prediction": prediction}, scheduler=scheduler)


def test_a_pupil_comes_closer_to_its_teacher_than_to_the_noise(tmp_path, data, configure):
    """The noise that no model can know is not in what it learns from."""
    config = configure({"teacher": "large"}, {"name": "large"})
    images = load_images(data, config.sample_shape, config.labels)
    train_ladder(config, images, tmp_path / "out", lambda *progress: None)
    losses = {
        name: json.loads((tmp_path / f"out/training/{name}/log.jsonl").read_text().splitlines()[-1])["loss"]
        for name in ("unet", "large")
    }
    assert losses["unet"] < 0.5 * losses["large"]


def test_a_diverging_loss_stops_at_once_and_keeps_the_checkpoint(tmp_path, data, configure, monkeypatch):
    config = configure({})
    images = load_images(data, config.sample_shape, config.labels)
    monkeypatch.setattr("mlem_dist.training.train.CHECKPOINT_SECONDS", 0.0)

    mixed = BetaProcess.mixed

    def poisoned(*given):
        return mixed(*given) * (float("nan") if poisoned.on else 1)

    poisoned.on = False

    def watch(name: str, done: int, loss: float) -> None:
        poisoned.on = done >= 20

    monkeypatch.setattr(BetaProcess, "mixed", poisoned)
    with pytest.raises(DivergedError, match="the loss is nan at step 20; the last good checkpoint is kept in"):
        train_ladder(config, images, tmp_path / "out", watch)
    assert (tmp_path / "out" / "training" / "unet" / "checkpoint.safetensors").exists()
    assert not (tmp_path / "out" / "ladder.json").exists()


@pytest.mark.parametrize(
    ("steps", "message"), [(2, "the loss is (nan|inf) at step 1; nothing"), (1, "held-out .* is (nan|inf) at step 1;")]
)
def test_an_update_that_spoils_the_weights_is_not_saved(tmp_path, data, configure, monkeypatch, steps, message):
    config = configure({"learning_rate": 1e36, "steps": steps})
    images = load_images(data, config.sample_shape, config.labels)
    monkeypatch.setattr("mlem_dist.training.train.CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(DivergedError, match=message):
        train_ladder(config, images, tmp_path / "out", lambda *progress: None)
    assert not (tmp_path / "out/training/unet/checkpoint.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"kind": "mlp"}, "mlp"),
        ({"size": 3}, "unknown keys 'size'"),
        ({"name": "gaussian"}, "twice"),
        ({"prediction": "x0"}, "x0"),
        ({"teacher": "unet"}, "teacher is 'unet'"),
        ({"steps": "many"}, "steps is 'many', expected a whole number"),
        ({"learning_rate": -1}, "learning_rate is -1"),
        ({"patch": 3}, "patch is 3, expected a divisor"),
        ({"ema": 1}, "ema is 1"),
        ({"name": "training"}, "expected a name"),
        ({"precision": "int8"}, "int8"),
    ],
)
def test_a_wrong_configuration_is_refused(configure, changes, message):
    with pytest.raises(UsageError, match=message):
        configure(changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_shape": [2, 8, 8]}, "sample_shape is"),
        ({"sample_shape": 8}, "expected a list"),
        ({"labels": ["left", "left"]}, "a name twice"),
        ({"scheduler": {"num_train_timesteps": 100, "beta_start": "low"}}, "scheduler"),
        ({"scheduler": {"num_train_timesteps": 10, "trained_betas": [[0.1], [0.1, 0.2]]}}, "scheduler"),
        ({"seed": "one"}, "expected a whole number"),
        ({"seed": -1}, "seed is -1, expected 0 or more"),
    ],
)
def test_a_wrong_ladder_configuration_is_refused(configure, changes, message):
    with pytest.raises(UsageError, match=message):
        configure({}, **changes)


def test_bfloat16_learns_what_float32_does(tmp_path, data, configure):
    images = load_images(data, (1, 8, 8), ["left", "right"])
    losses = {}
    for precision in ("float32", "bfloat16"):
        train_ladder(configure({"precision": precision}), images, tmp_path / precision, lambda *progress: None)
        log = (tmp_path / precision / "training/unet/log.jsonl").read_text().splitlines()
        losses[precision] = json.loads(log[-1])["loss"]
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_too_large_a_batch_is_one_clear_sentence(tmp_path, data, configure):
    images = load_images(data, (1, 8, 8), ["left", "right"])
    message = "level 'unet': out of memory on cpu after step 0; lower batch_size from 10000000000000 and run"
    with pytest.raises(RuntimeError, match=message):
        train_ladder(configure({"batch_size": 10**13}), images, tmp_path / "out", lambda *progress: None)
