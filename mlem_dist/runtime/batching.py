"""Evaluations of several blocks in one call, for levels that one block does not keep busy."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from mlem_dist.engine.program import Ask, Together
from mlem_dist.runtime.pool import Pool

WAIT_SECONDS = 0.02
"""Longest time that the first ask of a call waits for others."""


@dataclass(frozen=True, eq=False)
class Waiting:
    """A block's ask, the state it is about, and where its answer goes."""

    block: int
    ask: Ask
    state: ray.ObjectRef[Any]
    answer: asyncio.Future[ray.ObjectRef[Any]]


class Batcher:
    """Asks for one pool: those for the same increments are evaluated in one call, `most` at a time.

    A call is made when it is full, when its first ask has waited some milliseconds, or at `flush`.
    """

    def __init__(self, pool: Pool, limit: int) -> None:
        self._pool, self._most = pool, limit
        self._waiting: dict[Together, list[Waiting]] = {}
        self._timers: dict[Together, asyncio.TimerHandle] = {}
        self._calls: set[asyncio.Task[None]] = set()

    def add(self, block: int, ask: Ask, state: ray.ObjectRef[Any]) -> asyncio.Future[ray.ObjectRef[Any]]:
        """The values that a block asks for, to be awaited; it fails as `Pool.call` does."""
        loop = asyncio.get_running_loop()
        waiting = Waiting(block, ask, state, loop.create_future())
        group = self._waiting.setdefault(ask.increments, [])
        group.append(waiting)
        if len(group) == self._most:
            self._call(ask.increments)
        elif len(group) == 1:
            self._timers[ask.increments] = loop.call_later(WAIT_SECONDS, self._call, ask.increments)
        return waiting.answer

    def flush(self) -> None:
        """Make every call that waits for more asks."""
        for together in list(self._waiting):
            self._call(together)

    def _call(self, together: Together) -> None:
        if timer := self._timers.pop(together, None):
            timer.cancel()
        task = asyncio.get_running_loop().create_task(self._evaluate(self._waiting.pop(together)))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _evaluate(self, group: Sequence[Waiting]) -> None:
        asks = [(item.block, item.ask) for item in group]
        try:
            _, values = await self._pool.call("evaluate", asks, *(item.state for item in group), payloads=len(group))
        except Exception as error:
            for item in group:
                if not item.answer.done():
                    item.answer.set_exception(error)
        else:
            for item, value in zip(group, values, strict=True):
                if not item.answer.done():
                    item.answer.set_result(value)
