"""Comparison of an answer with the gold answer, without sympy wherever that is possible.

How ambiguous pairs are decided stands in the rules below. They are tried in order; each says equal,
different, or None, which passes the pair on. A pair that no rule decides goes to a worker.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from megatron_rl.reward.approximate import surely_differ
from megatron_rl.reward.exact import (
    MAX_DEPTH,
    brackets,
    exact,
    factorial_of_factorial,
    nesting,
    number,
    split_items,
)
from megatron_rl.reward.extract import MAX_ANSWER_CHARS
from megatron_rl.reward.functions import with_choices
from megatron_rl.reward.normalize import compact, normalize
from megatron_rl.reward.relations import Pair, strip_names
from megatron_rl.reward.units import Quantity, same_unit, split_unit
from megatron_rl.reward.words import same_choice, same_prose, unwrap_text


class Shape(NamedTuple):
    """Brackets and items: kind "{}" is a set or a list, others are of a point or an interval."""

    kind: str
    items: list[str]


Outcome = bool | Pair
"""Equal, different, or the pair that a worker has to compare."""

_IN_BASE = re.compile(r"\(?([0-9][0-9A-F]*|[A-F][0-9A-F]*[0-9][0-9A-F]*)\)?_\{?([0-9]{1,2})\}?")
_CLOCK = re.compile(r"[0-9]{1,2}:[0-5][0-9]")
_INEQUALITY = re.compile(r"<|>|\\(?:le|ge|ne)(?![a-zA-Z])")
_HEDGE = re.compile(
    r"(?<!\\)\b(?:or (?:more|less|fewer)|at (?:least|most)|(?:more|less|fewer) than|not)\b"
    r"|以[上下]|至[少多]"
)
_SPACED_DIGITS = re.compile(r"[0-9] [0-9]")
_PLUS_MINUS = re.compile(r"\\[pm][mp](?![a-zA-Z])")
# Expressions that can keep sympy busy for ever. An answer with one is wrong, unless the gold answer
# has it too: no question asks for it otherwise.
_REFUSED: tuple[Callable[[str], object], ...] = (
    factorial_of_factorial,
    *(
        re.compile(pattern).search
        for pattern in (
            r"[0-9]{41}",
            r"\^\s*[{(\s]*[+-]?[0-9]{5}",
            r"\^\s*\{[^{}]*\^\s*\{[^{}]*\^",
            r"(?:\^\s*\{[^{}]*){3}\^",  # a tower of four, where the gold answer may be one of three
            r"!.*\^\s*[{(]?[^{}()]*!|\^\s*[{(]?[^{}()^]*!.*!",  # in an exponent, beside another one
            r"\\sum",
            r"\\prod",
            r"\\int(?![a-zA-Z])",
            r"\\i{2,4}nt",
            r"\\lim",
            r"\\det",
            r"\\binom\s*\{\s*[0-9]{5}",
            r"[0-9]{5}\s*[)}]*\s*!",
        )
    ),
)

Rule = Callable[[str, str], bool | None]


# The responses to a prompt often repeat each other's answer.
@lru_cache(maxsize=16384)
def decide(gold: str, answer: str) -> Outcome:
    """Compare two answers as written; a pair is returned where a worker has to compare it."""
    wanted = _normalized_gold(with_choices(gold, answer))
    return _decide(wanted, unwrap_text(normalize(with_choices(answer, gold))))


@lru_cache(maxsize=4096)
def _normalized_gold(gold: str) -> str:
    return unwrap_text(normalize(gold))


def _decide(gold: str, answer: str) -> Outcome:
    if not answer:
        return False
    for rule in (_same_text, _overgrown, _pattern, _hedged, same_choice, same_prose):
        verdict = rule(gold, answer)
        if verdict is not None:
            return verdict
    bare = strip_names(gold, answer)
    if isinstance(bare, bool):
        return bare
    for rule in (_in_base, _clock, _quantities):
        verdict = rule(*bare)
        if verdict is not None:
            return verdict
    return _compare_values(_values_only(bare))


def _same_text(gold: str, answer: str) -> bool | None:
    return True if compact(gold) == compact(answer) else None


def _overgrown(gold: str, answer: str) -> bool | None:
    """Different: the answer, once normalised, is longer than any answer may be."""
    return False if len(answer) > 2 * MAX_ANSWER_CHARS else None


def _pattern(gold: str, answer: str) -> bool | None:
    """Different: sequences that go on and ratios of three are equal as text or not at all."""
    if "\\ldots" in gold or "\\ldots" in answer or gold.count(":") > 1 or answer.count(":") > 1:
        return False
    return None


def _hedged(gold: str, answer: str) -> bool | None:
    r"""Different where the answer alone hedges: `5\text{ or more}` is not 5."""
    return False if _HEDGE.search(answer) and not _HEDGE.search(gold) else None


def _in_base(gold: str, answer: str) -> bool | None:
    """Equal where digits and base are; the answer may leave out the gold answer's base."""
    wanted, given = _IN_BASE.fullmatch(gold), _IN_BASE.fullmatch(answer)
    if wanted is None:
        in_ten = given is not None and given[2] == "10"
        return in_ten and number(given[1]) == number(gold) if given else None
    digits, base = (given[1], given[2]) if given else (answer, wanted[2])
    return digits.lstrip("0") == wanted[1].lstrip("0") and base == wanted[2]


