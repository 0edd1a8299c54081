"""Progress for people: a bar on a terminal, a line every ten seconds elsewhere, always on standard error."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

from tqdm import tqdm

from mlem_dist.engine.progress import Progress

LINE_SECONDS = 10.0


class Display:
    """Shows the progress of a generation."""

    def __init__(self) -> None:
        self._line_at = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, progress: Progress) -> None:
        """Show a snapshot."""
        if self._bar is None and sys.stderr.isatty():
            self._bar = tqdm(total=progress.total, unit="img", dynamic_ncols=True)
        if self._bar is not None:
            self._bar.set_postfix_str(self._details(progress), refresh=False)
            self._bar.update(progress.samples - self._bar.n)
            self._bar.refresh()
        elif time.monotonic() - self._line_at >= LINE_SECONDS:
            self._line_at = time.monotonic()
            print(self._line(progress), file=sys.stderr, flush=True)

    def _line(self, progress: Progress) -> str:
        rate = progress.samples / progress.seconds
        left = f"{(progress.total - progress.samples) / rate:.0f} s left" if rate else "time left unknown"
        return f"{progress.samples:,} of {progress.total:,} images, {rate:.1f}/s, {left}, {self._details(progress)}"

    def _details(self, progress: Progress) -> str:
        if progress.state != "sampling" or not progress.blocks:
            return progress.state
        device_seconds = progress.seconds * progress.devices
        busy = " ".join(f"{pool.name} {pool.busy / device_seconds:.0%}" for pool in progress.pools)
        calls = " ".join(f"{name} {count:.1f}" for name, count in progress.calls_per_sample.items())
        deaths = sum(pool.deaths for pool in progress.pools)
        return f"calls/img: {calls}; busy: {busy}" + (f"; {deaths} actors replaced" if deaths else "")


@contextlib.contextmanager
def _stage_bar(unit: str) -> Iterator[Callable[[str, int, int, str], None]]:
    """A function that shows a stage's name, the numbers of its done units and of all its units, and a note."""
    bar: Any = None
    shown = ""
    line_at = time.monotonic()

    def show(name: str, done: int, total: int, note: str) -> None:
        nonlocal bar, shown, line_at
        if sys.stderr.isatty():
            if bar is None or shown != name:
                if bar is not None:
                    bar.close()
                shown = name
                bar = tqdm(total=total, desc=name, unit=unit, dynamic_ncols=True)
            bar.set_postfix_str(note, refresh=False)
            bar.update(done - bar.n)
        elif time.monotonic() - line_at >= LINE_SECONDS:
            line_at = time.monotonic()
            print(", ".join(filter(None, [f"{name}: {unit} {done} of {total}", note])), file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()


@contextlib.contextmanager
def training_bar() -> Iterator[Callable[[Mapping[str, tuple[int, float]], int], None]]:
    """A function that shows each level's steps and loss, and the done steps of all levels out of their total."""
    with _stage_bar("step") as show:
        yield lambda levels, total: show(
            "training",
            sum(done for done, _ in levels.values()),
            total,
            ", ".join(f"{name} {done} (loss {loss:.4f})" for name, (done, loss) in levels.items()),
        )


@contextlib.contextmanager
def parts_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A function that shows the current measurement, and the number of its done parts out of their total."""
    with _stage_bar("part") as show:
        yield lambda stage, done, total: show(stage, done, total, "")
