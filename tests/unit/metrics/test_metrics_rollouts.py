import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_rl.metrics.config import MetricsConfig
from megatron_rl.metrics.rollouts import RolloutLog
from megatron_rl.types import Prompt, Rollout, RolloutGroup, Verdict


@pytest.fixture(scope="module")
def groups():
    """The process groups of a single rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield SimpleNamespace(world=dist.group.WORLD, is_main=True)
    dist.destroy_process_group()


def prompt(number):
    return Prompt(
        group_id=number,
        tokens=torch.tensor([1]),
        answer=f"{number}",
        source="train",
        text=f"{number}?\u2028",
    )


def graded(number):
    rollout = Rollout(
        response_tokens=torch.tensor([5, 6, 7]),
        rollout_logprobs=None,
        finish_reason="length",
        policy_version=0,
        text=r"so \boxed{4}",
        reward=-1.0,
        verdict=Verdict.WRONG,
        extracted="4",
    )
    return RolloutGroup(prompt=prompt(number), rollouts=(rollout,))


def kept(directory):
    lines = (directory / "rollouts.jsonl").read_text().splitlines()
    return [(row["iteration"], row["group"]) for row in map(json.loads, lines)]


def test_a_line_holds_what_a_reader_asks_for(groups, tmp_path):
    config = MetricsConfig(rollouts_every=1)
    RolloutLog(config, tmp_path, groups).keep([graded(7)], [prompt(7)], iteration=3)
    assert json.loads((tmp_path / "rollouts.jsonl").read_text()) == {
        "iteration": 3,
        "prompt": "7?\u2028",
        "answer": "7",
        "source": "train",
        "group": 7,
        "responses": [
            {
                "text": r"so \boxed{4}",
                "verdict": "wrong",
                "extracted": "4",
                "reward": -1.0,
                "tokens": 3,
                "truncated": True,
            }
        ],
    }


def test_no_more_than_asked_for_and_only_in_iterations_that_ask(groups, tmp_path):
    log = RolloutLog(MetricsConfig(rollouts_every=2, rollouts_groups=3), tmp_path, groups)
    numbers = list(range(10, 18))
    for iteration in (1, 2, 3, 4):
        # A rank's groups come in any order.
        log.keep([graded(n) for n in numbers[::-1]], [prompt(n) for n in numbers], iteration)
    assert kept(tmp_path) == [(i, number) for i in (2, 4) for number in (10, 13, 16)]
    off = RolloutLog(MetricsConfig(), tmp_path / "off", groups)
    off.keep([graded(1)], [prompt(1)], 1)
    assert not (tmp_path / "off").exists()


def test_a_resumed_run_replaces_what_it_repeats(groups, tmp_path):
    config = MetricsConfig(rollouts_every=1)
    first = RolloutLog(config, tmp_path, groups)
    for iteration in (1, 2, 3):
        first.keep([graded(iteration)], [prompt(iteration)], iteration)
    resumed = RolloutLog(config, tmp_path, groups)
    for iteration in (2, 3):
        resumed.keep([graded(20 + iteration)], [prompt(20 + iteration)], iteration)
    assert kept(tmp_path) == [(1, 1), (2, 22), (3, 23)]
