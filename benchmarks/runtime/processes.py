"""`mlem-dist generate` as a command, and what a command and all that it begins, directly or not, use together."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SCRIPT = str(Path(sys.executable).with_name("mlem-dist"))
EVERY_SECONDS = 0.5


def generated(num: int, *options: str) -> tuple[dict[str, Any], list[str]]:
    """The final report of `mlem-dist generate` with these options, and the digests of the files that it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        command = [SCRIPT, "generate", "--num", str(num), "--out", f"{folder}/out", "--json", *options]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        manifest = json.loads(Path(folder, "out", "mlem.json").read_text())
    return json.loads(done.stdout), [shard["sha256"] for shard in manifest["shards"]]


def watched(command: Sequence[str], env: Mapping[str, str] | None = None) -> tuple[str, float, float]:
    """Run it: what it prints, the CPU seconds of all its processes, and the most MiB that they held at once.

    Memory that several share counts once. Time is read twice a second, and memory every ten
    seconds.
    """
    used: dict[int, float] = {}
    memory, looks = 0.0, 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        while process.poll() is None:
            used |= (now := cpu_seconds(process.pid))
            # The kernel goes through all pages to answer, which would slow down what is measured.
            if not looks % 20:
                memory = max(memory, sum(map(held, now)))
            looks += 1
            time.sleep(EVERY_SECONDS)
        assert process.stdout
        output = process.stdout.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command), output)
    return output, sum(used.values()), memory


def cpu_seconds(pid: int) -> dict[int, float]:
    """User and system time of a process and of each of those that it began."""
    parents, used = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            one = int(path.parent.name)
            parents[one] = int(fields[1])
            used[one] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    tree = {pid} & used.keys()
    while more := {child for child, parent in parents.items() if parent in tree} - tree:
        tree |= more
    return {one: used[one] for one in tree}


def held(pid: int) -> float:
    """MiB of a process, its part of what it shares with others."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/smaps_rollup").read_text().partition("\nPss:")[2].split()[0]) / 1024
    return 0.0
