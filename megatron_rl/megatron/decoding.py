"""Rows of prompts and of next tokens through the chunks of a model, with keys and values kept.

Ranks of a pipeline hand hidden states on from point to point; whoever calls sees to it that they
run the same rows in the same order.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_rl.megatron.attention import PackedRows, rows_of
from megatron_rl.megatron.kv_cache import KeyValueCache, NextTokens, Nothing, Prompts
from megatron_rl.megatron.rope import Rope
from megatron_rl.parallel.groups import Groups


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """Tokens that go through the model together."""

    tokens: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64
    rows: PackedRows
    at: Tensor  # [n] int64: the entries whose next token is asked for


class Decoder:
    """The chunks of this rank."""

    def __init__(
        self,
        chunks: Sequence[Any],
        rope: Rope,
        groups: Groups,
        *,
        in_blocks: bool,
        dtype: torch.dtype,
        hidden_size: int,
        is_split: bool,
    ) -> None:
        """in_blocks: attention pads sequences into blocks. is_split: under sequence parallelism."""
        self._chunks, self._rope, self._groups = chunks, rope, groups
        self._in_blocks, self._dtype, self._hidden_size = in_blocks, dtype, hidden_size
        self.is_split = is_split
        self._ranks_of_row = groups.layout.tp if is_split else 1
        self._device = groups.platform.current_device()
        self._sent: list[tuple[Any, Tensor]] = []  # until it has left

    @property
    def num_chunks(self) -> int:
        return len(self._chunks)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Rows are run inside: modules are told that nothing is trained."""
        modes = [chunk.training for chunk in self._chunks]
        for chunk in self._chunks:
            chunk.eval()
        try:
            with torch.inference_mode():
                yield
            for work, _ in self._sent:
                work.wait()
        finally:
            self._sent.clear()
            for chunk, mode in zip(self._chunks, modes, strict=True):
                chunk.train(mode)

    def prompts(
        self, cache: KeyValueCache, prompts: Sequence[Sequence[int]], slots: Sequence[Sequence[int]]
    ) -> Row:
        """A row of prompts, each with the slots of its responses."""
        lengths = tuple(map(len, prompts))
        ends = list(accumulate(lengths))
        entries, in_slots, positions = [], [], []
        counts = torch.tensor([len(own) for own in slots])
        of_prompts = torch.arange(len(prompts)).repeat_interleave(counts)
        for prompt, end, own in zip(prompts, ends, slots, strict=True):
            place = torch.arange(len(prompt))
            entries.append((place + end - len(prompt)).repeat(len(own)))
            in_slots.append(torch.tensor(own).repeat_interleave(len(prompt)))
            positions.append(place.repeat(len(own)))
        missing = -ends[-1] % self._ranks_of_row
        padded = (*lengths, missing) if missing else lengths
        tokens = torch.tensor([*chain.from_iterable(prompts), *[0] * missing])
        position_ids = torch.cat([torch.arange(length) for length in padded])
        bounds = torch.tensor([0, *accumulate(padded)], dtype=torch.int32)
        rows = rows_of(
            padded,
            bounds.to(self._device),
            position_ids.to(self._device),
            self._rope,
            in_blocks=self._in_blocks,
        )
        memory = Prompts(
            cache=cache,
            rows=rows,
            entries=torch.cat(entries).to(self._device),
            slots=torch.cat(in_slots).to(self._device),
            positions=torch.cat(positions).to(self._device),
            all_slots=torch.tensor(list(chain.from_iterable(slots))).to(self._device),
            prompts=of_prompts.to(self._device),
            ends=torch.tensor(ends)[of_prompts].to(self._device),
        )
        return Row(
            tokens=tokens.to(self._device),
            position_ids=position_ids.to(self._device),
            rows=replace(rows, remembered=memory),
            at=(torch.tensor(ends) - 1).to(self._device),
        )

    def next_tokens(
        self, cache: KeyValueCache, tokens: Tensor, positions: Tensor, length: int
    ) -> Row:
        """A row of one token for each of the first slots; both [n] int64, on the host.

        length: more than all positions; so much of the cache is looked at.
        """
        places, slots = positions.to(self._device), torch.arange(len(tokens), device=self._device)
        memory = NextTokens(cache=cache, slots=slots, positions=places, length=length)
        return self._row(tokens, places, memory, at=slots)

    def nothing(self) -> Row:
        """A row of padding, for ranks that have nothing to run while others have."""
        token = torch.zeros(1, dtype=torch.int64)
        return self._row(token, token.to(self._device), Nothing(), at=token[:0])

    def _row(self, tokens: Tensor, places: Tensor, memory: Any, *, at: Tensor) -> Row:
        missing = -len(tokens) % self._ranks_of_row
        tokens = tokens.to(self._device)
        if missing:
            tokens = torch.cat([tokens, tokens.new_zeros(missing)])
            places = torch.cat([places, places.new_zeros(missing)])
        rows = PackedRows(qkv_format="thd", rotation=self._rope.rotation(places), remembered=memory)
        return Row(tokens=tokens, position_ids=places, rows=rows, at=at)

    def run(self, chunk: int, row: Row) -> Tensor | None:
        """Run a row through a chunk of this rank, between those before and behind it.

        Returns [n, H] final hidden states of the entries row.at where it is the last one.
        """
        layout, pp_rank = self._groups.layout, self._groups.here.pp_rank
        stage, last = chunk * layout.pp + pp_rank, layout.pp * layout.vpp - 1
        model = self._chunks[chunk]
        if stage > 0:
            shape = (len(row.tokens) // self._ranks_of_row, 1, self._hidden_size)
            hidden = torch.empty(shape, dtype=self._dtype, device=self._device)
            dist.recv(hidden, self._rank_of(stage - 1), group=_pipeline())
            model.set_input_tensor([hidden])
        hidden = model(row.tokens[None], row.position_ids[None], None, packed_seq_params=row.rows)
        if stage == last:
            whole: Tensor = model.head_input(hidden)[:, 0].index_select(0, row.at)
            return whole
        hidden = hidden.contiguous()
        self.sent(dist.isend(hidden, self._rank_of(stage + 1), group=_pipeline()), hidden)
        return None

    def sent(self, work: Any, tensor: Tensor) -> None:
        """Keep a tensor until it has left."""
        self._sent = [(w, t) for w, t in self._sent if not w.is_completed()]
        self._sent.append((work, tensor))

    def _rank_of(self, stage: int) -> int:
        """The rank of this pipeline that has a stage."""
        layout = self._groups.layout
        return self._groups.rank % layout.stage_size + stage % layout.pp * layout.stage_size


def _pipeline() -> dist.ProcessGroup:
    group: dist.ProcessGroup = parallel_state.get_pipeline_model_parallel_group()
    return group
