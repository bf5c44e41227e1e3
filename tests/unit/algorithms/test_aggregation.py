import pytest

from megatron_rl.algorithms.aggregation import token_weight
from megatron_rl.types import UpdateTotals

TOTALS = UpdateTotals(
    kept_sequences=4, kept_tokens=50, collected_sequences=10, collected_tokens=200
)


@pytest.mark.parametrize(
    ("name", "normalize_over", "expected"),
    [
        ("sequence_mean", "kept", 1 / (4 * 20)),
        ("sequence_mean", "collected", 1 / (10 * 20)),
        ("token_mean", "kept", 1 / 50),
        ("token_mean", "collected", 1 / 200),
        ("sequence_sum", "kept", 1 / (4 * 100)),
        ("sequence_sum", "collected", 1 / (10 * 100)),
        ("pair_mean", "kept", 1 / 2),  # four responses are two pairs
    ],
)
def test_weight_of_a_token(name, normalize_over, expected):
    actual = token_weight(
        name, TOTALS, response_tokens=20, max_response_tokens=100, normalize_over=normalize_over
    )
    assert actual == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("name", ["sequence_mean", "token_mean"])
def test_the_weights_of_all_kept_tokens_sum_to_one(name):
    lengths = (20, 5, 15, 10)
    total = sum(
        length
        * token_weight(
            name,
            TOTALS,
            response_tokens=length,
            max_response_tokens=100,
            normalize_over="kept",
        )
        for length in lengths
    )
    assert total == pytest.approx(1.0, rel=1e-14)
