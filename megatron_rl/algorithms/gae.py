"""Advantages per token: rewards of tokens, generalized advantage estimation, the KL controller.

Responses are padded to a common length: tensors are [S, R], 0 past the end of a response.
"""

import torch
from torch import Tensor


def token_rewards(
    rewards: Tensor,
    lengths: Tensor,
    *,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    kl_coef: float,
) -> Tensor:
    """r_t = r * 1[t = last] - kl_coef * (log pi_old - log ref), [S, R].

    Source: Ziegler et al. 2019, arXiv:1909.08593, eq. 2.

    Args:
        rewards: [S], one per response.
        lengths: [S] int64, at least 1.
        old_logprobs, ref_logprobs: [S, R]; not needed if kl_coef is 0.
        kl_coef: in reward per nat.
    """
    result = rewards.new_zeros(len(rewards), int(lengths.max()) if len(lengths) else 0)
    result[torch.arange(len(rewards)), lengths - 1] = rewards
    if kl_coef:
        assert old_logprobs is not None
        assert ref_logprobs is not None
        result -= kl_coef * (old_logprobs - ref_logprobs)
    return result


def gae(rewards: Tensor, values: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns (advantages + values), [S, R] each; past the end the value is 0.

    A_t = sum_l (gamma lam)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l}).
    Source: Schulman et al. 2015, arXiv:1506.02438, eq. 16.
    """
    advantages = torch.zeros_like(values)
    ahead, next_value = values.new_zeros(len(values)), values.new_zeros(len(values))
    for t in reversed(range(values.size(1))):
        ahead = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * ahead
        advantages[:, t] = ahead
        next_value = values[:, t]
    return advantages, advantages + values


def adapted_kl_coef(
    kl_coef: float, *, kl: float, target: float, responses: int, horizon: int
) -> float:
    """The coefficient for the next iteration, after this many responses with this mean KL.

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2. kl and target in nats per response.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * responses / horizon)
