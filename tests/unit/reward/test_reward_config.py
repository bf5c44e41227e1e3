import pytest
from pydantic import ValidationError

from megatron_rl.reward.config import PartConfig, RewardConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "maths"}, "reward.kind='maths': must be math, exact, number"),
        ({"kind": "function"}, "reward.kind='function': needs the function to call"),
        ({"function": "a:b"}, "reward.function='a:b': has no effect while reward.kind='math'"),
        ({"kind": "function", "function": "a.b"}, "reward.function='a.b': must be an import path"),
        ({"kind": "a:b:c"}, "reward.kind='a:b:c': must be math"),
        ({"correct": 0.0, "wrong": 0.0}, "reward.correct=0.0: must be greater than reward.wrong"),
        ({"num_workers": 0}, "reward.num_workers=0: must be at least 1"),
        ({"deadline_s": 0.0}, "reward.deadline_s=0.0: must be at least 0.05"),
        ({"memory_mib": 10}, "reward.memory_mib=10: must be at least 256"),
        ({"max_failure_frac": 1.5}, "reward.max_failure_frac=1.5: must be a share"),
        ({"kind": "length_penalty"}, "reward.kind='length_penalty': must be math"),
        ({"tolerance": 0.1}, "reward.tolerance=0.1: only the kind number reads it"),
        ({"kind": "a:b", "answer_in": "response"}, "reward.answer_in='response': has no effect"),
        ({"kind": "a:b", "answer_in": "answer_line"}, "answer_in='answer_line': has no effect"),
        ({"kind": "format", "answer_in": "response"}, "Set reward.answer_in=box, or set reward"),
        ({"parts": {"Odd": {"weight": 1.0}}}, "reward.parts='Odd': a part's name becomes"),
        ({"parts": {"odd": {"weight": 1.0}}}, "reward.parts.odd.kind='odd': must be math"),
        (
            {"parts": {"format": {"weight": 1.0, "max_tokens": 5}}},
            "reward.parts.format.free_tokens, max_tokens=(None, 5): only length_penalty",
        ),
        (
            {"parts": {"length_penalty": {"weight": 1.0, "free_tokens": 5, "max_tokens": 5}}},
            "max_tokens=(5, 5): length_penalty needs both, the first below the second",
        ),
        ({"parts": {"length_penalty": {"weight": 1.0}}}, "length_penalty needs both"),
    ],
)
def test_refused_settings_name_field_value_and_rule(settings, message):
    with pytest.raises(ValidationError, match=r"\A[\s\S]*") as caught:
        RewardConfig(**settings)
    assert message in str(caught.value)


def test_function_path_has_two_spellings():
    assert RewardConfig(kind="a.b:c").function_path == "a.b:c"
    assert RewardConfig(kind="function", function="a.b:c").function_path == "a.b:c"
    assert RewardConfig().function_path is None


def test_every_field_is_documented():
    fields = [*RewardConfig.model_fields.values(), *PartConfig.model_fields.values()]
    assert all(field.description for field in fields)


def test_kinds_are_named_by_their_settings():
    parts = {"format": PartConfig(weight=1.0), "style": PartConfig(kind="a.b:c", weight=1.0)}
    assert RewardConfig(kind="function", function="m:f", parts=parts).kinds == {
        "reward.kind": "m:f",
        "reward.parts.format": "format",
        "reward.parts.style": "a.b:c",
    }


def test_bounds_of_a_sum():
    parts = {
        "format": PartConfig(weight=0.25),  # adds 0 to 0.25
        "exact": PartConfig(weight=-0.5),  # -0.5 to 0
        "style": PartConfig(kind="a:b", weight=0.125),  # -0.125 to 0.125
        "length_penalty": PartConfig(weight=2.0, free_tokens=1, max_tokens=2),  # -2 to 0
    }
    assert RewardConfig(parts=parts).bounds == (1 - 0.5 - 0.125 - 2.0, -1 + 0.25 + 0.125)
