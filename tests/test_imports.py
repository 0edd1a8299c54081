import os
import pickle
import subprocess
import sys

import pytest

from mlem_dist.runtime.imports import UNUSED
from mlem_dist.solver.plan import single_level


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("cli", "torch ray pyarrow"),
        ("dataset.manifest", "torch ray"),
        ("solver.integrate", "ray diffusers"),
        ("runtime.coordinator", "torch"),
        ("runtime.writer", "torch"),
    ],
)
def test_what_starts_soon_does_not_wait_for_what_it_does_not_use(module, absent):
    check = f"import sys, mlem_dist.{module}; print(*{{*sys.modules}} & {{*{absent.split()!r}}})"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout == "\n"


@pytest.mark.parametrize("decorators", ["imports.DECORATORS", "()"])
def test_levels_are_loaded_also_by_a_diffusers_that_wants_more_of_the_compiler(decorators):
    work = f"""
import sys
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.runtime import imports
from mlem_dist.runtime.worker import Levels
imports.DECORATORS = {decorators}
imports.hide_unused()
Levels(Ladder.load("fashion"), "cpu", "float32").load(2)
print(imports.COMPILER in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, check=True)
    assert done.stdout == f"{decorators == '()'}\n"


def test_an_actor_imports_nothing_that_only_diffusers_would(make_job, tmp_path):
    for name in UNUSED:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise SystemExit('{name} is imported')")
        (tmp_path / f"{name}-99.dist-info").mkdir()
        (tmp_path / f"{name}-99.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 99\n"
        )
    job = make_job(single_level(2, 2, 12), block_size=8, shard_size=8)
    (tmp_path / "job").write_bytes(pickle.dumps(job))
    work = """
import pickle, sys
from mlem_dist.runtime.actors import LevelActor
actor = LevelActor(pickle.load(open(sys.argv[1], "rb")), (range(1, 3),), 0)
actor.prepare()
print(2 in actor.worker.levels, "torch._dynamo" in sys.modules)
import torch._dynamo
print(torch._dynamo.disable.__module__)
"""
    command = [sys.executable, "-c", work, str(tmp_path / "job")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True False\ntorch._dynamo.decorators\n", "")
