"""Progress and report of a run, in one form for every engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Work:
    """What one call did.

    Attributes:
        busy: device seconds; CPU seconds on a CPU.
        calls: evaluations by level, each of one block.
        samples: in the block.
        moved: bytes of the arrays that came and went.
    """

    busy: float
    calls: dict[int, int]
    samples: int = 0
    moved: int = 0


@dataclass(frozen=True)
class PoolProgress:
    """One pool.

    Attributes:
        name: its levels' names.
        actors: those able to work now.
        busy: device seconds so far; CPU seconds on CPUs.
        deaths: actors lost so far.
        calls: finished calls of actors.
        waited: seconds that calls and blocks have waited for an actor, added up.
        moved: bytes of states and increments that crossed between processes.
        retries: calls made again, as their actor died.
    """

    name: str
    actors: int
    busy: float
    deaths: int
    calls: int = 0
    waited: float = 0.0
    moved: int = 0
    retries: int = 0

    def __add__(self, other: PoolProgress) -> PoolProgress:
        """The totals of two pools of one name."""
        totals = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)[1:]}
        return PoolProgress(self.name, **totals)


WAITS = "waiting for an actor"
"""Beginning of the state of a run that has no actor of some pool."""


@dataclass(frozen=True)
class Progress:
    """A snapshot of a run.

    Attributes:
        state: what it does: "waiting for ...", "loading levels", "sampling".
        seconds: since the engine began.
        ready: seconds until all levels were loaded; None before.
        first_block: seconds until the first block was finished; None before.
        samples: finished samples, without those of earlier runs.
        blocks: finished blocks.
        calls: evaluations of each level (from 1), each of one block, in the finished blocks.
        devices: CPU cores or GPUs in use.
        pools: the pools in order of their levels.
        queued: blocks that are to be made and not begun.
        writers: what writes shards, if not the pools themselves.
        written: shards that a coordinator has written, and not told of before.
        total: samples that the run has to make; 0 if not known.
        levels: the levels' names.
    """

    state: str
    seconds: float
    ready: float | None
    first_block: float | None
    samples: int
    blocks: int
    calls: Mapping[int, int]
    devices: int
    pools: Sequence[PoolProgress]
    queued: int = 0
    writers: Sequence[PoolProgress] = ()
    written: Sequence[int] = ()
    total: int = 0
    levels: Sequence[str] = ()

    def later(self, seconds: float) -> Progress:
        """The same with times that count from so many seconds earlier."""
        ready, first = (None if at is None else at + seconds for at in (self.ready, self.first_block))
        return replace(self, seconds=self.seconds + seconds, ready=ready, first_block=first)

    @property
    def busy(self) -> float:
        """The share of all device time that pools were busy, from 0 to 1."""
        return sum(pool.busy for pool in self.pools) / max(self.seconds * self.devices, 1e-9)

    @property
    def calls_per_sample(self) -> dict[str, float]:
        """Evaluations of each level per sample so far, by name; empty before the first block."""
        if not self.blocks:
            return {}
        return {name: self.calls.get(number, 0) / self.blocks for number, name in enumerate(self.levels, 1)}


@dataclass(frozen=True)
class GenerationReport:
    """The result of a generation, JSON-ready by `dataclasses.asdict`.

    Attributes:
        out: the dataset's folder or URL.
        num: images of the whole dataset.
        shards: files of the whole dataset.
        seconds: from the call to its end.
        device: "cpu" or "cuda".
        made: images of this run.
        devices: CPU cores or GPUs in use.
        sampling_seconds: from loaded levels to the end.
        ready_seconds: from the engine's begin to loaded levels; None if there was nothing to make.
        first_block_seconds: from the engine's begin to the first finished block; None if there was nothing to make.
        images_per_second: made / sampling_seconds; None if there was nothing to make.
        calls_per_sample: evaluations of each level per image, by name.
        busy: the share of device time that pools were busy, from 0 to 1.
        busy_seconds: device seconds by pool.
        deaths: actors lost.
        pools, writers: the last progress of each.
    """

    out: str
    num: int
    shards: int
    seconds: float
    device: str
    made: int
    devices: int
    sampling_seconds: float
    ready_seconds: float | None
    first_block_seconds: float | None
    images_per_second: float | None
    calls_per_sample: Mapping[str, float]
    busy: float
    busy_seconds: Mapping[str, float]
    deaths: int
    pools: Sequence[PoolProgress]
    writers: Sequence[PoolProgress]

    @classmethod
    def of(
        cls,
        last: Progress | None,
        out: str,
        num: int,
        shards: int,
        seconds: float,
        device: str,
    ) -> GenerationReport:
        """The report of a run by its last progress; None if there was nothing to make."""
        last = last or Progress("", 0.0, None, None, 0, 0, {}, 0, ())
        sampling = last.seconds - (last.ready or 0)
        return cls(
            out=out,
            num=num,
            shards=shards,
            seconds=seconds,
            device=device,
            made=last.samples,
            devices=last.devices,
            sampling_seconds=sampling,
            ready_seconds=last.ready,
            first_block_seconds=last.first_block,
            images_per_second=last.samples / sampling if sampling else None,
            calls_per_sample=last.calls_per_sample,
            busy=last.busy,
            busy_seconds={pool.name: pool.busy for pool in last.pools},
            deaths=sum(pool.deaths for pool in last.pools),
            pools=tuple(last.pools),
            writers=tuple(last.writers),
        )
