"""The program in environments as people have them: folders, streams, locales, limits."""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest
from commands import HANGS, SCRIPT, SMALL, assert_refused, tree
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mlem_dist
from mlem_dist import machine
from mlem_dist.engine.job import versions
from mlem_dist.errors import UsageError
from mlem_dist.runtime import cluster

EXAMPLES = Path(__file__).parents[1] / "examples"

INLINE = ["generate", "--engine", "inline", "--num", "16", *SMALL]


def run(
    *arguments: str,
    program: tuple[str, ...] = (SCRIPT,),
    env: Mapping[str, str] | None = None,
    before: Callable[[], object] | None = None,
    **streams: object,
) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, with further environment variables, after a call of `before` in it."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.run(
        [*program, *arguments],
        env={**os.environ, **(env or {})},
        preexec_fn=before,
        text=True,
        encoding="utf-8",
        timeout=HANGS,
        check=False,
        **streams,
    )


def test_what_is_installed_runs_wherever_it_is_started(tmp_path, three, here):
    """In a folder with other code of the same names, where the machine lends one core and no place but /tmp."""
    folder = tmp_path / "folder"
    shutil.copytree(
        Path(mlem_dist.__file__).parent, folder / "mlem_dist", ignore=shutil.ignore_patterns("*.safetensors")
    )
    shards = folder / "mlem_dist/dataset/shards.py"
    shards.write_text(shards.read_text().replace("for image in images:", "for image in 255 - images:"))
    for name in ("numpy", "torch", "PIL", "tqdm", "queue", "ray"):
        (folder / f"{name}.py").write_text("raise SystemExit('of the current folder')\n")
    narrow = {"HOME": "/proc/no/home", "TMPDIR": str(tmp_path / ("long" * 20))}
    core = min(os.sched_getaffinity(0))
    arguments = ["--ladder", str(three.folder), "--num", "32", *SMALL]
    made = run(
        *("generate", *arguments, "--out", str(tmp_path / "ray")),
        env=narrow,
        before=lambda: os.sched_setaffinity(0, {core}),
        cwd=folder,
    )
    assert made.returncode == 0, made.stderr
    assert "images/s on 1 CPU cores" in made.stdout
    assert "Ray's temporary files are in /tmp/ray" in made.stderr
    reference = here("generate", *arguments, "--engine", "inline", "--out", str(tmp_path / "inline"))
    assert reference.returncode == 0, reference.stderr
    assert tree(tmp_path / "ray") == tree(tmp_path / "inline")


