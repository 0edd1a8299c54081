"""The command line in processes of its own, for tests."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

SCRIPT = str(Path(sys.executable).with_name("mlem-dist"))
SMALL = ["--device", "cpu", "--steps", "20", "--nfe", "4", "--block-size", "8", "--shard-size", "16"]
ENDLESS = ["--num", "1e6", *SMALL]
"""More than any machine makes between its first shard and what a test does then."""
HANGS = 1800
"""Seconds after which what would otherwise end a test is taken to hang, however slow the machine is."""


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, timeout=HANGS, check=False)


@contextmanager
def running(*words: str, **options) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own that ends with the context, and with it all that it has started."""
    process = subprocess.Popen(words, start_new_session=True, text=True, **options)
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL of a process group, then of what its first process has started in other groups, as Ray's workers are."""
    if process.poll() is not None:
        return
    started = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for one in started:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    while any(map(works, started)):
        time.sleep(0.02)


def works(process: psutil.Process) -> bool:
    """Whether a process is there, and is more than a name that nobody has asked for its exit code."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def wait_for_files(process: subprocess.Popen[str], folder: Path, pattern: str, number: int = 1) -> None:
    """Until a process that goes on has written so many files of a pattern."""
    deadline = time.monotonic() + HANGS
    while len(list(folder.glob(pattern))) < number:
        assert process.poll() is None, f"it ended with {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
