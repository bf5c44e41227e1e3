"""Equality of two answers that only a computer algebra system can compare.

Everything here may run for ever or take all memory, so only workers import it. Values decide where
there are any, math-verify decides the rest.
"""

import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import verify
from math_verify.grader import should_treat_as_complex

from megatron_rl.reward.answers import decide, shape_of
from megatron_rl.reward.relations import Pair

# math-verify's own reading would cut off units, which for it are letters too: 2t would be 2.
_SPELLING = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
)
# latex2sympy reads 2(3) as the mixed number 5, \gamma as Euler's constant, and y' as y.
_REWRITTEN = (
    (re.compile(r"(?<![_^a-zA-Z0-9.])([0-9]+)\s*\("), r"\1 \\cdot ("),
    (re.compile(r"\)\s*\("), r") \\cdot ("),
    (re.compile(r"\\gamma(?![a-zA-Z])(?!\s*\()"), r"\\varpi "),
    (re.compile(r"\^\s*\{?\s*\\prime\s*\}?"), "'"),
    (re.compile(r"(?<=[a-zA-Z])\s*'"), "_{prime}"),
)
# latex2sympy gives one constant for every gcd, and overlooks a prime or index after a number.
_UNREADABLE = re.compile(r"\\(?:gcd|lcm|operatorname|bmod|pmod|mod)(?![a-zA-Z])|[0-9]\s*[_']")
_NAME = re.compile(r"\\?[a-zA-Z]+")

# Errors that sympy raises for values it cannot have: roots of matrices that are not square, the
# order of complex numbers, unknown functions. Its search for digits of half a matrix never ends.
_UNABLE = (
    *(ArithmeticError, AttributeError, NotImplementedError, RecursionError),
    *(TypeError, ValueError),
)

_DIGITS = 50
# Both sides are exact, so they agree in all digits, or differ in a late one: (2^2005 + 1) / 2^2005
# is not 1.
_MANY_DIGITS = 1000
_SAME_AT_POINT = sympy.Float("1e-25")  # evalf may lose digits to cancellation
_TOO_SMALL = sympy.Float("1e-20")
# Functions made of pieces: equality at a few points says nothing about the other pieces.
_PIECEWISE = (
    *(sympy.floor, sympy.ceiling, sympy.Mod, sympy.Piecewise),
    *(sympy.Abs, sympy.sign, sympy.Max, sympy.Min),
)
# The signs of the symbols at each point. First all are positive, where logarithms and roots are
# real; the points with both signs tell |x| from x.
_SIGNS = ((1, 1, 1), (1, 1, 1), (-1, 1, -1), (-1, -1, 1))


def warm_up() -> None:
    """Fill the caches of math-verify, once, in the process that workers are forked from."""
    # Its warnings of time-outs print the whole response.
    logging.getLogger("math_verify").disabled = True
    logging.disable(logging.CRITICAL)
    verify_pair("x + \\frac{1}{2}", "\\sqrt{2} + y")
    verify_pair("x < 2", "(-\\infty, 2)")


def verify_pair(gold: str, answer: str) -> bool:
    """True where two normalised answers are equal; time and memory are not bounded."""
    wanted, given = shape_of(gold), shape_of(answer)
    if wanted and given and len(wanted.items) > 1 and len(given.items) > 1:
        if wanted.kind == "{}":
            return _same_set(wanted.items, given.items)
        return all(map(_same, wanted.items, given.items))
    left, right = read_pair(gold, answer)
    if left is None or right is None:
        return False  # one cannot be read, and as texts they were already found to differ
    try:
        verdict = _compare(left, right)
        return _verify(left, right) if verdict is None else verdict
    except _UNABLE:
        return False  # sympy can do nothing with them, and as texts they differ


def _same(gold: str, answer: str) -> bool:
    """Compare two items of a list or a point."""
    outcome = decide(gold, answer)
    return verify_pair(*outcome) if isinstance(outcome, Pair) else outcome


def _same_set(gold: Sequence[str], answer: Sequence[str]) -> bool:
    """True where each item equals one of the other side; order and repetitions are free."""
    return all(any(_same(wanted, given) for given in answer) for wanted in gold) and all(
        any(_same(wanted, given) for wanted in gold) for given in answer
    )


def read_pair(gold: str, answer: str) -> tuple[Any, Any]:
    """Both texts as sympy objects, read alike so that x is one symbol; None: cannot be read.

    A MemoryError is passed on, so that the worker is replaced.
    """
    is_real = not (should_treat_as_complex(gold) or should_treat_as_complex(answer))
    # C and c are one constant, but where a text has both R and r they are two radii.
    folds_case = not (_has_both_cases(gold) or _has_both_cases(answer))
    return _parse(gold, is_real, folds_case), _parse(answer, is_real, folds_case)


def _has_both_cases(text: str) -> bool:
    names = {
        name if name.startswith("\\") else letter for name in _NAME.findall(text) for letter in name
    }
    return any(name.lower() != name and name.lower() in names for name in names)


