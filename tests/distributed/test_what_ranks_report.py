"""The meter, the selector and gold rollouts on two ranks: what one rank alone does not know."""

from itertools import islice
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from harness import run_on_ranks

from megatron_rl.algorithms.algorithm import Algorithm
from megatron_rl.algorithms.config import AlgorithmConfig
from megatron_rl.algorithms.selector import Selector
from megatron_rl.metrics.meter import Meter
from megatron_rl.parallel.layout import EngineLayout
from megatron_rl.parallel.stop import StopRequest
from megatron_rl.reward.scorer import Score
from megatron_rl.rollout.config import RoundsConfig
from megatron_rl.rollout.engine import Response
from megatron_rl.rollout.gold import GoldRollouts
from megatron_rl.rollout.rounds import Rounds, RoundsPlan, round_metrics
from megatron_rl.rollout.sampler import Sampler
from megatron_rl.types import Draw, Prompt, Rollout, RolloutGroup, Verdict


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
        "algorithms/kept_responses": 2,
        "algorithms/kept_responses_frac": 2 / 6,
        "algorithms/kept_tokens": 3,
        "algorithms/kept_tokens_frac": 3 / 10,  # 1 + 2 of 1 + 2, 1 + 2 and 1 + 3
        "algorithms/unusable_responses": 1.0,
        "algorithms/wasted_responses": 5,
        "algorithms/wasted_tokens": 9,  # with the 2 that could not be graded
    }


def fill_on_ranks() -> None:
    """Of five groups the first two that are mixed make the batch, in the order of the prompts."""
    rank = dist.get_rank()
    own = (
        [group(0, 1.0, 1.0), group(3, -1.0, 1.0), group(9, 1.0, -1.0)],
        [group(1, 1.0, None, -1.0), group(2, -1.0, -1.0)],
    )[rank]
    reported: dict[str, float] = {}
    selector = Selector(
        algorithm=Algorithm(AlgorithmConfig(preset="dapo")),
        world=dist.group.WORLD,
        prompts_per_update=1,
        num_mixed=2,
        run_seed=0,
        report=reported.update,
    )
    prompts = [prompt(number) for number in (0, 1, 2, 3, 9)]
    selection = selector.select(own, prompts, iteration=1)
    # Group 1 is the first mini-batch, group 3 the second, and group 9 is left over.
    expected = [[(1, 3, 0), (1, 3, 1)], [(0, 1, 0), (0, 1, 2)]][rank]
    assert [(s.update, s.group_id, s.index) for s in selection.samples] == expected
    assert selection.collected_sequences == 2
    assert reported == {
        "algorithms/kept_responses": 4,
        "algorithms/kept_responses_frac": 4 / 10,
        "algorithms/kept_tokens": 7,  # 1 + 3 and 1 + 2
        "algorithms/kept_tokens_frac": 7 / 16,
        "algorithms/unusable_responses": 1,
        "algorithms/wasted_responses": 7,
        "algorithms/wasted_tokens": 11,
    }


class Marked:
    """An engine that answers at once: response k of a prompt is right where MARKS has a +."""

    def __init__(self) -> None:
        self.asked: list[list[tuple[int, int]]] = []

    def generate(self, requests, on_finished, between_steps) -> None:
        self.asked.append([request.key for request in requests])
        for request in requests:
            tokens, logprobs = torch.tensor(request.key), torch.zeros(2)
            on_finished(
                Response(key=request.key, tokens=tokens, logprobs=logprobs, finish_reason="stop")
            )


class Marks:
    """Its scorer."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self._keys: list[tuple[int, int]] = []

    def submit(self, key, *_, **__) -> None:
        self._keys.append(key)

    def collect(self) -> dict[tuple[int, int], Score]:
        keys, self._keys = self._keys, []
        right, wrong = Score(Verdict.CORRECT, 1.0, None, 0), Score(Verdict.WRONG, -1.0, None, 0)
        return {key: right if MARKS[key[0]][key[1]] == "+" else wrong for key in keys}


# Of the first four, prompts 0 and 1 are the first engine's, 2 and 3 the second's, as their
# lengths have it. The second engine's leave after the first round.
MARKS = ("++++++", "++--++", "+-", "+-", "-+", "----+-")


def rounds_on_ranks(*, shared: bool) -> None:
    """Every rank takes part in every round, also where its prompts have left.

    shared: one engine over both ranks, which divide its groups, or one engine each.
    """
    rank = dist.get_rank()
    lengths = (4, 1, 3, 2, 1, 1)
    prompts = [
        Prompt(group_id=number, tokens=torch.ones(length, dtype=torch.int64), answer="")
        for number, length in enumerate(lengths)
    ]
    following = iter(prompts[4:])
    engines = EngineLayout(world_size=2, tp=1 + shared)
    groups = SimpleNamespace(rank=rank, engines=engines, world=dist.group.WORLD)
    plan = RoundsPlan(
        config=RoundsConfig(max_responses=6, fill=True),
        group_size=2,
        max_responses=6,
        num_wanted=4,
        max_prompts=6,
    )
    engine, scorer, reported = Marked(), Marks(), dict[str, float]()
    rounds = Rounds(
        plan=plan,
        draw=Draw(purpose="train", group_size=2, temperature=1.0, max_response_tokens=4),
        sampler=Sampler(engine, SimpleNamespace(decode=str), groups, run_seed=1),
        scorer=scorer,
        stop=StopRequest(),
        world=dist.group.WORLD,
        more=lambda count: list(islice(following, count)),
        say=lambda line: None,
    )
    own = rounds.generate(prompts[:4], iteration=1, policy_version=0, report=reported.update)
    # Three rounds for prompt 0; then one group is missing, at 4 of 5: two more prompts, of which
    # the last needs three rounds again.
    assert reported == {"rollout/rounds": 6}
    assert len(engine.asked) == 6
    counts = {each.prompt.group_id: len(each.rollouts) for each in own}
    everywhere: list[dict[int, int]] = [{}, {}]
    dist.all_gather_object(everywhere, counts)
    assert everywhere[0].keys().isdisjoint(everywhere[1])
    assert everywhere[0] | everywhere[1] == {0: 6, 1: 4, 2: 2, 3: 2, 4: 2, 5: 6}
    if shared:
        assert [len(keys) for keys in engine.asked] == [8, 4, 2, 4, 2, 2]
        assert all(len(counts) == 3 for counts in everywhere)
    else:
        assert set(everywhere[0]) >= {0, 1}
        assert set(everywhere[1]) >= {2, 3}
    if rank == 1 and not shared:
        assert engine.asked[1] == engine.asked[2] == []
    values = round_metrics(own, plan, dist.group.WORLD)
    assert values["rollout/prompts"] == 6
    assert (values["rollout/filled_groups"], values["rollout/missing_groups"]) == (4, 0)


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


def select_fill_and_rounds() -> None:
    select_on_ranks()
    fill_on_ranks()
    rounds_on_ranks(shared=False)
    rounds_on_ranks(shared=True)


@pytest.mark.parametrize(
    "work", [count_and_take, select_fill_and_rounds, whiten_on_ranks, draw_gold]
)
def test_two_ranks(work):
    run_on_ranks(2, work)
