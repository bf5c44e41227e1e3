"""Samples to rows, by hand: what is shifted, padded and rounded."""

from dataclasses import replace

import pytest
import torch

from megatron_rl.batching.pack import pack
from megatron_rl.types import Sample

CPU = torch.device("cpu")


def sample(prompt, response, advantage=1.0, rollout=None, **fields):
    return Sample(
        **fields,
        group_id=0,
        index=0,
        update=0,
        prompt_tokens=torch.tensor(prompt),
        response_tokens=torch.tensor(response),
        advantage=advantage,
        rollout_logprobs=None if rollout is None else torch.tensor(rollout),
    )


def packed(samples, *, multiple=1, dtype=torch.float32, share_prompts=False):
    return pack(
        samples,
        weight_of=lambda sample: 1 / (10 * len(sample.response_tokens)),
        multiple=multiple,
        dtype=dtype,
        device=CPU,
        share_prompts=share_prompts,
    )


def test_each_response_token_is_predicted_at_the_entry_before_it():
    row = packed(
        [
            sample([5, 9], [7, 2], 0.3, [-0.1, -1.2]),
            sample([4], [8, 6, 3], -1.0, [-1.0, -2.0, -3.0]),
        ],
        multiple=8,
    )
    assert row.tokens.tolist() == [5, 9, 7, 4, 8, 6, 0, 0]
    assert row.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert row.cu_seqlens.tolist() == [0, 3, 6, 8]
    assert row.loss.at.tolist() == [1, 2, 3, 4, 5]
    assert row.loss.targets.tolist() == [7, 2, 8, 6, 3]
    assert torch.equal(row.loss.weights, torch.tensor([0.05, 0.05, *[1 / 30] * 3]))
    assert torch.equal(row.loss.advantages, torch.tensor([0.3, 0.3, -1.0, -1.0, -1.0]))
    assert torch.equal(row.loss.rollout_logprobs, torch.tensor([-0.1, -1.2, -1.0, -2.0, -3.0]))
    assert row.loss.old_logprobs is None
    assert row.loss.ref_logprobs is None


def test_a_prompt_stands_once_before_its_responses():
    """Two responses of group 0, and one of group 1 that is alone."""
    samples = [
        sample([5, 9], [7, 2, 1], 0.3),
        sample([5, 9], [8, 2], -0.2, has_gradient=False),
        replace(sample([4], [6, 3, 1]), group_id=1),
    ]
    row = packed(samples, multiple=10, share_prompts=True)
    assert row.tokens.tolist() == [5, 9, 7, 2, 8, 4, 6, 3, 0, 0]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 2, 0, 1, 2, 0, 1]
    assert row.lengths == (2, 2, 1, 3, 2)
    assert row.cu_seqlens.tolist() == [0, 2, 4, 5, 8, 10]
    assert row.trained_lengths.tolist() == [2, 2, 0, 3, 0]
    assert row.loss.at.tolist() == [1, 2, 3, 1, 4, 5, 6, 7]
    assert row.loss.targets.tolist() == [7, 2, 1, 8, 2, 6, 3, 1]
    assert row.shared.prompts == (None, 0, 0, None, None)
    assert row.shared.keys.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 8, 9]
    assert row.shared.key_bounds.tolist() == [0, 2, 6, 9, 12, 14]
    assert row.shared.key_lengths == (2, 4, 3, 3, 2)
    assert packed(samples[1:], share_prompts=True).shared is None
    assert packed(samples).tokens.tolist() == [5, 9, 7, 2, 5, 9, 8, 4, 6, 3]


def test_a_prompt_alone_predicts_responses_of_one_token():
    samples = [sample([5, 9], [7]), sample([5, 9], [8, 2]), sample([5, 9], [3])]
    row = packed(samples, share_prompts=True)
    assert row.tokens.tolist() == [5, 9, 8]
    assert row.lengths == (2, 1)
    assert row.loss.at.tolist() == [1, 1, 2, 1]
    assert row.loss.targets.tolist() == [7, 8, 2, 3]
    assert row.response_lengths.tolist() == [1, 2, 1]
    assert row.shared.prompts == (None, 0)
    row = packed([samples[0], samples[2]], share_prompts=True)
    assert row.tokens.tolist() == [5, 9]
    assert row.loss.at.tolist() == [1, 1]
    assert row.loss.targets.tolist() == [7, 3]
    assert row.shared is None


