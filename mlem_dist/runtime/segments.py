"""What a segment ends with, as worker and coordinator tell each other."""

from __future__ import annotations

from dataclasses import dataclass

from mlem_dist.runtime.progress import Work
from mlem_dist.solver.plan import Increment


@dataclass(frozen=True)
class Ask:
    """Increments that a block needs from another pool before it can go on."""

    pool: int
    t: int
    increments: tuple[Increment, ...]

    @property
    def calls(self) -> set[int]:
        """The levels that it takes."""
        return {k for one in self.increments for k in one.calls}


@dataclass(frozen=True)
class SegmentEnd:
    """The end of a segment: what it needs from other pools, or nothing if the block is finished."""

    work: Work
    asks: tuple[Ask, ...]
