"""Rounds of responses on a lone rank, with scripted ones; several ranks are in distributed/."""

from types import SimpleNamespace

import pytest
import torch

from megatron_rl.algorithms.signs import Signs, signs
from megatron_rl.parallel.layout import EngineLayout
from megatron_rl.reward.scorer import Score
from megatron_rl.rollout.config import RoundsConfig
from megatron_rl.rollout.engine import Response
from megatron_rl.rollout.rounds import Progress, Rounds, RoundsPlan, num_new_prompts, round_metrics
from megatron_rl.rollout.sampler import Sampler
from megatron_rl.types import Draw, Prompt, Rollout, Verdict

ROUNDS = "megatron_rl.rollout.rounds"


def prompt(group_id):
    return Prompt(group_id=group_id, tokens=torch.tensor([1]), answer=str(group_id))


class Scripted:
    """An engine and a scorer: response k of a prompt is right where its script has a +."""

    def __init__(self, **scripts):
        self.scripts = {int(name[1:]): marks for name, marks in scripts.items()}
        self.asked, self.seeds, self.failures = [], {}, []
        self._submitted = []
        self.stops_at = None

    def generate(self, requests, on_finished, between_steps):
        self.asked.append([request.key for request in requests])
        for request in requests:
            self.seeds[request.key] = request.seed
            if len(self.asked) == self.stops_at:
                return
            group_id, index = request.key
            on_finished(
                Response(
                    key=request.key,
                    tokens=torch.tensor([group_id, index]),
                    logprobs=torch.zeros(2),
                    finish_reason="stop",
                )
            )

    def submit(self, key, *_, **__):
        self._submitted.append(key)

    def poll(self):
        pass

    def collect(self):
        found, self._submitted = self._submitted, []
        self.failures = [f"{key}" for key in found if self.mark(key) == "?"]
        kinds = {
            "+": (Verdict.CORRECT, 1.0),
            "-": (Verdict.WRONG, -1.0),
            "?": (Verdict.TIMEOUT, 0.0),
        }
        return {key: Score(*kinds[self.mark(key)], None, 0.0) for key in found}

    def mark(self, key):
        return self.scripts[key[0]][key[1]]


@pytest.fixture
def alone(monkeypatch):
    """Collectives of a lone rank, and its groups."""
    monkeypatch.setattr("megatron_rl.rollout.sampler.max_over", lambda values, _: list(values))
    monkeypatch.setattr(f"{ROUNDS}.all_gather_objects", lambda item, _: [item])
    monkeypatch.setattr(f"{ROUNDS}.sum_over", lambda values, _: list(values))
    return SimpleNamespace(rank=0, engines=EngineLayout(world_size=1, tp=1), world=None)


def plan_of(*, group_size=2, wanted=3, most=6, max_prompts=None, **config):
    config = RoundsConfig(max_responses=most, **config)
    return RoundsPlan(
        config=config,
        group_size=group_size,
        max_responses=most,
        num_wanted=wanted,
        max_prompts=max_prompts or wanted,
    )


def drawn_by(scripted, plan, alone, *, is_stopped=lambda: False):
    """(marks by group, everything said and reported, the rounds)."""
    told, values = [], {}
    following = iter(range(plan.num_wanted, 100))
    rounds = Rounds(
        plan=plan,
        draw=Draw(
            purpose="train", group_size=plan.group_size, temperature=1.0, max_response_tokens=4
        ),
        sampler=Sampler(scripted, SimpleNamespace(decode=str), alone, run_seed=7),
        scorer=scripted,
        stop=SimpleNamespace(agreed=lambda group: is_stopped(), was_told=False),
        world=None,
        more=lambda count: [prompt(next(following)) for _ in range(count)],
        say=told.append,
    )
    groups = rounds.generate(
        [prompt(n) for n in range(plan.num_wanted)],
        iteration=5,
        policy_version=3,
        report=values.update,
    )
    for group in groups:
        tokens = [rollout.response_tokens.tolist() for rollout in group.rollouts]
        assert tokens == [[group.prompt.group_id, index] for index in range(len(tokens))]
    marks = {
        group.prompt.group_id: "".join(
            scripted.mark((group.prompt.group_id, index)) for index in range(len(group.rollouts))
        )
        for group in groups
    }
    return marks, told, values, groups


def test_a_prompt_leaves_as_soon_as_its_rule_holds_while_others_go_on(alone):
    """The example of rounds.py."""
    scripted = Scripted(g0="+-....", g1="---+..", g2="++++++")
    marks, told, values, _ = drawn_by(scripted, plan_of(), alone)
    assert marks == {0: "+-", 1: "---+", 2: "++++++"}
    assert [sorted({group_id for group_id, _ in keys}) for keys in scripted.asked] == [
        [0, 1, 2],
        [1, 2],
        [2],
    ]
    assert scripted.asked[2] == [(2, 4), (2, 5)]
    assert values == {"rollout/rounds": 3.0}
    assert not told


@pytest.mark.parametrize(
    ("positive", "negative", "expected"),
    [
        (1, 1, "++-"),  # mixed
        (2, 0, "++"),  # positive: 2
        (2, 2, "++-+-"),  # balanced
        (0, 1, "++-"),
        (0, 0, "+"),  # one round, whatever it brings
        (6, 0, "++-+-+"),  # never, but for the limit
    ],
)
def test_the_rule_of_leaving(alone, positive, negative, expected):
    plan = plan_of(group_size=1, wanted=1, until_positive=positive, until_negative=negative)
    assert drawn_by(Scripted(g0="++-+-+"), plan, alone)[0] == {0: expected}


