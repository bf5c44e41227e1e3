"""The tokens that vLLM drew each token of a request from, under top-k and top-p.

vLLM 0.32 returns them on a GPU (`return_sampling_mask`). On a CPU it refuses that setting: its
newer model runner has to have Triton. Its sampler gives back log-probs of the truncated softmax
there, too, so we take from every step which of a row's are finite.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class SupportOfRequests:
    """What the requests that an engine on a CPU is at draw from."""

    def __init__(self, runner: Any) -> None:
        """runner: vLLM's model runner."""
        self._runner = runner
        self._of_request: dict[str, list[Tensor]] = {}
        inner = runner.sampler.topk_topp_sampler
        self._sample = inner.forward
        inner.forward = self._sample_and_keep

    def take(self, request_id: str) -> Tensor | None:
        """[R, K] int32 of a request that is finished; None: it drew from the whole vocabulary."""
        kept = self._of_request.pop(request_id, None)
        return None if kept is None else padded(kept)

    def forget(self) -> None:
        """Drop what is kept of requests that were broken off."""
        self._of_request.clear()

    def _sample_and_keep(self, logits: Tensor, generators: Any, k: Any, p: Any) -> Any:
        sampled, logprobs = self._sample(logits, generators, k, p)
        if k is None and p is None:  # a top_k of the whole vocabulary is None, beside a top_p too
            return sampled, logprobs
        # A step has a row for each request; none is in the middle of its prompt (vllm_engine.py).
        for row, internal_id in zip(logprobs, self._runner.input_batch.req_ids, strict=True):
            # vLLM puts a random part behind the name that we gave.
            kept = self._of_request.setdefault(internal_id.rpartition("-")[0], [])
            kept.append(row.isfinite().nonzero()[:, 0].int())
        return sampled, logprobs


def padded(tokens: Sequence[Tensor | Sequence[int]]) -> Tensor:
    """[R, K] int32 of the ids of each token, with -1 behind the last of them."""
    rows = [torch.as_tensor(ids, dtype=torch.int32) for ids in tokens]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
