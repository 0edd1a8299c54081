import asyncio
import os
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError

from mlem_dist.capacity.placement import Seat
from mlem_dist.engine.program import Ask
from mlem_dist.engine.progress import Work
from mlem_dist.errors import UsageError
from mlem_dist.runtime.batching import Batcher
from mlem_dist.runtime.pool import Pool, PoolError
from mlem_dist.solver.plan import Increment

pytestmark = pytest.mark.usefixtures("local_ray")


@ray.remote(num_cpus=0)
class Actor:
    """Dies while it prepares, or at its n-th call; a negative life lacks what it needs."""

    def __init__(self, dies_at: int) -> None:
        self.left = dies_at

    def prepare(self) -> None:
        if self.left < 0:
            raise UsageError("there is no ladder here")
        if not self.left:
            os._exit(1)

    def die(self) -> None:
        os._exit(1)

    def double(self, x: np.ndarray) -> tuple[Work, np.ndarray]:
        self.left -= 1
        if not self.left:
            os._exit(1)
        return Work(0.5, {1: 1}), 2 * x


@ray.remote(num_cpus=0)
class Gated:
    """Is ready when a file is there."""

    def __init__(self, gate: Path) -> None:
        self.gate = gate

    def prepare(self) -> None:
        while not self.gate.exists():
            time.sleep(0.01)

    def double(self, x: np.ndarray) -> tuple[Work, np.ndarray]:
        return Work(0.5, {1: 1}), 2 * x


@ray.remote(num_cpus=0)
class Faulty:
    """Fails at every evaluation, as where a state is not what the levels expect."""

    def prepare(self) -> None: ...

    def evaluate(self, asks: object, *states: np.ndarray) -> None:
        raise ValueError("a state of another shape")


def test_what_goes_wrong_in_a_call_is_told_to_each_block_that_waits_for_it():
    async def main():
        pool = Pool("p", [Seat(0, 1.0)], 2, lambda seat: Faulty.remote())
        await pool.start()
        batcher = Batcher(pool, 2)
        ask = Ask(1, 0, (Increment(2, 1),))
        found = await asyncio.gather(
            *(batcher.add(i, ask, ray.put(np.ones(3))) for i in (0, 1)), return_exceptions=True
        )
        assert ["a state of another shape" in str(error) for error in found] == [True, True]

    asyncio.run(main())


def make_pool(seats: int, *lives: int) -> Pool:
    """The first actors live as long as `lives` says, their replacements long."""
    left = list(lives)
    return Pool("p", [Seat(0, 1.0)] * seats, 2, lambda seat: Actor.remote(left.pop(0) if left else 1000))


def test_actors_that_die_while_they_start_break_the_pool():
    with pytest.raises(PoolError, match="4 actors in a row died"):
        asyncio.run(make_pool(1, 0, 0, 0, 0, 0).start())


def test_what_an_actor_lacks_is_said_and_not_tried_again():
    pool = make_pool(1, -1, 1000)
    with pytest.raises(UsageError, match=r"^there is no ladder here$"):
        asyncio.run(pool.start())
    assert not pool.progress().deaths


def test_a_lost_node_does_not_break_the_pool():
    """Five actors that have worked die at the same time."""

    async def main():
        pool = make_pool(5, *[2] * 5)
        await pool.start()
        for _ in range(2):
            await asyncio.gather(*(pool.call("double", np.ones(3)) for _ in range(5)))
        assert pool.progress().deaths == 5

    asyncio.run(main())


async def death(actor) -> None:
    """Return when whoever calls an actor is told that it has died."""
    while True:
        try:
            await actor.prepare.remote()
        except ActorDiedError:
            return
        except ActorUnavailableError:
            pass


def test_a_call_outlives_the_idle_actors_of_a_lost_node(tmp_path):
    """It is given to one dead actor after the other, as the pool has not noticed that they are."""
    gate = tmp_path / "gate"
    first = [Actor.remote(1000) for _ in range(5)]
    left = list(first)

    async def main():
        pool = Pool("p", [Seat(0, 1.0)] * 5, 2, lambda seat: left.pop() if left else Gated.remote(gate))
        await pool.start()
        await asyncio.gather(*(pool.call("double", np.ones(3)) for _ in range(10)))
        assert all(member.worked for member in pool.members)
        for actor in first:
            ray.kill(actor)
        for actor in first:
            await death(actor)
        call = asyncio.create_task(pool.call("double", np.ones(3)))
        while pool.progress().deaths < 5 and not call.done():
            await asyncio.sleep(0.01)
        # No actor takes the place of one of them before.
        gate.touch()
        _, (payload,) = await call
        assert ray.get(payload).sum() == 6
        assert pool.progress().deaths == 5

    asyncio.run(main())


