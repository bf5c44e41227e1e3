"""Rounds of responses in a recipe: what a preset brings, and what memory and plan make of them."""

import pytest
import yaml
from bad_input import only

from megatron_rl.config import load_config
from megatron_rl.memory import wanted_kv_mib
from megatron_rl.plan import _responses
from megatron_rl.rollout.config import RoundsConfig
from megatron_rl.rollout.group_rules import most_kept, most_prompts, most_responses

DAPO = RoundsConfig(fill=True)
ADA = RoundsConfig(max_responses=32, until_positive=2, until_negative=2)


def config_of(case, *overrides, preset="grpo", **rollout):
    case.settings["algorithm"] = {"preset": preset}
    case.settings["rollout"] |= rollout
    return load_config(case.write(), overrides)


@pytest.mark.parametrize(
    ("preset", "overrides", "expected"),
    [
        ("grpo", [], None),
        ("dapo", [], DAPO),
        ("reinforce_ada", [], ADA),
        ("grpo", ["algorithm.preset=dapo"], DAPO),
        ("dapo", ["algorithm.preset=grpo"], None),
        ("dapo", ["rollout.rounds=null"], None),
        ("dapo", ["rollout.rounds.max_prompts=40"], RoundsConfig(fill=True, max_prompts=40)),
        (
            "dapo",
            ["rollout.rounds.fill=false", "rollout.rounds.max_responses=16"],
            RoundsConfig(max_responses=16),
        ),
        (
            "reinforce_ada",
            ["rollout.rounds.until_positive=4", "rollout.rounds.fill=true"],
            ADA.model_copy(update={"until_positive": 4, "fill": True}),
        ),
        ("grpo", ["rollout.rounds.max_responses=8"], RoundsConfig(max_responses=8)),
    ],
)
def test_a_preset_brings_its_rounds_and_a_recipe_changes_them(case, preset, overrides, expected):
    assert config_of(case, *overrides, preset=preset).rollout.rounds == expected


@pytest.mark.parametrize("overrides", [[], ["rollout.rounds=null"]])
def test_a_written_config_is_read_again(case, overrides):
    config = config_of(case, *overrides, preset="reinforce_ada")
    text = yaml.safe_dump(config.model_dump(mode="json"))
    assert load_config(case.write(text), []) == config


def test_gold_responses_have_no_rounds(case):
    case.change(algorithm={"preset": "sft"}, rollout={"rounds": {"fill": True}})
    problem = only(case.config_problems())
    assert problem.startswith("rollout.rounds={'fill': True}: has no place under algorithm.preset")
    assert problem.endswith("where nothing is sampled. Set rollout.rounds=null")
    assert load_config(case.write(), ["rollout.rounds=null"]).is_supervised


def test_rounds_may_be_what_makes_a_group(case):
    config = config_of(case, group_size=1, rounds={"max_responses": 4})
    assert most_responses(config.rollout) == 4


@pytest.mark.parametrize(
    ("overrides", "responses", "kept", "prompts"),
    [
        ([], 4, 4, 2),
        (["algorithm.max_per_group=3"], 4, 3, 2),
        (["rollout.rounds.max_responses=12"], 12, 12, 2),
        (["algorithm.preset=reinforce_ada"], 32, 4, 2),
        (["algorithm.preset=reinforce_ada", "algorithm.balanced_size=6"], 32, 6, 2),
        (["algorithm.preset=reinforce_ada", "algorithm.train_on_everything=true"], 32, 32, 2),
        (["algorithm.preset=dapo"], 4, 4, 20),
        (["rollout.rounds.fill=true", "rollout.rounds.max_prompts=7"], 4, 4, 7),
    ],
)
def test_the_most_that_there_can_be(case, overrides, responses, kept, prompts):
    config = config_of(case, *overrides)
    assert most_responses(config.rollout) == responses
    assert most_kept(config.rollout, config.algorithm) == kept
    assert most_prompts(config.rollout.rounds, 2) == prompts


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], "2 prompts x 4 = 8"),
        (
            ["rollout.rounds.max_responses=12"],
            "2 prompts x 4 to 12 = 8 to 24; in rounds of up to 8, of which up to 24 are trained",
        ),
        (
            ["algorithm.preset=reinforce_ada", "rollout.rounds.fill=true"],
            "2 to 20 prompts x 4 to 32 = 8 to 640; in rounds of up to 8, of which up to 8 are "
            "trained",
        ),
    ],
)
def test_a_plan_says_how_many_responses_there_may_be(case, overrides, told):
    assert _responses(config_of(case, *overrides)) == told


def test_an_engines_cache_is_for_one_round(case):
    inputs = case.read()
    layout = load_config(case.write(), []).parallel.layout(1)
    sizes = {
        wanted_kv_mib(config_of(case, *overrides), inputs.arch, layout)
        for overrides in ([], ["algorithm.preset=reinforce_ada", "rollout.rounds.fill=true"])
    }
    assert len(sizes) == 1
