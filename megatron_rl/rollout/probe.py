"""The start-up check that the engine samples from the very weights that are trained."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_rl.batching.measured import measured_samples
from megatron_rl.batching.packer import Packer
from megatron_rl.errors import RunError
from megatron_rl.parallel.collectives import max_over, sum_over
from megatron_rl.rollout.sampler import Sampler
from megatron_rl.types import Draw, MicroBatch, Prompt, RolloutGroup

if TYPE_CHECKING:  # it imports Megatron-Core, which must be entered first
    from megatron_rl.policy.policy import Policy

PROMPTS_PER_ENGINE = 8
MAX_RESPONSE_TOKENS = 16


class NoGrader:
    """The probe asks for log-probs, not for verdicts."""

    def submit(
        self,
        key: tuple[int, int],
        response_text: str,
        answer: str,
        num_tokens: int,
        *,
        opens_thought: bool,
    ) -> None:
        pass

    def poll(self) -> None:
        pass


def draw_probe(
    sampler: Sampler, draw: Draw, prompts: Sequence[Prompt], *, engines: int, policy_version: int
) -> list[RolloutGroup]:
    """This rank's groups of a little that is sampled, from the first of the prompts; every rank of
    the engines calls it.
    """
    short = replace(
        draw,
        purpose="probe",
        group_size=1,
        max_response_tokens=min(MAX_RESPONSE_TOKENS, draw.max_response_tokens),
    )
    asked = prompts[: PROMPTS_PER_ENGINE * engines]
    return sampler.generate(
        asked, short, iteration=0, policy_version=policy_version, grader=NoGrader()
    )


def check_engine(
    groups: Sequence[RolloutGroup],
    policy: "Policy",
    packer: Packer,
    *,
    bound: float,
    scoring: AbstractContextManager[None] | None = None,
) -> str:
    """Score what was sampled, and say how far policy and engine are apart; every rank calls it.

    groups: this rank's. scoring: the policy is asked inside.

    Raises:
        RunError: on all ranks, if a sampled token's log-probs differ by more than the bound.
    """
    batches = packer.pack_for_measuring(measured_samples(groups))
    with scoring or nullcontext():
        scored = policy.logprobs(batches) or []
    own = max((_gap(b, v) for b, v in zip(batches, scored, strict=False)), default=0.0)
    gap = max_over([own], policy.groups.world)[0]
    if not gap <= bound:
        raise RunError(
            f"engine probe: policy and engine differ by {gap:.3g} nats on a sampled token; "
            f"rollout.max_logprob_gap allows {bound}. The engine samples from other weights or "
            "another network than is trained; if the difference is the dtype's, raise it"
        )
    (count,) = sum_over([len(groups)], policy.groups.world)
    return f"engine probe: largest log-prob gap {gap:.1e} over {count:.0f} responses"


def _gap(batch: MicroBatch, logprobs: Tensor) -> float:
    """Largest difference of one row; logprobs [N] are the policy's."""
    sampled = batch.loss.rollout_logprobs
    if sampled is None or not len(logprobs):
        return 0.0
    difference = (sampled - logprobs).abs()
    # Comparisons with nan are false: max() and the collective would drop it.
    return float(difference.nan_to_num(nan=torch.inf).max())
