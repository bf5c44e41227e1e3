"""Settings of ranks that only sample, their place in the job, and what passes between the sides."""

import os
from types import SimpleNamespace

import pytest
import torch

from megatron_rl.config import RunConfig, problems, world_problems
from megatron_rl.parallel import place
from megatron_rl.parallel.layout import EngineLayout
from megatron_rl.parallel.sides import take_side
from megatron_rl.rollout import exchange
from megatron_rl.rollout.exchange import Exchange, Told
from megatron_rl.types import Prompt, Rollout, RolloutGroup


def recipe(**sections):
    return RunConfig.model_validate(
        {
            "run": {"output_dir": "none", "num_iterations": 3, **sections.pop("run", {})},
            "model": {"path": "none"},
            "prompts": {"path": "none"},
            "algorithm": {"preset": "grpo"},
            **sections,
        }
    )


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"run": {"lag": 1}}, "run.lag=1: ranks that train cannot sample meanwhile"),
        (
            {"rollout": {"separate_ranks": 2, "engine": "megatron"}},
            "rollout.separate_ranks=2: rollout.engine=megatron is the policy itself",
        ),
        (
            {"rollout": {"separate_ranks": 2}, "algorithm": {"preset": "sft"}},
            "rollout.separate_ranks=2: no engine samples in this run",
        ),
        (
            {"rollout": {"separate_ranks": 2}, "debug": {"replay": "runs/a"}},
            "rollout.separate_ranks=2: no engine samples in this run",
        ),
        (
            {"rollout": {"separate_ranks": 2}, "parallel": {"auto": True}},
            "parallel.auto=True: chooses for ranks that train and sample in turns",
        ),
        ({"run": {"lag": 1}, "rollout": {"separate_ranks": 2}}, None),
        ({"rollout": {"separate_ranks": 2}}, None),
    ],
)
def test_what_cannot_be_is_refused_with_a_way_out(sections, told):
    found = [str(problem) for problem in problems(recipe(**sections))]
    assert [told in text for text in found] == [True] * (told is not None)
    assert all(". Set " in text for text in found)


@pytest.mark.parametrize(
    ("world", "separate", "engine", "tp", "told"),
    [
        (8, 4, 2, 4, []),
        (8, 3, 1, 5, []),
        (8, 8, 1, 1, ["of the 8 ranks of this run none is left to train"]),
        (8, 2, 4, 2, ["must divide the 2 ranks of rollout.separate_ranks"]),
        (8, 2, 1, 4, ["must divide the 6 ranks that train"]),
        (9, 1, 1, 2, []),
    ],
)
def test_both_sides_must_hold_their_layouts(world, separate, engine, tp, told):
    config = recipe(
        rollout={"separate_ranks": separate, "tensor_model_parallel_size": engine},
        parallel={"tensor_model_parallel_size": tp},
    )
    found = [str(problem) for problem in world_problems(config, world)]
    assert [part in text for part, text in zip(told, found, strict=True)] == [True] * len(told)


@pytest.mark.parametrize(
    ("lag", "algorithm", "old", "is_told"),
    [
        (0, {"preset": "grpo"}, False, False),
        (1, {"preset": "grpo"}, True, False),
        (1, {"preset": "grpo", "rollout_correction": {}}, False, False),
        (1, {"preset": "raft"}, False, True),
    ],
)
def test_old_samples_are_made_up_for_or_told(lag, algorithm, old, is_told):
    config = recipe(run={"lag": lag}, rollout={"separate_ranks": 2 * lag}, algorithm=algorithm)
    assert config.steps_of_iteration["by_engine"] == old
    notices = [text for text in config.notices if text.startswith("run.lag=1: samples of")]
    assert len(notices) == is_told


def test_nothing_leaves_the_device_of_ranks_that_only_train():
    assert recipe().offload_on("cuda") == "optimizer"
    assert recipe(rollout={"separate_ranks": 1}).offload_on("cuda") == "none"


def test_engines_are_counted_from_their_first_rank():
    engines = EngineLayout(world_size=4, tp=2, first=3)
    assert engines.in_step == ((3, 4), (5, 6))
    assert engines.ranks_of(1) == (4, 6)
    assert [engines.engine_of(rank) for rank in (3, 4, 5, 6)] == [0, 0, 1, 1]
    assert [engines.has(rank) for rank in (2, 3, 6, 7)] == [False, True, True, False]


def test_a_side_counts_its_ranks_from_nought(monkeypatch):
    found = []
    for rank in range(5):
        monkeypatch.setattr(os, "environ", {"RANK": str(rank), "WORLD_SIZE": "5"})
        side = take_side(2)
        assert (place.job_rank(), place.job_size()) == (rank, 5)
        found.append((side.name, side.rank, side.size, side.is_main, side.trainers))
    assert found == [
        ("training", 0, 3, True, 3),
        ("training", 1, 3, False, 3),
        ("training", 2, 3, False, 3),
        ("sampling", 0, 2, False, 3),
        ("sampling", 1, 2, False, 3),
    ]


def test_without_separate_ranks_there_is_one_side(monkeypatch):
    monkeypatch.setattr(os, "environ", {"RANK": "1", "WORLD_SIZE": "2"})
    side = take_side(0)
    assert (side.name, side.rank, side.size) == ("all", 1, 2)
    assert place.JOB_RANK not in os.environ


def group_of(number, size):
    prompt = Prompt(group_id=number, tokens=torch.tensor([5, number]), answer="7", text="1+6?")
    rollouts = tuple(
        Rollout(
            response_tokens=torch.arange(size + place),
            rollout_logprobs=-torch.rand(size + place),
            finish_reason="stop",
            policy_version=3,
            text="7" * place,
            reward=float(place),
        )
        for place in range(3)
    )
    return RolloutGroup(prompt=prompt, rollouts=rollouts)


def test_groups_reach_the_rank_whose_turn_it_is(monkeypatch):
    """Of messages of any length, in the order of the prompts."""
    side = SimpleNamespace(trainers=2, is_main=False)
    end = Exchange(SimpleNamespace(side=side, world=None))
    groups = [group_of(number, size=number) for number in (7, 8, 12, 13, 14)]
    sent = {}

    def send(messages, to_ranks, _group):
        for message, rank in zip(messages, to_ranks, strict=True):
            sent.setdefault(rank, []).append(message)
        return torch.cat(sent[1]) if not messages else torch.empty(0)

    told = Told(num_prompts=5, metrics={"time/sampling_s": 1.0})
    monkeypatch.setattr(exchange, "send_messages", send)
    monkeypatch.setattr(exchange, "all_gather_objects", lambda item, group: [None, None, told])
    end.give(told, list(reversed(groups)), [group.prompt for group in groups])
    heard, found = end.take()
    assert heard == told
    assert list(found) == [1, 3]
    for number, rollouts in found.items():
        for one, other in zip(rollouts, groups[number].rollouts, strict=True):
            assert torch.equal(one.response_tokens, other.response_tokens)
            assert torch.equal(one.rollout_logprobs, other.rollout_logprobs)
            assert (one.text, one.reward, one.policy_version) == (other.text, other.reward, 3)
