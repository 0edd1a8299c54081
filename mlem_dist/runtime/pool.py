"""A pool of identical Ray actors that outlives the death of any of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from mlem_dist.capacity.placement import Seat
from mlem_dist.engine.progress import PoolProgress, Work
from mlem_dist.errors import UsageError
from mlem_dist.runtime.metrics import PoolMetrics

# Only the first two are RayActorErrors; all mean that the actor cannot be counted on.
DEATHS = (ActorDiedError, ActorUnavailableError, NodeDiedError, WorkerCrashedError, OutOfMemoryError)
TRIES = 4
BREAKER = 4

logger = logging.getLogger(__name__)


def cause(error: Exception) -> Exception:
    """The error that a task or an actor's call has raised, without Ray's wrapping."""
    return error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, Exception) else error


class PoolError(RuntimeError):
    """A pool's actors die faster than they work."""


@dataclass(eq=False)
class Member:
    """A seat with the actor that sits there now, if any, whether it has worked, and how many of its slots are taken.

    An actor is there `since` a time of the monotonic clock.
    """

    seat: Seat
    actor: Any = None
    since: float = 0.0
    worked: bool = False
    taken: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def release(self) -> None:
        """One of its slots is free again."""
        self.taken -= 1
        if not self.taken:
            self.idle.set()


