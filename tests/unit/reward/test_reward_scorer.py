import os
import signal

import pytest
import torch

from megatron_rl.errors import InputError, RunError
from megatron_rl.reward.config import RewardConfig
from megatron_rl.reward.scorer import (
    RewardScorer,
    Score,
    attach,
    check_failures,
)
from megatron_rl.types import Prompt, Rollout, RolloutGroup, Verdict

ROOTS = "Thus \\boxed{\\sqrt{12}}"
GOLD = r"2\sqrt{3}"


@pytest.fixture
def make_scorer():
    scorers = []

    def make(**settings):
        scorers.append(RewardScorer(RewardConfig(**({"deadline_s": 10.0} | settings))))
        return scorers[-1]

    yield make
    for scorer in scorers:
        scorer.close()


def make_group(group_id, num_rollouts):
    rollout = Rollout(
        response_tokens=torch.tensor([7, 2]),
        rollout_logprobs=torch.tensor([-0.1, -1.2]),
        finish_reason="stop",
        policy_version=0,
    )
    prompt = Prompt(group_id=group_id, tokens=torch.tensor([5, 9]), answer="4")
    return RolloutGroup(prompt=prompt, rollouts=(rollout,) * num_rollouts)


def test_scores_carry_verdict_reward_and_answer(make_scorer):
    scorer = make_scorer(correct=2.0, wrong=-0.5)
    scorer.submit((3, 0), "\\boxed{4}", "4")
    scorer.submit((3, 1), "\\boxed{5}", "4")
    scorer.submit((3, 2), "it is 4", "4")
    scorer.submit((7, 0), ROOTS, GOLD)
    scorer.poll()
    scores = scorer.collect()
    assert {key: (score.verdict, score.reward) for key, score in scores.items()} == {
        (3, 0): (Verdict.CORRECT, 2.0),
        (3, 1): (Verdict.WRONG, -0.5),
        (3, 2): (Verdict.NO_ANSWER, -0.5),
        (7, 0): (Verdict.CORRECT, 2.0),
    }
    assert [scores[3, i].extracted for i in range(3)] == ["4", "5", None]
    assert scores[7, 0].extracted == "\\sqrt{12}"
    assert scorer.collect() == {}
    scorer.submit((3, 0), "\\boxed{5}", "4")  # the store is empty: keys can be used again
    assert scorer.collect()[3, 0].verdict is Verdict.WRONG


def test_submit_and_poll_do_not_wait(make_scorer):
    scorer = make_scorer()
    os.kill(scorer._pool.zygote_pid, signal.SIGSTOP)  # no worker can start: waiting would hang
    for index in range(50):
        scorer.submit((0, index), f"\\boxed{{\\sqrt{{{index}}}+x}}", GOLD)
        scorer.poll()
    assert scorer._pool.num_pending == 50
    os.kill(scorer._pool.zygote_pid, signal.SIGCONT)
    assert len(scorer.collect()) == 50


def test_equal_pairs_are_compared_once(make_scorer, monkeypatch):
    scorer = make_scorer()
    submitted = []
    submit = scorer._pool.submit
    monkeypatch.setattr(
        scorer._pool, "submit", lambda *args: submitted.append(args) or submit(*args)
    )
    for index in range(8):
        scorer.submit((0, index), ROOTS, GOLD)
    while scorer._claims:
        scorer.poll()
    scorer.submit((0, 8), ROOTS, GOLD)
    scores = scorer.collect()
    assert len(submitted) == 1
    assert [scores[0, index].verdict for index in range(9)] == [Verdict.CORRECT] * 9


def test_timeouts_get_their_verdict_and_are_listed(make_scorer):
    scorer = make_scorer(deadline_s=0.2)
    scorer.submit((0, 0), "\\boxed{9^{9^{9^{9}}}}", "4")
    scorer.submit((0, 1), "\\boxed{4}", "4")
    scores = scorer.collect()
    assert scores[0, 0].verdict is Verdict.TIMEOUT
    assert scores[0, 0].reward == -1.0
    assert scores[0, 0].seconds > 0.1
    assert scores[0, 1].verdict is Verdict.CORRECT
    assert len(scorer.failures) == 1
    assert scorer.failures[0].startswith("response (0, 0), answer '9^{9^{9^{9}}}': timeout, still")


