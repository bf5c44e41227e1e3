"""A bad recipe is named before any model is built: field, value, rule and way out, all at once."""

import math

import pytest
from bad_input import only

from megatron_rl.config import load_config, world_problems
from megatron_rl.errors import ConfigErrors


def test_the_recipe_that_is_spoiled_below_is_good(case):
    inputs = case.read()
    assert inputs.arch.num_attention_heads == 2
    assert len(inputs.prompts) == 2


# -- keys and types --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "key", "meant"),
    [
        ("rollout", "temprature", "rollout.temperature"),
        ("optimizer", "learning_rate_schedule", "optimizer.lr_schedule"),
        ("rollout", "lr", "optimizer.lr"),  # right key, wrong section
        ("model", "group_size", "rollout.group_size"),
        ("run", "tensor_model_parallel_size", "rollout.tensor_model_parallel_size"),
    ],
)
def test_an_unknown_key_names_the_one_that_was_meant(case, section, key, meant):
    case.change(**{section: {key: 1}})
    assert only(case.config_problems()) == f"{section}.{key}: unknown key. Did you mean {meant}?"


def test_an_unknown_key_like_no_other_lists_what_is_known(case):
    case.change(run={"zzz": 1})
    assert only(case.config_problems()) == (
        "run.zzz: unknown key. Known here: lag, num_iterations, output_dir, profile, resume, seed"
    )


def test_unknown_sections_and_keys_of_a_benchmark_are_named(case):
    case.change(rolout={}, evaluation={"benchmarks": {"aime": {"path": "x", "promt_key": "y"}}})
    assert sorted(case.config_problems()) == [
        "evaluation.benchmarks.aime.promt_key: unknown key. "
        "Did you mean evaluation.benchmarks.aime.prompt_key?",
        "rolout: unknown key. Did you mean rollout?",
    ]


@pytest.mark.parametrize(
    ("section", "key", "value", "rule"),
    [
        ("run", "num_iterations", "many", "should be a valid integer"),
        ("run", "num_iterations", 1.5, "should be a valid integer"),
        ("run", "profile", 2, "should be a valid tuple"),
        ("run", "num_iterations", 0, "greater than or equal to 1"),
        ("rollout", "temperature", 0, "greater than or equal to 0.01"),
        ("rollout", "temperature", float("nan"), "finite number"),
        ("rollout", "enforce_eager", "maybe", "valid boolean"),
        ("model", "dtype", "fp8", "'bfloat16', 'float16', 'float32' or 'float64'"),
        ("prompts", "path", "", "at least 1"),
        ("optimizer", "lr", None, "valid number"),
    ],
)
def test_a_wrong_type_or_value_is_named_with_its_field(case, section, key, value, rule):
    case.change(**{section: {key: value}})
    problem = case.config_problems()[0]
    assert problem.startswith(f"{section}.{key}={value!r}: ")
    assert rule in problem


def test_a_field_of_several_kinds_is_named_as_in_the_recipe(case):
    case.change(prompts={"path": 3})
    assert {problem.partition(":")[0] for problem in case.config_problems()} == {"prompts.path=3"}


def test_a_section_that_is_text_is_named(case):
    case.settings["rollout"] = "fast"
    assert only(case.config_problems()).startswith("rollout='fast': ")


def test_missing_sections_and_fields_are_named_together(case):
    del case.settings["model"], case.settings["algorithm"], case.settings["run"]["output_dir"]
    assert sorted(case.config_problems()) == [
        f"{name}: is missing. Set it in the recipe or as an override"
        for name in ("algorithm", "model", "run.output_dir")
    ]


def test_an_unknown_preset_names_the_nearest(case):
    case.change(algorithm={"preset": "reinforce_rei"})
    assert "Did you mean 'reinforce_rej'?" in only(case.config_problems())


# -- the file and the command line -----------------------------------------------------------------


def test_bad_yaml_is_shown_with_its_line(case):
    problem = only(case.config_problems(text="run:\n  output_dir: x\n  seed: [1\nmodel: {}\n"))
    assert "recipe.yaml: not valid YAML" in problem
    assert "line 3" in problem


def test_a_key_that_stands_twice_is_refused_with_both_lines(case):
    problem = only(case.config_problems(text="run:\n  seed: 1\n  num_iterations: 2\n  seed: 3\n"))
    assert "duplicate key seed" in problem
    assert "line 4" in problem


@pytest.mark.parametrize("text", ["- run\n", "3\n", "run\n"])
def test_a_recipe_without_sections_is_refused(case, text):
    assert "must hold sections" in only(case.config_problems(text=text))


