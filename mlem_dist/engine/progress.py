"""Progress and report of a run, in the same form for every engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace


@dataclass(frozen=True)
class Work:
    """The work of one call.

    Attributes:
        busy: device seconds; CPU seconds on a CPU.
        calls: evaluations by level, each of one block.
        samples: number of samples in the call's blocks.
        moved: bytes of the arrays received and returned.
    """

    busy: float
    calls: dict[int, int]
    samples: int = 0
    moved: int = 0


@dataclass(frozen=True)
class PoolProgress:
    """The progress of one pool.

    Attributes:
        name: names of the pool's levels.
        actors: number of actors that can work now.
        busy: device seconds so far; CPU seconds on CPUs.
        deaths: number of actors lost so far.
        calls: number of finished calls.
        waited: total seconds that calls and blocks have waited for an actor.
        moved: bytes of states and increments that crossed between processes.
        retries: number of calls repeated because their actor died.
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
        """The totals of two pools with the same name."""
        totals = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)[1:]}
        return PoolProgress(self.name, **totals)


WAITS = "waiting for an actor"
"""Beginning of the state of a run that has no actor of some pool."""


@dataclass(frozen=True)
class Progress:
    """A snapshot of a run.

    Attributes:
        state: the current activity: "starting", "waiting for ...", "loading levels", "sampling".
        seconds: seconds since the engine started.
        ready: seconds until all levels were loaded; None before.
        first_block: seconds until the first block was finished; None before.
        samples: number of finished samples, without those of earlier runs.
        blocks: number of finished blocks.
        calls: evaluations of each level (from 1), each of one block, in the finished blocks.
        devices: number of CPU cores or GPUs in use.
        pools: the pools in the order of their levels.
        queued: number of blocks to make that have not begun.
        writers: the pools of actors that write shards, if there are any.
        written: numbers of rows of shards that have been written and that the receiver does not know of yet.
        total: number of samples that the run has to make; 0 if not known.
        levels: the names of the levels.
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
    written: Mapping[int, int] = field(default_factory=dict)
    total: int = 0
    levels: Sequence[str] = ()

    def later(self, seconds: float) -> Progress:
        """The same progress with times that count from a moment `seconds` earlier."""
        ready, first = (None if at is None else at + seconds for at in (self.ready, self.first_block))
        return replace(self, seconds=self.seconds + seconds, ready=ready, first_block=first)

    @property
    def busy(self) -> float:
        """The share of all device time in which pools were busy, from 0 to 1."""
        return sum(pool.busy for pool in self.pools) / max(self.seconds * self.devices, 1e-9)

    @property
    def calls_per_sample(self) -> dict[str, float]:
        """Evaluations of each level per sample so far, by name; empty before the first block."""
        if not self.blocks:
            return {}
        return {name: self.calls.get(number, 0) / self.blocks for number, name in enumerate(self.levels, 1)}


@dataclass(frozen=True)
class GenerationReport:
    """The result of a generation; `dataclasses.asdict` makes it JSON-ready.

    Attributes:
        out: the dataset's folder or URL.
        num: number of images in the whole dataset.
        seed: image seed of the first image; image i has the seed `seed` + i.
        shards: number of files in the whole dataset.
        seconds: duration of the whole call.
        device: "cpu" or "cuda".
        made: number of images that this run made.
        devices: number of CPU cores or GPUs in use.
        sampling_seconds: seconds from loaded levels to the end.
        ready_seconds: seconds from the engine's start to loaded levels; None if there was nothing to make.
        first_block_seconds: seconds from the engine's start to the first finished block; None if there was nothing to
            make.
        images_per_second: made / sampling_seconds; None if there was nothing to make.
        calls_per_sample: evaluations of each level per image, by name.
        busy: the share of device time in which pools were busy, from 0 to 1.
        busy_seconds: device seconds by pool.
        deaths: number of actors lost.
        pools, writers: the last progress of each pool.
        kept: number of rows of the dataset, 0 until it is finished.
    """

    out: str
    num: int
    seed: int
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
    kept: int = 0

    @classmethod
    def of(
        cls,
        last: Progress | None,
        out: str,
        num: int,
        seed: int,
        shards: int,
        seconds: float,
        device: str,
    ) -> GenerationReport:
        """The report of a run from its last progress, which is None if there was nothing to make."""
        last = last or Progress("", 0.0, None, None, 0, 0, {}, 0, ())
        sampling = last.seconds - (last.ready or 0)
        return cls(
            out=out,
            num=num,
            seed=seed,
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
