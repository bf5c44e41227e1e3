"""The date in prompts: one for all ranks of a run, and that of the run for its evaluations."""

import json

import pytest
import yaml

from megatron_rl import preflight
from megatron_rl.config import load_config
from megatron_rl.preflight import at_one_date, read_inputs

ASKS = "{{ strftime_now('%d+%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def dated(model_copy, monkeypatch):
    """A model whose chat template asks for the date, and the day that it is."""
    directory = model_copy()
    settings = directory / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": ASKS}))

    def is_now(day):
        monkeypatch.setattr(preflight, "today", lambda: day)
        return directory

    return is_now


def first_text(inputs):
    return inputs.prompts.first_text(inputs.tokenizer)


def test_ranks_that_start_on_both_sides_of_midnight_have_one_date(case, dated):
    dated("2026-03-04")
    first = case.read()
    dated("2026-03-05")
    second = case.read()
    assert first_text(first) != first_text(second)
    config = load_config(case.write(), [])
    agreed = at_one_date(config, second, 1, first.date)
    assert first_text(agreed) == first_text(first)
    assert agreed.prompts.state_dict() == first.prompts.state_dict()
    assert agreed.dated(config).prompts.date == "2026-03-04"
    assert at_one_date(config, first, 1, first.date) is first


@pytest.mark.parametrize("place", ["hf", "checkpoints/iter_000002/hf"])
def test_an_evaluation_of_a_runs_model_has_the_date_of_the_run(place, case, dated):
    run = case.folder / "before"
    (run / place).parent.mkdir(parents=True)
    dated("2026-03-04").rename(run / place)
    kept = {"run": {"output_dir": "before"}, "prompts": {"date": "2026-01-02"}}
    (run / "config.yaml").write_text(yaml.safe_dump(kept))
    case.change(model={"path": str(run / place)})
    inputs = read_inputs(load_config(case.write(), []), 1, is_evaluation=True)
    assert (inputs.date, first_text(inputs)[:7]) == ("2026-01-02", "02+2026")
    assert inputs.asked(load_config(case.write(), []))["date"] == "2026-01-02"
    assert case.read().date == "2026-03-04"  # a run of its own
    case.change(prompts={"date": "2026-05-06"})
    assert read_inputs(load_config(case.write(), []), 1, is_evaluation=True).date == "2026-05-06"


def test_a_file_of_somebody_elses_near_the_model_says_no_date(case, dated):
    dated("2026-03-04")
    for text in ("date: 2026-01-02\n", "prompts: {date: '2026-01-02'}\n", "{", "- 1\n"):
        (case.folder / "config.yaml").write_text(text)
        inputs = read_inputs(load_config(case.write(), []), 1, is_evaluation=True)
        assert inputs.date == "2026-03-04"
