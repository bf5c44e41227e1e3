"""Samples to packed rows; the only place that shifts by one.

A response token at position p of a sequence is predicted at entry p - 1 of the row, which is where
`LossTokens.at` points, and so its last token has no entry. Everything after this file speaks of the
tokens that the loss is about.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rl.parallel.context import own_entries, padded
from megatron_rl.types import LossTokens, MicroBatch, RowPart, Sample, SharedPrompts


@dataclass(frozen=True, slots=True)
class _Run:
    """Tokens of a row that stand together and see each other; the padding tail is one, too."""

    parts: tuple[Tensor, ...]  # one behind the other
    position: int  # of the first token in its sequence
    prompt: int | None  # the run that it answers, where that is one of its own
    is_trained: bool

    @property
    def num_tokens(self) -> int:
        return sum(part.size(0) for part in self.parts)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a sample's prompt and response lie: a run, and the first token of it."""

    prompt: tuple[int, int]
    response: tuple[int, int]


def pack(
    samples: Sequence[Sample],
    *,
    weight_of: Callable[[Sample], float],
    multiple: int,
    dtype: torch.dtype,
    device: torch.device,
    cp: int = 1,
    cp_rank: int = 0,
    share_prompts: bool = False,
) -> MicroBatch:
    """One packed row of the samples, in their order, or a context-parallel rank's part of it.

    Args:
        samples: may be empty: the row is then padding alone, for a rank that has nothing to do
            while others have.
        weight_of: share of the global loss of each response token of a sample.
        multiple: the row's length is padded to a multiple of it (Layout.row_multiple).
        dtype: of weights, advantages and log-probs.
        device: of all tensors.
        cp: ranks that share every sequence, whose lengths are padded so that they can be cut.
        cp_rank: this rank's place among them.
        share_prompts: samples of one group that are neighbours have their prompt in common, once.
            Not with cp.
    """
    runs, places = _runs(samples, share_prompts=share_prompts)
    own_lengths = [run.num_tokens for run in runs]
    lengths = list(padded(own_lengths, cp))
    used = sum(lengths)
    padding = -used % multiple or (multiple if not used else 0)
    if padding:
        runs.append(_Run((), 0, None, is_trained=False))
        own_lengths.append(0)
        lengths.append(padding)
    bounds = [0, *itertools.accumulate(lengths)]
    tokens = _tokens(runs, own_lengths, lengths)
    position_ids = _ranges([run.position for run in runs], lengths)
    entries = [
        (bounds[place.prompt[0]] + place.prompt[1], bounds[place.response[0]] + place.response[1])
        for place in places
    ]
    loss = _loss_tokens(samples, entries, weight_of, dtype)
    experts = _experts(samples, entries, used + padding)
    part = None
    if cp > 1:
        own = own_entries(lengths, cp, cp_rank, torch.device("cpu"))
        tokens, position_ids = tokens[own], position_ids[own]
        experts = None if experts is None else experts[own]
        part = _part(own, loss.at, used + padding, device)
    groups: dict[int, int] = {}
    group_of = [groups.setdefault(sample.group_id, len(groups)) for sample in samples]
    trained = [
        length if run.is_trained else 0 for run, length in zip(runs, own_lengths, strict=True)
    ]
    responses = [sample.num_response_tokens for sample in samples]
    return MicroBatch(
        tokens=tokens.to(device),
        position_ids=position_ids.to(device),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32).to(device),
        lengths=tuple(lengths),
        trained_lengths=torch.tensor(trained, dtype=torch.int64).to(device),
        loss=loss.to(device),
        part=part,
        response_lengths=torch.tensor(responses, dtype=torch.int64).to(device),
        group_of=torch.tensor(group_of, dtype=torch.int64).to(device),
        samples=tuple(samples),
        experts=experts.pin_memory() if experts is not None and device.type == "cuda" else experts,
        shared=_shared(runs, lengths, bounds, device),
    )


def _runs(samples: Sequence[Sample], *, share_prompts: bool) -> tuple[list[_Run], list[_Place]]:
    runs: list[_Run] = []
    places: list[_Place] = []
    for _, members in itertools.groupby(samples, key=lambda sample: sample.group_id):
        group = list(members)
        prompt, at = group[0].prompt_tokens, len(runs)
        if share_prompts and len(group) > 1:
            is_trained = any(sample.has_gradient for sample in group)
            runs.append(_Run((prompt,), 0, None, is_trained))
            for sample in group:
                _, response = sample.inputs
                if not response.size(0):  # the prompt predicts all of it
                    places.append(_Place((at, 0), (at, 0)))
                    continue
                places.append(_Place((at, 0), (len(runs), 0)))
                runs.append(_Run((response,), prompt.size(0), at, sample.has_gradient))
            continue
        for sample in group:
            places.append(_Place((len(runs), 0), (len(runs), sample.num_prompt_tokens)))
            runs.append(_Run(sample.inputs, 0, None, sample.has_gradient))
    return runs, places


