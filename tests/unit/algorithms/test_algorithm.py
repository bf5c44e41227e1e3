import math
import random

import pytest
import torch
from rollout_groups import make_group

from megatron_rl.algorithms.algorithm import Algorithm
from megatron_rl.algorithms.config import AlgorithmConfig
from megatron_rl.objectives.clipped_ratio import ClippedRatio
from megatron_rl.objectives.dpo import Dpo
from megatron_rl.objectives.likelihood import Likelihood
from megatron_rl.objectives.loss import PairLoss, TokenLoss
from megatron_rl.ops.loss_spec import Correction, SharedTerms
from megatron_rl.types import UpdateTotals


def select(groups, update_of=None, seed=(0, 0), **settings):
    update_of = update_of or {group.prompt.group_id: 0 for group in groups}
    return Algorithm(AlgorithmConfig(**settings)).select(groups, update_of=update_of, seed=seed)


def names(selection):
    return [(sample.group_id, sample.index) for sample in selection.samples]


MIXED = make_group(10, [1.0, -1.0, -1.0], lengths=[4, 5, 6])
ALL_CORRECT = make_group(11, [1.0, 1.0], lengths=[2, 3])
ALL_WRONG = make_group(12, [-1.0, -1.0], lengths=[7, 8])
GROUPS = [MIXED, ALL_CORRECT, ALL_WRONG]


def test_a_sample_carries_what_its_rollout_had():
    sample = select(GROUPS, preset="raft_pp", update_of={10: 3, 11: 0, 12: 1}).samples[0]
    assert (sample.group_id, sample.index, sample.update, sample.advantage) == (10, 0, 3, 1.0)
    assert sample.prompt_tokens.tolist() == [7, 10]
    assert sample.response_tokens is MIXED.rollouts[0].response_tokens
    assert sample.rollout_logprobs is MIXED.rollouts[0].rollout_logprobs
    assert sample.old_logprobs is None
    assert sample.ref_logprobs is None


def test_totals_are_counted_per_update():
    selection = select(GROUPS, preset="raft_pp", update_of={10: 1, 11: 0, 12: 0, 99: 2})
    assert names(selection) == [(10, 0), (11, 0), (11, 1)]
    nothing = dict.fromkeys(
        ("kept_sequences", "kept_tokens", "collected_sequences", "collected_tokens"), 0
    )
    assert selection.totals == {
        0: UpdateTotals(
            kept_sequences=2, kept_tokens=5, collected_sequences=4, collected_tokens=20
        ),
        1: UpdateTotals(
            kept_sequences=1, kept_tokens=4, collected_sequences=3, collected_tokens=15
        ),
        2: UpdateTotals(**nothing),  # whose groups are on other ranks
    }
    assert (selection.kept_sequences, selection.kept_tokens) == (3, 9)
    assert (selection.collected_sequences, selection.collected_tokens) == (7, 35)


def test_outcomes_are_counted():
    outcomes = select(GROUPS, preset="grpo").outcomes
    assert (outcomes.all_correct_groups, outcomes.all_wrong_groups, outcomes.mixed_groups) == (
        1,
        1,
        1,
    )
    assert outcomes.unusable_groups == outcomes.unusable_rollouts == 0


def test_zero_advantage_costs_nothing_but_counts_as_kept():
    selection = select(GROUPS, preset="grpo")
    assert names(selection) == [(10, 0), (10, 1), (10, 2)]
    assert selection.outcomes.zero_advantage_sequences == 4
    assert selection.kept_sequences == selection.collected_sequences == 7


@pytest.mark.parametrize("term", [{"kl_coef": 0.1}, {"entropy_coef": 0.1}])
def test_zero_advantage_stays_under_a_term_that_acts_on_it(term):
    selection = select(GROUPS, preset="grpo", **term)
    assert len(selection.samples) == 7
    assert selection.outcomes.zero_advantage_sequences == 0