def without_extras() -> tuple[str, ...]:
    """A program that runs a script where only the package's own requirements are found, except by Ray's workers."""
    kept: set[str] = set()
    todo = [Requirement("mlem-dist")]
    while todo:
        requirement = todo.pop()
        extras = requirement.extras or {""}
        for name in {f"{requirement.name}[{extra}]" for extra in extras} - kept:
            kept.add(name)
            try:
                further = map(Requirement, metadata.requires(requirement.name) or [])
            except metadata.PackageNotFoundError:
                continue
            todo += [
                other
                for other in further
                if not other.marker or any(other.marker.evaluate({"extra": extra}) for extra in extras)
            ]
    names = {canonicalize_name(name.partition("[")[0]) for name in kept}
    hidden = [
        module
        for module, owners in metadata.packages_distributions().items()
        if not names & {canonicalize_name(owner) for owner in owners}
    ]
    assert {"pytest", "datasets", "matplotlib"} <= {*hidden}
    program = f"""
import runpy, sys, sysconfig
from importlib.util import find_spec
from importlib.machinery import PathFinder
hidden = {hidden!r}
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name in hidden:
            # Ray has some packages in folders of its own.
            path = [folder for folder in sys.path if folder not in sysconfig.get_paths().values()]
        return super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
assert find_spec("pytest") is None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    return sys.executable, "-c", program


def test_examples_need_no_extra(tmp_path):
    program = without_extras()
    for name in ("sample_in_process.py", "generate_and_read.py"):
        done = run(str(EXAMPLES / name), program=program, cwd=tmp_path)
        assert done.returncode == 0, done.stderr


def test_another_source_of_the_same_version_is_noticed(tmp_path):
    """The digest that every node compares is that of the code which runs there."""
    digests = []
    code = 'from mlem_dist.engine.job import versions; print(versions()["mlem_dist\'s source"])'
    for line in ("", "\n# changed\n"):
        shutil.copytree(Path(mlem_dist.__file__).parent, tmp_path / "mlem_dist", dirs_exist_ok=True)
        with (tmp_path / "mlem_dist/dataset/shards.py").open("a") as file:
            file.write(line)
        digests.append(run("-c", code, program=(sys.executable,), cwd=tmp_path).stdout)
    assert digests[0] != digests[1]
    assert digests[0].strip() == versions()["mlem_dist's source"]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_stream_that_nobody_reads_ends_no_run(tmp_path, stream, here):
    """Each line of progress is written, to a pipe whose reader has gone; the other stream is closed from the start."""
    read, write = os.pipe()
    os.close(read)
    other = {"stdout": 2, "stderr": 1}[stream]
    program = "from mlem_dist.report import progress; progress.LINE_SECONDS = 0; from mlem_dist.cli import main; main()"
    done = run(
        *(*INLINE, "--out", str(tmp_path / "out")),
        program=(sys.executable, "-c", program),
        before=lambda: os.close(other),
        **{stream: write},
    )
    os.close(write)
    assert done.returncode == 0
    whole = here("verify", str(tmp_path / "out"))
    assert whole.returncode == 0, whole.stderr


def test_a_result_that_cannot_be_written_is_a_failure():
    with Path("/dev/full").open("w") as full:
        done = run("ladder", "show", "fashion", stdout=full)
    assert done.returncode == 1
    assert done.stderr == "Error: [Errno 28] No space left on device\n"


def test_files_are_utf8_in_every_locale(tmp_path, three):
    ladder = tmp_path / "ladder"
    shutil.copytree(three.folder, ladder)
    raw = json.loads((ladder / "ladder.json").read_bytes())
    labels = ["Käse", "猫", *raw["labels"][2:]]
    (ladder / "ladder.json").write_text(json.dumps(raw | {"labels": labels}, ensure_ascii=False), "utf-8")
    config = tmp_path / "config.yaml"
    config.write_text("name: Käse\nsample_shape: [1, 8, 8]\nscheduler: {}\nlevels: [{name: 猫, kind: none}]\n", "utf-8")
    ascii_locale = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    out = tmp_path / "out"
    done = run(*INLINE, "--ladder", str(ladder), "--out", str(out), env=ascii_locale)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "mlem.json").read_bytes())["labels"] == labels
    assert "0 Käse, 1 猫" in (out / "README.md").read_text("utf-8")
    shown = run("ladder", "show", str(ladder), env=ascii_locale)
    assert shown.returncode == 0, shown.stderr
    arguments = ["train", "--data", str(tmp_path), "--config", str(config), "--out", str(out / "x")]
    # The configuration is read, and its contents are what is refused.
    assert_refused(run(*arguments, env=ascii_locale), "kind is 'none'")


@pytest.mark.parametrize("command", ["generate", "show", "train", "tune", "draw"])
def test_a_relative_path_to_write_to_is_refused_in_a_ray_job(tmp_path, monkeypatch, refuses, command):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.chdir(tmp_path)
    arguments = {
        "generate": ["--num", "16", *SMALL],
        "show": ["dataset"],
        "train": ["--data", "data", "--config", "config.yaml"],
        "tune": ["fashion"],
        "draw": [],
    }[command]
    refuses(
        command, *arguments, "--out", "jobrel/fashion", message="'jobrel/fashion' is a relative path, and a Ray job"
    )
    assert not [*tmp_path.iterdir()]


def test_an_address_is_tried_with_the_installed_ray(tmp_path, monkeypatch):
    """Something that listens and is no Ray, asked from a folder with a file named like a library."""
    (tmp_path / "click.py").write_text("raise SystemExit('version of the current folder')\n")
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(UsageError) as refused:
        cluster.connect(f"127.0.0.1:{server.getsockname()[1]}")
    assert "no Ray head answers" in str(refused.value)
    assert "current folder" not in str(refused.value)


def test_a_ray_that_does_not_start_is_said_in_one_sentence(tmp_path):
    """Its token is to be read from a file that is not there."""
    out = tmp_path / "out"
    done = run("generate", "--num", "16", *SMALL, "--out", str(out), env={"RAY_AUTH_TOKEN_PATH": str(tmp_path / "no")})
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: Ray does not start on this machine (")
    assert "--engine inline" in last
    assert not (out / "data").exists()


def test_too_few_open_files_are_refused_by_their_name(tmp_path):
    out = tmp_path / "out"
    limits = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (64, 64))
    done = run("generate", "--num", "16", *SMALL, "--out", str(out), before=limits)
    assert done.returncode == 2
    assert "Error: this process may open 64 files (ulimit -Hn), and Ray needs" in done.stderr
    assert not (out / "data").exists()


def test_a_soft_limit_of_open_files_is_raised():
    code = (
        "import resource; from mlem_dist.machine import require_open_files; require_open_files(200, 'it'); "
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    limits = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (64, 256))
    assert run("-c", code, program=(sys.executable,), before=limits).stdout == "(200, 256)\n"


@pytest.mark.parametrize(
    ("quotas", "cores"),
    [
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "350000 100000"}, 3),
        ({"cpu.max": "max 100000", "job/cpu.max": "250000 100000", "job/step/cpu.max": "max 100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({}, 8),
    ],
)
def test_cores_are_those_that_a_container_lends(tmp_path, monkeypatch, quotas, cores):
    for name, content in quotas.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    own = tmp_path / "own"
    own.write_text("0::/job/step\n")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN_CGROUP", own)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert machine.available_cores() == cores


@pytest.mark.parametrize(
    ("limits", "share"),
    [
        ({}, 16),
        ({"memory.max": "max", "job/memory.max": "4096"}, 4),
        ({"memory.max": "8192", "job/memory.max": "max", "job/step/memory.max": "999999999"}, 8),
        ({"memory/memory.limit_in_bytes": "2048"}, 2),
        ({"memory/memory.limit_in_bytes": "9223372036854771712"}, 16),
    ],
)
def test_memory_is_what_a_container_lends(tmp_path, monkeypatch, limits, share):
    """In KiB, of the 16 that the machine has, to the one core that the container lends."""
    for name, content in ({"cpu.max": "100000 100000"} | limits).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    own = tmp_path / "own"
    own.write_text("0::/job/step\n")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN_CGROUP", own)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 4}.__getitem__)
    assert machine.memory_per_core() == 1024 * share


@pytest.mark.parametrize("kind", ["generate", "draw", "plan", "tune", "train", "show", "verify", "ladder"])
def test_an_empty_path_is_refused(tmp_path, monkeypatch, refuses, kind):
    """As that of a variable which is not set: the current folder is not meant."""
    monkeypatch.chdir(tmp_path)
    for arguments in {
        "generate": [["--num", "4", "--out", ""], ["--num", "4", "--out", "x", "--ladder", ""]],
        "draw": [["--out", ""]],
        "plan": [["fashion", "--num", "4", "--pool-devices", "cpu:1", "--out", ""]],
        "tune": [["fashion", "--out", ""], ["", "--out", "x"]],
        "train": [["--data", "", "--config", "c", "--out", "x"], ["--data", "d", "--config", "c", "--out", ""]],
        "show": [[""]],
        "verify": [[""]],
        "ladder": [["show", ""], ["measure", ""]],
    }[kind]:
        refuses(kind, *arguments, message="it is empty, expected a name or path")
    assert not [*tmp_path.iterdir()]


def test_what_systems_put_into_a_folder_is_passed_over(tmp_path, here, refuses):
    out = tmp_path / "volume"
    (out / "lost+found").mkdir(parents=True)
    (out / ".DS_Store").touch()
    (out / ".gitkeep").touch()
    (out / "notes.txt").touch()
    (out / ".hidden").touch()
    arguments = [*INLINE, "--out", str(out)]
    refuses(*arguments, message="holds something else (.hidden, notes.txt) and no mlem.json")
    (out / "notes.txt").unlink()
    (out / ".hidden").unlink()
    assert here(*arguments).returncode == 0
    assert (out / "lost+found").is_dir()


def test_a_contact_sheet_has_a_place_of_its_own_where_the_dataset_may_be_read_only(
    tmp_path, here, refuses, monkeypatch
):
    out, picture = tmp_path / "out", tmp_path / "sheets" / "out.png"
    assert here(*INLINE, "--out", str(out)).returncode == 0
    before = tree(out)
    # Root may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, *_, **__: not Path(path).is_relative_to(out))
    refuses("show", str(out), message=f"{out} cannot be written; choose another place for the contact sheet by --out")
    picture.parent.mkdir()
    assert here("show", str(out), "--out", str(picture)).returncode == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    refuses("show", str(out), "--out", str(picture), message="exists")
    refuses("show", str(out), "--out", str(tmp_path / "x.jpg"), message="expected a name that ends in .png")
    assert tree(out) == before


@pytest.mark.parametrize("module", ["mlem_dist", "mlem_dist.cli"])
def test_modules_run_as_the_command_does(module):
    done = run("ladder", "show", "nowhere", program=(sys.executable, "-m", module))
    assert_refused(done, "no ladder 'nowhere'")