# The gold answer of a question is read again for each of its wrong answers.
@lru_cache(maxsize=256)
def _parse(text: str, is_real: bool, folds_case: bool) -> Any:
    """The sympy object of a text, None where it cannot be read."""
    if _UNREADABLE.search(text):
        return None
    for pattern, spelling in _REWRITTEN:
        text = pattern.sub(spelling, text)
    try:
        return latex2sympy(
            normalize_latex(text, _SPELLING),
            is_real=is_real,
            conversion_config=ConversionConfig(lowercase_symbols=folds_case),
            normalization_config=None,
        )
    except MemoryError:
        raise
    except Exception:  # its grammar raises plain Exceptions
        return None


def _verify(gold: Any, answer: Any) -> bool:
    """math-verify's verdict; False where it would compare a relation with a value.

    It would take the relation's right-hand side for a value.
    """
    if isinstance(answer, sympy.Eq | sympy.And) and not isinstance(gold, sympy.Rel | sympy.And):
        is_plausible = isinstance(gold, sympy.Set) and not answer.has(sympy.Eq)
        if not is_plausible:
            return False
    # Its time-outs are off: they take the process's alarm, and the pool has a harder limit.
    return bool(verify(gold, answer, timeout_seconds=None, allow_set_relation_comp=True))


def _compare(gold: Any, answer: Any) -> bool | None:
    """True where both have the same values, None where values cannot tell.

    math-verify simplifies instead, which takes several times as long where the sides differ, misses
    identities that simplify() misses, and has absolute tolerances on numbers.
    """
    if isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr):
        return _compare_expressions(_exactly(gold), _exactly(answer))
    if isinstance(gold, sympy.MatrixBase) and isinstance(answer, sympy.MatrixBase):
        if gold.shape != answer.shape:
            return False
        outcomes = [_compare(*entries) for entries in zip(gold.flat(), answer.flat(), strict=True)]
        return _all(outcomes)
    return None


def _all(outcomes: Sequence[bool | None]) -> bool | None:
    if False in outcomes:
        return False
    return None if None in outcomes else True


def _compare_expressions(gold: Any, answer: Any) -> bool | None:
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    if not symbols:
        return _compare_numbers(gold, answer)
    # Far points find differences of functions in pieces, but powers of symbols take for ever there.
    scale = 1 if _has_symbolic_power(gold) or _has_symbolic_power(answer) else 29
    points = [
        _point(symbols, number, signs, scale if number % 2 else 1)
        for number, signs in enumerate(_SIGNS)
    ]
    outcomes = [
        _compare_at(gold, answer, point, is_positive=min(signs) > 0)
        for point, signs in zip(points, _SIGNS, strict=True)
    ]
    if False in outcomes:
        return False
    is_in_pieces = gold.has(*_PIECEWISE) or answer.has(*_PIECEWISE)
    # Only the first two points must have values: elsewhere a side may fail to be real.
    return None if is_in_pieces or None in outcomes[:2] else True


def _compare_numbers(gold: Any, answer: Any) -> bool | None:
    for digits in (_DIGITS, _MANY_DIGITS):
        left, right = _value(gold, {}, digits), _value(answer, {}, digits)
        if left is None or right is None:
            return None
        tolerance = sympy.Float(10, digits) ** (-digits * 4 // 5)
        if not abs(left - right) <= tolerance * max(abs(left), abs(right)):
            # A value of 0 never agrees within a relative tolerance, so sympy has to prove it.
            return 0 in (left, right) and (gold - answer).equals(0) is True
    return True


def _has_symbolic_power(expression: Any) -> bool:
    return any(power.exp.free_symbols for power in expression.atoms(sympy.Pow, sympy.exp))


def _point(
    symbols: Sequence[Any], number: int, signs: tuple[int, ...], scale: int
) -> dict[Any, Any]:
    """An unlikely value for each symbol, of a size between 1/5 and 4, times scale."""
    sizes = ((7919 * index + 3571 * number + 619) % 3797 + 211 for index in range(len(symbols)))
    return {
        symbol: signs[index % 3] * scale * sympy.Rational(size, 1009)
        for index, (symbol, size) in enumerate(zip(symbols, sizes, strict=True))
    }


def _compare_at(gold: Any, answer: Any, point: dict[Any, Any], *, is_positive: bool) -> bool | None:
    left, right = _value(gold, point), _value(answer, point)
    if left is None or right is None:
        return None
    if not is_positive and not (left.is_real and right.is_real):
        return None
    size = max(abs(left), abs(right))
    if abs(left - right) <= _SAME_AT_POINT * size:
        return True
    return None if size < _TOO_SMALL else False


def _value(expression: Any, point: dict[Any, Any], digits: int = _DIGITS) -> Any:
    """The value to this many digits; None where there is none, or sympy cannot find it."""
    try:
        value = expression.evalf(digits, subs=point, maxn=2 * digits)
        return value if value.is_number and value.is_finite else None
    except _UNABLE:
        return None


def _exactly(expression: Any) -> Any:
    """The expression with floats as the decimals that were written, and i as the imaginary unit."""
    exact = {value: sympy.Rational(str(value)) for value in expression.atoms(sympy.Float)}
    units = {symbol: sympy.I for symbol in expression.free_symbols if symbol.name == "i"}
    return expression.xreplace(exact | units)