class Pool:
    """Actors behind a queue: at most `slots` calls or holders each, the least busy first, first come first served.

    An actor that dies is replaced. Four deaths in a row of actors that have not finished a call break the pool, each of
    one that began after the death before, as a lost node takes many at once; and so do four of one seat's that have not
    started.

    Attributes:
        metrics: what it has done.
    """

    def __init__(self, name: str, seats: Sequence[Seat], slots: int, create: Callable[[Seat], Any]) -> None:
        self.name = name
        self.members = [Member(seat) for seat in seats]
        self.slots = slots
        self.metrics = PoolMetrics(name)
        self._create = create
        self._in_a_row = 0
        self._died = -math.inf
        self._broken: PoolError | UsageError | None = None
        self._waiting: deque[asyncio.Future[Member]] = deque()
        self._restarts: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Create every actor and wait until all are ready.

        Raises:
            PoolError: they die.
            UsageError: what they need is not there.
        """
        await asyncio.gather(*(self._fill(member) for member in self.members))
        if self._broken:
            raise self._broken

    @property
    def alive(self) -> int:
        """Actors that can take work now."""
        return len(self.working)

    @property
    def working(self) -> tuple[Seat, ...]:
        """The seats of actors that can take work now."""
        return tuple(member.seat for member in self.members if member.actor is not None)

    @property
    def queue(self) -> int:
        """Calls and blocks that wait for an actor."""
        return len(self._waiting)

    async def leave(self, seat: Seat) -> None:
        """End the actor of one of `working` when its calls and holders have ended; it gets no more of them."""
        member = next(member for member in self.members if member.seat == seat and member.actor is not None)
        self.members.remove(member)
        while member.taken:
            await member.idle.wait()
        if member.actor is not None:
            ray.kill(member.actor)

    async def join(self, seat: Seat) -> bool:
        """Start an actor at a further seat; False if it cannot be started there, which does not harm the pool."""
        actor = self._create(seat)
        try:
            await actor.prepare.remote()
        except RayError as error:
            logger.warning("pool %s cannot start an actor at a further seat: %s", self.name, error)
            ray.kill(actor)
            return False
        self.members.append(Member(seat, actor, time.monotonic()))
        self._hand_out()
        return True

    async def rejoin(self, seat: Seat) -> None:
        """Start an actor at a seat that has left, as often as it takes."""
        member = Member(seat)
        self.members.append(member)
        await self._fill(member)

    @property
    def tries(self) -> int:
        """Attempts at a call or a block whose actor dies: a lost node may have held every actor."""
        return TRIES + len(self.members)

    @property
    def call_seconds(self) -> float:
        """Device seconds of a finished call in the mean, 0 before the first."""
        return self.metrics.totals["busy_seconds"] / max(1, self.metrics.totals["calls"])

    def progress(self) -> PoolProgress:
        """The pool's progress so far."""
        self.metrics.state(self.queue, self.alive)
        return self.metrics.progress(self.alive)

    @contextlib.asynccontextmanager
    async def member(self) -> AsyncIterator[Member]:
        """A slot of the least busy actor, for as long as the context lasts.

        Raises:
            PoolError: the pool is broken.
        """
        began = time.monotonic()
        member = await self._acquire()
        self.metrics.taken(time.monotonic() - began)
        try:
            yield member
        finally:
            member.release()
            self._hand_out()

    async def call(self, method: str, *args: Any, payloads: int = 1) -> tuple[Any, list[ray.ObjectRef[Any]]]:
        """Call a method of any actor; if the actor dies, of another.

        The method returns (record, payload, ...), the record with a `Work` or being one. The record is fetched, the
        payloads stay where they are.

        Raises:
            PoolError: the pool is broken, or every try met a death.
        """
        tries = self.tries
        for _ in range(tries):
            async with self.member() as member:
                try:
                    return await self.call_member(member, method, *args, payloads=payloads)
                except DEATHS:
                    self.metrics.count("retries")
        raise self._error(f"{tries} actors in turn died at the same call")

    async def call_member(
        self, member: Member, method: str, *args: Any, payloads: int = 1
    ) -> tuple[Any, list[ray.ObjectRef[Any]]]:
        """Call a method of one held actor, as `call` does but once.

        Raises:
            one of DEATHS: the actor died; its replacement is under way.
        """
        actor = member.actor
        if actor is None:
            raise ActorUnavailableError("the actor is being replaced", None)
        try:
            began = time.monotonic()
            record, *found_payloads = getattr(actor, method).options(num_returns=1 + payloads).remote(*args)
            result = await record
        except DEATHS as error:
            self._lost(member, actor, error)
            raise
        member.worked = True
        self._in_a_row = 0
        self.metrics.finished(result if isinstance(result, Work) else result.work, time.monotonic() - began)
        return result, found_payloads

    def _lost(self, member: Member, actor: Any, error: Exception) -> None:
        if member.actor is not actor:
            return
        member.actor = None
        self.metrics.count("deaths")
        if not member.worked and member.since > self._died:
            self._in_a_row += 1
            self._died = time.monotonic()
        logger.warning("pool %s lost an actor (%s), starting another", self.name, type(error).__name__)
        # An unavailable actor may still run: its late answer must not meet its replacement's.
        ray.kill(actor)
        if self._in_a_row >= BREAKER:
            self._break(self._error(f"{BREAKER} actors in a row died; the last one: {error}"))
            return
        if member not in self.members:
            return
        task = asyncio.get_running_loop().create_task(self._fill(member))
        self._restarts.add(task)
        task.add_done_callback(self._restarts.discard)

    async def _fill(self, member: Member) -> None:
        died = 0
        while self._broken is None:
            actor = self._create(member.seat)
            try:
                await actor.prepare.remote()
            except DEATHS as error:
                self.metrics.count("deaths")
                died += 1
                if died >= BREAKER:
                    self._break(self._error(f"{BREAKER} actors in a row died; the last one: {error}"))
            except Exception as error:
                # Not a death but a defect: nobody awaits a restart, so the pool must say it.
                why = cause(error)
                self._break(why if isinstance(why, UsageError) else self._error(f"an actor cannot start: {why}"))
            else:
                member.actor, member.since, member.worked = actor, time.monotonic(), False
                self._hand_out()
                return

    def _error(self, reason: str) -> PoolError:
        return PoolError(f"pool {self.name}: {reason}")

    def _break(self, error: PoolError | UsageError) -> None:
        self._broken = error
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_exception(self._broken)

    async def _acquire(self) -> Member:
        if self._broken:
            raise self._broken
        waiting: asyncio.Future[Member] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        self._hand_out()
        try:
            return await waiting
        except asyncio.CancelledError:
            if waiting.done() and not waiting.cancelled() and waiting.exception() is None:
                waiting.result().release()
                self._hand_out()
            raise

    def _hand_out(self) -> None:
        while self._waiting:
            if self._waiting[0].done():
                self._waiting.popleft()
                continue
            free = [member for member in self.members if member.actor is not None and member.taken < self.slots]
            if not free:
                return
            member = min(free, key=lambda member: member.taken)
            member.taken += 1
            member.idle.clear()
            self._waiting.popleft().set_result(member)
