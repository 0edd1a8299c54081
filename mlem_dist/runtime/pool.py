"""A pool of identical Ray actors that survives the death of any of them."""

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
    """The error that a task or an actor's call raised, without Ray's wrapping."""
    return error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, Exception) else error


class PoolError(RuntimeError):
    """A pool's actors die faster than they work."""


@dataclass(eq=False)
class Member:
    """A seat with its current actor, if any, whether that actor has finished a call, and the number of its taken slots.

    The actor has been ready `since` a time of the monotonic clock, in seconds.
    """

    seat: Seat
    actor: Any = None
    since: float = 0.0
    worked: bool = False
    taken: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def release(self) -> None:
        """Free a slot."""
        self.taken -= 1
        if not self.taken:
            self.idle.set()


class Pool:
    """Actors behind a queue: first come, first served by the least busy actor, at most `slots` calls or holders each.

    An actor that dies is replaced. Four deaths in a row of actors that have not finished a call break the pool. As a
    lost node takes many actors at once, a death counts only if the actor started after the death before. Four deaths of
    starting actors at one seat break the pool, too.

    Attributes:
        metrics: the pool's totals.
    """

    def __init__(self, name: str, seats: Sequence[Seat], slots: int, create: Callable[[Seat], Any]) -> None:
        self.name = name
        self.members = [Member(seat) for seat in seats]
        self.slots = slots
        self.metrics = PoolMetrics(name)
        self._create = create
        self._deaths_in_a_row = 0
        self._died = -math.inf
        self._broken: PoolError | UsageError | None = None
        self._waiting: deque[asyncio.Future[Member]] = deque()
        self._restarts: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Create every actor and wait until all are ready.

        Raises:
            PoolError: if actors die or fail to start.
            UsageError: if something that the actors need is missing, such as the ladder.
        """
        await asyncio.gather(*(self._fill(member) for member in self.members))
        if self._broken:
            raise self._broken

    @property
    def alive(self) -> int:
        """Number of actors that can take work now."""
        return len(self.working)

    @property
    def working(self) -> tuple[Seat, ...]:
        """The seats of the actors that can take work now."""
        return tuple(member.seat for member in self.members if member.actor is not None)

    @property
    def queue(self) -> int:
        """Number of calls and blocks that wait for an actor."""
        return len(self._waiting)

    async def leave(self, seat: Seat) -> None:
        """End the actor at a seat of `working` when its calls and holders have ended; it gets no new ones."""
        member = next(member for member in self.members if member.seat == seat and member.actor is not None)
        self.members.remove(member)
        while member.taken:
            await member.idle.wait()
        if member.actor is not None:
            ray.kill(member.actor)

    async def join(self, seat: Seat) -> bool:
        """Start an actor at a further seat; returns False, without harm to the pool, if it cannot start there."""
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
        """Start an actor again at a seat that has left; its failures count as in `start`."""
        member = Member(seat)
        self.members.append(member)
        await self._fill(member)

    @property
    def tries(self) -> int:
        """Number of attempts at a call or block whose actor dies: a lost node may have held every actor."""
        return TRIES + len(self.members)

    @property
    def call_seconds(self) -> float:
        """Mean device seconds of the finished calls; 0 before the first."""
        return self.metrics.totals["busy_seconds"] / max(1, self.metrics.totals["calls"])

    def progress(self) -> PoolProgress:
        """The pool's progress so far."""
        self.metrics.state(self.queue, self.alive)
        return self.metrics.progress(self.alive)

    @contextlib.asynccontextmanager
    async def member(self) -> AsyncIterator[Member]:
        """A slot of the least busy actor, for as long as the context lasts.

        Raises:
            PoolError, UsageError: if the pool is broken, by the error that broke it.
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
        """Call a method of any actor; if the actor dies, call that of another.

        The method returns (record, payload, ...), where the record is a `Work` or has one as `work`. The record is
        fetched, the payloads stay where they are.

        Raises:
            PoolError: if an actor died at every try.
            PoolError, UsageError: as `member`.
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
        """Call a method of a held actor, as `call` but with a single try.

        Raises:
            one of DEATHS: if the actor died; its replacement is under way.
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
        self._deaths_in_a_row = 0
        self.metrics.count_call(result if isinstance(result, Work) else result.work, time.monotonic() - began)
        return result, found_payloads

    def _lost(self, member: Member, actor: Any, error: Exception) -> None:
        if member.actor is not actor:
            return
        member.actor = None
        self.metrics.count("deaths")
        if not member.worked and member.since > self._died:
            self._deaths_in_a_row += 1
            self._died = time.monotonic()
        logger.warning("pool %s lost an actor (%s), starting another", self.name, type(error).__name__)
        # An unavailable actor may still run: its late answer must not mix with that of its replacement.
        ray.kill(actor)
        if self._deaths_in_a_row >= BREAKER:
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
                # Not a death but a defect: nobody awaits a restart, so the pool must report the defect.
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
