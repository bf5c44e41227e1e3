"""The comparison of test_gradient_invariance notices every wrong factor of a formula.

The fault lies in the definitions alone, on one rank: the native ops are compared with them
elsewhere, and layouts with one rank.
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import CORRECTIONS, EVERY_TERM, TIGHT, Case, Question, question_of
from harness import run_on_ranks
from splits import LAYOUTS

NOTICED = 1e-3
BOUND = 1e-12

CISPO = question_of("cispo", **TIGHT)
GSPO = question_of("gspo", **TIGHT)
SAPO = question_of("sapo", tau_positive=2.0, tau_negative=3.0)
TAUGHT = question_of("distillation", distillation_coef=0.3)
ADA = question_of("reinforce_ada", eps_high=0.28)
TAUGHT_TOO = question_of("grpo", distillation_coef=0.5, kl_coef=0.1)
TRUNCATED = Question(recipe=EVERY_TERM, groups="truncated")


def corrected(level: str, mode: str) -> Question:
    (correction,) = (c for c in CORRECTIONS if c[:2] == (level, mode))
    return question_of("grpo", correction=correction, kl_coef=0.1)


# What is wrong -> the question whose answer it spoils.
QUESTIONS = {
    "cispo: the weight has a gradient": CISPO,
    "cispo: the weight is not cut": CISPO,
    "cispo: the bounds are swapped": CISPO,
    "cispo: no log-probability": CISPO,
    "gspo: the ratio of each token": GSPO,
    "gspo: a sum in the place of the mean": GSPO,
    "gspo: the bounds of tokens": GSPO,
    "sapo: taus are swapped": SAPO,
    "sapo: no 4": SAPO,
    "sapo: not divided by tau": SAPO,
    "sapo: not centred at 1": SAPO,
    "dapo: symmetric": question_of("dapo", eps_high=0.28),
    "reinforce_ada: not over p": ADA,
    "reinforce_ada: times p": ADA,
    "reinforce_ada: over the root of p": ADA,
    "reinforce_ada: over the share of wrong ones": ADA,
    "reinforce_ada: over the number of right ones": ADA,
    "reinforce_ada: p and mean of what is kept": ADA,
    "reinforce_ada: the last ones are kept": ADA,
    "a correction upside down": corrected("token", "truncate"),
    "a correction without its lower bound": corrected("token", "truncate"),
    "a correction that is not cut": corrected("sequence", "truncate"),
    "a mask that cuts": corrected("token", "mask"),
    "a mask that forgets the weight": corrected("token", "mask"),
    "a sequence's mean": corrected("sequence", "mask"),
    "a geometric sum": corrected("geometric", "mask"),
    "a geometric mean of each token": corrected("geometric", "truncate"),
    "a teacher upside down": TAUGHT,
    "a teacher without its coefficient": TAUGHT,
    "a teacher without the student": TAUGHT,
    "a teacher in the place of the reward": TAUGHT_TOO,
    "a support that is forgotten": TRUNCATED,
    "a support with a token more": TRUNCATED,
}


@pytest.fixture(scope="module")
def errors(problems, tmp_path_factory):
    """Fault -> (error of the gradient with it, and without)."""
    out = tmp_path_factory.mktemp("formulas") / "errors.json"
    run_on_ranks(1, measure_formulas, problems["qwen2"], out)
    return json.loads(out.read_text())


@pytest.mark.parametrize("fault", QUESTIONS)
def test_a_wrong_formula_is_noticed(errors, fault):
    wrong, right = errors[fault]
    assert right < BOUND
    assert wrong > NOTICED


def measure_formulas(problem_file: Path, out: Path) -> None:
    from policy_on_ranks import measure, policy_at

    from megatron_rl.megatron.config import OptimizerConfig

    problem = torch.load(problem_file, weights_only=False)
    layout = replace(next(y for y in LAYOUTS if y.name == "one rank"), ops="reference")
    faults = wrong_formulas()
    assert set(faults) == set(QUESTIONS)
    found = {}
    with policy_at(layout, problem, OptimizerConfig(lr=1e-3, clip_grad=0.0)) as policy:
        for fault, question in QUESTIONS.items():
            case = Case(question=question)
            with faults[fault]():
                wrong = measure(policy, case, problem, layout=layout).gradient_error
            found[fault] = (wrong, measure(policy, case, problem, layout=layout).gradient_error)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))


Fault = Callable[[], AbstractContextManager[Any]]  # until it is left


def wrong_formulas() -> dict[str, Fault]:
    return {
        **wrong_objectives(),
        **wrong_rounds(),
        **wrong_corrections(),
        **wrong_teachers(),
        **wrong_supports(),
    }


def wrong_objectives() -> dict[str, Fault]:
    from megatron_rl.objectives import token_loss as losses
    from megatron_rl.objectives.cispo import Cispo
    from megatron_rl.objectives.clipped_ratio import clipped_terms
    from megatron_rl.objectives.gspo import Gspo
    from megatron_rl.objectives.sapo import Sapo

    def terms_of(kind: type, formula: Callable[..., Any]) -> Fault:
        def own_terms(self: Any, logprobs: Any, ratio: Any, advantages: Any) -> Any:
            return formula(self, logprobs, ratio, advantages), None

        return lambda: mock.patch.object(kind, "own_terms", own_terms)

    def gate(x: Any, tau: Any) -> Any:
        return (tau * x).sigmoid()

    def tau_of(o: Any, a: Any, *, swapped: bool = False) -> Any:
        return torch.where((a > 0) != swapped, o.tau_positive * (a * 0 + 1), o.tau_negative)

    def symmetric(*args: Any, eps_low: float, eps_high: float, dual_clip: Any) -> Any:
        return clipped_terms(*args, eps_low=eps_low, eps_high=eps_low, dual_clip=dual_clip)

    return {
        "cispo: the weight has a gradient": terms_of(
            Cispo, lambda o, p, r, a: -r.clamp(1 - o.eps_low, 1 + o.eps_high) * a * p
        ),
        "cispo: the weight is not cut": terms_of(Cispo, lambda o, p, r, a: -r.detach() * a * p),
        "cispo: the bounds are swapped": terms_of(
            Cispo, lambda o, p, r, a: -r.detach().clamp(1 - o.eps_high, 1 + o.eps_low) * a * p
        ),
        "cispo: no log-probability": terms_of(
            Cispo, lambda o, p, r, a: -r.clamp(1 - o.eps_low, 1 + o.eps_high) * a
        ),
        "gspo: the ratio of each token": lambda: mock.patch.object(Gspo, "ratio_of", "token"),
        "gspo: a sum in the place of the mean": lambda: mock.patch.object(
            losses, "_of_response", summed(losses._of_response)
        ),
        "gspo: the bounds of tokens": terms_of(
            Gspo, lambda o, p, r, a: clipped_terms(r, a, eps_low=0.2, eps_high=0.2)[0]
        ),
        "sapo: taus are swapped": terms_of(
            Sapo,
            lambda o, p, r, a: -(4 / (t := tau_of(o, a, swapped=True))) * gate(r - 1, t) * a,
        ),
        "sapo: no 4": terms_of(
            Sapo, lambda o, p, r, a: -(1 / (t := tau_of(o, a))) * gate(r - 1, t) * a
        ),
        "sapo: not divided by tau": terms_of(
            Sapo, lambda o, p, r, a: -4 * gate(r - 1, tau_of(o, a)) * a
        ),
        "sapo: not centred at 1": terms_of(
            Sapo, lambda o, p, r, a: -(4 / (t := tau_of(o, a))) * gate(r, t) * a
        ),
        "dapo: symmetric": lambda: mock.patch(
            "megatron_rl.objectives.clipped_ratio.clipped_terms", symmetric
        ),
    }


def wrong_rounds() -> dict[str, Fault]:
    from megatron_rl.algorithms import selection
    from megatron_rl.algorithms.algorithm import Algorithm
    from megatron_rl.ops import group_stats

    def over(factor: Callable[..., Any]) -> Fault:
        def advantage(rewards: Any, own: Any) -> Any:
            share = own.correct / own.count
            return ((rewards - own.mean) * factor(share, own)).where(own.correct > 0, 0.0)

        changed = {"reward_minus_mean_over_p": advantage}
        return lambda: mock.patch.dict(group_stats._ADVANTAGES, changed)

    judge, balanced = Algorithm._judge, selection._balanced

    def judged_after(self: Any, groups: Any) -> Any:
        """The advantages that follow from the responses that are kept alone."""
        found, rows = judge(self, groups), []
        for group in groups:
            rewards = torch.tensor(group.rewards, dtype=torch.float64)
            kept = rewards[torch.tensor(balanced(group, [True] * len(rewards), 4))]
            share = (kept > 0).double().mean().clamp(min=1e-9)
            rows.append((rewards - kept.mean()) / share * (kept > 0).any())
        return replace(found, advantages=torch.cat(rows))

    def from_the_end(group: Any, keep: Any, size: int) -> Any:
        turned = replace(group, rewards=group.rewards[::-1])
        return balanced(turned, keep[::-1], size)[::-1]

    return {
        "reinforce_ada: not over p": over(lambda p, own: 1.0),
        "reinforce_ada: times p": over(lambda p, own: p),
        "reinforce_ada: over the root of p": over(lambda p, own: p.rsqrt()),
        "reinforce_ada: over the share of wrong ones": over(
            lambda p, own: 1 / (1 - p).clamp(min=0.1)
        ),
        "reinforce_ada: over the number of right ones": over(lambda p, own: 1 / own.correct),
        "reinforce_ada: p and mean of what is kept": lambda: mock.patch.object(
            Algorithm, "_judge", judged_after
        ),
        "reinforce_ada: the last ones are kept": lambda: mock.patch.object(
            selection, "_balanced", from_the_end
        ),
    }


def wrong_corrections() -> dict[str, Fault]:
    from megatron_rl.objectives import token_loss as losses

    right = losses.corrections

    def corrections(formula: Callable[..., Any]) -> Fault:
        return lambda: mock.patch.object(losses, "corrections", formula)

    def other(**changes: Any) -> Fault:
        return corrections(lambda d, c, n: right(d, c._replace(**changes), n))

    def without_weight(d: Any, c: Any, n: Any) -> Any:
        found = right(d, c, n)
        return found._replace(weights=(found.weights != 0).to(found.weights))

    def reductions(**changes: str) -> Fault:
        return lambda: mock.patch.dict(losses._REDUCTIONS, changes)

    return {
        "a correction upside down": corrections(lambda d, c, n: right(-d, c, n)),
        "a correction without its lower bound": other(low=0.0),
        "a correction that is not cut": other(low=0.0, high=1e9),
        "a mask that cuts": other(mode="truncate"),
        "a mask that forgets the weight": corrections(without_weight),
        "a sequence's mean": reductions(sequence="mean"),
        "a geometric sum": reductions(geometric="sum"),
        "a geometric mean of each token": other(level="token"),
    }


def wrong_teachers() -> dict[str, Fault]:
    def teacher(advantages_of: Callable[[Any, float], Any]) -> Fault:
        def taught(batch: Any, coef: float) -> Any:
            rows = (
                row.with_loss(advantages=advantages_of(row.loss, coef))
                for row in batch.microbatches
            )
            return replace(batch, microbatches=tuple(rows))

        return lambda: mock.patch(
            "policy_on_ranks.with_distillation",
            lambda batches, coef: [taught(batch, coef) for batch in batches],
        )

    return {
        "a teacher upside down": teacher(
            lambda loss, coef: loss.advantages - coef * (loss.ref_logprobs - loss.old_logprobs)
        ),
        "a teacher without its coefficient": teacher(
            lambda loss, coef: loss.advantages + loss.ref_logprobs - loss.old_logprobs
        ),
        "a teacher without the student": teacher(
            lambda loss, coef: loss.advantages + coef * loss.ref_logprobs
        ),
        "a teacher in the place of the reward": teacher(
            lambda loss, coef: coef * (loss.ref_logprobs - loss.old_logprobs)
        ),
    }


def wrong_supports() -> dict[str, Fault]:
    from megatron_rl.ops import linear_logprobs

    right = linear_logprobs.keep_support

    def support(wrong: Callable[[Any], Any]) -> Fault:
        def kept(logits: Any, support: Any, shard: Any) -> Any:
            return right(logits, wrong(support), shard)

        return lambda: mock.patch.object(linear_logprobs, "keep_support", kept)

    def with_another(support: Any) -> Any:
        return torch.cat([support, (support[:, :1] + 1) % 90], dim=1)

    return {
        "a support that is forgotten": support(lambda support: None),
        "a support with a token more": support(with_another),
    }


def summed(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda values, lengths, reduction: right(values, lengths, "sum")
