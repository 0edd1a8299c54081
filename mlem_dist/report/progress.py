"""Progress for people: a bar on a terminal, a line every ten seconds elsewhere, always on standard error."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any

from tqdm import tqdm

from mlem_dist.runtime.progress import Progress

LINE_SECONDS = 10.0


class Display:
    """Shows the progress of a generation of `total` samples in blocks of `block_size`; `names` are the levels'."""

    def __init__(self, total: int, block_size: int, names: Sequence[str]) -> None:
        self.total, self.block_size, self.names = total, block_size, names
        self.last: Progress | None = None
        self._line_at = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Display:
        if sys.stderr.isatty():
            self._bar = tqdm(total=self.total, unit="img", dynamic_ncols=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.close()

    def show(self, progress: Progress) -> None:
        """Show a snapshot."""
        self.last = progress
        if self._bar:
            self._bar.set_postfix_str(self._details(progress), refresh=False)
            self._bar.update(progress.samples - self._bar.n)
            self._bar.refresh()
        elif time.monotonic() - self._line_at >= LINE_SECONDS:
            self._line_at = time.monotonic()
            print(self._line(progress), file=sys.stderr, flush=True)

    def calls_per_sample(self) -> dict[str, float]:
        """Evaluations of each level per sample so far, by name."""
        last = self.last
        if not last or not last.blocks:
            return {}
        return {name: last.calls.get(number, 0) / last.blocks for number, name in enumerate(self.names, 1)}

    def report(self) -> dict[str, Any]:
        """What the run has made and taken, JSON-ready; None for what it has not come to."""
        last = self.last or Progress("", 0.0, None, None, 0, 0, {}, 0, ())
        sampling = last.seconds - (last.ready or 0)
        return {
            "made": last.samples,
            "devices": last.devices,
            "sampling_seconds": sampling,
            "ready_seconds": last.ready,
            "first_block_seconds": last.first_block,
            "images_per_second": last.samples / sampling if sampling else None,
            "calls_per_sample": self.calls_per_sample(),
            "busy": last.busy,
            "busy_seconds": {pool.name: pool.busy for pool in last.pools},
            "deaths": sum(pool.deaths for pool in last.pools),
            "pools": [asdict(pool) for pool in last.pools],
            "writers": [asdict(pool) for pool in last.writers],
        }

    def _line(self, progress: Progress) -> str:
        rate = progress.samples / progress.seconds
        left = f"{(self.total - progress.samples) / rate:.0f} s left" if rate else "time left unknown"
        return f"{progress.samples:,} of {self.total:,} images, {rate:.1f}/s, {left}, {self._details(progress)}"

    def _details(self, progress: Progress) -> str:
        if progress.state != "sampling" or not progress.blocks:
            return progress.state
        device_seconds = progress.seconds * progress.devices
        busy = " ".join(f"{pool.name} {pool.busy / device_seconds:.0%}" for pool in progress.pools)
        calls = " ".join(f"{name} {count:.1f}" for name, count in self.calls_per_sample().items())
        deaths = sum(pool.deaths for pool in progress.pools)
        return f"calls/img: {calls}; busy: {busy}" + (f"; {deaths} actors replaced" if deaths else "")


@contextlib.contextmanager
def _stage_bar(unit: str) -> Iterator[Callable[[str, int, int, str], None]]:
    """A function that shows a stage's name, how many units of it are done and how many there are, and a note."""
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
def training_bar(total: int) -> Iterator[Callable[[Mapping[str, tuple[int, float]]], None]]:
    """A function that shows, of `total` steps of all levels, those done, and each level's steps and loss."""
    with _stage_bar("step") as show:
        yield lambda levels: show(
            "training",
            sum(done for done, _ in levels.values()),
            total,
            ", ".join(f"{name} {done} (loss {loss:.4f})" for name, (done, loss) in levels.items()),
        )


@contextlib.contextmanager
def parts_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A function that shows what is being measured, how much of it is done, and how much there is."""
    with _stage_bar("part") as show:
        yield lambda stage, done, total: show(stage, done, total, "")
