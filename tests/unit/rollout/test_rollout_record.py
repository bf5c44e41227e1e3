"""Graded rollouts on disk and back."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_rl.errors import InputError
from megatron_rl.rollout.record import ReplayedRollouts, RolloutRecord, recorded
from megatron_rl.types import Prompt, Rollout, RolloutGroup, Verdict


def place(rank, world_size):
    layout = SimpleNamespace(world_size=world_size)
    return SimpleNamespace(rank=rank, is_main=rank == 0, layout=layout)


def prompt(group_id):
    return Prompt(group_id=group_id, tokens=torch.tensor([5, group_id]), answer="7", text="1+6?")


def group(group_id):
    rollouts = [
        Rollout(
            response_tokens=torch.tensor([7, 2]),
            rollout_logprobs=torch.tensor([-0.5, -1.25]),
            finish_reason="stop",
            policy_version=3,
            text="7",
            reward=reward,
            verdict=verdict,
            reward_parts={"format": 0.5},
            extracted=extracted,
        )
        for reward, verdict, extracted in (
            (1.0, Verdict.CORRECT, "7"),
            (None, Verdict.TIMEOUT, None),
        )
    ]
    return RolloutGroup(prompt=prompt(group_id), rollouts=tuple(rollouts))


@pytest.fixture
def run(tmp_path):
    """The directory of a run that recorded iteration 4 on two ranks, three groups on the first."""
    for rank, ids in enumerate(([0, 2, 4], [1, 3])):
        record = RolloutRecord(tmp_path, place(rank, 2), num_iterations=1)
        record.keep([group(number) for number in ids], 4)
    return tmp_path


def replayed(run, rank, world_size, ids=range(5), iteration=4):
    source = ReplayedRollouts(run, place(rank, world_size), meter=None)
    prompts = [prompt(number) for number in ids]
    return source.generate(prompts, iteration=iteration, policy_version=9)


def ids_of(groups):
    return [each.prompt.group_id for each in groups]


def test_each_rank_gets_what_it_had(run):
    assert ids_of(replayed(run, 0, 2)) == [0, 2, 4]
    assert ids_of(replayed(run, 1, 2)) == [1, 3]


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_other_numbers_of_ranks_share_them(run, world_size):
    found = [ids_of(replayed(run, rank, world_size)) for rank in range(world_size)]
    assert sorted(number for own in found for number in own) == [0, 1, 2, 3, 4]


def test_nothing_is_lost_on_the_way(run):
    (found, *_), expected = replayed(run, 0, 2), group(0)
    assert torch.equal(found.prompt.tokens, expected.prompt.tokens)
    for one, other in zip(found.rollouts, expected.rollouts, strict=True):
        assert torch.equal(one.response_tokens, other.response_tokens)
        assert torch.equal(one.rollout_logprobs, other.rollout_logprobs)
        for name in ("reward", "verdict", "reward_parts", "extracted", "text", "policy_version"):
            assert getattr(one, name) == getattr(other, name), name
        assert one.verdict is other.verdict


def test_prompts_that_open_a_thought_are_recorded_as_such(tmp_path):
    thinking = replace(prompt(1), opens_thought=True)
    record = RolloutRecord(tmp_path, place(0, 1), num_iterations=1)
    record.keep([group(0), replace(group(1), prompt=thinking)], 4)
    assert [g.prompt.opens_thought for g in replayed(tmp_path, 0, 1, ids=range(2))] == [False, True]


def test_records_from_before_a_field_was_there_are_read(run):
    for path in (run / "debug" / "iteration_000004").iterdir():
        content = torch.load(path, weights_only=True)
        for each in content["groups"]:
            del each["prompt"]["opens_thought"]
        torch.save(content, path)
    assert {g.prompt.opens_thought for g in replayed(run, 0, 2)} == {False}


def test_only_the_newest_iterations_stay(tmp_path):
    record = RolloutRecord(tmp_path, place(0, 1), num_iterations=2)
    for iteration in range(1, 6):
        record.keep([group(iteration)], iteration)
    assert recorded(tmp_path / "debug") == [4, 5]


def test_without_the_setting_only_what_is_asked_for_is_written(tmp_path):
    record = RolloutRecord(tmp_path, place(0, 1), num_iterations=0)
    record.keep([group(1)], 1)
    assert recorded(tmp_path / "debug") == []
    record.write([group(2)], 2)
    assert recorded(tmp_path / "debug") == [2]


def test_an_iteration_that_is_not_there_is_named_with_those_that_are(run):
    with pytest.raises(InputError, match=r"iteration 5 cannot be read .*; recorded are 4\."):
        replayed(run, 0, 2, iteration=5)


def test_a_missing_rank_and_a_damaged_file_are_told(run):
    (run / "debug" / "iteration_000004" / "rank_1.pt").write_bytes(b"damaged")
    with pytest.raises(InputError, match="iteration 4 cannot be read"):
        replayed(run, 0, 2)
    (run / "debug" / "iteration_000004" / "rank_1.pt").unlink()
    with pytest.raises(InputError, match="iteration 4 cannot be read"):
        replayed(run, 0, 2)


def test_rollouts_to_other_prompts_are_refused(run):
    with pytest.raises(InputError, match="are to other prompts than iteration 4"):
        replayed(run, 0, 2, ids=range(1, 6))


def test_experts_are_kept_and_given_back_where_they_are_asked_for(tmp_path):
    experts = torch.arange(18, dtype=torch.uint8).view(3, 3, 2)
    plain = group(0)
    routed = replace(
        plain, rollouts=tuple(replace(rollout, experts=experts) for rollout in plain.rollouts)
    )
    RolloutRecord(tmp_path, place(0, 1), num_iterations=2).keep([routed], 4)
    RolloutRecord(tmp_path, place(0, 1), num_iterations=2).keep([plain], 5)
    found = {}
    for with_experts in (True, False):
        source = ReplayedRollouts(tmp_path, place(0, 1), meter=None, with_experts=with_experts)
        (found[with_experts],) = source.generate([prompt(0)], iteration=4, policy_version=9)
    assert all(torch.equal(rollout.experts, experts) for rollout in found[True].rollouts)
    assert all(rollout.experts is None for rollout in found[False].rollouts)
    source = ReplayedRollouts(tmp_path, place(0, 1), meter=None, with_experts=True)
    with pytest.raises(InputError, match=r"Set rollout\.routing_replay=false"):
        source.generate([prompt(0)], iteration=5, policy_version=9)


def test_rollouts_are_scored_under_what_they_were_drawn_from(tmp_path):
    plain = group(0)
    truncated = replace(
        plain,
        rollouts=tuple(
            replace(one, support=torch.ones(len(one.response_tokens), 2, dtype=torch.int32))
            for one in plain.rollouts
        ),
    )
    for iteration, drawn in ((4, plain), (5, truncated)):
        RolloutRecord(tmp_path, place(0, 1), num_iterations=2).keep([drawn], iteration)
    for with_support, fits, other, way_out in (
        (False, 4, 5, "as the run had them that recorded them"),
        (True, 5, 4, "to -1 and 1"),
    ):
        source = ReplayedRollouts(tmp_path, place(0, 1), meter=None, with_support=with_support)
        (found,) = source.generate([prompt(0)], iteration=fits, policy_version=9)
        assert [one.support is None for one in found.rollouts] == [not with_support] * len(
            found.rollouts
        )
        with pytest.raises(InputError, match=f"Set rollout.top_k and rollout.top_p {way_out}"):
            source.generate([prompt(0)], iteration=other, policy_version=9)
