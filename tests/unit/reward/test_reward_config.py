import pytest
from pydantic import ValidationError

from megatron_rl.reward.config import RewardConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "maths"}, "reward.kind='maths': must be math, function or an import path"),
        ({"kind": "function"}, "reward.kind='function': needs the function to call"),
        ({"function": "a:b"}, "reward.function='a:b': has no effect while reward.kind='math'"),
        ({"kind": "function", "function": "a.b"}, "reward.function='a.b': must be an import path"),
        ({"kind": "a:b:c"}, "reward.kind='a:b:c': must be math"),
        ({"correct": 0.0, "wrong": 0.0}, "reward.correct=0.0: must be greater than reward.wrong"),
        ({"num_workers": 0}, "reward.num_workers=0: must be at least 1"),
        ({"deadline_s": 0.0}, "reward.deadline_s=0.0: must be at least 0.05"),
        ({"memory_mib": 10}, "reward.memory_mib=10: must be at least 256"),
        ({"max_failure_frac": 1.5}, "reward.max_failure_frac=1.5: must be a share"),
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
    assert all(field.description for field in RewardConfig.model_fields.values())
