"""Samples as vectors of int64, which collectives carry.

A message is how many samples it holds, eleven numbers about each, and then, each of all samples one
behind the other: prompts, responses, advantages, log-probs, experts, supports. Advantages and
log-probs travel by the bits of a float64, experts and supports by theirs, eight bytes in a word.

Example: group 7, index 1, update 0, prompt [5, 9], response [2], advantage 0.5, no log-probs,
experts and support is [1, 7, 1, 0, 2, 1, 0, 1, 0, 0, 0, -1, 5, 9, 2, 0x3FE0000000000000].
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rl.types import Sample


class _Head(NamedTuple):
    """What a message says of a sample before its tokens."""

    group_id: int
    position: int  # in its group
    update: int
    prompt: int  # tokens
    response: int  # tokens
    has_logprobs: int
    has_gradient: int
    layers: int  # of the experts, 0 where there are none
    top_k: int
    expert_bytes: int  # of one number
    width: int  # of the support, -1 where there is none

    @property
    def logprobs(self) -> int:
        return self.response if self.has_logprobs else 0

    @property
    def expert_words(self) -> int:
        tokens = self.prompt + self.response - 1
        return _num_words(tokens * self.layers * self.top_k * self.expert_bytes)

    @property
    def support_words(self) -> int:
        return _num_words(self.response * max(self.width, 0) * torch.int32.itemsize)


def encode(samples: Sequence[Sample]) -> Tensor:
    """One message of all samples."""
    logprobs = [s.rollout_logprobs.double() for s in samples if s.rollout_logprobs is not None]
    advantages = torch.tensor([sample.advantage for sample in samples], dtype=torch.float64)
    return torch.cat(
        [
            torch.tensor([len(samples)]),
            torch.tensor([_head_of(sample) for sample in samples], dtype=torch.int64).flatten(),
            *(sample.prompt_tokens for sample in samples),
            *(sample.response_tokens for sample in samples),
            torch.cat([advantages, *logprobs]).view(torch.int64),
            *(_words_of(s.experts) for s in samples if s.experts is not None),
            *(_words_of(s.support) for s in samples if s.support is not None),
        ]
    )


def decode(stream: Tensor) -> list[Sample]:
    """The samples of messages that stand one behind the other."""
    samples: list[Sample] = []
    while stream.size(0):
        count, stream = int(stream[0]), stream[1:]
        numbers, stream = _cut(stream, count * len(_Head._fields))
        heads = [_Head(*each) for each in numbers.view(count, len(_Head._fields)).tolist()]
        prompts, stream = _split(stream, (head.prompt for head in heads))
        responses, stream = _split(stream, (head.response for head in heads))
        advantages, stream = _cut(stream, count)
        logprobs, stream = _split(stream, (head.logprobs for head in heads))
        experts, stream = _split(stream, (head.expert_words for head in heads))
        supports, stream = _split(stream, (head.support_words for head in heads))
        samples += (
            Sample(
                group_id=head.group_id,
                index=head.position,
                update=head.update,
                prompt_tokens=next(prompts),
                response_tokens=next(responses),
                advantage=advantage,
                has_gradient=bool(head.has_gradient),
                rollout_logprobs=_logprobs(head, next(logprobs)),
                experts=_experts(head, next(experts)),
                support=_support(head, next(supports)),
            )
            for head, advantage in zip(heads, advantages.view(torch.float64).tolist(), strict=True)
        )
    return samples


def _head_of(sample: Sample) -> _Head:
    layers, top_k, expert_bytes = 0, 0, 0
    if sample.experts is not None:
        _, layers, top_k = sample.experts.shape
        expert_bytes = sample.experts.itemsize
    return _Head(
        group_id=sample.group_id,
        position=sample.index,
        update=sample.update,
        prompt=sample.num_prompt_tokens,
        response=sample.num_response_tokens,
        has_logprobs=int(sample.rollout_logprobs is not None),
        has_gradient=int(sample.has_gradient),
        layers=layers,
        top_k=top_k,
        expert_bytes=expert_bytes,
        width=-1 if sample.support is None else sample.support.size(1),
    )


def _logprobs(head: _Head, words: Tensor) -> Tensor | None:
    return words.view(torch.float64).float() if head.has_logprobs else None


def _experts(head: _Head, words: Tensor) -> Tensor | None:
    if not head.layers:
        return None
    kind = torch.uint8 if head.expert_bytes == 1 else torch.int16
    return _values(words, kind, (head.prompt + head.response - 1, head.layers, head.top_k))


def _support(head: _Head, words: Tensor) -> Tensor | None:
    return None if head.width < 0 else _values(words, torch.int32, (head.response, head.width))


def _num_words(num_bytes: int) -> int:
    return -(-num_bytes // 8)


def _words_of(told: Tensor) -> Tensor:
    """Its bytes as int64, with zeros behind."""
    told = told.contiguous().view(torch.uint8).flatten()
    return F.pad(told, (0, -told.size(0) % 8)).view(torch.int64)


def _values(words: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """What _words_of() made words of."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return words.view(torch.uint8)[:num_bytes].clone().view(dtype).view(shape)


def _cut(stream: Tensor, size: int) -> tuple[Tensor, Tensor]:
    return stream[:size], stream[size:]


def _split(stream: Tensor, sizes: Iterable[int]) -> tuple[Iterator[Tensor], Tensor]:
    """Pieces of these sizes from the front, and what is behind them."""
    each = list(sizes)
    front, behind = _cut(stream, sum(each))
    return iter(front.split(each)), behind
