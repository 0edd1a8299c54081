import numpy as np
import pytest

from mlem_dist.capacity.placement import LEAST_SHARE, Costs, Placement, allot, allot_kinds, level_loads, parse_placement
from mlem_dist.engine.program import called, divide, evaluations
from mlem_dist.errors import UsageError
from mlem_dist.solver.plan import Increment, Recipe


@pytest.mark.parametrize("devices", [1, 2, 3, 8, 64])
def test_seats_fit_their_devices_and_balance_the_load(devices):
    rng = np.random.default_rng(devices)
    for _ in range(200):
        load = rng.exponential(size=rng.integers(1, 6)) ** 3
        load[1:] *= rng.random(len(load) - 1) > 0.2
        seats = allot(load, devices)
        used = np.zeros(devices)
        for pool in seats:
            for seat in pool:
                assert 0 < seat.share <= 1
                used[seat.device] += seat.share
        assert (used <= 1 + 1e-9).all()
        assert used.sum() > devices - LEAST_SHARE * devices
        assert seats[0]
        for pool, share in zip(seats, load / load.sum() * devices, strict=True):
            given = sum(seat.share for seat in pool)
            assert (given > 0) == (share > 0 or pool is seats[0])
            # Least shares and slivers move a little from one to another.
            assert given > 0.7 * share - 0.05


def test_placements():
    assert parse_placement("pools", 3).pools == (range(1, 2), range(2, 3), range(3, 4))
    assert parse_placement("together", 3).pools == (range(1, 4),)
    assert parse_placement("1-2,3", 3) == Placement((range(1, 3), range(3, 4)), ("", ""))
    assert parse_placement("1-2@L4,3@size=large", 3).kinds == ("L4", "size=large")
    for text in ("", "1,3", "2-3,1", "1-2", "0-3", "1-3-3,", "1-2-3", "a", "1-2@L4,3", "1-2@,3@", "1-3@L4,"):
        with pytest.raises(UsageError, match="placement"):
            parse_placement(text, 3)


def test_a_level_that_is_hardly_ever_drawn_has_a_seat(make_job):
    """No block of the first sixteen draws it, but one of a million will."""
    p = np.array([[1.0] * 12, [0.5] * 12, [0.0] * 11 + [1e-9]])
    costs = 2 * [Costs(*2 * [np.array([1.0, 2.0, 4.0])])]
    job = make_job(Recipe(p, "systematic", "held"))
    assert not job.workload.expected_calls()[2]
    load = level_loads(evaluations(job.workload), [range(1, 3), range(3, 4)], costs).sum(1)
    assert 0 < load[1] < 1e-6 * load[0]
    assert all(allot(load, 4))
    p[2] = 0
    never = evaluations(make_job(Recipe(p, "systematic", "held")).workload)
    assert not level_loads(never, [range(1, 3), range(3, 4)], costs)[1].any()


def test_level_1_is_counted_once_where_others_take_its_value(make_job):
    costs = Costs(np.array([1.0, 3.0, 9.0]), np.array([1.0, 2.0, 8.0]))
    counts = {(Increment(2, 1), Increment(3, 2)): 2.0, (Increment(3, 2),): 5.0}
    assert level_loads(counts, [range(1, 4)], [costs]).tolist() == [[2 * 1, 2 * 2 + 5 * 3, 2 * 8 + 5 * 9]]
    # Another pool does not have it.
    divided = level_loads(counts, [range(1, 3), range(3, 4)], 2 * [costs])
    assert divided.tolist() == [[2 * 1, 2 * 2 + 5 * 3, 0], [0, 0, 7 * 9]]


def test_pools_stay_on_their_kinds_of_devices():
    seats = allot_kinds(np.array([1.0, 3.0, 2.0]), [0, 0, 1], [4, 2])
    assert [{seat.device for seat in pool} for pool in seats] == [{0}, {1, 2, 3}, {4, 5}]
    # A kind without work has no actors, but the first pool always has one.
    seats = allot_kinds(np.array([0.0, 3.0, 0.0]), [0, 1, 2], [1, 2, 2])
    assert [len(pool) for pool in seats] == [1, 2, 0]
    # The first of those on a kind is not always the first of all.
    seats = allot_kinds(np.array([1.0, 0.0, 2.0]), [0, 1, 1], [1, 2])
    assert [len(pool) for pool in seats] == [1, 0, 2]


def test_a_level_is_evaluated_once_where_its_value_is_known_anyway():
    def divided(*together, pools):
        return divide(tuple(Increment(*one) for one in together), pools)

    single = [range(k, k + 1) for k in range(1, 5)]
    # The first pool has level 1 and takes part in every step; level 2 is asked for, and level 3 is not.
    assert divided((2, 1), (4, 2), pools=single) == (((1, 0),), ((2, 0),), (), ((4, 0),))
    assert divided((2, 1), (4, 3), pools=single) == (((1, 0),), ((2, 0),), (), ((4, 3),))
    assert divided((4, 2), pools=[range(1, 4), range(4, 5)]) == (((2, 0),), ((4, 0),))
    # In one pool one evaluation serves both.
    assert divided((3, 2), (4, 3), pools=[range(1, 3), range(3, 5)]) == (((2, 0),), ((3, 0), (4, 3)))
    every = (1, 0), (2, 1), (3, 2), (4, 3)
    assert divided(*every, pools=[range(1, 5)]) == (every,)
    for pools in ([range(1, 3), range(3, 5)], single, [range(1, 2), range(2, 5)]):
        levels = called(tuple(Increment(*one) for one in every), pools)
        assert sorted(k for of_pool in levels for k in of_pool) == [1, 2, 3, 4]
