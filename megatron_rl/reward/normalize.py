"""Normalisation: one spelling for answers that differ only in how LaTeX or Unicode writes them."""

import re
import unicodedata

from megatron_rl.reward.functions import with_functions
from megatron_rl.reward.markup import without_layout, without_marks

_GREEK = (
    *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"),
    *("lambda", "mu", "nu", "xi", "omicron", "pi", "rho", "varsigma", "sigma", "tau", "upsilon"),
    *("phi", "chi", "psi", "omega"),
)
# Rewritten before NFKC, which would lose them (a superscript two becomes a plain 2).
_SYMBOLS = str.maketrans(
    {
        "\u2212": "-",
        "\u2010": "-",
        "\u2011": "-",
        "\u2012": "-",
        "\u2013": "-",
        "\u2014": "-",
        "\u00d7": "\\times ",
        "\u00b7": "\\cdot ",
        "\u22c5": "\\cdot ",
        "\u00f7": "/",
        "\u2044": "/",
        "\u2215": "/",
        "\u2236": ":",
        "\u3001": ",",
        "\u221e": "\\infty ",
        "\u2264": "\\le ",
        "\u2265": "\\ge ",
        "\u2260": "\\ne ",
        "\u222a": "\\cup ",
        "\u2229": "\\cap ",
        "\u2208": "\\in ",
        "\u2205": "\\emptyset ",
        "\u00b1": "\\pm ",
        "\u00b0": "^\\circ ",
        "\u2026": "\\ldots ",
        "\u22ef": "\\ldots ",
        "\u2019": "'",
        "\u2032": "'",
        "\u211d": "\\mathbb{R}",
        "\u2124": "\\mathbb{Z}",
        "\u2115": "\\mathbb{N}",
        "\u211a": "\\mathbb{Q}",
        "\u2102": "\\mathbb{C}",
        "\u00b2": "^{2}",
        "\u00b3": "^{3}",
        "\u2074": "^{4}",
    }
    | {chr(0x3B1 + offset): f"\\{name} " for offset, name in enumerate(_GREEK)}
)
_ROOT = re.compile("\u221a\\s*(?:\\(([^()]*)\\)|\\{([^{}]*)\\}|(\\d+|[a-z]))")

_ARGUMENT = r"(\{[^{}]*\}|\\(?!sqrt|d?frac|text|math)[a-zA-Z]+|[0-9a-zA-Z])"
_SHORT_FRACTION = re.compile(rf"\\frac\s*{_ARGUMENT}\s*{_ARGUMENT}")
_SHORT_ROOT = re.compile(r"\\sqrt\s*([0-9a-zA-Z])")
_SYNONYMS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), spelling)
    for pattern, spelling in (
        (r"(?<!\\)\\!", ""),  # 900,\!000 is 900,000: a space here would make it a list
        (r"(?<!\\)\\[()\[\]]", " "),  # math delimiters
        (r"(?<!\\)\$", " "),
        (r"\\%", "%"),
        (r"\{,\}", ","),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\leq(?:slant)?(?![a-zA-Z])|<=", r"\\le "),
        (r"\\geq(?:slant)?(?![a-zA-Z])|>=", r"\\ge "),
        (r"\\neq(?![a-zA-Z])|!=", r"\\ne "),
        (r"\\not\s*=", r"\\ne "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\(?:c|l)?dots[bcimo]?(?![a-zA-Z])|\.\.\.", r"\\ldots "),
        (r"\\varnothing(?![a-zA-Z])", r"\\emptyset "),
        (r"\\colon(?![a-zA-Z])", ":"),
        (r"\^\s*\{\s*\\circ\s*\}|\\degree(?![a-zA-Z])", r"^\\circ"),
        (r"\\mathbb\s*([A-Z])", r"\\mathbb{\1}"),
        (r"\*\*", "^"),
        (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
    )
)
_UPRIGHT_LETTER = re.compile(r"\\(?:mathrm|text|textrm|mbox)\s*\{\s*(\(?([a-zA-Z])\)?)\s*\}")
_UNIT_LETTERS = frozenset("mgshLlNJWVAKCF")
_SPACES = re.compile(r"\s+")
# Spaces that carry meaning: between digits, and in "1, 000", which is a list and not a number.
_FREE_SPACE = re.compile(r"(?<![0-9,]) | (?![0-9])|(?<=[^0-9],) |(?<=,) (?![0-9]{3}(?![0-9]))")
_SINGLE_SCRIPT = re.compile(r"([\^_])\{([0-9a-zA-Z])\}")


def normalize(text: str) -> str:
    """The text with one spelling per meaning; still LaTeX, never another value."""
    if not text.isascii():
        text = _to_ascii_math(text)
    text = without_marks(text)
    for pattern, spelling in _SYNONYMS:
        text = pattern.sub(spelling, text)
    text = with_functions(without_layout(text))
    text = _UPRIGHT_LETTER.sub(_plain_letter, text)
    text = _SHORT_FRACTION.sub(_brace_arguments, text)
    text = _SHORT_ROOT.sub(r"\\sqrt{\1}", text)
    text = _SPACES.sub(" ", text).strip().rstrip("\\ ")
    if text.endswith(".") and len(text) > 1:
        text = text[:-1].rstrip()
    while text.startswith("{") and text.endswith("}") and is_balanced(text[1:-1]):
        text = text[1:-1].strip()
    return text


def compact(text: str) -> str:
    """The normalised text without the spaces and braces that carry no meaning."""
    return _SINGLE_SCRIPT.sub(r"\1\2", _FREE_SPACE.sub("", text))


def is_balanced(text: str) -> bool:
    depth = 0
    for before, char in zip(" " + text, text, strict=False):
        if before != "\\":
            depth += (char == "{") - (char == "}")
        if depth < 0:
            return False
    return depth == 0


def _to_ascii_math(text: str) -> str:
    text = "".join(_spell_fraction(char) for char in text.translate(_SYMBOLS))
    text = _ROOT.sub(lambda match: rf"\sqrt{{{next(filter(None, match.groups()), '')}}}", text)
    text = unicodedata.normalize("NFKC", text.replace("\u221a", "\\sqrt "))
    return "".join(char for char in text if not _is_invisible(char))


def _spell_fraction(char: str) -> str:
    if char.isascii() or not unicodedata.decomposition(char).startswith("<fraction>"):
        return char
    top, _, bottom = unicodedata.normalize("NFKC", char).partition("\u2044")
    return rf"\frac{{{top}}}{{{bottom}}}"


def _is_invisible(char: str) -> bool:
    return char not in "\n\t" and unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn")


def _brace_arguments(match: re.Match[str]) -> str:
    top, bottom = (group if group[0] == "{" else f"{{{group}}}" for group in match.groups())
    return rf"\frac{top}{bottom}"


def _plain_letter(match: re.Match[str]) -> str:
    before = match.string[: match.start()].rstrip()
    is_unit = before[-1:] in tuple("0123456789)}/") and match[2] in _UNIT_LETTERS
    return match[0] if is_unit else match[1]
