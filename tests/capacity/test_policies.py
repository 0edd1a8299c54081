from mlem_dist.capacity.placement import Devices, Seat
from mlem_dist.capacity.policies import Load, Move, choose_move

CPU, GPU = Devices("cpu", 4), Devices("cuda", 4)
A, B, C, D = (Seat(device, 1.0) for device in range(4))


def load(busy: float, *seats: Seat, devices: Devices = CPU, queued: bool = True) -> Load:
    return Load(devices, seats, busy, queued)


def test_a_full_pool_takes_the_seat_that_is_missed_least():
    small = Seat(1, 0.5)
    assert choose_move([load(0.6, A, small), load(1.0, C)]) == Move(0, 1, small)
    assert choose_move([load(1.0, C), load(0.2, A, B), load(0.1, A, D)]) == Move(2, 0, A)


def test_the_fuller_one_of_two_full_pools_comes_first():
    loads = [load(0.1, A, B), load(0.85, C), load(1.0, D)]
    assert choose_move(loads) == Move(0, 2, A)
    assert choose_move([loads[0], loads[2], loads[1]]) == Move(0, 1, A)


def test_what_has_failed_is_not_tried_again():
    loads = [load(0.1, A, Seat(1, 0.5)), load(1.0, C)]
    assert choose_move(loads, {(1, 1)}) == Move(0, 1, A)
    assert choose_move(loads, {(1, 0), (1, 1)}) is None


def test_no_seat_moves_where_it_would_not_help():
    for loads in (
        [load(0.1, A, B), load(0.7, C)],
        [load(0.1, A, B), load(1.0, C, queued=False)],
        [load(0.8, A, B), load(1.0, C)],
        [load(0.1, A), load(1.0, C)],
        [load(0.1, A, B, devices=GPU), load(1.0, C)],
        [load(0.1, Seat(2, 0.5), Seat(2, 0.1)), load(0.5, Seat(2, 0.4))],
    ):
        assert choose_move(loads) is None