def _clock(gold: str, answer: str) -> bool | None:
    """Equal times of day; 3:30 p.m. is accepted for 3:30, but not the reverse."""
    wanted, given = split_unit(gold), split_unit(answer)
    if not (_CLOCK.fullmatch(wanted.value) and _CLOCK.fullmatch(given.value)):
        return None
    same_half = not wanted.unit or wanted.unit == given.unit
    return wanted.value.lstrip("0") == given.value.lstrip("0") and same_half


def _quantities(gold: str, answer: str) -> bool | None:
    """Equal numbers in equal units; gold 50% accepts 50 and 0.5 too, gold 50 refuses 50%."""
    wanted, given = split_unit(gold), split_unit(answer)
    if not same_unit(wanted.unit, given.unit):
        return False
    gold_number, answer_number = size_of(wanted), size_of(given)
    if gold_number is None or answer_number is None:
        return None
    if wanted.is_percent and not given.is_percent:
        return answer_number in (gold_number, gold_number / 100)
    if given.is_percent and not wanted.is_percent:
        return gold_number * 100 == answer_number
    return gold_number == answer_number


def size_of(quantity: Quantity) -> Fraction | None:
    """The number of a quantity in its unit, a ratio as its fraction; None where there is none."""
    ratio = quantity.value.split(":")
    if len(ratio) == 2:
        top, bottom = number(ratio[0]), number(ratio[1])
        return top / bottom if top is not None and bottom else None
    size = number(quantity.value)
    return None if size is None else size * quantity.scale


def _values_only(pair: Pair) -> Pair:
    """The pair as a computer algebra system understands it: without units, ratios as fractions."""
    wanted, given = split_unit(pair.gold), split_unit(pair.answer)
    if given.is_percent and not wanted.is_percent:
        return Pair(wanted.value, given.value + "%")
    return Pair(_as_fraction(wanted.value), _as_fraction(given.value))


def _as_fraction(text: str) -> str:
    top, colon, bottom = text.partition(":")
    return rf"\frac{{{top.strip()}}}{{{bottom.strip()}}}" if colon else text


def _compare_values(pair: Pair) -> Outcome:
    gold, answer = pair
    if "%" in gold:
        gold, answer = gold.replace("%", ""), answer.replace("%", "")
    gold_value, answer_value = exact(gold), exact(answer)
    if gold_value is not None and answer_value is not None:
        return gold_value == answer_value
    if "%" in answer or _SPACED_DIGITS.search(answer):
        return False
    if gold_value is not None and re.fullmatch(r"[a-zA-Z]+|[^\x00-\x7f]+", answer):
        return False  # a name instead of a number
    if bool(_PLUS_MINUS.search(gold)) != bool(_PLUS_MINUS.search(answer)) and not _is_list(
        answer if _PLUS_MINUS.search(gold) else gold
    ):
        return False  # half of the solutions
    verdict = _compare_shapes(gold, answer)
    if verdict is not None:
        return verdict
    outcome = _unless_refused(Pair(_both_signs(gold), _both_signs(answer)))
    return False if isinstance(outcome, Pair) and surely_differ(*outcome) else outcome


def _is_list(text: str) -> bool:
    kind, inner = brackets(text)
    return kind in ("", "{}") and len(split_items(inner)) > 1


def _both_signs(text: str) -> str:
    r"""`2 \pm a` as the list `2 + a, 2 - a`."""
    if len(_PLUS_MINUS.findall(text)) != 1 or "," in text:
        return text
    return ", ".join(_PLUS_MINUS.sub(sign, text) for sign in (" + ", " - "))


def _compare_shapes(gold: str, answer: str) -> bool | None:
    """Different where a point meets an interval or a set, or points have different lengths."""
    wanted, given = shape_of(gold), shape_of(answer)
    if wanted is None or given is None or (len(wanted.items) < 2 and len(given.items) < 2):
        return None
    if min(len(wanted.items), len(given.items)) < 2 or wanted.kind != given.kind:
        return False
    if wanted.kind == "{}":
        return None
    if len(wanted.items) != len(given.items):
        return False
    outcomes = [_decide(*items) for items in zip(wanted.items, given.items, strict=True)]
    if False in outcomes:
        return False
    return True if all(outcome is True for outcome in outcomes) else None


def shape_of(text: str) -> Shape | None:
    """The brackets and items of an answer; None where sets are joined or described, not listed."""
    if "\\cup" in text or "\\cap" in text or "\\mid" in text:
        return None
    if _INEQUALITY.search(text) or _PLUS_MINUS.search(text):
        return None
    kind, inner = brackets(text)
    return Shape(kind or "{}", split_items(inner))


def _unless_refused(pair: Pair) -> Outcome:
    gold, answer = pair
    if nesting(answer) > MAX_DEPTH:
        return False
    if any(has(answer) and not has(gold) for has in _REFUSED):
        return False
    return pair
