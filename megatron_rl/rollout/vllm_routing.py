"""The experts that vLLM chose for the tokens of a request.

vLLM 0.32 returns them on a GPU (`enable_return_routed_experts`). On a CPU it refuses that setting:
its newer model runner has to have Triton. Its routers call a hook there, too, so we take the rows
of every step from the hook and give them to the requests of that step.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def narrowest(num_experts: int) -> torch.dtype:
    """The dtype of what is kept for each token of a rollout."""
    return torch.uint8 if num_experts <= 256 else torch.int16


class RoutedRequests:
    """Chosen experts of the requests that an engine on a CPU is at, prompts among their tokens."""

    def __init__(self, runner: Any, layers: Sequence[int], num_experts: int) -> None:
        """runner: vLLM's model runner. layers: those with experts."""
        from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
            bind_routed_experts_capturer,
        )

        self._runner, self._layers = runner, tuple(layers)
        self._dtype = narrowest(num_experts)
        self._of_step: dict[int, Tensor] = {}
        self._of_request: dict[str, list[Tensor]] = {}
        hook: Any = self  # it asks for `capture` and nothing else
        bind_routed_experts_capturer(runner.get_model(), hook)
        self._execute = runner.execute_model
        runner.execute_model = self._execute_and_keep

    def capture(self, layer_id: int, topk_ids: Tensor) -> None:
        """vLLM's hook: the experts [tokens of the step, K] of one layer."""
        self._of_step[layer_id] = topk_ids.to(self._dtype)

    def take(self, request_id: str) -> Tensor:
        """[P + R - 1, L, K] of a request that is finished: all of its tokens but the last."""
        return torch.cat(self._of_request.pop(request_id))

    def forget(self) -> None:
        """Drop what is kept of requests that were broken off."""
        self._of_request.clear()

    def _execute_and_keep(self, step: Any, *args: Any, **settings: Any) -> Any:
        self._of_step.clear()
        output = self._execute(step, *args, **settings)
        counts = step.num_scheduled_tokens
        if not counts:
            return output
        rows = torch.stack([self._of_step[layer] for layer in self._layers], dim=1)
        batch, at = self._runner.input_batch, 0
        for place, internal_id in enumerate(batch.req_ids):
            count = counts[internal_id]
            # vLLM puts a random part behind the name that we gave.
            kept = self._of_request.setdefault(internal_id.rpartition("-")[0], [])
            if not batch.num_computed_tokens_cpu[place]:
                kept.clear()  # it was put off for want of memory, and begins anew
            kept.append(rows[at : at + count].clone())
            at += count
        return output
