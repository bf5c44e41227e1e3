"""`rollout.engine: auto`: what it chooses, why, what it keeps, and that nobody reads it before."""

from dataclasses import replace

import pytest
from test_choose import QWEN_7B, SMALL, recipe

from megatron_rl import auto_engine
from megatron_rl.auto_engine import MOST_PARAMETERS, with_engine
from megatron_rl.checkpoint.contract import Terms
from megatron_rl.config import RunConfig
from megatron_rl.errors import InputError
from megatron_rl.preflight import kept_recipe

TINY = replace(SMALL, head_dim=32, num_attention_heads=2, num_query_groups=1)


@pytest.fixture(autouse=True)
def no_files(monkeypatch):
    """A tiny model without its files, no checkpoints, and vLLM installed."""
    monkeypatch.setenv("MEGATRON_RL_DEVICE", "cpu")
    set_model(monkeypatch, TINY)
    monkeypatch.setattr(auto_engine, "newest_terms", lambda directory: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())


def set_model(monkeypatch, arch):
    class Source:
        config_dir = "none"

    monkeypatch.setattr(auto_engine, "find_model", lambda path, field: Source)
    monkeypatch.setattr(auto_engine, "read_model_config", lambda path, ignored: arch)


def asked(dtype="float32", layer_spec="local", rollout=None, **sections):
    values = recipe().model_dump(exclude_unset=True)
    values["rollout"] |= {"engine": "auto", **(rollout or {})}
    values["model"] |= {"dtype": dtype, "layer_spec": layer_spec}
    return RunConfig.model_validate(values | sections)


def chosen(config, device_type="cpu", **how):
    """The engine, and what was said."""
    said = []
    return with_engine(config, device_type, said.append, **how).rollout.engine, "\n".join(said)


def test_a_small_model_samples_by_itself_on_a_cpu_and_says_so():
    engine, said = chosen(asked())
    assert engine == "megatron"
    assert said == (
        f"engine: megatron, since on a CPU a model of {TINY.num_parameters:,} parameters samples "
        f"by itself, as all up to {MOST_PARAMETERS:,} do. rollout.engine=vllm is the other one"
    )


def test_a_run_of_recorded_rollouts_has_the_engine_in_silence():
    assert chosen(asked(debug={"replay": "runs/a"})) == ("megatron", "")


def test_a_large_model_16_bits_and_gpus_are_vllms(monkeypatch):
    for dtype in ("bfloat16", "float16"):
        assert chosen(asked(dtype))[0] == "vllm"
    assert chosen(asked("float64"))[0] == "megatron"
    assert chosen(asked(), "cuda", is_here=False)[0] == "vllm"
    set_model(monkeypatch, QWEN_7B)
    engine, said = chosen(asked())
    assert engine == "vllm"
    assert f"{QWEN_7B.num_parameters:,} parameters has more than" in said


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rollout": {"dtype": "float16"}}, "rollout.dtype='float16': "),
        ({"rollout": {"tensor_model_parallel_size": 2}}, "rollout.tensor_model_parallel_size=2: "),
        ({"optimizer": {"offload": "weights"}}, "optimizer.offload='weights': "),
        ({"rollout": {"separate_ranks": 1}}, "rollout.separate_ranks=1: "),
        ({"layer_spec": "transformer_engine"}, "model.layer_spec='transformer_engine': "),
    ],
)
def test_what_the_policy_refuses_is_vllms_and_named(changes, told):
    engine, said = chosen(asked(**changes))
    assert engine == "vllm"
    assert said.startswith(f"engine: vllm, since the other one refuses {told}rollout.engine=")
    assert "Set " not in said  # it is no refusal


def test_what_vllm_refuses_is_the_policys(monkeypatch):
    set_model(monkeypatch, replace(QWEN_7B, head_dim=24))
    engine, said = chosen(asked())
    assert engine == "megatron"
    assert "its attention heads have 24 elements" in said
    assert chosen(asked(), "cuda", is_here=False)[0] == "vllm"  # only on a CPU it lacks them


def test_without_vllm_the_policy_samples_unless_it_cannot(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert chosen(asked()) == ("megatron", "engine: megatron, since vLLM is not installed")
    assert chosen(asked(rollout={"dtype": "float16"}))[0] == "vllm"  # whose start names what lacks
    assert (
        chosen(asked(), "cuda", is_here=False)[0] == "vllm"
    )  # of another machine nothing is known


def test_a_run_that_goes_on_keeps_its_engine_where_there_is_one(monkeypatch):
    former = asked(rollout={"engine": "vllm"})
    terms = Terms(where="runs/a/checkpoints/iteration_000003", recipe=kept_recipe(former))
    monkeypatch.setattr(auto_engine, "newest_terms", lambda directory: (terms, 3))
    engine, said = chosen(asked())
    assert engine == "vllm"
    assert "as in iteration_000003" in said
    anew = asked(run={"output_dir": "none", "num_iterations": 1, "resume": "never"})
    assert chosen(anew)[0] == "megatron"
    without = replace(terms, recipe=kept_recipe(asked()))  # of a supervised run, say
    monkeypatch.setattr(auto_engine, "newest_terms", lambda directory: (without, 3))
    assert chosen(asked())[0] == "megatron"
    monkeypatch.setattr(auto_engine, "newest_terms", lambda directory: (terms, 3))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert chosen(asked())[0] == "megatron"


def test_what_the_recipe_says_and_what_needs_no_engine_stay():
    for engine in ("vllm", "megatron"):
        assert chosen(asked(rollout={"engine": engine})) == (engine, "")
    assert chosen(asked(algorithm={"preset": "sft"})) == ("auto", "")


def test_a_model_that_cannot_be_read_is_left_to_those_who_read_it(monkeypatch):
    def missing(path, field):
        raise InputError("gone")

    monkeypatch.setattr(auto_engine, "find_model", missing)
    assert chosen(asked()) == ("megatron", "")


def test_nobody_reads_an_engine_before_it_is_chosen():
    with pytest.raises(AssertionError, match="with_engine comes first"):
        _ = asked().has_vllm
    assert not asked(debug={"replay": "runs/a"}).has_vllm
