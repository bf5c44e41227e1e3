"""Samples to rows, by hand: what is shifted, padded and rounded."""

import torch

from megatron_rl.batching.pack import pack
from megatron_rl.types import Sample

CPU = torch.device("cpu")


def sample(prompt, response, advantage=1.0, rollout=None):
    return Sample(
        group_id=0,
        index=0,
        update=0,
        prompt_tokens=torch.tensor(prompt),
        response_tokens=torch.tensor(response),
        advantage=advantage,
        rollout_logprobs=None if rollout is None else torch.tensor(rollout),
    )


def packed(samples, *, multiple=1, dtype=torch.float32):
    return pack(
        samples,
        weight_of=lambda sample: 1 / (10 * len(sample.response_tokens)),
        multiple=multiple,
        dtype=dtype,
        device=CPU,
    )


def test_each_response_token_is_predicted_at_the_entry_before_it():
    row = packed(
        [
            sample([5, 9], [7, 2], 0.3, [-0.1, -1.2]),
            sample([4], [8, 6, 3], -1.0, [-1.0, -2.0, -3.0]),
        ],
        multiple=8,
    )
    assert row.tokens.tolist() == [5, 9, 7, 2, 4, 8, 6, 3]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert row.cu_seqlens.tolist() == [0, 4, 8]
    assert row.loss.at.tolist() == [1, 2, 4, 5, 6]
    assert row.loss.targets.tolist() == [7, 2, 8, 6, 3]
    assert torch.equal(row.loss.targets, row.tokens[row.loss.at + 1])
    assert torch.equal(row.loss.weights, torch.tensor([0.05, 0.05, *[1 / 30] * 3]))
    assert torch.equal(row.loss.advantages, torch.tensor([0.3, 0.3, -1.0, -1.0, -1.0]))
    assert torch.equal(row.loss.rollout_logprobs, torch.tensor([-0.1, -1.2, -1.0, -2.0, -3.0]))
    assert row.loss.old_logprobs is None
    assert row.loss.ref_logprobs is None


def test_numbers_are_rounded_once_to_the_dtype_of_the_run():
    row = packed([sample([1], [2, 3, 4], 1 / 3)], dtype=torch.float64)
    assert row.loss.weights.tolist() == [1 / 30] * 3
    assert row.loss.advantages.tolist() == [1 / 3] * 3


def test_padding_is_one_more_sequence_without_loss():
    row = packed([sample([5], [7])], multiple=5)
    assert row.tokens.tolist() == [5, 7, 0, 0, 0]
    assert row.position_ids.tolist() == [0, 1, 0, 1, 2]
    assert row.cu_seqlens.tolist() == [0, 2, 5]
    assert row.max_seqlen == 3
    assert row.loss.at.tolist() == [0]


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
