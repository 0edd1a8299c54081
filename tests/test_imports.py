import ast
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import mlem_dist
from mlem_dist.models.imports import UNUSED
from mlem_dist.solver.plan import single_level

BELOW = {
    "solver": "",
    "dataset": "",
    "models": "solver",
    "ladder": "models solver",
    "tuning": "ladder models solver",
    "training": "ladder models solver",
    "engine": "dataset ladder models solver",
    "capacity": "engine dataset ladder models solver",
    "runtime": "capacity engine dataset ladder models solver",
    "report": "runtime capacity engine dataset tuning training ladder models solver",
    "api": "report runtime capacity engine dataset tuning training ladder models solver",
    "cli": "api report runtime capacity engine dataset tuning training ladder models solver",
}
"""Rooms of the package, with the rooms that each may import, beside the modules that lie below all."""

EVERYWHERE = {"__version__", "errors", "extras", "files", "machine", "store"}

PACKAGE = Path(mlem_dist.__file__).parent


def imported(file: Path) -> set[str]:
    """The modules of this package that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.startswith("mlem_dist.")}


@pytest.mark.parametrize("room", BELOW)
def test_imports_run_one_way(room):
    files = [*(PACKAGE / room).rglob("*.py")] or [PACKAGE / f"{room}.py"]
    rooms = {name.split(".")[1] for file in files for name in imported(file)}
    assert rooms <= {room, *BELOW[room].split()} | EVERYWHERE


def test_every_room_has_its_place():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert rooms - {"__pycache__", "__init__", "__main__"} - EVERYWHERE == {*BELOW}


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("", "torch ray diffusers pyarrow"),
        ("cli", "torch ray pyarrow"),
        ("dataset.*", "torch ray"),
        ("solver.*", "ray diffusers"),
        ("engine.*", "ray"),
        ("capacity.*", "ray"),
        ("runtime.coordinator", "torch"),
        ("engine.writer", "torch"),
        ("engine.program", "torch"),
    ],
)
def test_a_room_does_not_import_what_it_does_not_use(modules, absent):
    """Each in a fresh interpreter."""
    room, _, module = modules.partition(".")
    every = [file.stem for file in (PACKAGE / room).glob("*.py")] if module == "*" else [module]
    names = [".".join(filter(None, ("mlem_dist", room, name))) for name in every if name != "__init__"]
    check = f"import sys, {', '.join(names)}; print(*{{*sys.modules}} & {{*{absent.split()!r}}})"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout == "\n"


def test_the_public_names_are_imported_when_they_are_used():
    check = """
import sys, mlem_dist
assert not {"torch", "ray"} & {*sys.modules}
assert {*dir(mlem_dist)} == {*mlem_dist.__all__, "__version__"}
for name in mlem_dist.__all__:
    assert getattr(mlem_dist, name).__doc__
assert not hasattr(mlem_dist, "nothing")
"""
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.parametrize("decorators", ["imports.DECORATORS", "()"])
def test_levels_are_loaded_also_by_a_diffusers_that_wants_more_of_the_compiler(decorators):
    work = f"""
import sys
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.models import imports
from mlem_dist.engine.worker import Levels
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
