import pickle
import signal
import subprocess
import sys
from contextlib import suppress

import numpy as np
import psutil
import pytest
from ray.cluster_utils import Cluster

from mlem_dist.engine.completion import complete, open_dataset
from mlem_dist.engine.inline import run_inline
from mlem_dist.solver.plan import held, on_levels

DRIVER = """
import pickle, sys
from pathlib import Path

from mlem_dist.ladder.ladder import Ladder
from mlem_dist.runtime import cells, cluster
from mlem_dist.runtime.arrangement import arrange
from mlem_dist.runtime.run import run_ray
from mlem_dist.engine.completion import complete, open_dataset
from mlem_dist.capacity.placement import parse_placement

address, job, out = sys.argv[1], pickle.loads(bytes.fromhex(sys.argv[2])), Path(sys.argv[3])
cluster.connect(address)
ladder = Ladder.load(job.ladder)
there = arrange(job, ladder, parse_placement("together", len(ladder.levels)), None, True)
dataset = open_dataset(job, ladder, out)
engine = lambda shards: run_ray(job, ladder, out, shards, there)
# Nothing is handed out before this process is told to.
ahead, cells.QUEUED_BLOCKS_PER_DEVICE = cells.QUEUED_BLOCKS_PER_DEVICE, 0
for progress in complete(dataset, ladder, engine):
    print("at", progress.blocks, progress.devices, sum(pool.calls for pool in progress.pools), flush=True)
    if progress.state == "sampling" and not cells.QUEUED_BLOCKS_PER_DEVICE:
        print("ready", flush=True)
        sys.stdin.readline()
        cells.QUEUED_BLOCKS_PER_DEVICE = ahead
"""


@pytest.fixture
def two_nodes():
    """A head without CPUs and two nodes of one each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    yield cluster, nodes
    cluster.shutdown()


def writers(cluster: Cluster) -> list[psutil.Process]:
    """The processes of the cluster that write shards."""
    found = []
    for node in cluster.list_all_nodes():
        for info in node.all_processes["raylet"]:
            for child in psutil.Process(info.process.pid).children():
                with suppress(psutil.NoSuchProcess):
                    if "".join(child.cmdline()).startswith("ray::Writer"):
                        found.append(child)
    return found


def test_a_lost_node_costs_no_sample(two_nodes, three, make_job, tmp_path):
    """It takes an actor with it, and the images that it has made of a shard that is not written yet.

    What writes stands still until then; each node has made at least the two blocks that its actor was given first.
    """
    cluster, nodes = two_nodes
    levels = len(three.levels)
    plan = on_levels(held(np.eye(2, 12, dtype=bool)[[0, 0]] | np.array([[True], [False]])), (1, levels))
    # A block's images are more than what Ray keeps with the coordinator.
    job = make_job(plan, three, num=4160, block_size=104, shard_size=2080)
    arguments = [cluster.address, pickle.dumps(job).hex(), str(tmp_path / "out")]
    still = []
    removed = False
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", DRIVER, *arguments], **pipes) as run:
        for line in run.stdout:
            if line == "ready\n":
                still = writers(cluster)
                for writer in still:
                    writer.send_signal(signal.SIGSTOP)
                print(file=run.stdin, flush=True)
            # Ray prints what its nodes say.
            if not line.startswith("at "):
                continue
            blocks, devices, calls = map(int, line.split()[1:])
            assert devices == 2
            # The first of two shards.
            if blocks >= 20 and not removed:
                assert not list((tmp_path / "out").glob("data/*"))
                cluster.remove_node(nodes[1], allow_graceful=False)
                # Ray 2.60 uses a whole core of the head for looking for its bundle's new place until there is one.
                cluster.add_node(num_cpus=1)
                for writer in still:
                    with suppress(psutil.NoSuchProcess):
                        writer.send_signal(signal.SIGCONT)
                removed = True
    assert still
    assert removed
    assert run.returncode == 0
    # Of forty blocks.
    assert calls > 40
    list(
        complete(
            open_dataset(job, three, tmp_path / "reference"),
            three,
            lambda shards: run_inline(job, three, tmp_path / "reference", shards, 2),
        )
    )
    for path in (tmp_path / "reference").rglob("*.parquet"):
        assert (tmp_path / "out" / path.relative_to(tmp_path / "reference")).read_bytes() == path.read_bytes()