def test_zero_advantage_stays_when_told_so_and_before_whitening():
    assert len(select(GROUPS, preset="grpo", drop_zero_advantage=False).samples) == 7
    assert len(select(GROUPS, preset="reinforce_pp_baseline").samples) == 7


def test_train_on_everything_keeps_rejected_responses_at_no_weight():
    algorithm = Algorithm(AlgorithmConfig(preset="raft_pp", train_on_everything=True))
    selection = algorithm.select(GROUPS, update_of={10: 0, 11: 0, 12: 0}, seed=(0,))
    assert len(selection.samples) == 7
    totals = selection.totals[0]
    assert (totals.kept_sequences, totals.kept_tokens) == (3, 9)
    weights = [algorithm.token_weight(sample, totals, 100) for sample in selection.samples]
    assert weights == pytest.approx([1 / 12, 0.0, 0.0, 1 / 6, 1 / 9, 0.0, 0.0])
    assert [sample.advantage for sample in selection.samples] == [1, 0, 0, 1, 1, 0, 0]


def test_responses_that_cannot_be_judged_are_left_out_and_counted():
    broken = make_group(5, [1.0, None, math.nan, -1.0, math.inf, 1.0], lengths=[2, 2, 2, 3, 2, 0])
    lost = make_group(6, [None, math.nan])
    selection = select([broken, lost], preset="reinforce_mean_zero")
    assert names(selection) == [(5, 0), (5, 3)]  # positions in the group as sampled
    assert [sample.advantage for sample in selection.samples] == [1.0, -1.0]  # mean of the two
    assert selection.outcomes.unusable_rollouts == 6
    assert selection.outcomes.unusable_groups == 1
    assert selection.outcomes.mixed_groups == 1
    assert (selection.collected_sequences, selection.collected_tokens) == (2, 5)


def test_gold_responses_need_no_reward():
    groups = [
        make_group(1, [None], finish_reason="gold"),
        make_group(2, [1.0], finish_reason="gold"),
        make_group(3, [1.0]),
    ]
    selection = select(groups, preset="sft")
    assert names(selection) == [(1, 0), (2, 0)]
    assert [sample.advantage for sample in selection.samples] == [1.0, 1.0]


def test_a_group_of_one():
    groups = [make_group(1, [1.0]), make_group(2, [-1.0])]
    assert names(select(groups, preset="raft_pp")) == [(1, 0)]
    assert [s.advantage for s in select(groups, preset="reinforce").samples] == [1.0, -1.0]
    grpo = [s.advantage for s in select(groups, preset="grpo").samples]
    assert grpo == pytest.approx([1.0, -1.0], rel=1e-5)  # mean 0, std 1 + 1e-6
    assert select(groups, preset="reinforce_rej").samples == []


def test_no_groups():
    selection = select([], preset="grpo", update_of={1: 0})
    assert selection.samples == []
    assert selection.totals[0].collected_sequences == 0


def test_a_choice_depends_on_the_seed_and_the_group_alone():
    groups = [make_group(group_id, [1.0] * 8) for group_id in range(40)]
    whole = names(select(groups, preset="raft_pp", selection="best_of_n", seed=(1, 7)))
    apart = names(select(groups[20:], preset="raft_pp", selection="best_of_n", seed=(1, 7)))
    assert whole[20:] == apart
    assert len({index for _, index in whole}) > 3  # not the same choice in every group
    assert whole != names(select(groups, preset="raft_pp", selection="best_of_n", seed=(1, 8)))


def test_both_of_a_pair_are_drawn_one_after_the_other():
    """By one generator, so that which right one is chosen does not say which wrong one is."""
    groups = [make_group(group_id, [1.0] * 4 + [-1.0] * 4) for group_id in range(20)]
    expected = []
    for group_id in range(20):
        draw = random.Random(repr((1, 7, group_id)))
        expected += [(group_id, draw.choice(range(4))), (group_id, draw.choice(range(4, 8)))]
    assert names(select(groups, preset="iterative_dpo", seed=(1, 7))) == expected