def test_the_last_round_is_cut_to_the_most_responses(alone):
    plan = plan_of(group_size=4, wanted=1, most=6)
    assert drawn_by(Scripted(g0="++++++"), plan, alone)[0] == {0: "++++++"}


def test_seeds_are_those_of_one_large_round(alone):
    """So a response does not depend on the round in which it is drawn."""
    in_rounds, at_once = Scripted(g0="++++++"), Scripted(g0="++++++")
    drawn_by(in_rounds, plan_of(wanted=1), alone)
    drawn_by(at_once, plan_of(wanted=1, group_size=6), alone)
    assert in_rounds.seeds == at_once.seeds
    assert len(set(in_rounds.seeds.values())) == 6


def test_a_response_that_could_not_be_graded_is_neither_right_nor_wrong(alone):
    scripted = Scripted(g0="+?-...")
    plan = plan_of(group_size=1, wanted=1)
    marks, _, _, groups = drawn_by(scripted, plan, alone)
    assert marks == {0: "+?-"}
    assert groups[0].rollouts[1].reward is None
    assert scripted.failures == ["(0, 1)"]  # of an earlier round than the last


def test_a_batch_is_filled_with_new_prompts(alone):
    """1 of 3 is mixed, so 2 are missing: at 2 of 4 that would be four new ones, and a round has
    three. Then 1 is missing at 3 of 7, which is three new ones again.
    """
    marks = ("++", "+-", "--", "++", "-+", "++", "+-", "+-", "--")
    scripted = Scripted(**{f"g{n}": each for n, each in enumerate(marks)})
    plan = plan_of(most=2, fill=True, max_prompts=30)
    drawn, told, values, groups = drawn_by(scripted, plan, alone)
    assert [len(keys) for keys in scripted.asked] == [6, 6, 6]
    assert drawn == dict(enumerate(marks))
    assert values == {"rollout/rounds": 3.0}
    assert not told
    filled = round_metrics(groups, plan, None)
    assert (filled["rollout/prompts"], filled["rollout/filled_groups"]) == (9, 3)


def test_new_prompts_are_as_many_as_are_expected_to_bring_what_is_missing():
    plan = plan_of(wanted=10, fill=True, max_prompts=40)

    def states(mixed, uniform, active=0):
        return [
            *(Progress(drawn=2, found=Signs(1, 1)) for _ in range(mixed)),
            *(Progress(drawn=6, found=Signs(6, 0)) for _ in range(uniform)),
            *(Progress(drawn=2, found=Signs(2, 0)) for _ in range(active)),
        ]

    assert num_new_prompts(states(10, 0), plan) == 0
    assert num_new_prompts(states(12, 7), plan) == 0
    assert num_new_prompts(states(6, 4), plan) == 7  # 4 missing at 7 of 11: 6.3
    assert num_new_prompts(states(6, 1, active=4), plan) == 0  # those that go on may be mixed
    assert num_new_prompts(states(0, 10), plan) == 10  # 110, but a round has 10 prompts
    assert num_new_prompts(states(5, 33), plan) == 2  # up to the bound
    assert num_new_prompts(states(5, 35), plan) == 0
    assert num_new_prompts(states(0, 3), plan_of()) == 0  # nothing is to be filled


def test_a_batch_that_cannot_be_filled_is_told_once(alone):
    scripted = Scripted(**{f"g{n}": "++" for n in range(9)} | {"g1": "+-"})
    plan = plan_of(most=2, fill=True, max_prompts=5)
    marks, told, _, groups = drawn_by(scripted, plan, alone)
    assert list(marks) == [0, 1, 2, 3, 4]
    (line,) = told
    assert "iteration 5: 1 of 3 groups are mixed after 5 prompts" in line
    values = round_metrics(groups, plan, None)
    assert values == {
        "rollout/prompts": 5,
        "rollout/prompts_satisfied_frac": 1 / 5,
        "reward/first_round_accuracy": 9 / 10,
        "rollout/filled_groups": 1,
        "rollout/missing_groups": 2,
    }


def test_the_first_round_is_what_accuracies_are_compared_by(alone):
    """Hard prompts have more responses: 3 of 6 are right, but 1 of 4 in the first round."""
    scripted = Scripted(g0="+-....", g1="--++..")
    plan = plan_of(wanted=2)
    _, _, _, groups = drawn_by(scripted, plan, alone)
    assert sum(len(group.rollouts) for group in groups) == 6
    assert round_metrics(groups, plan, None)["reward/first_round_accuracy"] == 1 / 4


@pytest.mark.parametrize("stops_at", [1, 2])
def test_a_stop_in_a_round_drops_the_iteration(alone, stops_at):
    scripted = Scripted(g0="+-....", g1="---+..", g2="++++++")
    scripted.stops_at = stops_at
    marks, _, values, groups = drawn_by(
        scripted, plan_of(), alone, is_stopped=lambda: len(scripted.asked) == stops_at
    )
    assert (marks, groups, values) == ({}, [], {})
    assert len(scripted.asked) == stops_at


def test_signs_count_what_can_be_judged():
    def rollout(reward, tokens=1):
        return Rollout(
            response_tokens=torch.ones(tokens, dtype=torch.int64),
            rollout_logprobs=None,
            finish_reason="stop",
            policy_version=0,
            reward=reward,
        )

    rewards = [1.0, 0.5, 0.0, -1.0, None, float("nan")]
    found = signs([*map(rollout, rewards), rollout(1.0, tokens=0)])
    assert found == Signs(2, 2)
    assert found.are_mixed
    assert not Signs(3, 0).are_mixed
    assert not Signs(0, 3).are_mixed
    assert Signs(1, 0) + Signs(2, 3) == Signs(3, 3)
