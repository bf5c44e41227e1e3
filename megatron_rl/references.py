"""Values that a recipe takes from the environment: messages show the reference in their place."""

from collections.abc import Mapping
from typing import Any

References = Mapping[tuple[str | int, ...], str]
"""Path of each value that holds one of the environment -> its text in the recipe."""

MIN_HIDDEN_CHARS = 6
"""Length from which a value is looked for in messages: shorter ones stand in innocent words."""

_HIDDEN: dict[str, str] = {}


def remember(name: str, value: str) -> None:
    """Have `hidden` replace the value of this environment variable from now on."""
    if len(value) >= MIN_HIDDEN_CHARS:
        reference = "${oc.env:" + name + "}"
        # Messages quote values as Python does, which escapes ' only in a text that has " as well.
        forms = {value, repr(value)[1:-1], repr("'\"" + value)[4:-1], ascii(value)[1:-1]}
        _HIDDEN.update(dict.fromkeys(forms, reference))


def hidden(text: str) -> str:
    """The text with references in place of the values that were remembered."""
    for value in sorted(_HIDDEN, key=len, reverse=True):
        text = text.replace(value, _HIDDEN[value])
    return text


def replaced(value: Any, path: tuple[str | int, ...], text: str) -> Any:
    """Nested mappings and lists with the text at this path; unchanged where they lack it."""
    if not path:
        return text
    first, *rest = path
    if isinstance(value, dict) and first in value:
        return value | {first: replaced(value[first], tuple(rest), text)}
    if isinstance(value, list | tuple) and isinstance(first, int) and first < len(value):
        return [
            replaced(each, tuple(rest), text) if index == first else each
            for index, each in enumerate(value)
        ]
    return value
