"""Scoring runs while responses are still sampled, with the real scorer and its workers."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_rl.errors import InputError, RunError
from megatron_rl.parallel.layout import EngineLayout
from megatron_rl.reward.config import RewardConfig
from megatron_rl.reward.scorer import RewardScorer, attach
from megatron_rl.rollout.engine import Response
from megatron_rl.rollout.sampler import Sampler
from megatron_rl.types import Draw, Prompt, Verdict

TEXTS = ["\\boxed{\\sqrt{12}}", "\\boxed{4}", "\\boxed{x+\\sqrt{12}-x}"]
PROMPTS = [Prompt(group_id=7, tokens=torch.tensor([1]), answer=r"2\sqrt{3}")]
DRAW = Draw(purpose="train", group_size=3, temperature=1.0, max_response_tokens=9)


class Decoder:
    """Each token stands for a whole response, which is enough for the sampler."""

    def decode(self, tokens):
        return TEXTS[tokens[0]]


class SlowEngine:
    """Finishes one response, and the others only when the first has its verdict."""

    def __init__(self, has_verdict, logprob=0.0):
        self._has_verdict, self._logprob = has_verdict, logprob
        self.num_steps = 0

    def generate(self, requests, on_finished, between_steps):
        for number, request in enumerate(requests):
            on_finished(
                Response(
                    key=request.key,
                    tokens=torch.tensor([number] * (number + 1)),
                    logprobs=torch.full((number + 1,), self._logprob),
                    finish_reason="stop",
                )
            )
            end = time.monotonic() + 40
            while not self._has_verdict() and time.monotonic() < end:
                self.num_steps += 1
                between_steps()
            assert self._has_verdict(), "no verdict while others are sampled"


@pytest.fixture
def scorer():
    parts = {"length_penalty": {"weight": 1.0, "free_tokens": 1, "max_tokens": 3}}
    scorer = RewardScorer(RewardConfig(deadline_s=10.0, parts=parts))
    yield scorer
    scorer.close()


@pytest.fixture
def groups(monkeypatch):
    """Those of a lone rank, whose word is everybody's."""
    monkeypatch.setattr("megatron_rl.rollout.sampler.max_over", lambda values, _: list(values))
    return SimpleNamespace(rank=0, engines=EngineLayout(world_size=1, tp=1), world=None)


@pytest.mark.parametrize("logprob", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    ("policy_version", "error", "way_out"),
    [(0, InputError, "Use another model"), (3, RunError, "Go on from an earlier checkpoint")],
)
def test_logprobs_that_are_not_finite_stop_the_run(
    scorer, groups, logprob, policy_version, error, way_out
):
    sampler = Sampler(SlowEngine(lambda: True, logprob), Decoder(), groups, run_seed=0)
    with pytest.raises(error, match=rf"log-probs .* are not finite, .* {way_out}"):
        sampler.generate(PROMPTS, DRAW, iteration=1, policy_version=policy_version, grader=scorer)


def test_verdicts_come_while_others_are_sampled(scorer, groups):
    engine = SlowEngine(lambda: not scorer._verifiers[0].is_busy)
    sampler = Sampler(engine, Decoder(), groups, run_seed=0)
    sampled = sampler.generate(PROMPTS, DRAW, iteration=1, policy_version=0, grader=scorer)
    assert engine.num_steps > 0
    (group,) = attach(sampled, scorer.collect())
    assert [rollout.verdict for rollout in group.rollouts] == [
        Verdict.CORRECT,
        Verdict.WRONG,
        Verdict.CORRECT,
    ]
    # 1, 2 and 3 tokens: nothing, half and all of the penalty
    assert [rollout.reward for rollout in group.rollouts] == [1.0, -1.5, 0.0]


def test_a_prompt_that_opens_a_thought_is_told_to_the_grader(scorer, groups):
    """The texts hold a box and no </think>: to such a prompt they hold no answer."""
    prompts = [replace(PROMPTS[0], opens_thought=True), replace(PROMPTS[0], group_id=8)]
    engine = SlowEngine(lambda: not scorer._verifiers[0].is_busy)
    sampler = Sampler(engine, Decoder(), groups, run_seed=0)
    draw = replace(DRAW, group_size=1)
    sampled = sampler.generate(prompts, draw, iteration=1, policy_version=0, grader=scorer)
    verdicts = {
        group.prompt.group_id: group.rollouts[0].verdict
        for group in attach(sampled, scorer.collect())
    }
    assert verdicts == {7: Verdict.NO_ANSWER, 8: Verdict.WRONG}
