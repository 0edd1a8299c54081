import os

import pytest

from mlem_dist import api
from mlem_dist.errors import UsageError
from mlem_dist.runtime.device_task import run_on_device


def test_plans_found_on_a_cluster_are_those_found_here(fashion, part_of, tmp_path, local_ray, monkeypatch):
    small = part_of(fashion, (1, 2), tmp_path / "small")
    given = {"nfe": (3,), "steps": 20, "device": "cpu"}
    api.tune(small, out=tmp_path / "here", **given)
    # As if an address named the Ray to which this process is connected already.
    monkeypatch.setattr("mlem_dist.runtime.cluster.is_named", lambda address: True)
    told, stages = [], []
    rows, _ = api.tune(
        small,
        out=tmp_path / "there",
        notify=told.append,
        progress=lambda stage, done, total: stages.append((stage, done <= total)),
        **given,
    )
    assert "fitted" in {row.family for row in rows}
    assert "The search takes about" in told[0]
    assert stages
    assert all(within for _, within in stages)
    here, there = (tmp_path / name / "plan-ode-3.json" for name in ("here", "there"))
    assert there.read_bytes() == here.read_bytes()
    measured, written, _ = api.calibrate(small, out=tmp_path / "there", device="cpu")
    assert [level.name for level in measured.levels] == ["gaussian", "unet-1"]
    assert all(path.exists() for path in written)


def test_errors_are_those_of_the_task(local_ray):
    def refuse(report):
        raise UsageError("not so")

    with pytest.raises(UsageError, match="not so"):
        run_on_device(refuse, "cpu", 1, lambda *_: None)
    with pytest.raises(RuntimeError, match="the process of the task died"):
        run_on_device(lambda report: os._exit(1), "cpu", 1, lambda *_: None)
