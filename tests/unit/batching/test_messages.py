"""Samples come out of messages as they went in."""

from dataclasses import fields, replace

import pytest
import torch

from megatron_rl.batching.messages import decode, encode
from megatron_rl.types import Sample

FIRST = Sample(
    group_id=7,
    index=0,
    update=0,
    prompt_tokens=torch.tensor([1]),
    response_tokens=torch.arange(4),
    advantage=0.5,
)


def sent(*samples):
    """The samples after they have been in two messages, one behind the other."""
    half = len(samples) // 2
    return decode(torch.cat([encode(samples[:half]), encode(samples[half:])]))


def test_a_sample_as_a_vector():
    example = Sample(
        group_id=7,
        index=1,
        update=0,
        prompt_tokens=torch.tensor([5, 9]),
        response_tokens=torch.tensor([2]),
        advantage=0.5,
    )
    assert encode([example]).tolist() == [
        *(1, 7, 1, 0, 2, 1, 0, 1, 0, 0, 0, -1),
        *(5, 9, 2, 0x3FE0000000000000),
    ]


def test_a_sample_keeps_whether_it_has_a_gradient():
    for has_gradient in (True, False):
        (found,) = sent(replace(FIRST, has_gradient=has_gradient))
        assert found.has_gradient is has_gradient


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_a_sample_keeps_the_experts_of_its_tokens(dtype):
    """Of several samples in one stream, whose bytes do not fill words."""
    many = [
        replace(FIRST, experts=torch.arange(n * 6).view(n, 3, 2).to(dtype))
        for n in [FIRST.num_inputs]
    ]
    for found in sent(*many, FIRST, *many)[::2]:
        assert torch.equal(found.experts, many[0].experts)
        assert found.experts.dtype == dtype
    assert sent(FIRST)[0].experts is None


@pytest.mark.parametrize("width", [0, 1, 3])
def test_a_sample_keeps_what_its_tokens_were_drawn_from(width):
    """Beside experts, whose bytes do not fill words either, and beside a sample without."""
    count = len(FIRST.response_tokens)
    support = torch.arange(count * width, dtype=torch.int32).view(count, width) - 1
    experts = torch.arange((FIRST.num_inputs) * 3).view(-1, 3, 1).to(torch.uint8)
    many = [replace(FIRST, support=support), replace(FIRST, support=support, experts=experts)]
    found = sent(*many, FIRST, *many)
    for one in (*found[:2], *found[3:]):
        assert torch.equal(one.support, support)
        assert one.support.dtype == torch.int32
    assert [one.experts is None for one in found] == [True, False, True, True, False]
    assert torch.equal(found[4].experts, experts)
    assert found[2].support is None


def test_every_field_travels_but_what_policy_adds():
    """Random samples of all kinds, in one message."""
    generator = torch.Generator().manual_seed(0)

    def ids(*shape):
        return torch.randint(0, 100, shape, generator=generator)

    samples = [
        Sample(
            group_id=number // 3,
            index=number % 3,
            update=number % 2,
            prompt_tokens=ids(prompt),
            response_tokens=ids(response),
            advantage=float(torch.randn((), generator=generator, dtype=torch.float64)),
            has_gradient=bool(number % 5),
            rollout_logprobs=torch.randn(response, generator=generator) if number % 2 else None,
            experts=ids(prompt + response - 1, 2, 3).to(torch.int16) if number % 3 else None,
            support=ids(response, number).to(torch.int32) if number % 4 else None,
        )
        for number, (prompt, response) in enumerate(ids(12, 2).add(1).tolist())
    ]
    found = decode(encode(samples))
    assert len(found) == len(samples)
    for one, other in zip(found, samples, strict=True):
        for name in (field.name for field in fields(Sample)):
            value, wanted = getattr(one, name), getattr(other, name)
            if isinstance(wanted, torch.Tensor):
                assert torch.equal(value, wanted), name
                assert value.dtype == wanted.dtype
            else:
                assert value == wanted, name
