"""The token ids of many texts, four bytes each, so that a million prompts fit in memory."""

from array import array
from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from torch import Tensor

from megatron_rl.prompts.tokenizer import Tokenizer

ENCODE_CHUNK = 4096  # texts given to the tokenizer at once: enough for all its threads


class TokenTable:
    """Rows of token ids, of any length, in two flat arrays."""

    def __init__(self) -> None:
        self.ids = array("i")
        self.ends = array("q", [0])  # row r is ids[ends[r] : ends[r + 1]]

    def append(self, ids: Sequence[int]) -> None:
        self.ids.extend(ids)
        self.ends.append(len(self.ids))

    def tokens(self, row: int) -> Tensor:
        """The row's ids, [P] int64."""
        return torch.tensor(self._row(row), dtype=torch.int64)

    def lengths(self) -> list[int]:
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]

    def select(self, rows: Iterable[int]) -> "TokenTable":
        chosen = TokenTable()
        for row in rows:
            chosen.append(self._row(row))
        return chosen

    def _row(self, row: int) -> Sequence[int]:
        return self.ids[self.ends[row] : self.ends[row + 1]]


def tokenize(
    tokenizer: Tokenizer,
    texts: Iterable[str],
    prefix: Sequence[int] = (),
    suffix: Sequence[int] = (),
) -> TokenTable:
    """A row for each text: the prefix, unless the ids begin with it, its ids, then the suffix."""
    table = TokenTable()
    remaining = iter(texts)
    while chunk := list(islice(remaining, ENCODE_CHUNK)):
        for ids in tokenizer.encode_batch(chunk):
            front = () if list(ids[: len(prefix)]) == list(prefix) else prefix
            table.append([*front, *ids, *suffix])
    return table
