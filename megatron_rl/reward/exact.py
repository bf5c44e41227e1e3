"""Exact values of answers that are numbers, or tuples, intervals and sets of numbers.

Everything here is rational arithmetic on bounded text: there are no floats, and no sympy.
"""

import re
from collections.abc import Hashable, Iterator
from fractions import Fraction
from functools import partial

MAX_DEPTH = 12

Exact = Hashable
"""A Fraction for a number, a frozenset for a set or list, (brackets, values) for a tuple or an
interval."""

_DIGITS = "[0-9]{1,40}"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]{{0,40}})?|\.{_DIGITS})"
_number = partial(re.compile, flags=re.ASCII)
_PLAIN = _number(_DECIMAL)
_GROUPED = _number(r"[0-9]{1,3}(?:([, ])[0-9]{3})(?:\1[0-9]{3}){0,12}(?:\.[0-9]{1,40})?")
_SLASH = _number(rf"(?:({_DIGITS}) )?({_DIGITS}) ?/ ?([+-]?{_DIGITS})")
_FRACTION = _number(
    rf"({_DIGITS})? ?\\frac ?\{{ ?([+-]?{_DIGITS}) ?\}} ?\{{ ?([+-]?{_DIGITS}) ?\}}"
)
_POWER = _number(
    rf"(?:({_DECIMAL}) ?(?:\\times|\\cdot|\*) ?)?"
    r"([0-9]{1,6}) ?\^ ?(?:\{ ?([+-]?[0-9]{1,3}) ?\}|\(?([+-]?[0-9]{1,3})\)?)"  # 10^33 as typed
)
_REPEATING = _number(r"([0-9]{0,20})\.([0-9]{0,20}) ?\\overline ?\{ ?([0-9]{1,20}) ?\}")
_EXPONENT = _number(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)[eE]([+-]?[0-9]{1,2})")
_SIGN = _number(r"(?:([+-]) ?){0,2}")
_CLOSERS = {"(": ")", "[": "]", "\\{": "\\}"}
_AND_OR = re.compile(
    r"\\(?:text|mathrm|textrm|mbox)\s*\{\s*(?:and|or)\s*\}|(?<=[\s)}0-9])(?:and|or)(?=[\s(\\0-9-])"
    r"|[和或]"
)


def number(text: str) -> Fraction | None:
    r"""The value of a plain number such as 1,000 or 3\frac{1}{2} or 1.2\times 10^{4}, else None."""
    text = text.strip()
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1].strip()
    signs = _SIGN.match(text)
    prefix = signs[0] if signs else ""
    size = _magnitude(text[len(prefix) :].strip())
    if size is None:
        return None
    return -size if prefix.count("-") % 2 else size


def _magnitude(text: str) -> Fraction | None:
    if _GROUPED.fullmatch(text):
        text = text.replace(",", "").replace(" ", "")
    if _PLAIN.fullmatch(text):
        return Fraction(text.removesuffix("."))
    if match := _SLASH.fullmatch(text) or _FRACTION.fullmatch(text):
        return _mixed(*match.groups())
    if match := _POWER.fullmatch(text):
        mantissa, base, braced, typed = match.groups()
        return _power(Fraction(mantissa or 1), int(base), int(braced or typed))
    if match := _EXPONENT.fullmatch(text):
        return _power(Fraction(match[1]), 10, int(match[2]))
    if match := _REPEATING.fullmatch(text):
        return _repeating(*match.groups())
    return None


def _mixed(whole: str | None, top: str, bottom: str) -> Fraction | None:
    if int(bottom) == 0 or (whole is not None and "-" in top + bottom):
        return None
    return int(whole or 0) + Fraction(int(top), int(bottom))


def _repeating(whole: str, fixed: str, period: str) -> Fraction:
    nines = int("9" * len(period))
    tail = Fraction(int(fixed or 0)) + Fraction(int(period), nines)
    return int(whole or 0) + tail / Fraction(10) ** len(fixed)


def _power(mantissa: Fraction, base: int, exponent: int) -> Fraction | None:
    if base == 0 and exponent <= 0:
        return None
    return mantissa * Fraction(base) ** exponent


def split_items(text: str) -> list[str]:
    """The items of a list, cut at commas, semicolons, "and" and "or" outside of brackets."""
    parts: list[str] = []
    depth, start = 0, 0
    text = _AND_OR.sub(",", text)
    for position, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char in ",;" and depth <= 0:
            parts.append(text[start:position])
            start = position + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def brackets(text: str) -> tuple[str, str]:
    """The outermost brackets and the text in them: "(1,2]" gives "(]" and "1,2".

    A set in braces gives "{}". Where no pair holds the whole text, as in (1,2),(3,4), there is "".
    """
    opener = "\\{" if text.startswith("\\{") else text[:1]
    if opener not in _CLOSERS:
        return "", text
    closer = "\\}" if opener == "\\{" else text[-1:]
    if not text.endswith(closer) or closer not in _CLOSERS.values():
        return "", text
    if opener != "\\{" and (closer == "\\}" or text.endswith("\\}")):
        return "", text
    inner = text[len(opener) : len(text) - len(closer)]
    if min(_depths(inner), default=0) < 0:
        return "", text
    return opener[-1] + closer[-1], inner.strip()


def _depths(text: str) -> Iterator[int]:
    depth = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        yield depth


def nesting(text: str) -> int:
    """The depth to which brackets are nested."""
    return max(_depths(text), default=0)


def factorial_of_factorial(text: str) -> bool:
    """Whether a factorial is taken of another one: 5!!, (5! + 1)!."""
    groups = [
        False
    ]  # whether a factorial stands in each bracket that is open, the whole text first
    of_factorial = False  # what a factorial sign would be taken of here
    for character in text:
        if character == "!":
            if of_factorial:
                return True
            groups[-1] = of_factorial = True
        elif character in "([{":
            groups.append(False)
        elif character in ")]}" and len(groups) > 1:
            of_factorial = groups.pop()
            groups[-1] |= of_factorial
        elif not character.isspace():
            of_factorial = False
    return False


def exact(text: str) -> Exact | None:
    """The exact value of a number, list, set, tuple or interval of numbers; None for the rest."""
    return _exact(text) if nesting(text) <= MAX_DEPTH else None


def _exact(text: str) -> Exact | None:
    text = text.strip()
    value = number(text)
    if value is not None:
        return value
    if text.replace(" ", "") in ("\\infty", "+\\infty", "-\\infty"):
        return "-oo" if "-" in text else "oo"
    if text == "\\emptyset":
        return frozenset()
    if text.startswith("\\pm"):
        size = number(text.removeprefix("\\pm"))
        return None if size is None else as_set([size, -size])
    kind, inner = brackets(text)
    items = split_items(inner)
    if kind in ("", "{}") and (kind or len(items) > 1):
        return as_set([_exact(item) for item in items])
    if kind and len(items) > 1:
        values = tuple(_exact(item) for item in items)
        return None if None in values else (kind, values)
    return None


def as_set(values: list[Exact | None]) -> Exact | None:
    """The set of the values, a single value as itself; None where one of them is None."""
    distinct: set[Exact] = set()
    for value in values:
        if value is None:
            return None
        # In "\pm 1, 2" the first item is two values.
        distinct |= value if isinstance(value, frozenset) else {value}
    return distinct.pop() if len(distinct) == 1 else frozenset(distinct)
