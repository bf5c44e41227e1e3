"""The LM head that a loss goes through in row chunks, so that only one chunk's logits are alive."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.ops.head_gradient import GradientBuffer
from megatron_rl.ops.vocab_parallel import Shard

LOGITS_BYTES = 1_250_000_000
"""Most bytes that the logits of a chunk may take. Every chunk reads and writes the whole gradient
of the head, so few are better. With 151,936 columns of 16 bits a chunk has 4,113 rows."""

KEPT_BYTES = 320_000_000
"""The same on a CPU, which keeps the memory: 526 rows of 151,936 columns of 32 bits. Two chunks of
half as many take 5 % longer than one."""

_kept: list[Tensor] = []  # bytes; not here while they are lent


def logits_bytes(device_type: str) -> int:
    """Most bytes that the logits of a chunk may take there."""
    return KEPT_BYTES if device_type == "cpu" else LOGITS_BYTES


def most_rows(hidden: Tensor, head_weight: Tensor) -> int:
    """Rows of hidden states whose logits fit; one in any case."""
    row_bytes = len(head_weight) * hidden.element_size()
    return max(1, logits_bytes(hidden.device.type) // row_bytes)


@contextmanager
def logits_memory(rows: int, columns: int, like: Tensor) -> Iterator[Tensor]:
    """Memory for logits [rows, columns] of the dtype and device of another tensor, uninitialised.

    A GPU has it from torch's allocator, which keeps what is freed. On a CPU the system would hand
    it out anew each time, which takes longer than writing to it, and much longer where it has to
    put large pages together first; so a process keeps the largest.
    """
    num_bytes = rows * columns * like.element_size()
    if like.device.type != "cpu" or num_bytes > KEPT_BYTES or torch.compiler.is_compiling():
        yield like.new_empty(rows, columns)
        return
    memory = _kept.pop() if _kept else None
    if memory is None or len(memory) < num_bytes:
        memory = torch.empty(num_bytes, dtype=torch.uint8)
    try:
        yield memory[:num_bytes].view(like.dtype).view(rows, columns)
    finally:
        _kept[:] = [memory]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Head:
    """The LM head on this rank, at the N tokens that a loss is about."""

    hidden: Tensor  # [N, H], equal on all tp ranks, in the dtype of head_weight
    head_weight: Tensor  # [V/tp, H], this rank's rows
    shard: Shard
    support: Tensor | None = None
    """[N, K] ids of the tokens that each softmax is over, as LossTokens has them; None: all."""
    gradient_buffer: GradientBuffer | None = None
    """Memory for the gradient of head_weight, in all losses of a step or in none; None: autograd
    carries it. A loss with a buffer must be backpropagated exactly once, from a gradient of
    loss_scale: native ops add to the buffer in the forward, and any other turns it to NaN."""
    loss_scale: float = 1.0
    """The gradient of the loss that its backward will begin with. Native ops write the gradient of
    the logits in their 16 bits before that, and float16 would lose the small ones."""

    def chunk_size(self, targets: Tensor, chunk_rows: int | None) -> int:
        """Rows of a chunk: chunks are as few as may be, and of about the same size.

        Args:
            targets: [N] int64 global token ids, of which only the shape is looked at.
            chunk_rows: most rows of logits alive at a time; changes results by rounding only. None:
                as many as logits_bytes allows.
        """
        hidden, weight = self.hidden, self.head_weight
        if (
            hidden.dim() != 2
            or weight.dim() != 2
            or hidden.size(1) != weight.size(1)
            or targets.shape != hidden.shape[:1]
        ):
            raise ValueError(
                "expected hidden [N, H], head_weight [V/tp, H] and targets [N], got "
                f"{list(hidden.shape)}, {list(weight.shape)} and {list(targets.shape)}"
            )
        if chunk_rows is None:
            chunk_rows = most_rows(hidden, weight)
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows={chunk_rows}: must be >= 1: a chunk holds whole rows")
        num_chunks = -(-len(hidden) // chunk_rows)
        return -(-len(hidden) // max(num_chunks, 1))
