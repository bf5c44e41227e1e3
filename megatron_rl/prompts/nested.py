"""Lists and objects that a column of text holds: as JSON, or as Python writes them to CSV."""

import ast
import re
from collections import Counter
from collections.abc import Mapping

from megatron_rl.files import JsonError, parse_json

MAX_CHARS, MAX_DEPTH = 1 << 18, 32  # of a Python literal

UNREAD = object()
"""What nested_value() gives where a text is no list and no object."""

_STRING = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
_PLAIN = re.compile(r"(?:[\s\[\](){},:\d.eE+-]|\"|None|True|False)*")
# NumPy writes ['a' 'b'], which Python would read as the one text 'ab'.
_RUN_TOGETHER = re.compile(r"\"\s*\"|[-+]\s*[-+]")
_MESSAGES = re.compile(r"[\s\[]*(?:array\([\s\[]*)?\{\s*(['\"])(?:role|content|from|value)\1\s*:")
_TEXTS = re.compile(r"\s*(?:array\()?\s*\[\s*(['\"]).*\1\s*\](?:,\s*dtype=\w+\))?\s*", re.DOTALL)
_OBJECT = re.compile(r"\s*\{\s*(['\"])[^'\"{}]*\1\s*:.*\}\s*", re.DOTALL)


def nested_value(text: str) -> object:
    """The list or object of a text that begins like one; UNREAD where it is none.

    Nothing of the text is run.
    """
    if text.lstrip()[:1] not in ("[", "{"):
        return UNREAD
    try:
        return parse_json(text)
    except JsonError:
        return _literal(text)


def looks_like_messages(text: str) -> bool:
    """True for the text of a list of messages, whether or not it can be read."""
    return _MESSAGES.match(text) is not None


def looks_nested(text: str) -> bool:
    """True for the text of messages, of a list of texts or of an object."""
    return looks_like_messages(text) or any(form.fullmatch(text) for form in (_TEXTS, _OBJECT))


def _literal(text: str) -> object:
    """The value of a Python literal of lists, objects, texts and numbers; else UNREAD."""
    if len(text) > MAX_CHARS:
        return UNREAD
    outside = _STRING.sub('"', text)
    if not _PLAIN.fullmatch(outside) or _RUN_TOGETHER.search(outside):
        return UNREAD
    depth = 0
    for char in outside:
        depth += (char in "[({") - (char in "])}")
        if depth > MAX_DEPTH:
            return UNREAD
    try:
        tree = ast.parse(text.strip(), mode="eval")
        if any(_has_key_twice(node) for node in ast.walk(tree)):
            return UNREAD
        value = ast.literal_eval(tree)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return UNREAD
    return value if isinstance(value, list | Mapping) else UNREAD


def _has_key_twice(node: ast.AST) -> bool:
    if not isinstance(node, ast.Dict):
        return False
    counts = Counter(key.value for key in node.keys if isinstance(key, ast.Constant))
    return max(counts.values(), default=1) > 1