def test_a_call_that_kills_every_actor_is_given_up():
    """Even where they have made other calls before."""

    async def main():
        pool = make_pool(2)
        await pool.start()
        deadly = asyncio.create_task(pool.call("die"))
        # On a busy machine no call may come between two deaths, and then the pool as a whole is given up.
        with suppress(PoolError):
            while not deadly.done():
                await pool.call("double", np.ones(3))
        with pytest.raises(PoolError, match=r"6 actors in turn died at the same call|4 actors in a row died"):
            await deadly
        assert 4 <= pool.progress().deaths <= 6

    asyncio.run(main())


def test_actors_that_a_lost_node_takes_while_they_load_do_not_break_the_pool():
    async def main():
        pool = make_pool(5, *[0] * 5)
        await pool.start()
        assert (pool.alive, pool.progress().deaths) == (5, 5)

    asyncio.run(main())


def test_actors_that_a_lost_node_takes_at_their_first_call_do_not_break_the_pool():
    async def main():
        pool = make_pool(5, *[1] * 5)
        await pool.start()
        await asyncio.gather(*(pool.call("double", np.ones(3)) for _ in range(10)))
        assert pool.progress().deaths == 5

    asyncio.run(main())


def test_calls_of_a_dead_actor_are_made_elsewhere():
    async def main():
        # Each is given two calls at once, so that both die, however busy the machine is.
        pool = make_pool(2, 1, 2)
        await pool.start()
        answers = await asyncio.gather(*(pool.call("double", np.full(3, i)) for i in range(20)))
        found = ray.get([payload for _, (payload,) in answers])
        assert [int(x[0]) for x in found] == [2 * i for i in range(20)]
        done = pool.progress()
        # Every finished call is counted once, and the calls that died are made again.
        assert (done.calls, done.busy, done.deaths) == (20, 10, 2)
        assert done.retries >= 2
        assert done.waited > 0
        while pool.alive < 2:
            await asyncio.sleep(0.05)

    asyncio.run(main())


def test_a_seat_that_leaves_finishes_its_calls_and_one_that_joins_takes_some():
    async def main():
        pool = make_pool(2)
        await pool.start()
        calls = [asyncio.create_task(pool.call("double", np.full(3, i))) for i in range(40)]
        # All of them begin at once, and four of them have an actor then.
        await asyncio.sleep(0)
        await pool.leave(Seat(0, 1.0))
        assert pool.alive == 1
        assert await pool.join(Seat(1, 0.5))
        assert pool.working == (Seat(0, 1.0), Seat(1, 0.5))
        found = ray.get([payload for _, (payload,) in await asyncio.gather(*calls)])
        assert [int(x[0]) for x in found] == [2 * i for i in range(40)]
        assert (pool.progress().calls, pool.progress().deaths) == (40, 0)

    asyncio.run(main())


def test_a_seat_whose_actor_does_not_start_does_not_harm_the_pool():
    async def main():
        pool = make_pool(1, 1000, 0)
        await pool.start()
        assert not await pool.join(Seat(1, 1.0))
        assert pool.alive == 1
        await pool.rejoin(Seat(1, 1.0))
        assert pool.alive == 2
        await pool.call("double", np.ones(3))

    asyncio.run(main())


def test_no_more_calls_at_once_than_slots():
    async def main():
        pool = make_pool(2)
        await pool.start()
        taken = []

        async def hold():
            async with pool.member() as member:
                taken.append(member)
                assert member.taken <= 2
                await asyncio.sleep(0.02)

        await asyncio.gather(*(hold() for _ in range(12)))
        assert {id(member) for member in taken} == {id(member) for member in pool.members}
        assert [member.taken for member in pool.members] == [0, 0]

    asyncio.run(main())
