import random
import time

import pytest

from megatron_rl.batching import balance as scheduling
from megatron_rl.batching.balance import balance_definition, fill_rows_definition

pytestmark = pytest.mark.skipif(not scheduling.BUILT, reason="the scheduler is not compiled")


@pytest.mark.parametrize("seed", range(30))
def test_equals_the_definition(seed):
    draw = random.Random(seed)
    longest = draw.choice([1, 3, 100, 5000])  # few different lengths: many ties
    lengths = [draw.randint(0, longest) for _ in range(draw.randint(0, 300))]
    for parts in (1, 2, 7, 400):
        assert scheduling.balance(lengths, parts) == balance_definition(lengths, parts)
    for budget in (1, longest // 2 + 1, longest, 3 * longest):  # also lengths over the budget
        assert scheduling.fill_rows(lengths, budget) == fill_rows_definition(lengths, budget)


def test_nothing_to_share_out():
    assert scheduling.balance([], 3) == [[], [], []]
    assert scheduling.fill_rows([], 10) == []


def test_known_by_hand():
    assert scheduling.balance([5, 4, 3, 3, 3], 2) == [[0, 3], [1, 2, 4]]
    assert scheduling.fill_rows([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]


def test_100_000_sequences_take_less_than_a_second():
    draw = random.Random(0)
    lengths = [draw.randint(100, 8192) for _ in range(100_000)]
    start = time.process_time()  # other jobs on the machine do not count
    rows = scheduling.fill_rows(lengths, 16384)
    shares = scheduling.balance(lengths, 64)
    # 0.1 s on an idle core; the definition of fill_rows takes minutes, being quadratic
    assert time.process_time() - start < 1.0
    assert sorted(index for row in rows for index in row) == list(range(100_000))
    assert all(sum(lengths[index] for index in row) <= 16384 for row in rows)
    loads = [sum(lengths[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= 8192


def test_no_parts_are_refused():
    with pytest.raises(ValueError, match="parts"):
        scheduling.balance([1], 0)
