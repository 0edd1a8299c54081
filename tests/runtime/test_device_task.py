import os
import subprocess
import sys

import pytest
from ray.cluster_utils import Cluster

from mlem_dist import api
from mlem_dist.errors import UsageError
from mlem_dist.runtime.device_task import run_on_device
from mlem_dist.tuning.calibrate import calibrate


@pytest.fixture
def address():
    """A head without CPUs, as on a cluster, and a node of one."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()


def test_plans_found_on_a_cluster_are_those_found_here(address, fashion, part_of, tmp_path):
    small = part_of(fashion, (1, 2), tmp_path / "small")
    api.tune(small, out=tmp_path / "here", nfe=(3,), steps=20, device="cpu")
    command = [sys.executable, "-m", "mlem_dist", "tune", small, "--nfe", "3", "--steps", "20", "--address", address]
    done = subprocess.run(
        [*map(str, command), "--out", str(tmp_path / "there")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "fitted" in done.stdout
    assert "The search takes about" in done.stderr
    here, there = (tmp_path / name / "plan-ode-3.json" for name in ("here", "there"))
    assert there.read_bytes() == here.read_bytes()


def test_progress_comes_here_and_errors_are_those_of_the_task(three, local_ray):
    told = []
    measured = run_on_device(
        lambda report: calibrate(three, "cpu", report, steps=5, samples=2),
        "cpu",
        1,
        lambda stage, done, total: told.append((stage, done, total)),
    )
    assert [level.name for level in measured.levels] == [level.name for level in three.levels]
    assert told
    assert all(done <= total for _, done, total in told)

    def refuse(report):
        raise UsageError("not so")

    with pytest.raises(UsageError, match="not so"):
        run_on_device(refuse, "cpu", 1, lambda *_: None)
    with pytest.raises(RuntimeError, match="the process of the task died"):
        run_on_device(lambda report: os._exit(1), "cpu", 1, lambda *_: None)
