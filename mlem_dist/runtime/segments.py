"""What a segment ends with, as worker and coordinator tell each other."""

from __future__ import annotations

from dataclasses import dataclass

from mlem_dist.runtime.progress import Work
from mlem_dist.solver.plan import Term


@dataclass(frozen=True)
class Ask:
    """Terms that a block needs from another pool before it can go on."""

    pool: int
    t: int
    terms: tuple[Term, ...]

    @property
    def calls(self) -> set[int]:
        """The levels that it takes."""
        return {k for term in self.terms for k in term.calls}


@dataclass(frozen=True)
class SegmentEnd:
    """The end of a segment: what it needs from other pools, or nothing if the block is finished."""

    work: Work
    asks: tuple[Ask, ...]
