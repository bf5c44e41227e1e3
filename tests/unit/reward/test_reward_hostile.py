"""Responses and functions that want to hang, crash or slow a run: all are counted, none succeeds.

Times are CPU times, so that a busy machine does not fail the tests.
"""

import gc
import importlib.util
import itertools
import time
from collections import Counter
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from random import Random

import pytest

from megatron_rl.reward.config import RewardConfig
from megatron_rl.reward.math_grader import grade
from megatron_rl.reward.scorer import RewardScorer, check_failures
from megatron_rl.types import Verdict

DEADLINE_S = 0.3
AMPLE_S = 30.0  # so that another limit is met first, on a slow machine too
GOLDS = ("4", "x^2+1", r"(1,2)\cup(3,4)")
MEGABYTE = "We compute the next step carefully, $x = \\frac{3}{4}$ and so on. " * 16_000
HOSTILE = {
    # what only a worker can end
    "tower of exponents": r"\boxed{9^{9^{\sqrt{81}^{9}}}}",
    "sine of a tower": r"\boxed{\sin(9^{9^{9}})}",
    "gigabytes of digits": r"\boxed{2^{2^{4\cdot2^{40}}}}",
    "nested fractions": "\\boxed{" + r"\frac{1}{x+" * 11 + "1" + "}" * 11 + "}",
    "many sines": "\\boxed{" + "+".join(rf"\sin({n} x)^{{{n}}}" for n in range(2, 30)) + "}",
    "union of 40 intervals": "\\boxed{" + r"\cup".join(f"({n},{n + 1})" for n in range(40)) + "}",
    "set of roots": r"\boxed{\{" + ",".join(rf"\sqrt{{{n}}}" for n in range(2, 40)) + r"\}}",
    "power of a sum": r"\boxed{(a+b+c+d+f+g)^{9999}}",
    "product of sums": "\\boxed{" + "".join(f"(a_{n}+b_{n}+c_{n})" for n in range(20)) + "}",
    "determinant": r"\boxed{\det\begin{pmatrix}a&b\\c&d\end{pmatrix}}",
    # what must not even reach one
    "tower of towers": r"\boxed{9^{9^{9^{9^{9}}}}}",
    "large power": r"\boxed{3^{100000000}}",
    "large factorial": r"\boxed{10000000!}",
    "factorial of a factorial": r"\boxed{((10!)!)!}",
    "sum": r"\boxed{\sum_{n=1}^{1000000000} \sin n}",
    "megabyte without a box": MEGABYTE,
    "megabyte with a box": MEGABYTE + "\\boxed{5}",
    "megabyte in a box": "\\boxed{" + "7" * 1_000_000 + "}",
    "thousands of braces": "\\boxed{" + "{" * 5000 + "1" + "}" * 5000 + "}",
    "thousands of open boxes": "\\boxed{" * 20_000,
    "thousands of boxes": "\\boxed{5} " * 20_000,
    "thousands of bare boxes": "\\boxed " * 100_000,
    "dollars": "\\boxed{" + "$" * 500 + "}",
    "half a surrogate and NUL": "\\boxed{\ud800\x00\x1b[2J}",
    "code": "\\boxed{__import__('os').system('kill 1')}",
}


@cache
def fuzz():
    """benchmarks/grading_fuzz.py."""
    path = Path(__file__).parents[3] / "benchmarks" / "grading_fuzz.py"
    spec = importlib.util.spec_from_file_location("grading_fuzz", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_scorer():
    scorers = []

    def make(**settings):
        scorers.append(RewardScorer(RewardConfig(**{"deadline_s": DEADLINE_S} | settings)))
        return scorers[-1]

    yield make
    for scorer in scorers:
        scorer.close()


@contextmanager
def no_garbage_collection():
    """Which takes longer than what is timed, in a process with this many objects."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("name", HOSTILE)
def test_the_trainer_loses_no_time(name):
    with no_garbage_collection():
        started = time.thread_time()
        for gold in GOLDS:
            grade(HOSTILE[name], gold)
        taken = time.thread_time() - started
    assert taken < 0.25  # most take microseconds, a megabyte 2 ms


def test_no_answer_costs_the_trainer_much():
    # Answers as long as any may be, of fragments repeated: where a regex or a split is not linear.
    answers = [fuzz().repeated(Random(seed)) for seed in range(300)]
    slowest = 0.0
    for answer, gold in itertools.product(answers, ("4", r"5\text{ cm}", "x^2-1")):
        with no_garbage_collection():
            started = time.thread_time()
            grade(f"\\boxed{{{answer}}}", gold)
            slowest = max(slowest, time.thread_time() - started)
    assert slowest < 0.1  # the slowest takes some 5 ms


def test_hostile_responses_are_all_counted_within_their_deadline(make_scorer):
    scorer = make_scorer()
    cases = {(g, i): (text, gold) for g, gold in enumerate(GOLDS)
             for i, text in enumerate(HOSTILE.values())}  # fmt: skip
    for key, (text, gold) in cases.items():
        scorer.submit(key, text, gold)
    scores = scorer.collect()
    assert scores.keys() == cases.keys()
    assert {score.verdict for score in scores.values()} <= set(Verdict) - {Verdict.CORRECT}
    # Looked at every eighth of a second at least; a clock tick of /proc is a hundredth.
    assert max(score.seconds for score in scores.values()) < DEADLINE_S + 0.5
    counts = Counter(score.verdict for score in scores.values())
    assert counts[Verdict.TIMEOUT] >= 3
    assert counts[Verdict.NO_ANSWER] >= 5 * len(GOLDS)
    scorer.submit((0, 0), r"\boxed{\sqrt{12}}", r"2\sqrt{3}")  # and nobody else is harmed
    assert scorer.collect()[0, 0].verdict is Verdict.CORRECT


@pytest.mark.parametrize(
    ("action", "verdict"),
    [
        ("loop in c", Verdict.TIMEOUT),
        ("ignore signals", Verdict.TIMEOUT),
        ("allocate", Verdict.ERROR),
        ("allocate on and on", Verdict.ERROR),
        ("os._exit", Verdict.ERROR),
        ("raise", Verdict.ERROR),
        ("print", Verdict.CORRECT),
        ("fork", Verdict.CORRECT),
    ],
)
def test_a_function_that_misbehaves_is_counted_and_stops_the_run(make_scorer, action, verdict):
    scorer = make_scorer(
        kind="reward_functions:misbehave",
        num_workers=1,
        memory_mib=256,
        deadline_s=DEADLINE_S if verdict is Verdict.TIMEOUT else AMPLE_S,
    )
    for index, response in enumerate([action, "fine", "no"]):
        scorer.submit((0, index), response, "")
    scores = scorer.collect()
    verdicts = [scores[0, index].verdict for index in range(3)]
    assert verdicts == [verdict, Verdict.CORRECT, Verdict.WRONG]
    if verdict is Verdict.CORRECT:
        check_failures(Counter(verdicts), RewardConfig())
        return
    with pytest.raises(Exception, match=r"1 (timeouts|errors)") as caught:
        check_failures(Counter(verdicts), RewardConfig(), scorer.failures)
    assert "response (0, 0)" in str(caught.value)


def test_fuzzed_responses_raise_nothing(make_scorer):
    responses = list(fuzz().make_responses(1000, seed=1))
    scores = fuzz().grade_all(responses, make_scorer(deadline_s=RewardConfig().deadline_s))
    assert len(scores) == 1000
    assert [score.reason for score in scores if score.verdict is Verdict.ERROR] == []
    # None here; five on a machine three times slower.
    assert sum(score.verdict is Verdict.TIMEOUT for score in scores) < 6
