import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from commands import ENDLESS, HANGS, SCRIPT, SMALL, assert_refused, command, running, tree, wait_for_files
from PIL import Image

from mlem_dist.cli import cli
from mlem_dist.ladder.images import load_images
from mlem_dist.ladder.ladder import Ladder
from mlem_dist.solver.plan import plan_from_dict

HALF = """
import time
from mlem_dist.cli import main
from mlem_dist.runtime import run

run_ray = run.run_ray

def half(job, ladder, out, shards, *others):
    yield from run_ray(job, ladder, out, shards[: len(shards) // 2], *others)
    while True:
        time.sleep(1)

run.run_ray = half
main()
"""
"""The command line, but that a run comes to the first half of its shards only, and never ends."""


def test_no_command_is_told_which_there_are():
    done = command()
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: mlem-dist")
    assert "generate" in done.stderr


def test_a_file_that_is_there_is_not_replaced(tmp_path, refuses):
    file = tmp_path / "mine.png"
    file.write_text("mine")
    refuses("plan", "fashion", "--num", "8", "--pool-devices", "cpu:1", "--out", str(file), message="exists")
    refuses("draw", "--out", str(file), message="exists")
    assert file.read_text() == "mine"


def test_the_option_that_differs_is_said(tmp_path, here, refuses):
    out = tmp_path / "out"
    arguments = ["--num", "16", *SMALL, "--engine", "inline", "--out", str(out)]
    assert here("generate", *arguments).returncode == 0
    refuses("generate", *arguments, "--nfe", "3", message="plan is another one: it follows from --nfe")
    refuses("generate", *arguments, "--seed", "3", message="seed was 0, now 3")


def test_a_folder_of_pictures_becomes_a_ladder_by_the_commands_of_the_docs(tmp_path, here):
    page = (Path(__file__).parents[1] / "docs/ladders.md").read_text()
    config = tmp_path / "photos.yaml"
    small = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1].replace("steps: 8000", "steps: 4")
    small = re.sub(r"block_out_channels: \[\d+", "block_out_channels: [8", small)
    small = re.sub(r", (48|64|128)\b", ", 8", small).replace("[3, 32, 32]", "[3, 16, 16]")
    config.write_text(small)
    for folder, colour in (("cats", (220, 120, 30)), ("dogs", (90, 60, 40))):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (48, 40 + 4 * i), colour).save(tmp_path / f"photos/{folder}/{i}.png")
    ladder = tmp_path / "photos-ladder"
    train = ("train", "--data", str(tmp_path / "photos"), "--config", str(config), "--out", str(ladder))
    done = command(*train)
    assert done.returncode == 0, done.stderr
    assert "12 images are larger than the samples" in done.stderr
    assert (ladder / "training/loss.png").read_bytes().startswith(b"\x89PNG")
    before = tree(ladder)
    again = here(*train)
    assert again.returncode == 0
    assert "finished already" in again.stdout
    assert {name: data for name, data in tree(ladder).items() if name != "training/loss.png"} == {
        name: data for name, data in before.items() if name != "training/loss.png"
    }
    out = tmp_path / "out"
    arguments = ("--num", "20", *SMALL, "--engine", "inline", "--out", str(out))
    made = here("generate", "--ladder", str(ladder), *arguments)
    assert made.returncode == 0, made.stderr
    assert load_images(out, (3, 16, 16), None).labels == ("cats", "dogs")


