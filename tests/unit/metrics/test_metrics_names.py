import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_rl.evaluation.measures import OF_VERDICTS
from megatron_rl.metrics import names
from megatron_rl.metrics.console import COLUMNS
from megatron_rl.metrics.meter import Meter
from megatron_rl.metrics.plot import PANELS

PACKAGE = Path(__file__).parents[3] / "megatron_rl"


def test_every_name_is_room_and_quantity():
    rooms = "reward|algorithms|batching|rollout|policy|weights|critic|time|memory|evaluation"
    pattern = rf"({rooms})/[a-z0-9_<>/]+"
    assert [name for name in names.METRICS if not re.fullmatch(pattern, name)] == []


def test_what_is_shown_is_listed():
    shown = {name for column in COLUMNS for name in column.metrics}
    shown |= {name for _, _, metrics in PANELS for name in metrics}
    assert shown <= names.METRICS.keys()


def test_every_metric_that_the_package_spells_has_a_meaning():
    rooms = "reward|algorithms|batching|rollout|policy|weights|critic|time|memory"
    spelled = {
        name
        for path in PACKAGE.rglob("*.py")
        for name in re.findall(rf'"((?:{rooms})/[a-z0-9_]+)"', path.read_text())
    }
    assert len(spelled) > 30
    assert sorted(name for name in spelled if names.meaning(name) is None) == []


def test_the_meter_takes_no_metric_without_a_meaning():
    meter = Meter(SimpleNamespace(platform=SimpleNamespace(synchronize=lambda: None)))
    meter.report({"reward/part_My.part_mean": 1.0})
    with pytest.raises(ValueError, match=r"metric 'policy/no_such': has no meaning\. Add it to"):
        meter.report({"policy/no_such": 1.0})


@pytest.mark.parametrize("name", ["evaluation/aime24/average_at_8", "evaluation/a/b/average_at_k"])
def test_a_benchmark_has_the_meaning_of_its_kind(name):
    assert names.meaning(name) == names.METRICS["evaluation/<benchmark>/average_at_k"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("reward/verdict_no_answer_frac", "reward/verdict_<verdict>_frac"),
        ("reward/part_length_penalty_mean", "reward/part_<name>_mean"),
    ],
)
def test_metrics_of_verdicts_and_parts_have_the_meaning_of_their_kind(name, kind):
    assert names.meaning(name) == names.METRICS[kind]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("pass_at_16", "pass_at_k"),
        ("majority_at_4", "majority_at_k"),
        *((name, name) for name in ("truncated_frac", *OF_VERDICTS.values())),
    ],
)
def test_other_measures_of_a_benchmark(name, kind):
    meaning = names.METRICS[f"evaluation/<benchmark>/{kind}"]
    assert names.meaning(f"evaluation/math500/{name}") == meaning


def test_an_unlisted_name_has_no_meaning():
    assert names.meaning("policy/vibes") is None
    assert names.meaning("evaluation/aime24/pass_at") is None
    assert names.meaning("evaluation/aime24/truncated_frac_8") is None


def test_evaluation_label():
    assert names.evaluation_label("evaluation/aime24/average_at_8") == "aime24 average@8"
    with pytest.raises(ValueError, match="'reward/mean' is not evaluation"):
        names.evaluation_label("reward/mean")
