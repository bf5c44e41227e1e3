import pytest
from pydantic import ValidationError

from megatron_rl.prompts.config import PromptsConfig


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("Solve it.", "does not contain {prompt}"),
        ("{prompt} in \\boxed{}", "has fields other than {prompt}: ''"),
        ("{question}", "has fields other than {prompt}: 'question'"),
        ("{prompt.__class__} {prompt}", "has fields other than {prompt}: 'prompt.__class__'"),
        ("{prompt!r}", "has a conversion"),
        ("{prompt:>2000}", "has a conversion or a format"),
        ("{prompt", "is not a format string"),
    ],
)
def test_a_template_that_cannot_work_is_refused_with_its_field(template, problem):
    with pytest.raises(ValidationError) as error:
        PromptsConfig(path="x.jsonl", template=template)
    assert "prompts.template=" in str(error.value)
    assert problem in str(error.value)
    assert "double all other braces" in str(error.value)


@pytest.mark.parametrize(
    "setting",
    [
        {"path": ""},
        {"path": []},
        {"path": ["a.jsonl", " "]},
        {"prompts_per_iteration": 0},
        {"max_prompt_tokens": 0},
        {"overlong": "truncate"},
        {"promt_key": "question"},
    ],
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ValidationError, match=next(iter(setting))):
        PromptsConfig(**{"path": "x.jsonl", **setting})


def test_doubled_braces_and_several_paths_are_accepted():
    config = PromptsConfig(path=["a.jsonl", "b.parquet"], template="{prompt} \\boxed{{}}")
    assert config.paths == ("a.jsonl", "b.parquet")
    assert PromptsConfig(path="a.jsonl").paths == ("a.jsonl",)


@pytest.mark.parametrize("field", ["system", "instruction"])
def test_a_turn_beside_a_template_would_have_no_effect(field):
    with pytest.raises(ValueError, match=rf"prompts\.{field}='x': has no effect beside"):
        PromptsConfig(path="a.jsonl", template="{prompt}", **{field: "x"})
    PromptsConfig(path="a.jsonl", template="{prompt}", **{field: ""})