def test_numbers_are_rounded_once_to_the_dtype_of_the_run():
    row = packed([sample([1], [2, 3, 4], 1 / 3)], dtype=torch.float64)
    assert row.loss.weights.tolist() == [1 / 30] * 3
    assert row.loss.advantages.tolist() == [1 / 3] * 3


def test_padding_is_one_more_sequence_without_loss():
    row = packed([sample([5], [7, 2])], multiple=5)
    assert row.tokens.tolist() == [5, 7, 0, 0, 0]
    assert row.position_ids.tolist() == [0, 1, 0, 1, 2]
    assert row.cu_seqlens.tolist() == [0, 2, 5]
    assert row.max_seqlen == 3
    assert row.loss.at.tolist() == [0, 1]


def test_a_row_without_samples_is_padding_alone():
    row = packed([], multiple=4)
    assert row.tokens.tolist() == [0] * 4
    assert row.cu_seqlens.tolist() == [0, 4]
    assert row.loss.at.shape == row.loss.weights.shape == row.loss.rollout_logprobs.shape == (0,)
    assert row.loss.at.dtype == row.loss.targets.dtype == torch.int64


def test_one_sample_without_rollout_logprobs_leaves_the_row_without():
    row = packed([sample([5], [7], rollout=[-1.0]), sample([5], [7])])
    assert row.loss.rollout_logprobs is None


def test_constants_that_come_later_get_the_dtype_of_the_weights():
    row = packed([sample([5], [7, 2])])
    later = row.with_loss(old_logprobs=torch.tensor([-1.0, -2.0], dtype=torch.float64))
    assert torch.equal(later.loss.old_logprobs, torch.tensor([-1.0, -2.0]))
    assert later.with_loss(old_logprobs=None).loss.old_logprobs is None
    assert row.loss.old_logprobs is None


def test_slices_of_tokens_cut_everything_that_is_there():
    tokens = packed([sample([5], [7, 2, 3], rollout=[-1.0, -2.0, -3.0])]).loss[1:3]
    assert tokens.at.tolist() == [1, 2]
    assert tokens.targets.tolist() == [2, 3]
    assert tokens.rollout_logprobs.tolist() == [-2.0, -3.0]
    assert tokens.ref_logprobs is None


def part_of(samples, cp_rank, *, cp=2, multiple=4):
    return pack(
        samples,
        weight_of=lambda _: 1.0,
        multiple=multiple,
        dtype=torch.float32,
        device=CPU,
        cp=cp,
        cp_rank=cp_rank,
    )


def test_ranks_that_share_a_sequence_have_an_early_and_a_late_chunk_of_it():
    """Five tokens are filled up to eight, and two to four: chunks of two tokens, and of one."""
    samples = [sample([1, 2], [3, 4, 5, 8]), sample([6], [7, 9])]
    first, second = (part_of(samples, rank) for rank in (0, 1))
    assert first.lengths == second.lengths == (8, 4)
    assert first.tokens.tolist() == [1, 2, 0, 0, 6, 0]
    assert second.tokens.tolist() == [3, 4, 5, 0, 7, 0]
    assert first.position_ids.tolist() == [0, 1, 6, 7, 0, 3]
    assert second.position_ids.tolist() == [2, 3, 4, 5, 1, 2]


def test_a_token_is_predicted_on_the_rank_that_has_the_one_before():
    """Over the seam, too: 2 is on rank 0 and predicts 3, which is on rank 1."""
    samples = [sample([1, 2], [3, 4, 5, 8]), sample([6], [7, 9])]
    first, second = (part_of(samples, rank) for rank in (0, 1))
    assert first.loss.targets.tolist() == second.loss.targets.tolist() == [3, 4, 5, 8, 7, 9]
    assert first.own_loss.targets.tolist() == [3, 7]
    assert first.own_loss.at.tolist() == [1, 4]
    assert second.own_loss.targets.tolist() == [4, 5, 8, 9]
    assert second.own_loss.at.tolist() == [0, 1, 2, 4]
    assert part_of(samples, 0, cp=1).own_loss.targets.tolist() == [3, 4, 5, 8, 7, 9]