@pytest.mark.parametrize("override", ["run.seed", "=3", "seed=3", "run..seed=1", ".seed=1"])
def test_the_form_of_an_override_is_told(case, override):
    problem = only(case.config_problems(override))
    assert problem == (
        f"override {override!r}: must read section.key=value, for example run.seed=1"
    )


def test_all_wrong_overrides_are_told_at_once(case):
    problems = case.config_problems("run.seed", "run.num_iterations=3", "run.seed=[1")
    assert len(problems) == 2
    assert problems[1].startswith("override 'run.seed=[1': its value is not valid YAML")


def test_an_override_is_checked_like_the_recipe(case):
    assert only(case.config_problems("run.sed=1")) == "run.sed: unknown key. Did you mean run.seed?"


def test_a_variable_that_is_not_there_is_named(case):
    case.change(run={"output_dir": "${oc.env:NO_SUCH_VARIABLE_HERE}"})
    assert "NO_SUCH_VARIABLE_HERE" in only(case.config_problems())


def test_base_recipes_that_name_each_other_are_refused(case):
    (case.folder / "other.yaml").write_text("base: recipe.yaml\n")
    problem = only(case.config_problems(text="base: other.yaml\n"))
    assert problem.endswith("base recipes name each other in a circle")


def test_a_base_recipe_that_is_missing_is_named(case):
    assert "gone.yaml' cannot be read" in only(case.config_problems(text="base: gone.yaml\n"))


# -- rules across sections -------------------------------------------------------------------------


@pytest.mark.parametrize("section", ["rollout", "evaluation"])
def test_what_is_kept_of_a_truncated_distribution_is_bounded(case, section):
    case.change(**{section: {"top_p": 0.9}})
    assert only(case.config_problems()) == (
        f"{section}.top_p=0.9: needs a top_k, which bounds what is kept of every token that it was "
        f"drawn from. Set {section}.top_k=100, or set {section}.top_p=1"
    )
    case.change(**{section: {"top_p": 0.9, "top_k": 0}})
    assert only(case.config_problems()).startswith(f"{section}.top_k=0: tokens are drawn from none")
    case.change(**{section: {"top_p": 0.9, "top_k": 5}})
    case.read()


def test_greedy_and_supervised_runs_draw_from_no_part(case):
    case.change(evaluation={"top_k": 5, "temperature": 0})
    assert only(case.config_problems()).startswith("evaluation.top_k=5: has no effect at")
    case.change(evaluation={"top_k": -1, "temperature": 1})
    case.change(rollout={"top_k": 5}, algorithm={"preset": "sft"})
    assert only(case.config_problems()) == (
        "rollout.top_k=5: nothing is sampled. Set rollout.top_k=-1 rollout.top_p=1"
    )


def test_a_row_must_hold_the_longest_sequence(case):
    case.change(batching={"max_tokens_per_microbatch": 31})
    problem = only(case.config_problems())
    assert problem.startswith("batching.max_tokens_per_microbatch=31: ")
    assert "rollout.max_response_tokens = 32" in problem
    case.change(batching={"max_tokens_per_microbatch": 32})
    case.read()


def test_float64_cannot_be_clipped(case):
    case.change(model={"dtype": "float64"})
    assert only(case.config_problems()).startswith("optimizer.clip_grad=1.0: ")
    case.change(optimizer={"clip_grad": 0})
    case.read()


def test_routing_is_replayed_where_something_routed_and_a_router_listens(case):
    case.change(rollout={"routing_replay": True})
    with pytest.raises(ConfigErrors, match="has no effect: the model has no experts"):
        case.read()
    case.change(model={"megatron": {"moe_router_fusion": True}})
    assert only(case.config_problems()).startswith("rollout.routing_replay=True: Transformer")
    case.change(algorithm={"preset": "sft"}, model={"megatron": {}})
    assert only(case.config_problems()) == (
        "rollout.routing_replay=True: nothing is sampled. Set rollout.routing_replay=false"
    )


def test_supervised_runs_have_no_engine_to_evaluate_with(case):
    case.change(
        algorithm={"preset": "sft"}, evaluation={"benchmarks": {"aime": {"path": "aime.jsonl"}}}
    )
    problem = only(case.config_problems())
    assert problem.startswith("evaluation.benchmarks=['aime']: ")
    assert "evaluate the exported model" in problem


def test_rules_of_several_sections_are_told_together(case):
    case.change(
        rollout={"top_p": 0.9, "group_size": 1},
        model={"dtype": "float64"},
        parallel={"sequence_parallel": True},
    )
    assert {problem.partition("=")[0] for problem in case.config_problems()} == {
        "rollout.top_p",
        "rollout.group_size",
        "optimizer.clip_grad",
        "parallel.sequence_parallel",
    }


