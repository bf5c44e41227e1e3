"""What requests drew from is kept by request, whichever of top-k and top-p left something out."""

from types import SimpleNamespace

import pytest
import torch

from megatron_rl.rollout.vllm_support import SupportOfRequests

LOST = -torch.inf
FIRST = torch.tensor([[-0.5, LOST, -1.0], [LOST, 0.0, LOST]])
SECOND = torch.tensor([[LOST, LOST, 0.0], [-1.0, -1.1, -1.2]])


def kept_of(k, p):
    """The requests' answers after two steps of vLLM's sampler, whose log-probs these are."""
    steps = iter((FIRST, SECOND))
    sampler = SimpleNamespace(forward=lambda logits, generators, k, p: ("sampled", next(steps)))
    runner = SimpleNamespace(
        sampler=SimpleNamespace(topk_topp_sampler=sampler),
        input_batch=SimpleNamespace(req_ids=["0-4f2a", "12-99ab"]),
    )
    kept = SupportOfRequests(runner)
    for step in (FIRST, SECOND):
        sampled, logprobs = sampler.forward(None, {}, k, p)
        assert sampled == "sampled"
        assert logprobs is step
    return [kept.take(name) for name in ("0", "12")]


@pytest.mark.parametrize(("k", "p"), [(torch.ones(2), None), (None, torch.ones(2))])
def test_each_request_has_a_row_for_each_of_its_tokens(k, p):
    first, second = kept_of(k, p)
    assert first.tolist() == [[0, 2], [2, -1]]
    assert second.tolist() == [[1, -1, -1], [0, 1, 2]]
    assert first.dtype == torch.int32


def test_of_a_whole_vocabulary_nothing_is_kept():
    assert kept_of(None, None) == [None, None]
