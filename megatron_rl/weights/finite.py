"""Weights that are NaN or infinite, found by name right after they were read."""

from collections.abc import Sequence

import torch

from megatron_rl.weights.pieces import Piece, Tensors


@torch.no_grad()
def first_not_finite(params: Tensors, pieces: Sequence[Piece]) -> str | None:
    """The first element that is not finite, as "name[3, 7] is nan"; None where all are finite.

    Cost: one pass over the weights, and a host sync for each piece.
    """
    for piece in pieces:
        values = piece.of(params)
        if values.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(values))).all()):
            continue
        at = (~torch.isfinite(values)).nonzero()[0].tolist()
        place = [lo + offset for (lo, _), offset in zip(piece.box, at, strict=True)]
        return f"{piece.hf}{place} is {float(values[tuple(at)])}"
    return None
