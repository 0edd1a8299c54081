"""Datasets with scores, `--keep` and `--until` whose processes are killed at random, against an undisturbed one.

python benchmarks/runtime/kills.py --kills 30 --out benchmarks/results/kills.json [--ladder DIR --prompts FILE]

Every kill is SIGKILL, of the command itself or of one of its Ray workers. A command that was killed is given again.
When a dataset is finished, its files are compared with those of the undisturbed dataset, and another one is begun,
until all kills are done.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import click
import psutil

SCORE = """
class Brightness:
    def __call__(self, batch):
        return {"brightness": batch["image"].mean((1, 2, 3))}
"""

NAMES = tuple(f"ray::{name}" for name in ("Coordinator", "Level", "Score", "Stage", "Trajectory", "Writer"))
"""Beginnings of the titles of a run's actors."""

SECONDS = 20.0
"""Longest time from the moment at which there are actors to the next kill."""

EARLY = 0.2
"""Share of kills at any moment, also before there are actors."""


def files(out: Path) -> dict[str, bytes]:
    """All files of a finished dataset by their paths."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def workers(driver: psutil.Process) -> list[psutil.Process]:
    """The actors of a run."""
    children = []
    with suppress(psutil.Error):
        for child in driver.children(recursive=True):
            with suppress(psutil.Error):
                if child.cmdline() and child.cmdline()[0].startswith(NAMES):
                    children.append(child)
    return children


def kill_one(run: subprocess.Popen[bytes], rng: random.Random) -> str:
    """Kill the command or one of its workers; returns the victim's name."""
    driver = psutil.Process(run.pid)
    crowd = workers(driver)
    if not crowd or rng.random() < 0.5:
        every = driver.children(recursive=True)
        run.send_signal(signal.SIGKILL)
        run.wait()
        # Ray's own processes end by themselves when the driver is gone.
        psutil.wait_procs(every, timeout=60)
        return "command"
    victim = rng.choice(crowd)
    name = victim.cmdline()[0].removeprefix("ray::").partition(".")[0]
    with suppress(psutil.Error):
        victim.send_signal(signal.SIGKILL)
    return name


@click.command()
@click.option("--kills", type=int, default=30, show_default=True)
@click.option("--num", type=int, default=4000, show_default=True)
@click.option("--until", type=int, default=1200, show_default=True)
@click.option("--keep", default="brightness > 60", show_default=True)
@click.option("--ladder", default="fashion", show_default=True)
@click.option("--prompts", type=click.Path(path_type=Path))
@click.option("--nfe", default="3", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    kills: int, num: int, until: int, keep: str, ladder: str, prompts: Path | None, nfe: str, seed: int, out: Path
) -> None:
    """Kill processes of datasets, and compare the datasets."""
    rng, victims, begun = random.Random(seed), Counter[str](), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "brightness.py").write_text(SCORE)

        def start(name: str) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-m", "mlem_dist", "generate", "--ladder", ladder, "--num", str(num)]
            command += ["--out", name, "--nfe", nfe, "--block-size", "20", "--shard-size", "20"]
            command += ["--score", "brightness:Brightness", "--keep", keep, "--until", str(until)]
            command += ["--prompts", str(prompts.absolute())] if prompts else []
            log = (Path(folder) / f"{name}.log").open("ab")
            environment = {**os.environ, "CI": "true"}
            return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment)

        run = start("undisturbed")
        if run.wait():
            raise click.ClickException((Path(folder) / "undisturbed.log").read_text()[-2000:])
        wanted = files(Path(folder) / "undisturbed")
        seconds = time.monotonic() - begun
        datasets = 0
        while victims.total() < kills:
            name = f"disturbed-{datasets}"
            run = start(name)
            while True:
                early = rng.random() < EARLY
                while run.poll() is None and not early and not workers(psutil.Process(run.pid)):
                    time.sleep(0.1)
                with suppress(subprocess.TimeoutExpired):
                    run.wait(rng.uniform(0, SECONDS) if victims.total() < kills else None)
                if run.poll() is None:
                    victim = kill_one(run, rng)
                    victims[victim] += 1
                    click.echo(f"{victims.total()}: {victim}", err=True)
                    run = start(name) if victim == "command" else run
                elif run.returncode:
                    raise click.ClickException((Path(folder) / f"{name}.log").read_text()[-2000:])
                else:
                    break
            if files(Path(folder) / name) != wanted:
                raise click.ClickException(f"{name} differs from the undisturbed dataset")
            datasets += 1
    result = {"kills": victims.total(), "victims": dict(victims), "datasets": datasets}
    result |= {"files": len(wanted), "rows": until, "undisturbed_seconds": round(seconds, 1)}
    out.write_text(json.dumps(result, indent=1) + "\n")
    click.echo(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