# -- layouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parallel", "rollout_tp", "world_size", "fields"),
    [
        ({"tensor_model_parallel_size": 2}, 1, 3, {"tensor_model_parallel_size * pipeline"}),
        ({"pipeline_model_parallel_size": 2}, 1, 3, {"tensor_model_parallel_size * pipeline"}),
        ({}, 2, 3, {"rollout.tensor_model_parallel_size=2"}),
        ({"world_size": 4}, 1, 2, {"parallel.world_size=4"}),
    ],
)
def test_the_number_of_ranks_must_fit(case, parallel, rollout_tp, world_size, fields):
    case.change(parallel=parallel, rollout={"tensor_model_parallel_size": rollout_tp})
    problems = case.input_problems(world_size)
    assert len(problems) == len(fields)
    assert all(any(field in problem for problem in problems) for field in fields)
    assert str(world_size) in problems[0]


@pytest.mark.parametrize(
    ("tp", "pp", "ep", "expert_tp", "rollout_tp", "smallest"),
    [(2, 2, 1, None, 1, 4), (1, 2, 4, None, 1, 8), (4, 1, 2, 1, 1, 4), (2, 1, 3, 2, 4, 12)],
)
def test_experts_must_fit_the_ranks_of_a_stage(case, tp, pp, ep, expert_tp, rollout_tp, smallest):
    parallel = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": expert_tp,
        "sequence_parallel": tp > 1,
    }
    case.change(parallel=parallel, rollout={"tensor_model_parallel_size": rollout_tp})
    config = load_config(case.write(), [])
    assert config.smallest_world == smallest
    assert not list(world_problems(config, smallest))
    if ep > 1 and ep * (expert_tp or tp) > tp:
        (problem,) = world_problems(config, math.lcm(tp * pp, rollout_tp))
        assert f"must divide the {math.lcm(tp * pp, rollout_tp) // pp} ranks" in str(problem)


def test_tensor_parallelism_must_divide_the_heads(case):
    case.change(parallel={"tensor_model_parallel_size": 4})
    problems = case.input_problems(world_size=4)
    assert problems[0] == (
        "parallel.tensor_model_parallel_size=4: must divide the model's 2 attention heads. "
        "Choose 1 or 2"
    )


def test_the_engine_must_be_able_to_split_the_model_too(case):
    case.change(rollout={"tensor_model_parallel_size": 3})
    problems = case.input_problems(world_size=3)
    assert all(problem.startswith("rollout.tensor_model_parallel_size=3: ") for problem in problems)
    assert "2 attention heads" in problems[0]
    assert any("128 rows of the padded vocabulary" in problem for problem in problems)


def test_pipeline_stages_must_divide_the_layers(case):
    case.change(parallel={"pipeline_model_parallel_size": 3})
    assert only(case.input_problems(3)).startswith(
        "parallel.pipeline_model_parallel_size=3: must divide the model's 2 layers"
    )


# -- pairs and critics -----------------------------------------------------------------------------


def test_a_row_must_hold_both_responses_of_a_pair(case):
    case.change(algorithm={"preset": "iterative_dpo"}, batching={"max_tokens_per_microbatch": 63})
    problem = only(case.config_problems())
    assert problem.startswith("batching.max_tokens_per_microbatch=63: a row must hold the longest")
    assert "both responses of a pair = 64" in problem


def test_a_critic_without_an_algorithm_that_asks_for_one_is_refused(case):
    case.change(critic={"lr": 1e-4})
    problem = only(case.config_problems())
    assert problem == (
        "critic={'lr': 0.0001}: algorithm.preset=grpo has no critic. Set algorithm.preset=ppo or "
        "leave the section out"
    )


def test_the_critics_learning_rate_may_not_end_above_where_it_starts(case):
    case.change(
        algorithm={"preset": "ppo"}, optimizer={"lr": 1e-3, "min_lr": 1e-4}, critic={"lr": 1e-5}
    )
    assert only(case.config_problems()).startswith(
        "optimizer.min_lr=0.0001: must not exceed critic.lr=1e-05"
    )


def test_an_iteration_that_would_never_come_cannot_be_traced(case):
    case.change(run={"num_iterations": 4, "profile": [1, 5, 4]})
    assert only(case.config_problems()) == (
        "run.profile=[1, 5, 4]: iteration 5 would never come, run.num_iterations=4. Set "
        "run.num_iterations=5, or name iterations up to that"
    )


@pytest.mark.parametrize(("number", "rule"), [(0, "than or equal to 1"), (True, "valid integer")])
def test_iterations_to_trace_are_numbers_from_one_on(case, number, rule):
    case.change(run={"profile": [1, number]})
    problem = only(case.config_problems())
    assert problem.startswith(f"run.profile={number}: ")
    assert rule in problem
