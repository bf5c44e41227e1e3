"""An override of a text setting is text, as a shell hands it over."""

import subprocess

import pytest
from bad_input import only

from megatron_rl.config import load_config


def as_a_shell_hands_over(typed):
    """The one argument that a shell makes of what a person types."""
    return subprocess.run(
        ["sh", "-c", f"printf %s {typed}"], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize(
    ("typed", "section", "key", "value"),
    [
        ('prompts.system=""', "prompts", "system", ""),
        ("prompts.instruction=''", "prompts", "instruction", ""),
        ("prompts.system=", "prompts", "system", ""),
        ("prompts.system=null", "prompts", "system", None),
        ("prompts.system=yes", "prompts", "system", "yes"),
        ("prompts.system=12", "prompts", "system", "12"),
        ("'prompts.system=be brief: one line # no more'", "prompts", "system",
         "be brief: one line # no more"),
        ("\"prompts.system='quoted, as YAML has it'\"", "prompts", "system",
         "quoted, as YAML has it"),
        ("'prompts.template={prompt}'", "prompts", "template", "{prompt}"),
        ("'prompts.template=Question: {prompt}'", "prompts", "template", "Question: {prompt}"),
        ("'prompts.template=[INST] {prompt} [/INST]'", "prompts", "template",
         "[INST] {prompt} [/INST]"),
        ("'prompts.template=- \"{prompt}\"'", "prompts", "template", '- "{prompt}"'),
        ("metrics.wandb_project=2026", "metrics", "wandb_project", "2026"),
        ("run.resume=never", "run", "resume", "never"),
        ("checkpoint.save_every=", "checkpoint", "save_every", None),  # a number: not set
    ],
)  # fmt: skip
def test_what_is_typed_is_what_is_set(case, typed, section, key, value):
    config = load_config(case.write(), [as_a_shell_hands_over(typed)])
    assert getattr(getattr(config, section), key) == value


@pytest.mark.parametrize("name", ["a: b.jsonl", "{a}.jsonl", "[a].jsonl", "12", "a # b.jsonl"])
def test_a_path_is_text_where_it_is_no_list(case, name):
    assert load_config(case.write(), [f"prompts.path={name}"]).prompts.path == name


@pytest.mark.parametrize(
    ("override", "way_out"),
    [
        ("run.output_dir=", "Name one"),
        ("model.path= ", "Name one"),
        ("metrics.wandb_project=", "Set metrics.wandb_project=null for none"),
        ("reference.path=", "Set reference.path=null for none"),
        ("prompts.answer_key=", "Set prompts.answer_key=null for none"),
        ("evaluation.benchmarks.a.path=", "Name one"),
    ],
)
def test_a_text_that_is_empty_is_refused_where_it_says_nothing(case, override, way_out):
    (problem,) = case.config_problems(override)
    key, _, value = override.partition("=")
    assert problem == f"{key}={value!r}: is empty. {way_out}"
    if "=null" in way_out:
        load_config(case.write(), [way_out.split()[1]])


def test_lists_and_mappings_of_other_settings_stay_what_they_are(case):
    data = f"prompts.path=[{case.prompts}, {case.prompts}]"
    config = load_config(case.write(), [data, "model.megatron={attention_dropout: 0.0}"])
    assert config.prompts.path == [str(case.prompts)] * 2
    assert config.model.megatron == {"attention_dropout": 0.0}


def test_a_mapping_in_a_file_names_the_way_out(case):
    case.change(prompts={"template": {"prompt": None}})
    assert only(case.config_problems()) == (
        "prompts.template={'prompt': None}: Input should be a valid string. YAML reads this as a "
        "mapping or a list: put quotes around the text"
    )
