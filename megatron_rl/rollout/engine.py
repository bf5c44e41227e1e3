"""The interface of a sampling engine."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

PROMPT_TOKENS_PER_STEP = 8192
"""Tokens of prompts in one forward pass, where an engine has no measure of its own: of vLLM on a
CPU, and of the policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One response to sample."""

    key: tuple[int, int]  # group_id, index in the group
    prompt_tokens: tuple[int, ...]
    temperature: float  # 0 is greedy
    max_tokens: int
    seed: int
    top_k: int = -1  # both as of the draw, and the same in all requests of a call
    top_p: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Response:
    """The response to a request."""

    key: tuple[int, int]
    tokens: Tensor  # [R] int64
    logprobs: Tensor  # [R] float32 nats at the sampling temperature
    finish_reason: Literal["stop", "length"]
    experts: Tensor | None = None  # [P + R - 1, L, K], where the engine was asked for them
    support: Tensor | None = None  # [R, K] int32 as of a rollout, where top_k is not -1


class Engine(Protocol):
    """A sampling engine on this rank (its shard of it, with tensor parallelism)."""

    def generate(
        self,
        requests: Sequence[Request],
        on_finished: Callable[[Response], None],
        between_steps: Callable[[], bool],
    ) -> None:
        """Sample all requests; all ranks of one engine make the same call.

        on_finished gets each response while others go on; between_steps runs after engine steps,
        and what is unfinished is dropped where it returns False, on all ranks of the engine.
        """
        ...

    def sleep(self, *, keeps_weights: bool = False) -> None:
        """Give the device memory to the trainer, where the engine can.

        keeps_weights: they wait in host memory, and `wake` brings them back.
        """
        ...

    @property
    def is_awake(self) -> bool: ...

    def wake(self) -> None:
        """Take all memory again, after a sleep that kept the weights."""
        ...

    def wake_for_weights(self) -> None: ...

    def wake_for_generation(self) -> None: ...

    def shutdown(self) -> None: ...


def request_seed(run_seed: int, purpose: str, iteration: int, group_id: int, index: int) -> int:
    """A request's own seed: the same tokens are sampled again after a resume, in any order."""
    text = f"{run_seed}/{purpose}/{iteration}/{group_id}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 2
