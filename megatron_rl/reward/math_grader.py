"""The mathematics verifier: exact layers first, math-verify for what they leave open.

`grade` runs in the trainer and is bounded; `verify_pair` may run for ever or take all memory, so
only workers call it. No torch here: workers import this module.
"""

import logging
from dataclasses import dataclass
from typing import Any, Literal

from megatron_rl.reward.answers import Pair, decide
from megatron_rl.reward.extract import last_box

VerdictName = Literal["correct", "wrong", "no_answer", "timeout", "error"]
"""Value of megatron_rl.types.Verdict; the enum itself lives next to torch."""


@dataclass(frozen=True, slots=True)
class Graded:
    """What the exact layers say: a verdict, or the pair a worker has to compare."""

    extracted: str | None
    verdict: VerdictName | None = None
    pair: Pair | None = None


def grade(response: str, gold: str) -> Graded:
    """Extract the answer and compare it exactly; microseconds, whatever the response holds."""
    answer = last_box(response)
    if answer is None:
        return Graded(None, "no_answer")
    if not gold.strip():
        return Graded(answer, "error")  # nothing to compare with; check_gold finds it beforehand
    outcome = decide(gold, answer)
    if isinstance(outcome, Pair):
        return Graded(answer, pair=outcome)
    return Graded(answer, "correct" if outcome else "wrong")


def warm_up() -> None:
    """Import math-verify and fill its caches, once, in the process that workers are forked from."""
    # Its time-out warnings print the whole response, and one of them comes once per process.
    logging.getLogger("math_verify").disabled = True
    logging.disable(logging.CRITICAL)
    verify_pair("x + \\frac{1}{2}", "\\sqrt{2} + y")


def verify_pair(gold: str, answer: str) -> VerdictName:
    """Compare two normalised answers with math-verify, then check its yes. Unbounded: see above."""
    from math_verify import verify  # type: ignore[import-untyped]  # has no stubs

    wanted, given = _parse(gold), _parse(answer)
    if wanted is None or given is None:
        return "wrong"  # what it cannot read is compared as text, and that differed
    # Time-outs off: they steal the process's alarm, and the pool has a harder one.
    accepted = verify(wanted, given, timeout_seconds=None, allow_set_relation_comp=True)
    return "correct" if accepted and _is_plausible(wanted, given) else "wrong"


def _parse(text: str) -> Any:
    """The sympy object of a text, None where math-verify cannot read it."""
    from math_verify import LatexExtractionConfig, parse

    # Only LaTeX: math-verify's other reader hands its text to sympy's parse_expr, which is eval.
    parsed = parse(
        f"${text}$",
        extraction_config=[LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    return parsed[0] if parsed else None


def _is_plausible(gold: Any, answer: Any) -> bool:
    """Whether math-verify's yes survives what it is known to overlook.

    It compares with absolute tolerances, rounds to six decimals as soon as one side is a float, and
    reads any relation by its right-hand side.
    """
    import sympy  # type: ignore[import-untyped]  # has no stubs

    if isinstance(answer, sympy.Eq | sympy.And) and not isinstance(gold, sympy.Rel | sympy.And):
        return isinstance(gold, sympy.Set) and not answer.has(sympy.Eq)
    if not (isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr)):
        return True
    if gold.free_symbols or answer.free_symbols:
        return True
    exact_gold, exact_answer = _without_floats(gold), _without_floats(answer)
    left, right = sympy.N(exact_gold, 50), sympy.N(exact_answer, 50)
    if not (left.is_number and right.is_number and left.is_finite and right.is_finite):
        return False
    # Both sides are exact, so they agree in all of 50 digits or differ. Zero has no relative error.
    if abs(left - right) <= sympy.Float("1e-40") * max(abs(left), abs(right)):
        return True
    return 0 in (left, right) and (exact_gold - exact_answer).equals(0) is True


def _without_floats(expression: Any) -> Any:
    import sympy

    return expression.xreplace(
        {value: sympy.Rational(str(value)) for value in expression.atoms(sympy.Float)}
    )