def test_every_token_of_any_row_is_on_one_rank_and_all_have_the_same_work():
    generator = torch.Generator().manual_seed(3)
    for cp in (2, 3, 4):
        sizes = torch.randint(1, 40, (5, 2), generator=generator).tolist()
        samples = [sample(list(range(1, p + 1)), [9] * r) for p, r in sizes]
        parts = [part_of(samples, rank, cp=cp, multiple=2 * cp) for rank in range(cp)]
        assert len({len(part.tokens) for part in parts}) == 1
        predicted = torch.cat([part.part.loss for part in parts]).sort().values
        assert predicted.tolist() == list(range(len(parts[0].loss.at)))
        seen = {int((part.position_ids + 1).sum()) for part in parts}  # by a causal attention
        assert len(seen) == 1
        for part in parts:
            own = part.own_loss
            assert torch.equal(part.position_ids[own.at] + 1, positions_of_targets(part))


def positions_of_targets(part):
    """Of the row's targets that the part predicts, counted along each sequence."""
    starts = part.cu_seqlens[:-1].repeat_interleave(torch.tensor(part.lengths))
    return (part.loss.at - starts[part.loss.at] + 1)[part.part.loss]


def test_tokens_of_what_is_trained_are_told_without_filling():
    rows = [sample([5, 9], [7, 2, 3]), sample([4], [8, 6], has_gradient=False)]
    assert packed(rows, multiple=8).trained_lengths.tolist() == [4, 0, 0]
    assert packed(rows).trained_lengths.tolist() == [4, 0]


EXPERTS = [[[1, 0]], [[2, 3]], [[0, 255]]]  # of one layer, for every token but the last
NONE = [[-1, -1]]


def test_experts_stand_at_the_tokens_that_the_engine_saw():
    routed = sample([5, 9], [7, 2], experts=torch.tensor(EXPERTS, dtype=torch.uint8))
    row = packed([sample([3], [4]), routed], multiple=8)
    assert row.experts.dtype == torch.int16
    assert row.experts.tolist() == [NONE, *EXPERTS, NONE, NONE, NONE, NONE]
    assert row.without_experts.experts is None
    assert packed([sample([3], [4])]).experts is None


def test_a_part_of_a_row_has_the_experts_of_its_own_tokens():
    routed = sample([5, 9], [7, 2], experts=torch.tensor(EXPERTS, dtype=torch.uint8))
    parts = [
        pack(
            [routed],
            weight_of=lambda _: 1.0,
            multiple=4,
            dtype=torch.float32,
            device=CPU,
            cp=2,
            cp_rank=rank,
        )
        for rank in range(2)
    ]
    assert [part.experts.tolist() for part in parts] == [[EXPERTS[0], NONE], EXPERTS[1:]]


def test_what_tokens_were_drawn_from_stands_with_them_as_wide_as_the_widest():
    wide = torch.tensor([[7, 1, 3], [2, -1, -1]], dtype=torch.int32)
    row = packed(
        [
            sample([5, 9], [7, 2], support=wide),
            sample([3], [4], support=torch.tensor([[4]], dtype=torch.int32)),
        ]
    )
    assert row.loss.targets.tolist() == [7, 2, 4]
    assert row.loss.support.tolist() == [[7, 1, 3], [2, -1, -1], [4, -1, -1]]
    assert row.loss[1:].support.tolist() == [[2, -1, -1], [4, -1, -1]]
    assert packed([sample([3], [4])]).loss.support is None
    with pytest.raises(ValueError, match="drawn from a part of the vocabulary, some not"):
        packed([sample([3], [4]), sample([5, 9], [7, 2], support=wide)])


def test_a_part_of_a_row_has_the_supports_of_its_own_tokens():
    support = torch.tensor([[7, 1], [2, -1]], dtype=torch.int32)
    parts = [part_of([sample([5, 9], [7, 2], support=support)], cp_rank) for cp_rank in (0, 1)]
    found = {
        int(target): ids
        for part in parts
        for target, ids in zip(part.own_loss.targets, part.own_loss.support.tolist(), strict=True)
    }
    assert found == {7: [7, 1], 2: [2, -1]}
