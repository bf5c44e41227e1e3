"""The LM head that a loss goes through in row chunks, so that only one chunk's logits are alive."""

from dataclasses import dataclass

from torch import Tensor

from megatron_rl.ops.head_gradient import GradientBuffer
from megatron_rl.ops.vocab_parallel import Shard

LOGITS_BYTES = 1_250_000_000
"""Most bytes that the logits of a chunk may take. Every chunk reads and writes the whole gradient
of the head, so few are better. With 151,936 columns of 16 bits a chunk has 4,113 rows."""


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
                as many as fit into LOGITS_BYTES.
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
            chunk_rows = max(1, LOGITS_BYTES // (len(weight) * hidden.element_size()))
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows={chunk_rows}: must be >= 1: a chunk holds whole rows")
        num_chunks = -(-len(hidden) // chunk_rows)
        return -(-len(hidden) // max(num_chunks, 1))
