"""Evaluation of several blocks in one call, for levels whose device a single block does not keep busy."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from mlem_dist.engine.program import Ask, Together
from mlem_dist.runtime.pool import Pool

WAIT_SECONDS = 0.02
"""Longest time that the first ask of a call waits for more asks, in seconds."""


@dataclass(frozen=True, eq=False)
class Waiting:
    """A block's ask, its state and, unless workers make it themselves, its condition; and the future of the answer."""

    block: int
    ask: Ask
    state: ray.ObjectRef[Any]
    condition: Sequence[ray.ObjectRef[Any]]
    answer: asyncio.Future[ray.ObjectRef[Any]]


class Batcher:
    """Asks for one pool: asks for the same increments are evaluated in one call, at most `limit` at a time.

    A call is made when it is full, when its first ask has waited for `WAIT_SECONDS`, or at `flush`.
    """

    def __init__(self, pool: Pool, limit: int) -> None:
        self._pool, self._limit = pool, limit
        self._waiting: dict[Together, list[Waiting]] = {}
        self._timers: dict[Together, asyncio.TimerHandle] = {}
        self._calls: set[asyncio.Task[None]] = set()

    def add(
        self, block: int, ask: Ask, state: ray.ObjectRef[Any], condition: Sequence[ray.ObjectRef[Any]] = ()
    ) -> asyncio.Future[ray.ObjectRef[Any]]:
        """A future of the values that a block asks for; it fails as `Pool.call` does."""
        loop = asyncio.get_running_loop()
        waiting = Waiting(block, ask, state, condition, loop.create_future())
        group = self._waiting.setdefault(ask.increments, [])
        group.append(waiting)
        if len(group) == self._limit:
            self._call(ask.increments)
        elif len(group) == 1:
            self._timers[ask.increments] = loop.call_later(WAIT_SECONDS, self._call, ask.increments)
        return waiting.answer

    def flush(self) -> None:
        """Make all calls that wait for more asks."""
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
        given = [*(item.state for item in group), *(ref for item in group for ref in item.condition)]
        try:
            _, values = await self._pool.call("evaluate", asks, *given, payloads=len(group))
        except Exception as error:
            for item in group:
                if not item.answer.done():
                    item.answer.set_exception(error)
        else:
            for item, value in zip(group, values, strict=True):
                if not item.answer.done():
                    item.answer.set_result(value)
