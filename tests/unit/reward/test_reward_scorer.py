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


def pool_of(scorer):
    return scorer._verifiers[0]._pool


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


FORMS = {
    "box": "\\boxed{4}",
    "answer_tag": "<answer>4</answer>",
    "answer_line": "\nAnswer: 4",
    "response": "4",
}


@pytest.mark.parametrize("kind", ["math", "exact", "number", "format"])
@pytest.mark.parametrize(("answer_in", "form"), FORMS.items())
def test_a_response_that_starts_inside_a_thought_has_to_close_it(
    make_scorer, kind, answer_in, form
):
    if (kind, answer_in) == ("format", "response"):
        return  # refused: there is no form
    scorer = make_scorer(kind=kind, answer_in=answer_in)
    for number, text in enumerate([form, f"so</think>{form}", f"<think>so</think>{form}"]):
        scorer.submit((0, number), text, "4", opens_thought=True)
        scorer.submit((1, number), text, "4")
    scores = scorer.collect()
    verdicts = [[str(scores[group, n].verdict) for n in range(3)] for group in range(2)]
    assert verdicts == [["no_answer", "correct", "correct"], ["correct"] * 3]


def test_the_form_with_a_draft_in_the_thought(make_scorer):
    scorer = make_scorer(kind="format", answer_in="answer_tag")
    draft = "<answer>3</answer>"
    for number, text in enumerate([draft, f"so</think>{draft}", f"so</think>{draft} and so on"]):
        scorer.submit((0, number), text, "4", opens_thought=True)
    scores = scorer.collect()
    assert [str(scores[0, n].verdict) for n in range(3)] == ["no_answer", "correct", "no_answer"]


def test_a_function_gets_the_response_as_it_is(make_scorer):
    scorer = make_scorer(kind="reward_functions:same_length")
    scorer.submit((0, 0), "so</think>4", "so</think>4", opens_thought=True)
    assert scorer.collect()[0, 0].verdict is Verdict.CORRECT


def test_submit_and_poll_do_not_wait(make_scorer):
    scorer = make_scorer()
    os.kill(pool_of(scorer).zygote_pid, signal.SIGSTOP)  # no worker can start: waiting would hang
    for index in range(50):
        scorer.submit((0, index), f"\\boxed{{\\log {index}}}", GOLD)
        scorer.poll()
    assert pool_of(scorer).num_pending == 50
    os.kill(pool_of(scorer).zygote_pid, signal.SIGCONT)
    assert len(scorer.collect()) == 50


def test_equal_pairs_are_compared_once(make_scorer, monkeypatch):
    scorer = make_scorer()
    submitted = []
    submit = pool_of(scorer).submit
    monkeypatch.setattr(
        pool_of(scorer), "submit", lambda *args: submitted.append(args) or submit(*args)
    )
    for index in range(8):
        scorer.submit((0, index), ROOTS, GOLD)
    while scorer._verifiers[0].is_busy:
        scorer.poll()
    scorer.submit((0, 8), ROOTS, GOLD)
    scores = scorer.collect()
    assert len(submitted) == 1
    assert [scores[0, index].verdict for index in range(9)] == [Verdict.CORRECT] * 9


def test_timeouts_get_their_verdict_and_are_listed(make_scorer):
    scorer = make_scorer(deadline_s=0.2)
    scorer.submit((0, 0), "\\boxed{\\sin(9^{9^{9}})}", "4")
    scorer.submit((0, 1), "\\boxed{4}", "4")
    scores = scorer.collect()
    assert scores[0, 0].verdict is Verdict.TIMEOUT
    assert scores[0, 0].reward == -1.0
    assert scores[0, 0].seconds > 0.1
    assert scores[0, 1].verdict is Verdict.CORRECT
    assert len(scorer.failures) == 1
    assert scorer.failures[0].startswith(
        r"response (0, 0), answer '\\sin(9^{9^{9}})': timeout, still"
    )


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


@pytest.mark.parametrize(
    ("answers", "is_refused"),
    [
        ((), False),
        (('{"accepted": ["yes"]}',), False),
        (("2", '{"accepted": []}'), False),
        (("2", "3"), True),
    ],
)
def test_function_that_fails_on_every_answer_of_the_data_is_refused(answers, is_refused):
    config = RewardConfig(kind="reward_functions:needs_json", deadline_s=10.0)
    if not is_refused:
        RewardScorer(config, answers).close()
        return
    with pytest.raises(InputError, match="and with answers of the data, it gave no reward: Type"):
        RewardScorer(config, answers)


