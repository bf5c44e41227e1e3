"""The policy itself as the engine: its own Megatron-Core model samples, with a key/value cache.

Megatron-Core's own inference does not serve here: its static batches have one position for all
sequences, and its dynamic ones need CUDA and flash-attn (versions 0.16.1 and 0.19.2).
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.ops.truncated import Truncation
from megatron_rl.parallel.collectives import max_over
from megatron_rl.parallel.groups import Groups
from megatron_rl.rollout.engine import Request, Response
from megatron_rl.rollout.recorded import Recordings
from megatron_rl.rollout.slots import Slots

if TYPE_CHECKING:  # they import Megatron-Core, which must be entered first
    from megatron_rl.megatron.decoding import Row
    from megatron_rl.megatron.kv_cache import KeyValueCache
    from megatron_rl.policy.policy import Policy


KEPT_BYTES = 64 << 20
"""Caches up to this size stay between calls, with what was recorded of them."""

LENGTH_BLOCK = 16
"""Tokens of a cache that a step looks at come in multiples of it, so that steps are alike."""


@dataclass(slots=True)
class _Lane:
    """Responses that go through the pipeline while those of other lanes are in other stages."""

    slots: Slots
    cache: "KeyValueCache"
    recordings: Recordings | None  # of its steps, where they are repeated
    row: "Row | None" = None  # that is on its way through the chunks
    asked: range = range(0)  # the slots that get a token from it
    repeats: Tensor | None = None  # [n] int64: the entry of row.at that each of them has
    drawn: Tensor | None = None  # [n, 2 + K] float64 tokens, log-probs and support, on the last
    # stage


class MegatronEngine:
    """This rank's part of its copy of the model; its ranks generate together, the same requests."""

    def __init__(
        self,
        policy: "Policy",
        groups: Groups,
        *,
        eos_ids: Sequence[int],
        max_model_len: int,
        max_num_seqs: int,
        cache_bytes: float,
        token_bytes: int,
        state_bytes: int = 0,
    ) -> None:
        """Build it beside a policy whose weights it never copies.

        Args:
            cache_bytes: of this rank, for keys, values and states; there is room for a sequence
                anyway.
            token_bytes: of those, what a token takes on the rank that has most layers.
            state_bytes: likewise, what a sequence takes beside its tokens.
        """
        self._policy, self._groups = policy, groups
        self._stop_ids, self._max_model_len = list(eos_ids), max_model_len
        self._max_num_seqs = max_num_seqs
        self._cache_bytes, self._token_bytes = cache_bytes, token_bytes
        self._state_bytes = state_bytes
        self._decoder = policy.decoder()
        self._shares_experts = groups.layout.ep > 1
        self._truncation: Truncation | None = None  # of the requests at hand
        layout, device = groups.layout, groups.platform.current_device()
        self._records = (
            device.type == "cpu"
            and layout.pp == layout.cp == 1  # else a step waits for what other ranks send
            and not self._decoder.is_split  # Megatron-Core looks at its random numbers there
            and policy.arch.mixture is None  # how many tokens an expert has differs in every step
        )
        self._kept: dict[tuple[int, int], tuple[KeyValueCache, Recordings]] = {}
        self._addresses: list[int] = []  # of the weights when that was recorded

    def generate(
        self,
        requests: Sequence[Request],
        on_finished: Callable[[Response], None],
        between_steps: Callable[[], bool],
    ) -> None:
        """Sample all requests; on_finished runs as each is done, while others go on."""
        self._policy.residence.bring_weights()
        self._truncation = truncation_of(requests)
        queue = deque(requests)
        lanes = self._lanes(requests)
        with self._decoder.running():
            while self._any(bool(queue) or any(lane.asked or lane.slots.in_use for lane in lanes)):
                for chunk in range(self._decoder.num_chunks):
                    for lane in lanes:
                        if chunk == 0:
                            self._settle(lane, on_finished)
                            self._begin(lane, queue)
                        if lane.row is not None:
                            self._pass(lane, chunk)
                if not between_steps():
                    for lane in lanes:  # other ranks have sent what they drew
                        self._drawn_in(lane)
                    return

    @property
    def is_awake(self) -> bool:
        """Nothing of it ever leaves the device: it has no weights, and no cache between calls."""
        return True

    def sleep(self, *, keeps_weights: bool = False) -> None:
        pass

    def wake(self) -> None:
        pass

    def wake_for_weights(self) -> None:
        pass

    def wake_for_generation(self) -> None:
        pass

    def shutdown(self) -> None:
        pass

    def _lanes(self, requests: Sequence[Request]) -> list[_Lane]:
        """As many as there are pipeline ranks, so that each has something to do."""
        limits = [
            (
                min(len(request.prompt_tokens) + request.max_tokens, self._max_model_len),
                request.max_tokens,
            )
            for request in requests
        ]
        longest = max((total for total, _ in limits), default=1)
        longest_response = max((response for _, response in limits), default=1)
        num_lanes, top_k = self._groups.layout.pp, self._most_to_choose_from
        room = int(self._cache_bytes // (longest * self._token_bytes + self._state_bytes))
        in_all = min(self._max_num_seqs, len(requests), room)
        each = max(1, -(-in_all // num_lanes))
        return [
            _Lane(
                Slots(each, longest_response, longest, self._stop_ids, top_k=top_k),
                *self._cache(each, longest),
            )
            for _ in range(num_lanes)
        ]

    def _cache(self, num_slots: int, num_tokens: int) -> "tuple[KeyValueCache, Recordings | None]":
        """A cache, and what was recorded of steps with it; small ones serve call after call."""
        if not self._records:
            return self._policy.key_value_cache(num_slots, num_tokens), None
        addresses = [weight.data_ptr() for weight in self._policy.named_parameters().values()]
        if addresses != self._addresses:
            self._kept, self._addresses = {}, addresses
        size = (num_slots, num_tokens)
        if size not in self._kept:
            made = self._policy.key_value_cache(num_slots, num_tokens), Recordings()
            if self._bytes_of(size) > KEPT_BYTES:
                return made
            if sum(map(self._bytes_of, [*self._kept, size])) > KEPT_BYTES:
                self._kept.clear()
            self._kept[size] = made
        return self._kept[size]

    def _bytes_of(self, size: tuple[int, int]) -> int:
        """Of a cache of so many slots of so many tokens."""
        num_slots, num_tokens = size
        return num_slots * (num_tokens * self._token_bytes + self._state_bytes)

    def _any(self, is_busy: bool) -> bool:
        """Whether a rank that this one generates in step with has something to do."""
        if not self._shares_experts:
            return is_busy
        return bool(max_over([float(is_busy)], self._groups.engine)[0])

    def _settle(self, lane: _Lane, on_finished: Callable[[Response], None]) -> None:
        """Take what the lane's last row has brought."""
        drawn, asked = self._drawn_in(lane), lane.asked
        lane.asked = range(0)
        if drawn is None:
            return
        support = drawn[:, 2:].int()
        tokens, logprobs = drawn[:, 0].long(), drawn[:, 1].float()
        responses, moves = lane.slots.take(asked, tokens, logprobs, support)
        if moves is not None:
            device = self._groups.platform.current_device()
            places = (moves.sources.to(device), moves.targets.to(device))
            lane.cache.move(*places, moves.num_tokens)
        for response in responses:
            on_finished(response)

    def _drawn_in(self, lane: _Lane) -> Tensor | None:
        """[n, 2 + K] float64 of the lane's last row, as in a lane; None: it had none."""
        if not lane.asked:
            return None
        if self._groups.is_last_stage:
            return lane.drawn
        width = 2 + self._most_to_choose_from
        drawn = torch.empty(len(lane.asked), width, dtype=torch.float64)
        dist.recv(drawn, self._last_stage, group=self._groups.world)
        return drawn

    def _begin(self, lane: _Lane, queue: deque[Request]) -> None:
        """Find the lane's next row: of new prompts, or of a token for each of its responses."""
        first, lane.repeats = lane.slots.in_use, None
        admitted = lane.slots.admit(queue)
        if admitted is not None:
            lane.row = self._decoder.prompts(lane.cache, admitted.prompts, admitted.slots)
            lane.asked = range(first, lane.slots.in_use)
            counts = torch.tensor([len(slots) for slots in admitted.slots])
            lane.repeats = torch.arange(len(counts)).repeat_interleave(counts)
        elif lane.slots.in_use:
            lane.asked = range(lane.slots.in_use)
            self._step(lane)
        else:
            lane.row = self._decoder.nothing() if self._shares_experts else None

    def _step(self, lane: _Lane) -> None:
        """Find the row of a token for each of the lane's responses.

        Where steps are recorded, it has run behind this, and its tokens are drawn.
        """
        n = len(lane.asked)
        if lane.recordings is None:
            tokens, positions = lane.slots.next_row(n)
            lane.row = self._decoder.next_tokens(
                lane.cache, tokens, positions, int(positions.max()) + 1
            )
            return
        padded = min(_rounded_up(n), lane.slots.num_slots)
        tokens, positions = lane.slots.next_row(padded)
        blocks = int(positions[:n].max()) // LENGTH_BLOCK + 1
        length = min(blocks * LENGTH_BLOCK, lane.slots.longest)

        def step(tokens: Tensor, positions: Tensor, *noise: Tensor) -> Tensor:
            row = self._decoder.next_tokens(lane.cache, tokens, positions, length)
            hidden = self._decoder.run(0, row)
            assert hidden is not None
            return self._draw(hidden, None, noise)

        noise = lane.slots.noise_of(range(padded))
        key = (padded, length, self._truncation)
        lane.row = None
        lane.drawn = lane.recordings.run(key, step, tokens, positions, *noise)[:n]

    def _pass(self, lane: _Lane, chunk: int) -> None:
        """Run the lane's row through a chunk; behind the last one, draw its tokens."""
        assert lane.row is not None
        hidden = self._decoder.run(chunk, lane.row)
        if hidden is None or not lane.asked:
            return
        lane.drawn = self._draw(hidden, lane.repeats, lane.slots.noise_of(lane.asked)).cpu()
        layout, rank = self._groups.layout, self._groups.rank
        for pp_rank in range(layout.pp - 1):
            target = rank % layout.stage_size + pp_rank * layout.stage_size
            work: Any = dist.isend(lane.drawn, target, group=self._groups.world)
            self._decoder.sent(work, lane.drawn)

    def _draw(self, hidden: Tensor, repeats: Tensor | None, noise: tuple[Tensor, ...]) -> Tensor:
        """[n, 2 + K] float64 as in a lane; noise: as Slots.noise_of."""
        seeds, places, temperatures = noise
        tokens, logprobs, support = self._policy.sample(
            hidden, repeats, seeds, places, temperatures, self._truncation
        )
        drawn = torch.stack([tokens.double(), logprobs.double()], dim=1)
        return drawn if support is None else torch.cat([drawn, support], dim=1)

    @property
    def _most_to_choose_from(self) -> int:
        return 0 if self._truncation is None else self._truncation.top_k

    @property
    def _last_stage(self) -> int:
        layout = self._groups.layout
        return self._groups.rank % layout.stage_size + (layout.pp - 1) * layout.stage_size


def _rounded_up(number: int) -> int:
    """To one of eight numbers between two powers of two."""
    step = 1 << max(0, number.bit_length() - 4)
    return -(-number // step) * step


def truncation_of(requests: Sequence[Request]) -> Truncation | None:
    """What the requests of a call have in common; None: they draw from the whole vocabulary."""
    found = {(request.top_k, request.top_p) for request in requests}
    if len(found) > 1:
        raise ValueError(f"requests of one call differ in (top_k, top_p): {sorted(found)}")
    top_k, top_p = found.pop() if found else (-1, 1.0)
    return Truncation(top_k, top_p) if top_k > 0 else None