def test_only_batch_norm_changes_advantages_later():
    def never(local):
        raise AssertionError("no collective is due")

    selection = select(GROUPS, preset="grpo")
    algorithm = Algorithm(AlgorithmConfig(preset="grpo"))
    samples = algorithm.assign_advantages(selection.samples, sum_over_ranks=never)
    assert samples == selection.samples

    algorithm = Algorithm(AlgorithmConfig(preset="reinforce_pp_baseline", std_eps=0))
    samples = select(GROUPS, preset="reinforce_pp_baseline").samples
    whitened = algorithm.assign_advantages(samples, sum_over_ranks=lambda local: local)
    per_token = torch.cat(
        [torch.full(sample.response_tokens.shape, sample.advantage) for sample in whitened]
    ).double()
    assert per_token.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert per_token.std().item() == pytest.approx(1.0, rel=1e-6)
    assert [s.index for s in whitened] == [s.index for s in samples]


def test_a_teacher_needs_no_reward():
    """Responses whose verification failed are taught like all others, from advantage 0."""
    groups = [make_group(0, [1.0, None, -1.0])]
    assert names(select(groups, preset="grpo")) == [(0, 0), (0, 2)]
    selection = select(groups, preset="distillation")
    assert names(selection) == [(0, 0), (0, 1), (0, 2)]
    assert all(sample.has_gradient for sample in selection.samples)
    algorithm = Algorithm(AlgorithmConfig(preset="distillation"))
    finished = algorithm.assign_advantages(selection.samples, sum_over_ranks=lambda local: local)
    assert [sample.advantage for sample in finished] == [0.0, 0.0, 0.0]
    assert algorithm.needs_old_logprobs
    assert algorithm.needs_ref_logprobs


def test_a_teacher_beside_rewards_keeps_responses_of_advantage_0():
    groups = [make_group(0, [1.0, 1.0])]
    assert names(select(groups, preset="grpo")) == []
    assert names(select(groups, preset="grpo", distillation_coef=0.1)) == [(0, 0), (0, 1)]
    assert not Algorithm(AlgorithmConfig(preset="grpo")).needs_ref_logprobs
    assert Algorithm(AlgorithmConfig(preset="grpo", distillation_coef=0.1)).needs_ref_logprobs


def test_needs_and_loss_follow_the_config():
    raft = Algorithm(AlgorithmConfig(preset="raft"))
    assert not raft.needs_old_logprobs
    assert not raft.needs_ref_logprobs
    assert raft.loss() == TokenLoss(Likelihood(), SharedTerms())
    assert Algorithm(AlgorithmConfig(preset="raft", rollout_correction={})).needs_old_logprobs

    config = AlgorithmConfig(
        preset="grpo",
        objective={"eps_low": 0.1, "eps_high": 0.3, "dual_clip": 3.0},
        kl_coef=0.01,
        kl_estimator="k2",
        entropy_coef=0.02,
        rollout_correction={"level": "sequence", "mode": "mask", "low": 0.5, "high": 3},
    )
    algorithm = Algorithm(config)
    assert algorithm.needs_old_logprobs
    assert algorithm.needs_ref_logprobs
    assert algorithm.loss() == TokenLoss(
        ClippedRatio(eps_low=0.1, eps_high=0.3, dual_clip=3.0),
        SharedTerms(
            kl_coef=0.01,
            kl_estimator="k2",
            entropy_coef=0.02,
            correction=Correction("sequence", "mask", 0.5, 3.0),
        ),
    )
    assert ClippedRatio(eps_low=0.1, eps_high=0.3, dual_clip=3.0).native == (
        "clipped_ratio", 0.1, 0.3, 3.0,
    )  # fmt: skip
    dpo = AlgorithmConfig(preset="iterative_dpo", objective={"beta": 0.4})
    assert Algorithm(dpo).loss() == PairLoss(Dpo(beta=0.4))
