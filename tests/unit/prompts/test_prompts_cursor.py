import pytest

from megatron_rl.prompts.cursor import Cursor


def _rows(draws):
    return [draw.row for draw in draws]


def _ids(draws):
    return [draw.group_id for draw in draws]


def test_every_epoch_visits_every_row_once_in_an_order_of_its_own():
    cursor = Cursor(50, seed=3, shuffle=True)
    epochs = [_rows(cursor.take(50)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_order_depends_on_all_bits_of_the_seed():
    seeds = (0, 1, 2**32, 2**63 - 1, -1)
    orders = {tuple(_rows(Cursor(50, seed=seed, shuffle=True).take(50))) for seed in seeds}
    assert len(orders) == len(seeds)


def test_order_is_the_documented_function_of_seed_and_epoch():
    # numpy keeps RandomState's stream for ever, so these numbers may not change.
    # From numpy alone: RandomState([5, 0, epoch, 0]).permutation(6)
    cursor = Cursor(6, seed=5, shuffle=True)
    assert [_rows(cursor.take(6)) for _ in range(2)] == [[5, 4, 3, 1, 0, 2], [1, 2, 3, 0, 5, 4]]


def test_batches_of_any_size_are_the_same_walk():
    whole = Cursor(7, seed=1, shuffle=True).take(24)
    cursor = Cursor(7, seed=1, shuffle=True)
    parts = [draw for size in (1, 6, 3, 0, 14) for draw in cursor.take(size)]
    assert parts == whole
    assert _ids(whole) == list(range(24))  # epoch * 7 + position, over three epoch boundaries


def test_seek_continues_inside_and_at_the_end_of_an_epoch():
    for taken in (3, 7, 10, 14):
        cursor = Cursor(7, seed=1, shuffle=True)
        cursor.take(taken)
        resumed = Cursor(7, seed=1, shuffle=True)
        resumed.seek(cursor.epoch, cursor.position)
        assert resumed.take(12) == cursor.take(12)


def test_without_shuffling_rows_come_in_file_order():
    assert _rows(Cursor(3, seed=9, shuffle=False).take(7)) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("place", [(-1, 0), (0, -1), (0, 8)])
def test_a_place_outside_the_data_is_refused(place):
    with pytest.raises(ValueError, match="is no place in 7 rows"):
        Cursor(7, seed=1, shuffle=True).seek(*place)
