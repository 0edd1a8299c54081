"""What all processes but the sampling actors use of two cores: Ray's own, the coordinator, the writer, the driver.

python benchmarks/runtime/ray_share.py --out benchmarks/results/ray_share.json
"""

import json
import platform
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

import click
from processes import SCRIPT, cpu_seconds

CORES, NUM = 2, 3000
BEFORE_SECONDS, SECONDS = 25, 40
"""From the start of the command, and of the look: a part of its run in which nothing begins or ends."""

SAMPLING = "ray::TrajectoryActor"


def name(pid: int) -> str:
    """An actor's class, a script's file or a program's name."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ").split()
    if words[0].startswith("ray::"):
        return words[0].partition(".")[0]
    interpreted = Path(words[0]).name.startswith("python")
    return Path(next(word for word in words[interpreted:] if not word.startswith("-"))).name


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(out: Path) -> None:
    """Cores by kind of process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [SCRIPT, "generate", "--num", str(NUM), "--out", f"{folder}/out", "--devices", str(CORES)]
        command += ["--solver", "sde", "--address", "local", "--placement", "together", "--nfe", "10"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as driver:
            time.sleep(BEFORE_SECONDS)
            began, before = time.monotonic(), cpu_seconds(driver.pid)
            time.sleep(SECONDS)
            seconds, after = time.monotonic() - began, cpu_seconds(driver.pid)
            used: Counter[str] = Counter()
            for pid, so_far in after.items():
                used[name(pid)] += (so_far - before.get(pid, 0.0)) / seconds
            driver.wait()
    result = {"machine": f"{platform.machine()}, {CORES} cores", "seconds": SECONDS, "cores": dict(used.most_common())}
    result["cores_beside_sampling"] = sum(cores for kind, cores in used.items() if kind != SAMPLING)
    print(result)
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
