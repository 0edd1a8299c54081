import json
import shutil

import pytest
import torch

from mlem_dist.errors import UsageError
from mlem_dist.ladder.images import load_images
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.training.assemble import train_ladder
from mlem_dist.training.resume import check_training
from mlem_dist.training.tasks import level_share, train_on_ray

LEVELS = ({"prediction": "residual", "teacher": "large", "steps": 40}, {"name": "large", "steps": 110})


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def images(data):
    return load_images(data, (1, 8, 8), ["left", "right"])


def test_side_by_side_on_ray_and_interrupted_it_is_the_same_ladder(tmp_path, images, configure, local_ray, one_thread):
    config = configure(*LEVELS)
    assert level_share(config)[0] == 3  # The pupil waits for its teacher.
    config = configure(*LEVELS, {"name": "third", "steps": 10})
    assert level_share(config)[0] == 1
    whole = train_ladder(config, images, tmp_path / "whole", lambda *progress: None)
    for progress in train_on_ray(config, images, tmp_path / "ray", "cpu"):
        if progress.get("large", (0, 0.0))[0]:
            break
    assert not (tmp_path / "ray/ladder.json").exists()
    assert not check_training(config, images, tmp_path / "ray")
    last: dict[str, tuple[int, float]] = {}
    for progress in train_on_ray(config, images, tmp_path / "ray", "cpu"):
        last |= progress
    assert {name: done for name, (done, _) in last.items()} == {"unet": 40, "large": 110, "third": 10}
    assert Ladder.load(tmp_path / "ray").digest == whole.digest
    assert check_training(config, images, tmp_path / "ray")
    log = [json.loads(line) for line in (tmp_path / "ray/training/large/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [100, 110]


def test_levels_share_cores_and_gpus_where_there_are_any(configure, monkeypatch):
    def node(**resources):
        return {"Alive": True, "Resources": resources}

    config = configure({}, {"name": "second"})
    for nodes, threads, gpu in (
        ([node(CPU=8.0)], 4, 0.5),
        ([node(), node(CPU=8.0, GPU=1.0), node(CPU=8.0)], 8, 0.5),
        ([node(CPU=0.0), node(CPU=3.0, GPU=2.0), node(CPU=8.0, GPU=2.0)], 3, 1),
        ([node()], 1, 0.5),
    ):
        monkeypatch.setattr("ray.nodes", lambda nodes=nodes: nodes)
        assert level_share(config) == (threads, gpu)


def test_what_does_not_fit_together_is_refused_and_nothing_is_touched(tmp_path, images, configure):
    out = tmp_path / "out"
    train_ladder(configure({"steps": 20}), images, out, lambda *progress: None)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert not check_training(configure({"steps": 30, "learning_rate": 1e-3}), images, out)
    for changes, message in (
        ({"steps": 10}, "its checkpoint is at step 20, beyond the 10 steps"),
        ({"steps": 20, "patch": 1}, "its checkpoint was trained with patch 2, not 1"),
        ({"steps": 20, "prediction": "epsilon"}, "trained with prediction v_prediction, not epsilon"),
        ({"steps": 20, "model": {"block_out_channels": [8]}}, "its model cannot be used for samples of 1x8x8"),
    ):
        with pytest.raises(UsageError, match=message):
            check_training(configure(changes), images, out)
    pupil, teacher = {"teacher": "large", "steps": 20}, {"name": "large", "steps": 20}
    train_ladder(configure(pupil, teacher), images, tmp_path / "taught", lambda *progress: None)
    with pytest.raises(UsageError, match="was trained with its teacher's steps 20, not 30"):
        check_training(configure(pupil, teacher | {"steps": 30}), images, tmp_path / "taught")
    for changes, message in (
        ({"patch": 1}, "was trained with its teacher's patch 2, not 1"),
        ({"prediction": "epsilon"}, "was trained with its teacher's prediction v_prediction, not epsilon"),
    ):
        # As one is told to who changes it.
        shutil.copytree(tmp_path / "taught", tmp_path / "untaught", dirs_exist_ok=True)
        shutil.rmtree(tmp_path / "untaught/training/large")
        with pytest.raises(UsageError, match=message):
            check_training(configure(pupil, teacher | changes), images, tmp_path / "untaught")
    # Version 0.2 kept no more of a teacher.
    kept = tmp_path / "untaught/training/unet/settings.json"
    known = json.loads(kept.read_text())
    of_teacher = {key for key in known if key.startswith("its teacher's ")}
    kept.write_text(json.dumps({key: known[key] for key in known.keys() - of_teacher | {"its teacher's steps"}}))
    check_training(configure(pupil, teacher), images, tmp_path / "untaught")
    with pytest.raises(UsageError, match="trained with seed 0, not 1"):
        check_training(configure({"steps": 20}, seed=1), images, out)
    other = load_images(tmp_path / "data", (1, 8, 8), ["right", "left"])
    with pytest.raises(UsageError, match="its checkpoint was trained with"):
        check_training(configure({"steps": 20}), other, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds something else"):
        check_training(configure({}), images, tmp_path / "full")
    with pytest.raises(UsageError, match="is a file"):
        check_training(configure({}), images, tmp_path / "full/thesis.txt")
