r"""Answers with names in front: x = 5, y = 2x + 3, x = 1 or x = 2, k \in \mathbb{Z}."""

import re
from typing import NamedTuple

from megatron_rl.reward.exact import exact, split_items
from megatron_rl.reward.normalize import compact


class Pair(NamedTuple):
    """A gold answer and an answer, both normalised."""

    gold: str
    answer: str


class Named(NamedTuple):
    """Names and what each is set to, in the order of the text."""

    names: list[str]
    values: list[str]


_NAME = (
    r"(?:\\(?:text|mathrm|textrm)\s*\{[^{}]*\}"
    r"|\\(?:angle|triangle|overline|vec) ?\{?[a-zA-Z]{1,4}\}?"
    r"|[a-zA-Z]{1,4}|\\(?!pi|infty|frac|sqrt)[a-zA-Z]+)'{0,3}(?:_(?:\{\w{1,8}\}|\w))?(?:\^\{-1\})?"
    r"(?: ?\([a-zA-Z, ]{1,12}\))?"
)
_ASSIGNED = re.compile(rf"({_NAME})\s*(?:=|\\in(?![a-z]))\s*(.+)", re.DOTALL)


def strip_names(gold: str, answer: str) -> bool | Pair:
    """The pair that is left to compare without names, or the outcome where they decide it.

    A name on one side only is cut off; a chain such as 3 = 4 or x = y = 4 is never an answer.
    """
    wanted, given = _named(gold), _named(answer)
    if wanted and given:
        return _compare_named(wanted, given, Pair(gold, answer))
    if gold.count("=") and answer.count("="):
        # Both are equations, which may be the same in another form: 2x - y + 3 = 0 is y = 2x + 3.
        return Pair(gold, answer) if answer.count("=") <= gold.count("=") else False
    if wanted:
        return Pair(_values(wanted), answer) if len(set(wanted.names)) == 1 else False
    if given:
        return Pair(gold, _values(given)) if len(set(given.names)) == 1 else False
    return Pair(gold, answer) if gold.count("=") == answer.count("=") else False


def _compare_named(wanted: Named, given: Named, whole: Pair) -> bool | Pair:
    if len(set(wanted.names)) == 1 and set(wanted.names) == set(given.names):
        return Pair(_values(wanted), _values(given))
    if len(wanted.names) == 1 == len(given.names):
        # With other names the two can only be one equation in two forms, and not two numbers.
        values = exact(wanted.values[0]), exact(given.values[0])
        return whole if values == (None, None) else False
    by_name = _exact_by_name(wanted), _exact_by_name(given)
    return whole if None in by_name else by_name[0] == by_name[1]


def _named(text: str) -> Named | None:
    """The names and values of a text such as `x = 1, 2` or `x = 1, y = 2`; None of any other."""
    whole = _ASSIGNED.fullmatch(text)
    if whole is None or "=" not in whole[2]:
        return Named([compact(whole[1])], [whole[2]]) if whole else None
    matches = [_ASSIGNED.fullmatch(item) for item in split_items(text)]
    found = [match for match in matches if match and "=" not in match[2]]
    if len(found) < len(matches):
        return None
    return Named([compact(match[1]) for match in found], [match[2] for match in found])


def _values(named: Named) -> str:
    return ", ".join(named.values)


def _exact_by_name(named: Named) -> dict[str, object] | None:
    values = [exact(value) for value in named.values]
    if None in values or len(set(named.names)) < len(values):
        return None
    return dict(zip(named.names, values, strict=True))
