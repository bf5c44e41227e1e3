"""The teacher's part of advantages, by hand."""

import pytest
import torch

from megatron_rl.policy.token_advantages import with_distillation
from megatron_rl.types import LossTokens, MicroBatch, MiniBatch, UpdateTotals


def batch_of(**constants):
    tokens = LossTokens(
        at=torch.tensor([0, 1]),
        targets=torch.tensor([3, 4]),
        weights=torch.tensor([0.5, 0.5], dtype=torch.float64),
        advantages=torch.tensor([1.0, -2.0], dtype=torch.float64),
    ).replace(**{name: torch.tensor(values) for name, values in constants.items()})
    row = MicroBatch(
        tokens=torch.tensor([7, 3, 4]),
        position_ids=torch.arange(3),
        cu_seqlens=torch.tensor([0, 3], dtype=torch.int32),
        lengths=(3,),
        trained_lengths=torch.tensor([3]),
        loss=tokens,
        part=None,
        response_lengths=torch.tensor([2]),
        group_of=torch.tensor([0]),
        samples=(),
    )
    totals = UpdateTotals(
        kept_sequences=1, kept_tokens=2, collected_sequences=1, collected_tokens=2
    )
    return MiniBatch(update=0, totals=totals, num_samples=1, microbatches=(row,))


def advantages_of(batches):
    return [row.loss.advantages.tolist() for batch in batches for row in batch.microbatches]


def test_the_teachers_lead_is_added_to_each_tokens_advantage():
    batch = batch_of(old_logprobs=[-1.0, -2.0], ref_logprobs=[-0.5, -4.0])
    (found,) = advantages_of(with_distillation([batch], 0.5))
    assert found == pytest.approx([1.0 + 0.5 * 0.5, -2.0 - 0.5 * 2.0])


def test_a_stage_without_logprobs_keeps_its_rows():
    for constants in ({}, {"old_logprobs": [-1.0, -2.0]}, {"ref_logprobs": [-1.0, -2.0]}):
        assert advantages_of(with_distillation([batch_of(**constants)], 0.5)) == [[1.0, -2.0]]


def test_without_a_coefficient_nothing_changes():
    batch = batch_of(old_logprobs=[-1.0, -2.0], ref_logprobs=[-0.5, -4.0])
    assert with_distillation([batch], 0.0) == [batch]