def test_empty_gold_is_our_error_and_not_the_response_s(make_scorer):
    scorer = make_scorer()
    scorer.submit((0, 0), "\\boxed{4}", " ")
    assert scorer.collect()[0, 0].verdict is Verdict.ERROR
    assert scorer.failures == ["response (0, 0), answer '4': error, no gold answer"]


def test_a_key_names_one_response(make_scorer):
    scorer = make_scorer()
    scorer.submit((0, 0), "\\boxed{4}", "4")
    with pytest.raises(ValueError, match=r"response \(0, 0\) was submitted twice"):
        scorer.submit((0, 0), "\\boxed{4}", "4")


def test_function_with_bools_earns_the_configured_rewards(make_scorer):
    scorer = make_scorer(kind="reward_functions:same_length", correct=3.0)
    scorer.submit((0, 0), "four", "4444")
    scorer.submit((0, 1), "four", "4")
    scores = scorer.collect()
    assert [(scores[0, i].verdict, scores[0, i].reward) for i in range(2)] == [
        (Verdict.CORRECT, 3.0),
        (Verdict.WRONG, -1.0),
    ]


def test_function_with_floats_gives_the_reward_itself(make_scorer):
    scorer = make_scorer(kind="function", function="reward_functions:length_reward")
    scorer.submit((0, 0), "x" * 10, "")
    scorer.submit((0, 1), "x" * 5, "")
    scores = scorer.collect()
    assert [(scores[0, i].verdict, scores[0, i].reward) for i in range(2)] == [
        (Verdict.CORRECT, 1.0),
        (Verdict.WRONG, 0.5),
    ]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("reward_functions:missing", "has no attribute missing"),
        ("reward_functions:returns_text", "returned a str: must be a bool or a float"),
        ("reward_functions:misspelt", "NameError"),
    ],
)
def test_unusable_functions_are_refused_before_any_work(make_scorer, function, message):
    with pytest.raises(InputError) as caught:
        make_scorer(kind=function)
    assert f"reward.function='{function}'" in str(caught.value)
    assert message in str(caught.value)


def test_function_may_fail_on_the_dummy(make_scorer):
    scorer = make_scorer(kind="reward_functions:needs_json")
    scorer.submit((0, 0), "yes", '{"accepted": ["yes"]}')
    assert scorer.collect()[0, 0].verdict is Verdict.CORRECT


def test_attach_fills_every_rollout():
    groups = [make_group(3, 2), make_group(9, 1)]
    scores = {
        (3, 0): Score(Verdict.CORRECT, 1.0, "4", 0.0),
        (3, 1): Score(Verdict.TIMEOUT, -1.0, "5", 0.0),
        (9, 0): Score(Verdict.NO_ANSWER, -1.0, None, 0.0),
    }
    attached = attach(groups, scores)
    assert [[rollout.reward for rollout in group.rollouts] for group in attached] == [
        [1.0, None],  # nothing is learned from a response that could not be verified
        [-1.0],
    ]
    assert attached[0].rollouts[1].verdict is Verdict.TIMEOUT
    assert attached[0].prompt is groups[0].prompt
    assert groups[0].rollouts[0].reward is None


def test_failures_above_the_threshold_stop_the_run():
    config = RewardConfig(max_failure_frac=0.01)
    # 2 of 200 are exactly 1%, 3 of 200 are 1.5%
    check_failures({Verdict.CORRECT: 198, Verdict.TIMEOUT: 1, Verdict.ERROR: 1}, config)
    check_failures({}, config)
    with pytest.raises(RunError) as caught:
        check_failures(
            {Verdict.CORRECT: 197, Verdict.TIMEOUT: 1, Verdict.ERROR: 2},
            config,
            ["response (0, 1)"],
        )
    for part in ("1 timeouts and 2 errors in 200", "1.5%", "max_failure_frac=0.01", "(0, 1)"):
        assert part in str(caught.value)
