"""Work that is not divided: a function that runs on one device of the connected cluster."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

T = TypeVar("T")

POLL_SECONDS = 0.5

Report = Callable[[str, int, int], None]
"""Function that receives the name of a stage, its finished units of work, and their total."""


class Board:
    """Actor that keeps the latest progress of a task."""

    def __init__(self) -> None:
        self.posted: tuple[str, int, int] | None = None

    def post(self, stage: str, done: int, total: int) -> None:
        """Keep the progress of a stage."""
        self.posted = (stage, done, total)

    def read(self) -> tuple[str, int, int] | None:
        """The latest progress; None before the first."""
        return self.posted


def run_on_device(run: Callable[[Report], T], device: str, cores: int, progress: Report) -> T:
    """The result of `run` in a Ray task with one GPU, or for the device type "cpu" with `cores` cores of a node.

    `run` and its result travel by pickle. It reads and writes files under the paths of the driver, which its node must
    share.

    Raises:
        RuntimeError: if the process of the task dies, as for lack of memory.
        Exception: what `run` raises.
    """
    os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"
    kind: Any = ray.remote(Board)
    board = kind.options(num_cpus=0).remote()
    task: Any = ray.remote(_call)
    share = {"num_cpus": 0, "num_gpus": 1} if device == "cuda" else {"num_cpus": cores}
    ref = task.options(name=getattr(run, "__name__", "run"), max_retries=0, **share).remote(run, board)
    shown, ended = None, False
    try:
        while not (ended := bool(ray.wait([ref], timeout=POLL_SECONDS)[0])):
            if (posted := ray.get(board.read.remote())) not in (None, shown):
                shown = posted
                progress(*posted)
        return ray.get(ref)
    except RayTaskError as error:
        cause: Any = error.cause if isinstance(error.cause, Exception) else error
        raise cause from None
    except RayError as error:
        raise RuntimeError(
            f"the process of the task died ({str(error).splitlines()[0]}); the same command goes on from what is kept"
        ) from None
    finally:
        # Cancel only a task that has not ended: a race in Ray lets a cancel at its end abort this process.
        if not ended:
            ray.cancel(ref, force=True)
        ray.kill(board)


def _call(run: Callable[[Report], T], board: Any) -> T:
    return run(lambda stage, done, total: board.post.remote(stage, done, total))