def _tokens(runs: Sequence[_Run], own_lengths: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """The row [T]: the tokens of each run, and zeros up to its length in the row."""
    parts: list[Tensor] = []
    for run, own, length in zip(runs, own_lengths, lengths, strict=True):
        parts += run.parts
        if own < length:
            parts.append(torch.zeros(length - own, dtype=torch.int64))
    return torch.cat(parts)


def _shared(
    runs: Sequence[_Run], lengths: Sequence[int], bounds: Sequence[int], device: torch.device
) -> SharedPrompts | None:
    """What each run sees; None where none of them answers another."""
    if all(run.prompt is None for run in runs):
        return None
    prompts = [run.prompt for run in runs]
    seen = [[run] if prompt is None else [prompt, run] for run, prompt in enumerate(prompts)]
    flat = _flat(seen)
    key_lengths = [sum(lengths[one] for one in both) for both in seen]
    return SharedPrompts(
        prompts=tuple(prompts),
        keys=_ranges([bounds[one] for one in flat], [lengths[one] for one in flat]).to(device),
        key_bounds=torch.tensor([0, *key_lengths]).cumsum(0).to(device, torch.int32),
        key_lengths=tuple(key_lengths),
    )


def _loss_tokens(
    samples: Sequence[Sample],
    entries: Sequence[tuple[int, int]],
    weight_of: Callable[[Sample], float],
    dtype: torch.dtype,
) -> LossTokens:
    """entries: of the first token of each sample's prompt, and of its response."""
    counts = [sample.num_response_tokens for sample in samples]
    sizes = np.array(counts, np.int64)

    def per_token(values: Sequence[float]) -> Tensor:
        # By way of float64, which Python numbers are, so that they are rounded once.
        return torch.from_numpy(np.repeat(np.array(values, np.float64), sizes)).to(dtype)

    # The last token of a prompt predicts the first one of a response, which predicts the second.
    ends = [
        (prompt + sample.num_prompt_tokens - 1, response)
        for sample, (prompt, response) in zip(samples, entries, strict=True)
    ]
    of_ends = [(min(count, 1), max(count - 1, 0)) for count in counts]
    rollout = [s.rollout_logprobs for s in samples if s.rollout_logprobs is not None]
    return LossTokens(
        at=_ranges(_flat(ends), _flat(of_ends)),
        targets=_joined([sample.response_tokens for sample in samples], torch.int64),
        weights=per_token([weight_of(sample) for sample in samples]),
        advantages=per_token([sample.advantage for sample in samples]),
        rollout_logprobs=_joined(rollout, dtype) if len(rollout) == len(samples) else None,
        support=_support(samples),
    )


def _support(samples: Sequence[Sample]) -> Tensor | None:
    """What each loss token [N, K] was drawn from, where the engine told it of the samples."""
    told = [sample.support for sample in samples if sample.support is not None]
    if not told:
        return None
    if len(told) < len(samples):
        raise ValueError("some samples of a row were drawn from a part of the vocabulary, some not")
    widest = max(support.size(1) for support in told)
    return torch.cat([F.pad(each, (0, widest - each.size(1)), value=-1) for each in told])


def _experts(
    samples: Sequence[Sample], entries: Sequence[tuple[int, int]], row_tokens: int
) -> Tensor | None:
    """The experts [T, L, K] that the engine chose, where it told them of any sample."""
    told = [sample.experts for sample in samples if sample.experts is not None]
    if not told:
        return None
    experts = torch.full((row_tokens, *told[0].shape[1:]), -1, dtype=torch.int16)
    for sample, (prompt, response) in zip(samples, entries, strict=True):
        if sample.experts is not None:
            length = sample.num_prompt_tokens
            of_prompt, of_response = sample.experts[:length], sample.experts[length:]
            experts[prompt : prompt + length] = of_prompt
            experts[response : response + len(of_response)] = of_response
    return experts


def _part(own: Tensor, at: Tensor, row_tokens: int, device: torch.device) -> RowPart:
    """The loss tokens among a rank's own [T] entries of a row."""
    entry_of = torch.full((row_tokens,), -1).scatter(0, own, torch.arange(len(own)))
    entries = entry_of[at]
    mine = torch.nonzero(entries >= 0)[:, 0]
    return RowPart(loss=mine.to(device), at=entries[mine].to(device))


def _ranges(firsts: Sequence[int], counts: Sequence[int]) -> Tensor:
    """int64: counts[0] numbers from firsts[0] on, counts[1] from firsts[1] on, and so forth."""
    # NumPy repeats numbers five times as fast as torch does.
    sizes = np.array(counts, np.int64)
    shifts = np.array(firsts, np.int64) - (sizes.cumsum() - sizes)
    return torch.from_numpy(np.repeat(shifts, sizes) + np.arange(sizes.sum()))


def _flat(numbers: Iterable[Iterable[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(numbers))


def _joined(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([torch.empty(0, dtype=dtype), *(part.to(dtype) for part in parts)])
