"""Responses that are sampled together: which request has which slot, and when it is done.

Slots in use are the first ones. New responses take those behind them; where some are done, the last
ones move into their places.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.rollout.engine import PROMPT_TOKENS_PER_STEP, Request, Response

FREE_SHARE = 8
"""New prompts go through the model when one slot in so many is free: a pass of a single prompt
costs a small model as much as a token of everybody."""


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """Prompts that go through the model, and the new slots of their responses."""

    prompts: tuple[tuple[int, ...], ...]
    slots: tuple[range, ...]  # of each prompt


@dataclass(frozen=True, kw_only=True)
class Moves:
    """Slots that take another place."""

    sources: Tensor  # [k] int64
    targets: Tensor  # [k] int64
    num_tokens: int  # more than any of them has


class Slots:
    """The state of every response on the way, in tensors on the host."""

    def __init__(
        self,
        num_slots: int,
        longest_response: int,
        longest: int,
        stop_ids: Sequence[int],
        *,
        top_k: int = 0,
    ) -> None:
        """longest: most tokens of a prompt and its response. top_k: most that one is drawn from."""
        self.num_slots, self.longest = num_slots, longest
        self.in_use = 0
        self._stop_ids = torch.tensor(list(stop_ids), dtype=torch.int64)
        self._requests: list[Request] = []
        self._prompt_lengths = torch.zeros(num_slots, dtype=torch.int64)
        self._limits = torch.zeros(num_slots, dtype=torch.int64)
        self._drawn = torch.zeros(num_slots, dtype=torch.int64)
        self._seeds = torch.zeros(num_slots, dtype=torch.int64)
        self._temperatures = torch.zeros(num_slots, dtype=torch.float64)
        self._tokens = torch.zeros(num_slots, longest_response, dtype=torch.int64)
        self._logprobs = torch.zeros(num_slots, longest_response, dtype=torch.float32)
        self._support = torch.zeros(num_slots, longest_response, top_k, dtype=torch.int32)

    def admit(self, queue: deque[Request]) -> Admitted | None:
        """Take requests from the queue into free slots; None where it is not the time to."""
        free = self.num_slots - self.in_use
        if not queue or not free or (self.in_use and free < self.num_slots // FREE_SHARE):
            return None
        first = self.in_use
        prompts: list[tuple[int, ...]] = []
        bounds: list[int] = []
        num_tokens = 0
        while queue and len(self._requests) < self.num_slots:
            tokens = queue[0].prompt_tokens
            if not prompts or tokens != prompts[-1]:
                num_tokens += len(tokens)
                if prompts and num_tokens > PROMPT_TOKENS_PER_STEP:
                    break
                prompts.append(tokens)
                bounds.append(len(self._requests))
            self._requests.append(queue.popleft())
        new = self._requests[first:]
        self.in_use = len(self._requests)
        slots = slice(first, self.in_use)
        lengths = torch.tensor([len(request.prompt_tokens) for request in new])
        self._prompt_lengths[slots] = lengths
        limits = torch.tensor([request.max_tokens for request in new])
        self._limits[slots] = torch.minimum(limits, self.longest - lengths)
        self._drawn[slots] = 0
        self._seeds[slots] = torch.tensor([request.seed for request in new])
        temperatures = [request.temperature for request in new]
        self._temperatures[slots] = torch.tensor(temperatures, dtype=torch.float64)
        ends = [*bounds[1:], self.in_use]
        return Admitted(prompts=tuple(prompts), slots=tuple(map(range, bounds, ends)))

    def next_row(self, num_slots: int) -> tuple[Tensor, Tensor]:
        """([n] last tokens, [n] their positions) of the first slots.

        Those that are free have some token, at position 0.
        """
        last = (self._drawn[:num_slots] - 1).clamp_(min=0)
        tokens = self._tokens[:num_slots].gather(1, last[:, None])[:, 0]
        positions = self._prompt_lengths[:num_slots] + last
        positions[self.in_use :] = 0  # which everybody sees: no row of scores is masked as a whole
        return tokens, positions

    def noise_of(self, slots: range) -> tuple[Tensor, Tensor, Tensor]:
        """(seeds, places, temperatures) [n] of the tokens that these slots draw next."""
        part = slice(slots.start, slots.stop)
        return self._seeds[part], self._drawn[part], self._temperatures[part]

    def take(
        self, slots: range, tokens: Tensor, logprobs: Tensor, support: Tensor | None = None
    ) -> tuple[list[Response], Moves | None]:
        """Add a token [n], its log-prob and what it was drawn from [n, top_k] to these slots; what
        is done by it leaves.
        """
        part = slice(slots.start, slots.stop)
        rows, at = torch.arange(slots.start, slots.stop), self._drawn[part]
        self._tokens[rows, at] = tokens
        self._logprobs[rows, at] = logprobs
        if support is not None:
            self._support[rows, at] = support
        self._drawn[part] += 1
        has_stopped = torch.isin(tokens, self._stop_ids)
        is_done = has_stopped | (self._drawn[part] >= self._limits[part])
        if not bool(is_done.any()):
            return [], None
        done = is_done.nonzero()[:, 0]
        responses = [
            self._response(slots.start + number, has_stopped=bool(has_stopped[number]))
            for number in done.tolist()
        ]
        return responses, self._leave(done + slots.start)

    def _response(self, slot: int, *, has_stopped: bool) -> Response:
        length = int(self._drawn[slot])
        return Response(
            key=self._requests[slot].key,
            tokens=self._tokens[slot, :length].clone(),
            logprobs=self._logprobs[slot, :length].clone(),
            support=trimmed(self._support[slot, :length]) if self._support.size(2) else None,
            finish_reason="stop" if has_stopped else "length",
        )

    def _leave(self, done: Tensor) -> Moves | None:
        """Empty these slots [n]: the last ones of the others move into their places."""
        left = self.in_use - len(done)
        stays = torch.ones(self.in_use, dtype=torch.bool)
        stays[done] = False
        targets = (~stays[:left]).nonzero()[:, 0]
        sources = stays[left:].nonzero()[:, 0] + left
        for state in (
            self._prompt_lengths,
            self._limits,
            self._drawn,
            self._seeds,
            self._temperatures,
            self._tokens,
            self._logprobs,
            self._support,
        ):
            state[targets] = state[sources]
        for target, source in zip(targets.tolist(), sources.tolist(), strict=True):
            self._requests[target] = self._requests[source]
        del self._requests[left:]
        self.in_use = left
        if not len(targets):
            return None
        lengths = self._prompt_lengths[targets] + self._drawn[targets]
        return Moves(sources=sources, targets=targets, num_tokens=int(lengths.max()))


def trimmed(support: Tensor) -> Tensor:
    """[R, K] a copy as wide as its widest row, whose ids stand before all -1."""
    widest = int((support >= 0).sum(dim=1).max()) if len(support) else 0
    return support[:, :widest].clone()