def test_a_training_that_diverges_fails_in_one_sentence(tmp_path, here, local_ray):
    (tmp_path / "photos").mkdir()
    for i in range(6):
        Image.new("L", (8, 8), 40 * i).save(tmp_path / f"photos/{i}.png")
    config = tmp_path / "photos.yaml"
    config.write_text(
        """
        name: photos
        sample_shape: [1, 8, 8]
        scheduler: {num_train_timesteps: 100, beta_start: 1.0e-3, beta_end: 0.2}
        levels:
          - name: unet
            kind: unet
            model: {block_out_channels: [8], norm_num_groups: 4, down_block_types: [DownBlock2D],
                    up_block_types: [UpBlock2D]}
            steps: 9
            learning_rate: 1.0e+36
        """
    )
    done = here("train", "--data", str(tmp_path / "photos"), "--config", str(config), "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    said = done.stderr[done.stderr.index("Error: ") :]
    assert said.count("\n") == 1
    assert "level 'unet': the loss is " in said
    assert "at step 1" in said
    assert not (tmp_path / "out/ladder.json").exists()


@pytest.fixture(scope="module")
def other_plan(tmp_path_factory) -> Path:
    """A plan for 30 steps."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    cli.main(["draw", "--steps", "30", "--nfe", "5", "--out", str(path)], standalone_mode=False)
    return path


def spoil_nothing(folder: Path) -> None:
    pass


def flip_byte(folder: Path) -> None:
    path = next(folder.glob("unet-1/*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def remove_weights(folder: Path) -> None:
    next(folder.glob("unet-1/*.safetensors")).unlink()


def other_schema(folder: Path) -> None:
    path = folder / "ladder.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))


def other_labels(folder: Path) -> None:
    path = folder / "ladder.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"labels": ["a", "b"]}))


BAD = {
    "num 0": (["--num", "0"], "0"),
    "num -5": (["--num", "-5"], "-5"),
    "num abc": (["--num", "abc"], "abc"),
    "num 1.5": (["--num", "1.5"], "1.5"),
    "num 1e400": (["--num", "1e400"], "1e400"),
    "nfe below the base level": (["--nfe", "0.001"], "below the cost of the base level"),
    "nfe nan": (["--nfe", "nan"], "nan"),
    "unknown ladder": (["--ladder", "nonesuch"], "nonesuch"),
    "label out of range": (["--labels", "3,10"], "10 is out of range"),
    "label word": (["--labels", "bag"], "bag"),
    "steps beyond the schedule": (["--steps", "1001"], "1001"),
    "shard not a multiple": (["--block-size", "8", "--shard-size", "20"], "take 16"),
    "placement": (["--placement", "1,3"], "1,3"),
    "coalesce in one pool": (["--placement", "together", "--coalesce", "4"], "one pool for all levels asks no other"),
    "placement in one process": (["--engine", "inline", "--placement", "pools"], "inline has no pools"),
    "shards": (["--num", "1e12"], "500,000,000 files; raise"),
    "unknown option": (["--nonesuch"], "nonesuch"),
    "ray client": (["--address", "ray://127.0.0.1:10001"], "ray job submit"),
    "plan missing": (["--plan", "nonesuch.json"], "nonesuch.json"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_sentence(tmp_path, name, refuses):
    arguments, message = BAD[name]
    out = tmp_path / "out"
    given = arguments if "--num" in arguments else ["--num", "16", *arguments]
    refuses("generate", "--out", str(out), *given, message=message)
    assert not out.exists()


def test_a_process_that_refuses_says_only_why(tmp_path):
    assert_refused(command("generate", "--num", "0", "--out", str(tmp_path / "out")), "0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path, refuses):
    arguments = ("--num", "8", "--out", str(tmp_path / "out"), "--device", "cuda", "--address", "local")
    refuses("generate", *arguments, message="torch finds no CUDA device")


def test_a_plan_for_other_steps_is_refused(tmp_path, other_plan, refuses):
    arguments = ("--num", "8", "--out", str(tmp_path / "out"), "--steps", "20", "--plan", str(other_plan))
    refuses("generate", *arguments, message="another steps: 30, not 20")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (flip_byte, "corrupted"),
        (remove_weights, "lacks diffusion_pytorch_model.safetensors; restore it"),
        (other_schema, "schema_version is 99"),
        (lambda folder: (folder / "ladder.json").write_text("[]"), "is not a JSON object"),
        (lambda folder: (folder / "ladder.json").unlink(), "it has no ladder.json"),
        (other_labels, "does not fit"),
    ],
)
def test_a_broken_ladder_is_refused(tmp_path, fashion, spoil, message, refuses):
    folder = tmp_path / "ladder"
    shutil.copytree(fashion.folder, folder)
    spoil(folder)
    refuses("generate", "--num", "8", "--out", str(tmp_path / "out"), "--ladder", str(folder), message=message)


def test_a_plan_for_another_ladder_is_refused(tmp_path, other_plan, refuses):
    raw = json.loads(other_plan.read_text()) | {"ladder": "0" * 64}
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(raw))
    arguments = ("--num", "8", "--out", str(tmp_path / "out"), "--steps", "30", "--plan", str(plan))
    refuses("generate", *arguments, message="another ladder")


def test_an_out_path_that_cannot_be_used_is_refused(tmp_path, refuses):
    file = tmp_path / "file"
    file.write_text("mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    for path, message in (
        (file, "is a file"),
        (file / "below", "not a writable folder"),
        (folder, "something else"),
        (link, "is a link to nothing"),
    ):
        before = tree(tmp_path)
        refuses("generate", "--num", "8", "--out", str(path), message=message)
        assert tree(tmp_path) == before


def test_an_address_that_does_not_answer_is_refused_before_ray_would_wait_for_it(tmp_path, refuses, monkeypatch):
    monkeypatch.setattr("ray.init", lambda **options: pytest.fail("it would wait for minutes"))
    monkeypatch.setattr("mlem_dist.runtime.cluster.ANSWER_SECONDS", 1)
    with socket.socket() as silent, socket.socket() as closed:
        for one in (silent, closed):
            one.bind(("127.0.0.1", 0))
        # Whoever connects to the other is refused, and nobody else can listen there.
        silent.listen()
        for one in (silent, closed):
            address = f"127.0.0.1:{one.getsockname()[1]}"
            refuses("generate", "--num", "8", "--out", str(tmp_path / "out"), "--address", address, message=address)


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, here, three):
    """SIGKILL of the driver and of all that it has started, on Ray; then to the end with another placement."""
    arguments = ["--ladder", str(three.folder), "--num", "192", *SMALL, "--devices", "1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = here("generate", *arguments, "--engine", "inline", "--out", str(whole))
    assert done.returncode == 0, done.stderr
    arguments += ["--address", "local"]
    first = [*arguments, "--placement", "pools", "--out", str(killed)]
    with running(sys.executable, "-c", HALF, "generate", *first) as run:
        wait_for_files(run, killed, ".mlem/train-*.json", 4)
    marked = [killed / "data" / f"{path.stem}.parquet" for path in killed.glob(".mlem/train-*.json")]
    assert 4 <= len(marked) <= 6
    # What is written from now on is younger, however coarse the clock of the file system is.
    for path in marked:
        os.utime(path, (0, 0))
    done = command("generate", *arguments, "--out", str(killed), "--json")
    assert done.returncode == 0, done.stderr
    assert "Placement 1-" in done.stderr
    assert json.loads(done.stdout)["made"] == 192 - 16 * len(marked)
    assert tree(killed) == tree(whole)
    assert all(path.stat().st_mtime == 0 for path in marked)
    again = here("generate", *arguments, "--out", str(killed))
    assert again.returncode == 0
    assert "finished already" in again.stdout


@pytest.mark.parametrize(
    ("number", "engine", "code"),
    [(signal.SIGINT, "inline", 130), (signal.SIGTERM, "inline", 143), (signal.SIGTERM, "ray", 143)],
)
def test_a_stopped_run_keeps_its_shards_and_says_so(tmp_path, number, engine, code):
    # Where it is ignored, as by a shell's background jobs, a child would ignore it too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = tmp_path / "out"
    arguments = [*ENDLESS, "--engine", engine, "--address", "local", "--out", str(out)]
    arguments += ["--placement", "together", "--devices", "1"] if engine == "ray" else []
    with running(SCRIPT, "generate", *arguments, stderr=subprocess.PIPE) as run:
        wait_for_files(run, out, "data/*.parquet")
        run.send_signal(number)
        _, stderr = run.communicate(timeout=HANGS)
    assert run.returncode == code
    assert "Traceback" not in stderr
    assert "Stopped." in stderr
    assert list(out.glob("data/*.parquet"))


def test_a_run_whose_ray_has_died_ends_and_says_so(tmp_path):
    """Nothing would come back where Ray has been started for this run alone, however long it waits."""
    out = tmp_path / "out"
    arguments = [*ENDLESS, "--address", "local", "--placement", "together", "--devices", "1", "--out", str(out)]
    # Ray sees whether its nodes live every three seconds otherwise, five times. They have ten seconds to answer.
    hasty = {f"RAY_health_check_{name}": "500" for name in ("period_ms", "initial_delay_ms")}
    with running(SCRIPT, "generate", *arguments, stderr=subprocess.PIPE, env=os.environ | hasty) as run:
        wait_for_files(run, out, "data/*.parquet")
        (raylet,) = [child for child in psutil.Process(run.pid).children() if child.name() == "raylet"]
        raylet.kill()
        _, stderr = run.communicate(timeout=HANGS)
    assert run.returncode == 1
    assert "Traceback" not in stderr
    assert "Ray has died on this machine" in stderr
    assert 0 < len(list(out.glob("data/*.parquet"))) < 1e6 / 16


def test_a_folder_named_like_a_bundled_ladder_is_that_folder(tmp_path, fashion):
    shutil.copytree(fashion.folder, tmp_path / "fashion")
    assert Ladder.load(tmp_path / "fashion").source == str(tmp_path / "fashion")
    assert Ladder.load("fashion").source == "fashion"


def test_the_report_the_sheet_and_verify(tmp_path, here, refuses):
    out = tmp_path / "o u't"
    arguments = ["--num", "3e1", *SMALL, "--labels", "2,7", "--engine", "inline", "--out", str(out)]
    done = here("generate", *arguments)
    assert done.returncode == 0, done.stderr
    for word in ("30 images", "images/s", "unet-1", "pyarrow", "mlem-dist show"):
        assert word in done.stdout
    look = shlex.split(done.stdout.partition("Open it:")[2].splitlines()[0])
    printed = subprocess.run([sys.executable, *look[1:]], capture_output=True, text=True, check=True)
    assert "sample_id" in printed.stdout
    assert here("show", str(out)).returncode == 0
    assert (out / "preview.png").read_bytes().startswith(b"\x89PNG")
    assert here("verify", str(out)).returncode == 0
    shard, extra = min((out / "data").iterdir()), out / "data/extra.parquet"
    whole = shard.read_bytes()
    extra.write_bytes(whole)
    shard.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    damaged = here("verify", str(out))
    assert damaged.returncode == 1
    assert shard.name in damaged.stderr
    assert "data/extra.parquet is no shard" in damaged.stderr
    extra.unlink()
    shard.write_bytes(whole[:-1] + b"?")
    refuses("show", str(out), message="cannot be read")
    # A repair leaves what has become the user's own.
    shard.unlink()
    (out / "README.md").write_text("mine")
    assert here("generate", *arguments).returncode == 0
    assert shard.read_bytes() == whole
    assert (out / "README.md").read_text() == "mine"


def test_a_dataset_that_lacks_its_end_alone_is_ended_without_ray(tmp_path, here):
    out = tmp_path / "out"
    arguments = ["--num", "32", *SMALL, "--out", str(out)]
    assert here("generate", *arguments, "--engine", "inline").returncode == 0
    made = tree(out)
    raw = json.loads(made["mlem.json"])
    (out / ".mlem").mkdir()
    for shard in raw["shards"]:
        (out / ".mlem" / f"{Path(shard['path']).stem}.json").write_text(json.dumps(shard))
    (out / "mlem.json").write_text(json.dumps(raw | {"shards": [], "calls_per_sample": {}}))
    (out / "README.md").unlink()
    begun = here("verify", str(out))
    assert begun.returncode == 3
    assert "2 shards are there and as they were written" in begun.stderr
    # As many as a cluster had.
    done = here("generate", *arguments, "--address", "local", "--devices", "1000")
    assert done.returncode == 0, done.stderr
    assert "Placement" not in done.stderr
    assert tree(out) == made


def test_a_memorised_plan_is_used_for_every_block(tmp_path, other_plan, here):
    out = tmp_path / "out"
    arguments = ["--num", "16", "--steps", "30", "--block-size", "8", "--shard-size", "8", "--engine", "inline"]
    done = here("generate", *arguments, "--plan", str(other_plan), "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "mlem.json").read_text())["config"]["plan"] == json.loads(other_plan.read_text())
    plan = plan_from_dict(json.loads(other_plan.read_text()), 6)
    assert [*json.loads(done.stdout)["calls_per_sample"].values()] == plan.calls.sum(1).tolist()


def test_a_ladder_that_was_measured_elsewhere_says_so(tmp_path, here, three):
    folder = shutil.copytree(three.folder, tmp_path / "ladder")
    raw = json.loads((folder / "ladder.json").read_text())
    for level in raw["levels"]:
        del level["seconds"]["cpu"]
    (folder / "ladder.json").write_text(json.dumps(raw))
    arguments = ("--num", "8", *SMALL, "--engine", "inline")
    elsewhere, measured = (
        here("generate", "--ladder", str(source), *arguments, "--out", str(tmp_path / f"out-{number}"))
        for number, source in enumerate((folder, three.folder))
    )
    assert elsewhere.returncode == measured.returncode == 0
    assert "counted by the levels' costs on cuda, as they were not measured on cpu" in elsewhere.stderr
    assert "counted by" not in measured.stderr


def test_ladder_show_prints_every_level(fashion, here):
    done = here("ladder", "show", "fashion")
    assert done.returncode == 0
    assert all(level.name in done.stdout for level in fashion.levels)
