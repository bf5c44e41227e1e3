"""Units of answers: they are cut off to compare the numbers, and compared where both name one."""

import re
from functools import lru_cache
from typing import NamedTuple

from megatron_rl.reward.exact import number


class Quantity(NamedTuple):
    r"""An answer taken apart: `5\text{ cm}^2` is value "5", unit ("cm", "2")."""

    value: str
    unit: tuple[str, ...] = ()
    scale: int = 1
    is_percent: bool = False


_SPELLINGS = {
    "cm": "centimeter centimetre 厘米",
    "mm": "millimeter millimetre 毫米",
    "m": "meter metre 米",
    "km": "kilometer kilometre 千米 公里",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "g": "gram gramme 克",
    "kg": "kilogram 千克 公斤",
    "lb": "pound lbs",
    "oz": "ounce",
    "l": "liter litre L",
    "ml": "milliliter millilitre mL",
    "s": "sec second 秒",
    "min": "minute 分钟",
    "h": "hour hr 小时",
    "day": "天",
    "week": "",
    "month": "",
    "year": "yr 年",
    "dollar": "usd 美元",
    "cent": "",
    "degree": "deg 度",
    "rad": "radian",
    "unit": "",
    "am": "",
    "pm": "",
    "mph": "",
    "percent": "",
}
_CANONICAL = {
    spelling.casefold(): unit
    for unit, spellings in _SPELLINGS.items()
    for word in (unit, *spellings.split())
    for spelling in (word, word + "s")
}
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_SCALES |= {"trillion": 10**12, "百": 10**2, "千": 10**3, "万": 10**4, "亿": 10**8}
_KNOWN = frozenset(_CANONICAL.values())

_HAN = "[\u4e00-\u9fff]"
_BARE_WORD = "|".join(
    sorted((word for word in (*_CANONICAL, *_SCALES) if len(word) > 1), key=len, reverse=True)
)
_BARE = re.compile(
    rf"\s*((?:(?:square|cubic|sq) )?(?:{_BARE_WORD})(?:(?: per |/| )(?:{_BARE_WORD}))?"
    rf"|{_HAN}{{1,8}})"
    r"(\s*\^\s*\{?[0-9]\}?)?$",
    re.IGNORECASE,
)
_TEXT = r"\\(?:text|mathrm|textrm|mbox|operatorname)\s*\{[^{}]*\}(?:\s?\^\s?\{?-?[0-9]\}?)?"
_WRITTEN = re.compile(rf"(?:\s?/?\s?{_TEXT}){{1,6}}$")
_WORD = re.compile(rf"[A-Za-z]+|[0-9]|千[米克]|[百千万亿]|{_HAN}+")
_JOINS = frozenset(("per", "and", "or"))
_MONEY = re.compile(r"([+-]?)\s?\\\$\s?")
_DEGREE = re.compile(r"\s?\^\s?\\circ\s?$")


@lru_cache(maxsize=8192)
def split_unit(text: str) -> Quantity:
    """The answer taken apart, if its value is then a number or an expression of numbers."""
    value, words, power = text, [], []
    if match := _WRITTEN.search(text):
        value, words = text[: match.start()], _WORD.findall(re.sub(r"\\[a-z]+", " ", match[0]))
    elif match := _BARE.search(text):
        value, words = text[: match.start()], _WORD.findall(match[1])
        power = _WORD.findall(match[2] or "")
    if words in (["and"], ["or"]) or not _is_closed(value):
        value, words, power = text, [], []
    unit = _canonical([*words, *power])
    scale = 1
    for word in words:
        scale *= _SCALES.get(word.casefold(), 1)
    value, money = _MONEY.subn(r"\1", value)
    degrees = _DEGREE.search(value)
    if degrees and number(value[: degrees.start()]) is not None:
        value, unit = value[: degrees.start()], unit or ("degree",)
    value = value.strip()
    is_percent = value.endswith("%") or "percent" in unit
    unit = tuple(word for word in unit if word != "percent")
    if money:
        unit = unit or ("dollar",)
    return Quantity(value.removesuffix("%").strip(), unit, scale, is_percent)


def same_unit(gold: tuple[str, ...], answer: tuple[str, ...]) -> bool:
    """True where units are equal or one side has none; "ways" also equals "different ways"."""
    if not gold or not answer or gold == answer:
        return True
    if all(word in _KNOWN or word.isdigit() for word in gold + answer):
        return False
    return set(gold) <= set(answer) or set(answer) <= set(gold)


def _is_closed(value: str) -> bool:
    """True where a value is a number or an expression of numbers, so that it can have a unit."""
    names = re.sub(r"\\(?:frac|sqrt|pi|times|cdot|circ|infty|pm|\$)", "", value)
    return bool(re.search(r"[0-9]|\\pi", value)) and not re.search(r"[a-zA-Z=<>]", names)


def _canonical(words: list[str]) -> tuple[str, ...]:
    """A unit in one spelling: `square feet` and `ft^2` are both ("ft", "2")."""
    unit: list[str] = []
    powers = {"square": "2", "sq": "2", "squared": "2", "cubic": "3", "cubed": "3"}
    pending = ""
    if [word.casefold() for word in words] in (["a", "m"], ["p", "m"]):
        words = ["".join(words)]
    for word in (word.casefold() for word in words):
        if word in powers:
            pending = powers[word]
            if unit:
                unit.append(pending)
                pending = ""
        elif word not in _SCALES and word not in _JOINS:
            unit.append(_CANONICAL.get(word, word.removesuffix("s")))
            if pending:
                unit.append(pending)
                pending = ""
    return tuple(unit)
