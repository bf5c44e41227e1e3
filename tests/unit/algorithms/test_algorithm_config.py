import subprocess
import sys

import pytest

from megatron_rl.algorithms.config import AlgorithmConfig
from megatron_rl.algorithms.presets import PRESETS
from megatron_rl.algorithms.rules import algorithm_problems
from megatron_rl.errors import ConfigErrors
from megatron_rl.objectives.clipped_ratio import ClippedRatio
from megatron_rl.objectives.dpo import Dpo
from megatron_rl.objectives.likelihood import Likelihood
from megatron_rl.objectives.registry import OBJECTIVES


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_valid_configuration_by_itself(preset):
    config = AlgorithmConfig(preset=preset)
    assert config.resolved == PRESETS[preset]
    assert AlgorithmConfig(**config.model_dump()) == config  # as a resumed run reads it back


def test_the_table_is_the_documented_one():
    table = {
        name: (*row.selection, row.advantage, row.objective, row.loss_aggregation)
        for name, row in PRESETS.items()
    }
    clipped = ("clipped_ratio", "sequence_mean")
    assert table == {
        "sft": ("gold", "one", "likelihood", "sequence_mean"),
        "raft": ("positive", "one", "likelihood", "sequence_mean"),
        "raft_pp": ("positive", "one", *clipped),
        "reinforce": ("all", "reward", *clipped),
        "reinforce_remove_all_wrong": ("drop_all_wrong", "reward", *clipped),
        "reinforce_remove_all_correct": ("drop_all_correct", "reward", *clipped),
        "reinforce_rej": ("drop_uniform", "reward", *clipped),
        "reinforce_rej_norm": ("drop_uniform", "reward_over_std", *clipped),
        "reinforce_mean_zero": ("all", "reward_minus_mean", *clipped),
        "grpo": ("all", "group_norm", *clipped),
        "rloo": ("all", "leave_one_out", *clipped),
        "reinforce_pp_baseline": ("all", "batch_norm", *clipped),
        "dr_grpo": ("all", "reward_minus_mean", "clipped_ratio", "sequence_sum"),
        "dapo": ("drop_uniform", "group_norm", "clipped_ratio", "token_mean"),
        "reinforce_ada": (
            "balanced",
            "reward_minus_mean_over_p",
            "clipped_ratio",
            "token_mean",
        ),
        "cispo": ("all", "group_norm", "cispo", "token_mean"),
        "gspo": ("all", "group_norm", "gspo", "sequence_mean"),
        "sapo": ("all", "group_norm", "sapo", "sequence_mean"),
        "ppo": ("all", "gae", *clipped),
        "distillation": ("all", "distillation", "clipped_ratio", "token_mean"),
        "iterative_dpo": ("best_and_worst", "preference", "dpo", "pair_mean"),
    }


def test_presets_that_compare_within_a_group_say_so():
    needing = {name for name, row in PRESETS.items() if row.needs_group}
    assert needing == {
        "reinforce_rej",
        "reinforce_rej_norm",
        "reinforce_mean_zero",
        "grpo",
        "rloo",
        "reinforce_pp_baseline",
        "dr_grpo",
        "dapo",
        "reinforce_ada",
        "cispo",
        "gspo",
        "sapo",
        "iterative_dpo",
    }
    assert AlgorithmConfig(preset="raft_pp", advantage="group_norm").resolved.needs_group


