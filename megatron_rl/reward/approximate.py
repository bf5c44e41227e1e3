r"""Values of expressions such as \frac{3 \sqrt{2}}{4} + 2 \pi x, to tell different ones apart.

Most wrong answers to a symbolic gold answer differ from it in the first digits, at any value of x.
This module finds that in some 50 microseconds, where sympy takes milliseconds. Texts that can be
read in more than one way are not read. Equal values are no proof of equality: that is sympy's part.
"""

import re
from decimal import Context, Decimal, DecimalException, localcontext

_CONTEXT = Context(prec=40, Emin=-(10**6), Emax=10**6)
_PI = Decimal("3.14159265358979323846264338327950288419717")
_SAME = Decimal("1e-12")
_CANCELLED = Decimal("1e-20")
_TOKEN = re.compile(
    r"\s*([0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40}"
    r"|\\(?:frac|sqrt|pi|cdot|times|alpha|beta|delta|theta|lambda|mu|phi|omega)(?![a-zA-Z])"
    r"|[a-df-hj-z]|[-+*/^(){}\[\]])"  # e and i are left out: they are numbers, not symbols
)
_TIMES = frozenset(("*", "\\cdot", "\\times"))
_CLOSERS = {"(": ")", "{": "}", "[": "]"}


class _UnreadableError(ValueError):
    """The text has no value, or more than one reading."""


def surely_differ(left: str, right: str) -> bool:
    """True where both texts have a value and the values differ; False where that cannot be told."""
    with localcontext(_CONTEXT):
        try:
            first, second = _Reader(left).value(), _Reader(right).value()
            return abs(first - second) > _SAME * max(abs(first), abs(second))
        except (_UnreadableError, DecimalException):
            return False


class _Reader:
    """Recursive descent over the tokens of one text; nesting is bounded by the caller."""

    def __init__(self, text: str) -> None:
        self._tokens = [*_tokens(text), ""]  # "" ends the text
        self._next = 0

    def value(self) -> Decimal:
        value = self._sum()
        if self._peek():
            raise _UnreadableError
        return value

    def _peek(self) -> str:
        return self._tokens[self._next]

    def _take(self) -> str:
        token = self._peek()
        self._next += 1
        return token

    def _sum(self) -> Decimal:
        terms: list[Decimal] = []
        while not terms or self._peek() in ("+", "-"):
            sign = self._take() if self._peek() in ("+", "-") else "+"
            terms.append(self._product() if sign == "+" else -self._product())
        total = sum(terms, Decimal(0))
        # After a cancellation the rest may be nothing but rounding.
        if len(terms) > 1 and abs(total) <= _CANCELLED * max(map(abs, terms)):
            raise _UnreadableError
        return total

    def _product(self) -> Decimal:
        is_mixed = self._is_whole_number()
        value, has_divided = self._power(), False
        if is_mixed and self._peek() == "\\frac":
            return self._mixed_number(value)
        while (token := self._peek()) in _TIMES or token == "/" or _starts_factor(token):
            if token == "/":
                self._take()
                value /= self._power()
                has_divided = True
            elif token in _TIMES:
                self._take()
                value *= self._power()
            elif has_divided:
                raise _UnreadableError  # 1/2x is 1/(2x) to some, and (1/2)x to others
            else:
                value *= self._power()
        return value

    def _is_whole_number(self) -> bool:
        return self._peek().isdecimal() and self._tokens[self._next + 1] != "^"

    def _mixed_number(self, whole: Decimal) -> Decimal:
        r"""3\frac{1}{2} is 3.5 where both are whole numbers, a product where one is not."""
        start = self._next
        fraction = self._atom()
        if self._peek() in ("/", "*", "^") or _starts_factor(self._peek()):
            raise _UnreadableError
        inside = self._tokens[start + 1 : self._next]
        is_plain = all(token.isdecimal() or token in "{}" for token in inside)
        return whole + fraction if is_plain else whole * fraction

    def _power(self) -> Decimal:
        base = self._atom()
        if self._peek() != "^":
            return base
        self._take()
        token = self._peek()
        if token not in ("{", "(") and len(token) > 1:
            raise _UnreadableError  # 2^10 is two to the ten as typed, and 2^1 0 in LaTeX
        return base ** self._atom()

    def _atom(self) -> Decimal:
        token = self._take()
        if token[:1].isdecimal() or token[:1] == ".":
            return Decimal(token)
        if token == "\\pi":
            return _PI
        if token in ("(", "{"):
            return self._closed(token)
        if token == "\\frac":
            return self._group() / self._group()
        if token == "\\sqrt":
            return self._root()
        if token.isalpha() or token[1:].isalpha():
            return _symbol(token)
        raise _UnreadableError

    def _root(self) -> Decimal:
        if self._peek() != "[":
            return self._group().sqrt()
        degree = self._closed(self._take())
        return self._group() ** (1 / degree)

    def _group(self) -> Decimal:
        if self._peek() != "{":
            raise _UnreadableError
        return self._closed(self._take())

    def _closed(self, opener: str) -> Decimal:
        value = self._sum()
        if self._take() != _CLOSERS[opener]:
            raise _UnreadableError
        return value


def _starts_factor(token: str) -> bool:
    """True where a product goes on with this token, without a sign of multiplication."""
    return token[:1] in ("\\", "(") or token.isalpha()


def _symbol(name: str) -> Decimal:
    """A value for a symbol, between 1/5 and 4, at which different expressions will not agree."""
    return Decimal(sum(map(ord, name)) * 7919 % 3797 + 211) / 1009


def _tokens(text: str) -> list[str]:
    tokens, position = [], 0
    text = text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise _UnreadableError
        tokens.append(match[1])
        position = match.end()
    return tokens
