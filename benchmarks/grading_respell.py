"""A gold answer written otherwise: the same value as a person would write it, or nearly the same.

Each rule returns None where it does not apply. The values are kept (or changed) by construction, so
the verdicts are known without asking a grader.
"""

import random
import re
from collections.abc import Callable

Respelling = Callable[[str], str | None]

_INTEGER = re.compile(r"-?[0-9]+")
_LARGE_INTEGER = re.compile(r"-?[1-9][0-9]{3,}")
_DECIMAL = re.compile(r"-?[0-9]+\.[0-9]+")
_SCIENTIFIC = re.compile(r"([0-9.]+)e([0-9]+)")
_FRACTION = re.compile(r"\\frac\{([0-9]+)\}\{([0-9]+)\}")
# What cannot stand in a sum: several answers, relations, intervals, words, units, percent, code.
_NO_EXPRESSION = re.compile(
    r"[,=<>;:%]|\\(?:le|ge|leq|geq|geqslant|in|pm|mp|cup|text|mathrm|mbox|begin|infty|ldots|dots|circ|\$|\{)"
    r"(?![a-z])|_\d+$|_\{\d+\}$|^[\[(].*[\])]$|[a-z]{4,}\.|\*|prime|dot|SR|LR|MR"
)


def respell(gold: str, rng: random.Random) -> str | None:
    """The same answer in another spelling, by one or more rules; None where no rule applies."""
    text = gold
    for rule in rng.sample(_RULES, len(_RULES)):
        text = rule(text) or text
    return text if text != gold else None


def disguise(gold: str) -> str | None:
    r"""`\frac{2 \cdot (gold)}{2}`: equal, but only algebra can tell. None for no expression."""
    bare = gold.strip().strip("$")
    if _NO_EXPRESSION.search(bare) or not re.search(r"[\\a-zA-Z^]", bare):
        return None
    return rf"\frac{{2 \cdot \left( {bare} \right)}}{{2}}"


def near_miss(gold: str, rng: random.Random) -> str | None:
    """The answer with one digit changed; None where there is none."""
    places = [match.start() for match in re.finditer("[0-9]", gold)]
    if not places:
        return None
    place = rng.choice(places)
    other = (int(gold[place]) + rng.randrange(1, 9)) % 10
    return f"{gold[:place]}{other}{gold[place + 1 :]}"


def _group_thousands(text: str) -> str | None:
    if not _LARGE_INTEGER.fullmatch(text):
        return None
    return f"{int(text):,}".replace(",", "{,}")


def _pad_decimal(text: str) -> str | None:
    if _DECIMAL.fullmatch(text):
        return f"{text}0"
    return f"{text}.0" if _INTEGER.fullmatch(text) and not text.startswith("0") else None


def _write_power_of_ten(text: str) -> str | None:
    match = _SCIENTIFIC.fullmatch(text)
    return rf"{match[1]} \times 10^{{{match[2]}}}" if match else None


def _expand_fraction(text: str) -> str | None:
    match = _FRACTION.fullmatch(text)
    return rf"\frac{{{3 * int(match[1])}}}{{{3 * int(match[2])}}}" if match else None


def _display_fractions(text: str) -> str | None:
    return text.replace(r"\frac", r"\dfrac")


def _stretch_brackets(text: str) -> str | None:
    if re.search(r"\\(?:left|right|big|text)|\\[{}]", text) or text.count("(") != text.count(")"):
        return None
    return text.replace("(", r"\left( ").replace(")", r" \right)")


def _space_commas(text: str) -> str | None:
    return re.sub(r",(?![0-9]{3}|\s|\\)", r",\\ ", text) if "{,}" not in text else None


def _enclose(text: str) -> str | None:
    return f"${text}$" if "$" not in text else None


def _end_sentence(text: str) -> str | None:
    return f"{text}." if re.search(r"[0-9}x]$", text) else None


_RULES: list[Respelling] = [
    _group_thousands,
    _pad_decimal,
    _write_power_of_ten,
    _expand_fraction,
    _display_fractions,
    _stretch_brackets,
    _space_commas,
    _enclose,
    _end_sentence,
]
