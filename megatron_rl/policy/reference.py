"""The frozen model whose log-probs the policy's are compared with."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from megatron_rl.policy.policy import Policy
from megatron_rl.types import MicroBatch, MiniBatch


class Reference(Protocol):
    """A frozen model."""

    def logprobs(self, batches: Sequence[MiniBatch]) -> list[list[Tensor] | None]:
        """Of each mini-batch what Policy.logprobs says of its rows; every rank calls it."""
        ...


class FirstWeights:
    """The policy's network with the weights that it started from."""

    def __init__(self, policy: Policy, weights: Mapping[str, Tensor]) -> None:
        """weights: this rank's, in host memory."""
        self._policy, self._weights = policy, weights

    def logprobs(self, batches: Sequence[MiniBatch]) -> list[list[Tensor] | None]:
        with self._policy.weights_replaced(self._weights):
            return [self._policy.logprobs(_as_it_routes(batch)) for batch in batches]


class OtherModel:
    """A network of its own."""

    def __init__(self, model: Policy, *, leaves: bool = False) -> None:
        """model: never trained. leaves: it is on the device for its own passes only."""
        self.model, self._leaves = model, leaves

    def logprobs(self, batches: Sequence[MiniBatch]) -> list[list[Tensor] | None]:
        values = [self.model.logprobs(_as_it_routes(batch)) for batch in batches]
        if self._leaves:
            self.model.residence.weights_leave()
        return values


def _as_it_routes(batch: MiniBatch) -> list[MicroBatch]:
    """The rows without the engine's choice of experts, which is the policy's."""
    return [row.without_experts for row in batch.microbatches]
