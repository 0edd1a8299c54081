import numpy as np
import pytest

from mlem_dist.errors import UsageError
from mlem_dist.runtime.placement import LEAST_SHARE, allot, parse_placement


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
    assert parse_placement("pools", 3) == (range(1, 2), range(2, 3), range(3, 4))
    assert parse_placement("together", 3) == (range(1, 4),)
    assert parse_placement("1-2,3", 3) == (range(1, 3), range(3, 4))
    for text in ("", "1,3", "2-3,1", "1-2", "0-3", "1-3-3,", "a"):
        with pytest.raises(UsageError, match="placement"):
            parse_placement(text, 3)