def test_overrides_replace_their_part_of_the_row():
    config = AlgorithmConfig(
        preset="grpo", selection=["drop_truncated", "drop_all_wrong"], loss_aggregation="token_mean"
    )
    assert config.resolved.selection == ("drop_truncated", "drop_all_wrong")
    assert config.resolved.loss_aggregation == "token_mean"
    assert config.resolved.advantage == "group_norm"
    assert AlgorithmConfig(preset="grpo", selection="positive").resolved.selection == ("positive",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"preset": "grop"},
            r"preset='grop': is not known. Did you mean 'grpo'\? Known: sft, raft",
        ),
        ({"preset": "zzzzzz"}, "preset='zzzzzz': is not known. Known: sft, raft"),
        ({"selection": ["all", "postive"]}, r"'postive': is not known. Did you mean 'positive'\?"),
        ({"selection": []}, "is empty"),
        ({"advantage": "gruop_norm"}, r"Did you mean 'group_norm'\?"),
        ({"objective": "clip"}, "objective='clip': is not known"),
        ({"loss_aggregation": "token-mean"}, r"Did you mean 'token_mean'\?"),
        ({"epslow": 0.1}, "epslow"),
        ({"objective": {"kind": "clip", "eps_low": 0.1}}, "objective='clip': is not known"),
        ({"objective": {"eps_low": 1.5}}, "objective.clipped_ratio.eps_low"),
        ({"objective": {"dual_clip": 1.0}}, "objective.clipped_ratio.dual_clip"),
        ({"objective": {"beta": 1.0}}, "objective.clipped_ratio.beta"),
        ({"objective": [1]}, "objective"),
        ({"eps_low": 1.5}, "objective.clipped_ratio.eps_low"),
        ({"kl_estimator": "k2"}, "no effect under algorithm.kl_coef=0"),
        ({"preset": "raft", "eps_high": 0.3}, "no effect under an objective other than clipped"),
        ({"preset": "raft", "dual_clip": 3.0}, "no effect under an objective other than clipped"),
        ({"gae_lambda": 0.9}, "no effect under an advantage other than gae"),
        ({"preset": "ppo", "kl_reward_target": 6.0}, "so without anything to adapt"),
        ({"dpo_beta": 0.5}, "no effect under an objective other than dpo"),
        ({"preset": "iterative_dpo", "kl_coef": 0.1}, "whose loss is not about tokens"),
        (
            {"preset": "iterative_dpo", "normalize_over": "collected"},
            "whose loss is not about tokens",
        ),
        ({"objective": "dpo"}, "only work together. Set algorithm.preset=iterative_dpo"),
        ({"preset": "iterative_dpo", "advantage": "reward"}, "only work together"),
        ({"preset": "iterative_dpo", "max_per_group": 1}, "take a pair apart"),
        (
            {"preset": "iterative_dpo", "selection": ["best_and_worst", "drop_truncated"]},
            "best_and_worst must come last",
        ),
        ({"preset": "ppo", "objective": "likelihood"}, "need an objective with a ratio"),
        ({"preset": "ppo", "train_on_everything": True}, "whitening"),
        ({"selection": "drop_overlong"}, "drop_overlong needs a limit"),
        ({"overlong_tokens": 10}, "no effect under a selection without drop_overlong"),
        ({"preset": "sft", "advantage": "reward"}, "gold responses have neither"),
        ({"preset": "sft", "rollout_correction": {}}, "gold responses have neither"),
        ({"advantage": "reward_over_std"}, "std 0"),
        ({"train_on_everything": True, "kl_coef": 0.1}, "nothing is compared"),
        ({"train_on_everything": True, "advantage": "batch_norm"}, "whitening"),
        ({"train_on_everything": True, "distillation_coef": 0.5}, "nothing is compared"),
        ({"preset": "distillation", "train_on_everything": True}, "nothing is compared"),
        ({"preset": "distillation", "distillation_coef": 0.0}, "all advantages would be 0"),
        (
            {"preset": "distillation", "objective": "likelihood"},
            "advantage='distillation': advantages per token need an objective with a ratio",
        ),
        (
            {"preset": "gspo", "distillation_coef": 0.5},
            "distillation_coef='0.5': gives every token an advantage, and gspo a response one",
        ),
        ({"preset": "ppo", "objective": "gspo"}, "advantage='gae': gives every token"),
        (
            {"preset": "iterative_dpo", "distillation_coef": 0.5},
            "whose loss is not about tokens",
        ),
        ({"preset": "sft", "distillation_coef": 0.5}, "were not sampled"),
    ],
)
def test_what_cannot_work_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        raise_problems(AlgorithmConfig(**{"preset": "grpo", **settings}))


def test_all_problems_are_told_at_once():
    config = AlgorithmConfig(preset="raft", overlong_tokens=10, kl_estimator="k1")
    with pytest.raises(ConfigErrors, match="2 problems") as error:
        raise_problems(config)
    assert "algorithm.overlong_tokens=10" in str(error.value)
    assert "algorithm.kl_estimator='k1'" in str(error.value)


def raise_problems(config):
    if found := [str(problem) for problem in algorithm_problems(config)]:
        raise ConfigErrors(found)


def test_every_preset_names_a_known_objective_and_contradicts_nothing():
    for name, row in PRESETS.items():
        config = AlgorithmConfig(preset=name)
        assert type(config.objective) is OBJECTIVES[row.objective]
        raise_problems(config)


def test_what_an_objective_needs_is_its_own_word():
    assert list(OBJECTIVES) == ["likelihood", "clipped_ratio", "cispo", "gspo", "sapo", "dpo"]
    assert all(OBJECTIVES[name]().kind == name for name in OBJECTIVES)
    assert [o.has_ratio for o in OBJECTIVES.values()] == [False, True, True, True, True, False]
    assert [o.trains_pairs for o in OBJECTIVES.values()] == [False] * 5 + [True]
    needs = {
        name: (objective.needs_old_logprobs, objective.needs_ref_logprobs)
        for name, objective in {
            "likelihood": Likelihood(),
            "clipped_ratio": ClippedRatio(),
            "dpo": Dpo(),
            "dpo of the iteration": Dpo(reference="previous_iteration"),
        }.items()
    }
    assert needs == {
        "likelihood": (False, False),
        "clipped_ratio": (True, False),
        "dpo": (False, True),
        "dpo of the iteration": (True, False),
    }


def test_dapo_has_its_papers_upper_bound():
    assert AlgorithmConfig(preset="dapo").objective == ClippedRatio(eps_low=0.2, eps_high=0.28)
    lower = AlgorithmConfig(preset="dapo", objective={"eps_low": 0.1})
    assert lower.objective == ClippedRatio(eps_low=0.1, eps_high=0.28)
    assert AlgorithmConfig(preset="dapo", objective={"eps_high": 0.3}).objective.eps_high == 0.3
    other = AlgorithmConfig(preset="dapo", objective={"kind": "cispo"})
    assert other.objective == OBJECTIVES["cispo"]()
    assert AlgorithmConfig(preset="grpo").objective == ClippedRatio()


def test_one_ratio_of_a_response_takes_no_advantages_of_tokens():
    config = AlgorithmConfig(preset="ppo", objective="gspo")
    with pytest.raises(ConfigErrors, match=r"gae.*every token an advantage, and gspo a response"):
        raise_problems(config)


def test_reading_a_config_does_not_import_torch():
    code = "import sys; import megatron_rl.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
