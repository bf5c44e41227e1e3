"""From an iteration's selection to the packed rows of every optimizer step."""

from collections.abc import Sequence

import torch

from megatron_rl.algorithms.algorithm import Algorithm, Selection
from megatron_rl.batching.pack import pack
from megatron_rl.batching.schedule import distribute, rows_of
from megatron_rl.parallel.collectives import max_over, sum_over
from megatron_rl.parallel.groups import Groups
from megatron_rl.types import MicroBatch, MiniBatch, Report, Sample, UpdateTotals


class Packer:
    """Packs samples for one layout and algorithm."""

    def __init__(
        self,
        groups: Groups,
        algorithm: Algorithm,
        *,
        row_tokens: int,
        row_multiple: int,
        max_response_tokens: int,
        dtype: torch.dtype,
        share_prompts: bool = False,
        report: Report | None = None,
    ) -> None:
        """row_multiple: rows are padded to a multiple of it (Layout.row_multiple).

        share_prompts: the responses to a prompt that share a row have it once. report: is told of
            what is trained.
        """
        self._report = report
        self._groups, self._algorithm = groups, algorithm
        self._row_tokens, self._row_multiple = row_tokens, row_multiple
        self._max_response_tokens, self._dtype = max_response_tokens, dtype
        self._share_prompts = share_prompts
        self._keep_groups_whole = algorithm.objective.trains_pairs
        # The interleaved schedule wants a multiple of the pipeline size.
        self._count_multiple = groups.layout.pp if groups.layout.vpp > 1 else 1

    def pack(self, selection: Selection, num_updates: int) -> list[MiniBatch]:
        """The mini-batch of every update, on this data-parallel rank; every rank calls it.

        Weights are shares of the global loss: the aggregation over all ranks and rows of an
        optimizer step is in them already, and nothing divides after this.
        """
        totals = self._global_totals(selection, num_updates)
        distributed = distribute(
            selection.samples,
            self._groups,
            keep_groups_whole=self._keep_groups_whole,
            share_up_to=self._share_up_to,
        )
        if self._report is not None and distributed.num_tokens:
            repeated = distributed.num_repeated / distributed.num_tokens
            self._report({"batching/repeated_prompts_frac": repeated})
        return [
            MiniBatch(
                update=update,
                totals=totals[update],
                num_samples=distributed.num_samples[update],
                microbatches=self._rows(
                    [sample for sample in distributed.samples if sample.update == update],
                    totals[update],
                ),
            )
            for update in range(num_updates)
        ]

    def pack_for_measuring(self, samples: Sequence[Sample]) -> tuple[MicroBatch, ...]:
        """Rows for a pass that only measures: every response token counts once."""
        distributed = distribute(samples, self._groups, share_up_to=self._share_up_to)
        return self._rows(distributed.samples, None)

    @property
    def _share_up_to(self) -> int | None:
        return self._row_tokens if self._share_prompts else None

    def _rows(
        self, samples: Sequence[Sample], totals: UpdateTotals | None
    ) -> tuple[MicroBatch, ...]:
        def weight_of(sample: Sample) -> float:
            if totals is None:
                return 1.0
            return self._algorithm.token_weight(sample, totals, self._max_response_tokens)

        rows = self._evened(
            rows_of(
                samples,
                self._row_tokens,
                count_multiple=self._count_multiple,
                keep_groups_whole=self._keep_groups_whole and totals is not None,
                share_prompts=self._share_prompts,
            )
        )
        return tuple(
            pack(
                row,
                weight_of=weight_of,
                multiple=self._row_multiple,
                dtype=self._dtype,
                device=self._groups.platform.current_device(),
                cp=self._groups.layout.cp,
                cp_rank=self._groups.here.cp_rank,
                share_prompts=self._share_prompts,
            )
            for row in rows
        )

    def _evened(self, rows: list[list[Sample]]) -> list[list[Sample]]:
        """The rows, with empty ones added under expert parallelism.

        There ranks exchange tokens in every layer, so all must run the same number of rows.
        """
        if self._groups.layout.ep == 1:
            return rows
        longest = int(max_over([len(rows)], self._groups.world)[0])
        return rows + [[] for _ in range(longest - len(rows))]

    def _global_totals(self, selection: Selection, num_updates: int) -> list[UpdateTotals]:
        nothing = UpdateTotals(
            kept_sequences=0, kept_tokens=0, collected_sequences=0, collected_tokens=0
        )
        own = [selection.totals.get(update, nothing) for update in range(num_updates)]
        counts = sum_over(
            [
                count
                for part in own
                for count in (
                    part.kept_sequences,
                    part.kept_tokens,
                    part.collected_sequences,
                    part.collected_tokens,
                )
            ],
            self._groups.world,
        )
        return [
            UpdateTotals(
                kept_sequences=int(counts[at]),
                kept_tokens=int(counts[at + 1]),
                collected_sequences=int(counts[at + 2]),
                collected_tokens=int(counts[at + 3]),
            )
            for at in range(0, len(counts), 4)
        ]
