"""Comparison of answers in words: prose, names of months, letters of choices."""

import re

_CHOICE = re.compile(r"\(?([A-J])\)?")
_LEADING_CHOICE = re.compile(r"(?:\(([A-J])\)|([A-J])(?=$|[\s.:)]))[\s.:)]*(.*)", re.DOTALL)
_OTHER_CHOICE = re.compile(r"(?<![A-Za-z\\])[A-J](?![A-Za-z])|\b(?:and|or)\b")
_TEXT = re.compile(r"\\(?:text|textrm|mbox|mathrm|operatorname)\s*\{([^{}]*)\}")
_WHOLE_TEXT = re.compile(_TEXT.pattern + r"\s*")
_WORDS = re.compile(r"[A-Za-z][A-Za-z ,.'\-]*")
_LONG_WORD = re.compile(r"[A-Za-z]{3}|^no\b", re.IGNORECASE)  # R - r is no prose
_FUNCTIONS = frozenset(("sinh", "cosh", "tanh", "sqrt", "frac", "infty", "theta", "infinity"))
_MONTH = re.compile(
    r"\b(?:january|february|march|april|may|june|july|august|september|october|november|december)\b"
)


def unwrap_text(text: str) -> str:
    r"""`\text{3 and 4}` becomes `3 and 4`; a whole answer in \text without digits is prose."""
    match = _WHOLE_TEXT.fullmatch(text)
    return match[1].strip() if match and any(char.isdigit() for char in match[1]) else text


def same_choice(gold: str, answer: str) -> bool | None:
    """True where the answer leads with the gold letter and names no other; None for other golds."""
    letter = _CHOICE.fullmatch(gold)
    if letter is None:
        return None
    match = _LEADING_CHOICE.match(_TEXT.sub(r" \1 ", answer).strip())
    if match is None or _OTHER_CHOICE.search(match[3]):
        return False
    return (match[1] or match[2]) == letter[1]


def same_prose(gold: str, answer: str) -> bool | None:
    """Equality of prose, without case, articles and punctuation; None where neither is prose."""
    if _is_prose(gold):
        return _words(gold) == _words(answer)
    is_word = _WORDS.fullmatch(gold) and _LONG_WORD.search(gold)
    if is_word and _words(gold) == _words(answer):
        return True
    return False if _WHOLE_TEXT.fullmatch(answer) else None


def _is_prose(text: str) -> bool:
    if _WHOLE_TEXT.fullmatch(text):
        return True
    if not re.fullmatch(r"(?:[^\W_]|[ ,.'\-])+", text):
        return False
    words = re.findall(r"[^\W\d_]+", text.casefold())
    if text[0].isdigit() and not _MONTH.search(text.casefold()):
        return False  # a number and its unit
    return any(not word.isascii() or (len(word) > 3 and word not in _FUNCTIONS) for word in words)


def _words(text: str) -> list[str]:
    words = re.sub(r"[.,;:!()\"'{}]", " ", _TEXT.sub(r" \1 ", text)).casefold().split()
    if words[:1] in (["a"], ["an"], ["the"]):
        words = words[1:]
    return sorted(words) if _MONTH.search(" ".join(words)) else words  # June 20, 20 June
