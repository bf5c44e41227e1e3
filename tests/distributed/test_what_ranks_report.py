"""The meter, the selector and gold rollouts on two ranks: what one rank alone does not know."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from harness import run_on_ranks

from megatron_rl.algorithms.algorithm import Algorithm
from megatron_rl.algorithms.config import AlgorithmConfig
from megatron_rl.algorithms.selector import Selector
from megatron_rl.metrics.meter import Meter
from megatron_rl.rollout.gold import GoldRollouts
from megatron_rl.types import Prompt, Rollout, RolloutGroup, Verdict


def world_of(peak_bytes: int) -> SimpleNamespace:
    """The few fields of Groups that are read here."""
    return SimpleNamespace(
        rank=dist.get_rank(),
        world=dist.group.WORLD,
        layout=SimpleNamespace(world_size=dist.get_world_size()),
        platform=SimpleNamespace(
            synchronize=lambda: None,
            peak_memory_bytes=lambda: peak_bytes,
            used_memory_bytes=lambda: 2 * peak_bytes,
            device_type="cpu",
        ),
    )


def prompt(group_id: int) -> Prompt:
    return Prompt(
        group_id=group_id,
        tokens=torch.tensor([1]),
        answer="",
        gold_tokens=torch.ones(group_id + 1, dtype=torch.int64),
    )


def group(group_id: int, *rewards: float | None) -> RolloutGroup:
    """Response k has k + 1 tokens of log-prob -0.5 each."""
    return RolloutGroup(
        prompt=prompt(group_id),
        rollouts=tuple(
            Rollout(
                response_tokens=torch.ones(length, dtype=torch.int64),
                rollout_logprobs=torch.full((length,), -0.5),
                finish_reason="stop",
                policy_version=0,
                reward=reward,
                verdict=Verdict.ERROR
                if reward is None
                else (Verdict.CORRECT if reward > 0 else Verdict.WRONG),
            )
            for length, reward in enumerate(rewards, start=1)
        ),
    )


OF_RANKS = (
    [group(0, 1.0, -1.0), group(2, -1.0, -1.0)],
    [group(1, 1.0, None, 1.0)],
)


def count_and_take() -> None:
    rank = dist.get_rank()
    meter = Meter(world_of(peak_bytes=(rank + 1) << 30))
    verdicts = meter.count(OF_RANKS[rank])
    assert (verdicts[Verdict.CORRECT], verdicts[Verdict.ERROR]) == (3, 1)
    with meter.phase("rollout"):
        meter.report({"policy/kl_ref_k1": 0.25, "policy/loss": 1.0})
    meter.report({"policy/loss": 2.0})
    values = meter.take()
    assert values["rollout/tokens"] == 3 + 3 + 6
    assert values["reward/mean"] == pytest.approx((1 - 1 - 1 - 1 + 1 + 1) / 6)  # of the graded
    assert values["policy/loss"] == 2.0
    assert values["memory/peak_gib"] == 2.0
    assert values["policy/kl_initial_k1"] == 0.25  # nothing else measured it
    assert values["rollout/tokens_per_s"] == 12 / values["time/rollout_s"]
    told: list[dict[str, float]] = [{}, {}]
    dist.all_gather_object(told, values)
    assert told[0] == told[1]
    assert set(meter.take()) == {"time/iteration_s", "memory/peak_gib"}
    meter.report({"policy/loss": 3.0, "policy/kl_ref_k3": 1.0, "policy/kl_initial_k3": 2.0})
    meter.restart()
    assert "policy/loss" not in meter.take()


def select_on_ranks() -> None:
    rank = dist.get_rank()
    reported: dict[str, float] = {}
    selector = Selector(
        algorithm=Algorithm(AlgorithmConfig(preset="reinforce_rej")),
        world=dist.group.WORLD,
        prompts_per_update=2,
        run_seed=0,
        report=reported.update,
    )
    prompts = [prompt(number) for number in range(3)]
    selection = selector.select(OF_RANKS[rank], prompts, iteration=1)
    # Only group 0 is mixed; group 2 is the second mini-batch's.
    assert [(s.group_id, s.advantage) for s in selection.samples] == (
        [(0, 1.0), (0, -1.0)] if rank == 0 else []
    )
    assert sorted(selection.totals) == [0, 1]
    assert reported == {
        "algorithms/kept_responses_frac": 2 / 6,
        "algorithms/kept_tokens_frac": 3 / 10,  # 1 + 2 of 1 + 2, 1 + 2 and 1 + 3
        "algorithms/unusable_responses": 1.0,
    }


def whiten_on_ranks() -> None:
    """Whitening is over all ranks' tokens: 2 tokens of +1 here, 2 of -1 there."""
    rank = dist.get_rank()
    own = [group(rank, 1.0 - 2 * rank, 3.0 - 2 * rank)]
    selector = Selector(
        algorithm=Algorithm(
            AlgorithmConfig(preset="reinforce_pp_baseline", std_ddof=0, std_eps=0.0)
        ),
        world=dist.group.WORLD,
        prompts_per_update=None,
        run_seed=0,
        report=lambda values: None,
    )
    selection = selector.select(own, [prompt(0), prompt(1)], iteration=1)
    # Less the group's mean: -1 on one token and +1 on two, on both ranks. The mean over tokens is
    # 1/3, the variance 8/9.
    expected = [(-1 - 1 / 3) / (8 / 9) ** 0.5, (1 - 1 / 3) / (8 / 9) ** 0.5]
    assert [s.advantage for s in selection.samples] == pytest.approx(expected, abs=1e-12)


def draw_gold() -> None:
    groups = world_of(0)
    rollouts = GoldRollouts(groups, Meter(groups))
    own = rollouts.generate([prompt(n) for n in range(5)], iteration=1, policy_version=4)
    assert [g.prompt.group_id for g in own] == [[0, 2, 4], [1, 3]][groups.rank]
    assert [len(g.rollouts[0].response_tokens) for g in own] == [[1, 3, 5], [2, 4]][groups.rank]
    assert {g.rollouts[0].policy_version for g in own} == {4}
    assert rollouts.grade(own) == own
    rollouts.count(own)
    assert rollouts.evaluate(1, 4).metrics() == {}
    values = rollouts._meter.take()
    assert values["rollout/tokens"] == 15
    assert not [name for name in values if name.startswith("reward/")]


@pytest.mark.parametrize("work", [count_and_take, select_on_ranks, whiten_on_ranks, draw_gold])
def test_two_ranks(work):
    run_on_ranks(2, work)
