import pickle
import subprocess
import sys

import numpy as np
import pytest
from ray.cluster_utils import Cluster

from mlem_dist.runtime.generate import complete, open_dataset
from mlem_dist.runtime.inline import run_inline
from mlem_dist.solver.plan import held, on_levels

DRIVER = """
import pickle, sys
from pathlib import Path

from mlem_dist.ladder.ladder import Ladder
from mlem_dist.runtime import cluster
from mlem_dist.runtime.arrange import arrange
from mlem_dist.runtime.driver import run_ray
from mlem_dist.runtime.generate import complete, open_dataset
from mlem_dist.runtime.placement import parse_placement

address, job, out = sys.argv[1], pickle.loads(bytes.fromhex(sys.argv[2])), Path(sys.argv[3])
cluster.connect(address)
ladder = Ladder.load(job.ladder)
there = arrange(job, ladder, parse_placement("together", len(ladder.levels)), None, True)
dataset = open_dataset(job, ladder, out)
engine = lambda shards: run_ray(job, ladder, out, shards, there)
for progress in complete(dataset, ladder, engine):
    print("at", progress.blocks, progress.devices, sum(pool.calls for pool in progress.pools), flush=True)
"""


@pytest.fixture
def two_nodes():
    """A head without CPUs and two nodes of one each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    yield cluster, nodes
    cluster.shutdown()


def test_a_lost_node_costs_no_sample(two_nodes, three, make_job, tmp_path):
    """It takes an actor with it, and the images that it has made of a shard that is not written yet."""
    cluster, nodes = two_nodes
    levels = len(three.levels)
    plan = on_levels(held(np.eye(2, 12, dtype=bool)[[0, 0]] | np.array([[True], [False]])), (1, levels))
    # A block's images are more than what Ray keeps with the coordinator.
    job = make_job(plan, three, num=2080, block_size=104, shard_size=2080)
    arguments = [cluster.address, pickle.dumps(job).hex(), str(tmp_path / "out")]
    removed = False
    with subprocess.Popen([sys.executable, "-c", DRIVER, *arguments], stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            # Ray prints what its nodes say.
            if not line.startswith("at "):
                continue
            blocks, devices, calls = map(int, line.split()[1:])
            assert devices == 2
            if blocks >= 4 and not removed:
                assert blocks < 12
                cluster.remove_node(nodes[1], allow_graceful=False)
                # Ray 2.60 uses a whole core of the head for looking for its bundle's new place until there is one.
                cluster.add_node(num_cpus=1)
                removed = True
    assert run.returncode == 0
    # Of twenty blocks.
    assert calls > 20
    list(
        complete(
            open_dataset(job, three, tmp_path / "reference"),
            three,
            lambda shards: run_inline(job, three, tmp_path / "reference", shards, 2),
        )
    )
    for path in (tmp_path / "reference").rglob("*.parquet"):
        assert (tmp_path / "out" / path.relative_to(tmp_path / "reference")).read_bytes() == path.read_bytes()
