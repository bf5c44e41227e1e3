"""What is written down in Python and in C++ has the same names, in the same order."""

import re
from pathlib import Path

import pytest

from megatron_rl.objectives.registry import OBJECTIVES
from megatron_rl.ops import group_stats
from megatron_rl.ops.loss_spec import EXTREMA, KL_ESTIMATORS, LOSS_KINDS, MAX_LOG_RATIO, SUMS

CSRC = Path(__file__).parents[2] / "csrc"
TOKEN_TERMS = (CSRC / "token_loss" / "token_terms.h").read_text()
GROUP_STATS = (CSRC / "group_stats" / "group_stats.h").read_text()


def members_of(source: str, enum: str) -> list[tuple[str, str]]:
    """(name without its k, value as written or "") of each member."""
    (body,) = re.findall(rf"enum {enum} : \w+ {{(.*?)}};", source, flags=re.DOTALL)
    found = re.findall(r"k(\w+)(?:\s*=\s*(\w+))?", re.sub(r"//.*", "", body))
    assert found, enum
    return found


def snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


@pytest.mark.parametrize(
    ("source", "enum", "prefix", "names"),
    [
        (TOKEN_TERMS, "LossKind", "", LOSS_KINDS),
        (TOKEN_TERMS, "KlEstimator", "", KL_ESTIMATORS),
        (TOKEN_TERMS, "Sum", "", SUMS),
        (TOKEN_TERMS, "Extremum", "max_", EXTREMA),
        (GROUP_STATS, "AdvantageMode", "", group_stats.GROUP_ADVANTAGES),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_an_enum_counts_the_names_of_python_in_their_order(source, enum, prefix, names):
    *members, (count, _) = members_of(source, enum)
    assert count.startswith("Num")
    assert not any(value for _, value in members), "numbered by their place alone"
    assert [snake(name).removeprefix(prefix) for name, _ in members] == list(names)


def test_the_bits_of_the_keep_rules_are_those_of_python():
    bits = {snake(name): int(value) for name, value in members_of(GROUP_STATS, "KeepRule")}
    assert bits.pop("keep_rules") == 7
    told = dict(group_stats._KEEP_BITS)
    assert told.pop("drop_uniform") == bits["drop_all_wrong"] | bits["drop_all_correct"]
    assert told == bits


def test_the_flags_of_groups_are_in_the_order_that_python_reads():
    *members, _ = members_of(GROUP_STATS, "GroupFlag")
    source = Path(group_stats.__file__).read_text()
    read = re.findall(r"(\w+)=flags\[(\d)\]", source)
    assert read == [(snake(name), str(place)) for place, (name, _) in enumerate(members)]


def test_the_bound_of_a_ratio_is_one_number():
    (bound,) = re.findall(r"kMaxLogRatio = ([\d.]+);", TOKEN_TERMS)
    assert float(bound) == MAX_LOG_RATIO


def test_every_native_kind_is_that_of_an_objective():
    natives = [getattr(objective(), "native", None) for objective in OBJECTIVES.values()]
    assert {native.kind for native in natives if native} == set(LOSS_KINDS)
