"""A value of the environment is used, and nothing that is written or said shows it."""

import json

import pytest
import yaml
from bad_input import only

from megatron_rl.commands.main import main
from megatron_rl.config import load_config
from megatron_rl.references import hidden

SECRET = "hunter2hunter2"


@pytest.fixture
def secret(monkeypatch):
    monkeypatch.setenv("TOKEN", SECRET)
    return "${oc.env:TOKEN}"


def test_the_run_gets_the_value_and_what_is_written_the_reference(case, secret):
    case.change(metrics={"wandb_project": f"team-{secret}"}, run={"output_dir": secret})
    config = load_config(case.write(), [])
    assert config.metrics.wandb_project == f"team-{SECRET}"
    assert config.run.output_dir == SECRET
    for written in (config.model_dump(), config.model_dump(mode="json")):
        assert written["metrics"]["wandb_project"] == f"team-{secret}"
        assert written["run"]["output_dir"] == secret
        assert SECRET not in repr(written)
    assert SECRET not in config.model_dump_json()


def test_what_is_written_is_a_recipe_that_means_the_same(case, secret):
    case.change(run={"output_dir": secret, "seed": "${oc.env:SEED,7}"})
    config = load_config(case.write(), [])
    again = load_config(case.write(yaml.safe_dump(config.model_dump(mode="json"))), [])
    assert again == config
    assert again.run.seed == 7


def test_references_in_lists_mappings_and_overrides_are_kept(case, secret):
    case.change(
        prompts={"path": ["a.jsonl", f"{secret}/b.jsonl"]},
        evaluation={"benchmarks": {"aime": {"path": secret}}},
    )
    config = load_config(case.write(), [f"critic.path={secret}", "algorithm.preset=ppo"])
    written = config.model_dump()
    assert written["prompts"]["path"] == ["a.jsonl", f"{secret}/b.jsonl"]
    assert written["evaluation"]["benchmarks"]["aime"]["path"] == secret
    assert written["critic"]["path"] == secret
    assert config.critic.path == SECRET


def test_a_reference_to_another_setting_is_written_out_unless_it_leads_to_the_environment(
    case, secret
):
    case.change(
        run={"output_dir": f"runs/{secret}", "seed": "${run.num_iterations}"},
        metrics={"wandb_project": "${run.output_dir}"},
    )
    written = load_config(case.write(), []).model_dump()
    assert written["run"]["seed"] == 2
    assert written["metrics"]["wandb_project"] == "${run.output_dir}"


def test_a_wrong_value_is_shown_as_its_reference(case, secret):
    case.change(model={"dtype": secret})
    assert only(case.config_problems()).startswith("model.dtype='${oc.env:TOKEN}': ")


def test_a_short_value_is_hidden_where_it_is_the_setting_and_not_inside_of_words(case, monkeypatch):
    monkeypatch.setenv("TOKEN", "at")
    case.change(model={"dtype": "${oc.env:TOKEN}"})
    problem = only(case.config_problems())
    assert problem == (
        "model.dtype='${oc.env:TOKEN}': Input should be 'bfloat16', 'float16', 'float32' or "
        "'float64'"
    )
    assert hidden("what data") == "what data"


@pytest.mark.parametrize(
    "reference", ['${oc.env:"TOKEN"}', "${oc.env:${run.output_dir}}", "${ oc.env : TOKEN , x }"]
)
def test_every_spelling_of_a_reference_is_kept_and_hidden(case, secret, reference):
    case.change(run={"output_dir": "TOKEN"}, metrics={"wandb_project": reference})
    config = load_config(case.write(), [])
    assert config.metrics.wandb_project == SECRET
    assert config.model_dump()["metrics"]["wandb_project"] == reference
    assert SECRET not in hidden(f"a message with {SECRET}")


def test_a_value_that_cannot_be_decoded_is_not_shown(case, monkeypatch):
    monkeypatch.setenv("TOKEN", f"[{SECRET}")
    case.change(run={"seed": "${oc.decode:${oc.env:TOKEN}}"})
    assert SECRET not in only(case.config_problems())


def test_what_is_decoded_from_a_variable_is_kept_as_a_reference(case, monkeypatch):
    monkeypatch.setenv("BENCHMARKS", '{aime: {path: "/hunter2hunter2"}}')
    monkeypatch.setenv("SELECTION", "all")
    case.change(
        evaluation={"benchmarks": "${oc.decode:${oc.env:BENCHMARKS}}"},
        algorithm={"selection": ["${oc.env:SELECTION}"]},
    )
    config = load_config(case.write(), [])
    assert config.evaluation.benchmarks["aime"].path == "/hunter2hunter2"
    written = config.model_dump()
    assert written["evaluation"]["benchmarks"] == "${oc.decode:${oc.env:BENCHMARKS}}"
    assert written["algorithm"]["selection"] == ["${oc.env:SELECTION}"]


@pytest.mark.parametrize("value", [SECRET, "it's\\a\nsecret", 'it\'s "a" secret'])
def test_no_message_of_a_command_shows_it(case, monkeypatch, capsys, value):
    monkeypatch.setenv("TOKEN", value)
    case.change(model={"path": "/nowhere/${oc.env:TOKEN}"})
    assert main(["plan", str(case.write())]) == 2
    told = capsys.readouterr().err
    assert "/nowhere/${oc.env:TOKEN}" in told
    assert "there is no such directory" in told
    assert "secret" not in told
    assert SECRET not in told


def test_environment_json_keeps_what_was_typed(case, secret, tmp_path, monkeypatch):
    from megatron_rl import session
    from megatron_rl.metrics.starts import write_start
    from megatron_rl.platforms.base import CPU

    monkeypatch.setattr("sys.argv", ["megatron-rl", "train", f"critic.path={secret}"])
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    case.change(metrics={"wandb_project": secret})
    config = load_config(case.write(), [])
    write_start(tmp_path / "out", config.model_dump(mode="json"), session._environment(CPU))
    files = {path.name: path.read_text() for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert not [name for name, text in files.items() if SECRET in text]
    assert json.loads(files["environment.json"])["command"][-1] == f"critic.path={secret}"
    assert yaml.safe_load(files["config.yaml"])["metrics"]["wandb_project"] == secret