@pytest.mark.parametrize("text", ["import time\ntime.sleep(600)\n", "while True:\n    pass\n"])
def test_function_whose_import_never_ends_is_refused_by_name(tmp_path, monkeypatch, text):
    monkeypatch.setattr("megatron_rl.reward.pool._START_LIMIT_S", 1.0)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "endless_import.py").write_text(text)
    with pytest.raises(InputError, match=r"reward\.function='endless_import:f': .* may hang"):
        RewardScorer(RewardConfig(kind="endless_import:f"))


PARTS = {
    "format": {"weight": 0.5},
    "brevity": {"kind": "length_penalty", "weight": 2.0, "free_tokens": 100, "max_tokens": 200},
    "style": {"kind": "reward_functions:length_reward", "weight": -1.0},
}


def test_parts_are_weighed_and_the_verdict_is_not_theirs(make_scorer):
    scorer = make_scorer(parts=PARTS)
    scorer.submit((0, 0), "\\boxed{4}", "4", 150)
    scorer.submit((0, 1), "\\boxed{5}", "4", 1000)
    scorer.submit((0, 2), "4", "4", 20)
    scorer.submit((0, 3), "\\boxed{4}xx", "4", 100)
    scores = scorer.collect()
    # verdict's reward + 0.5 format - 2 excess - 0.1 per character
    assert [(str(scores[0, i].verdict), scores[0, i].reward) for i in range(3)] == [
        ("correct", pytest.approx(1 + 0.5 - 2 * 0.5 - 0.9)),
        ("wrong", pytest.approx(-1 + 0.5 - 2 * 1.0 - 0.9)),
        ("no_answer", pytest.approx(-1 + 0.0 - 0.0 - 0.1)),
    ]
    assert scores[0, 3].verdict is Verdict.ERROR
    assert scores[0, 0].parts == {"format": 1.0, "brevity": -0.5, "style": pytest.approx(0.9)}
    assert scores[0, 1].parts["brevity"] == -1.0
    assert scores[0, 2].parts == {"format": 0.0, "brevity": 0.0, "style": pytest.approx(0.1)}
    assert scorer.failures == [
        "response (0, 3), answer '4': error, part style: returned 1.1: must lie between -1 and 1, "
        "the weight makes it count"
    ]


def test_a_part_that_fails_takes_the_reward_along(make_scorer):
    parts = {"odd": {"kind": "reward_functions:misbehave", "weight": 0.1}}
    scorer = make_scorer(parts=parts, deadline_s=0.3)
    scorer.submit((0, 0), "raise", "4")
    scorer.submit((0, 1), "loop in c", "4")
    scorer.submit((0, 2), "\\boxed{4}", "4")
    scores = scorer.collect()
    assert [str(scores[0, i].verdict) for i in range(3)] == ["error", "timeout", "correct"]
    assert scores[0, 2].reward == pytest.approx(1.1)
    (group,) = attach([make_group(0, 3)], scores)
    assert [rollout.reward for rollout in group.rollouts] == [None, None, pytest.approx(1.1)]
    assert group.rollouts[2].reward_parts == {"odd": 1.0}
    assert "error, part odd: ValueError: broken" in scorer.failures[0]


def test_a_part_whose_function_cannot_be_used_is_named(make_scorer):
    with pytest.raises(InputError, match=r"reward\.parts\.style\.kind='reward_functions:missing'"):
        make_scorer(parts={"style": {"kind": "reward_functions:missing", "weight": 1.0}})


def test_length_penalty_needs_the_number_of_tokens(make_scorer):
    scorer = make_scorer(kind="exact", parts={"brevity": PARTS["brevity"]})
    with pytest.raises(ValueError, match="number of tokens"):
        scorer.submit((0, 0), "\\boxed{4}", "4")


@pytest.mark.parametrize("kind", ["exact", "number", "format"])
def test_kinds_that_need_no_worker_start_none(make_scorer, kind):
    scorer = make_scorer(kind=kind)
    assert pool_of(scorer) is None
    scorer.submit((0, 0), "\\boxed{4}", "4")
    scorer.poll()
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
