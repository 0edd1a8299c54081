import json
import shutil
import subprocess
import sys

import pytest
from ray.cluster_utils import Cluster

from mlem_dist import api

TUNE = {"nfe": (3,), "steps": 20, "device": "cpu"}


@pytest.fixture(scope="module")
def address():
    """A head without CPUs, as on a cluster, and a node of one."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mlem_dist", *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory, fashion, part_of):
    """The two lowest levels of the bundled ladder."""
    return part_of(fashion, (1, 2), tmp_path_factory.mktemp("ladders") / "small")


def test_plans_found_on_a_cluster_are_those_found_here(address, small, tmp_path):
    api.tune(small, out=tmp_path / "here", **TUNE)
    arguments = ["--nfe", 3, "--steps", 20, "--out", tmp_path / "there", "--address", address]
    done = run("tune", small, *arguments)
    assert done.returncode == 0, done.stderr
    assert "fitted" in done.stdout
    assert "The search takes about" in done.stderr
    here, there = (tmp_path / name / "plan-ode-3.json" for name in ("here", "there"))
    assert there.read_bytes() == here.read_bytes()
    again = run("tune", small, *arguments)
    assert again.stdout == done.stdout


def test_a_ladder_is_calibrated_on_a_node_of_a_cluster(address, small, tmp_path):
    done = run("calibrate", small, "--out", tmp_path, "--address", address)
    assert done.returncode == 0, done.stderr
    (measured,) = json.loads((tmp_path / "calibration.json").read_text())["devices"].values()
    assert [level["name"] for level in measured["levels"]] == ["gaussian", "unet-1"]


def test_what_is_refused_there_is_refused_here_in_one_sentence(address, small, tmp_path):
    single = shutil.copytree(small, tmp_path / "single")
    raw = json.loads((single / "ladder.json").read_text())
    (single / "ladder.json").write_text(json.dumps(raw | {"levels": raw["levels"][:1]}))
    done = run("calibrate", single, "--address", address)
    assert done.returncode == 2
    assert "has one level" in done.stderr
    assert "Traceback" not in done.stderr
