"""Finders of the answer that a response commits to: in its last box, tag or answer line, or all.

A response to a prompt that ends in <think> is searched with that tag in front: until its </think>
it is a thought.

Every search is bounded: a policy may well learn to repeat an opening box a hundred thousand times.
"""

import re
from collections.abc import Callable

Finder = Callable[[str], str | None]
"""Finds the answer in a response; None where there is none."""

MAX_ANSWER_CHARS = 512
TAIL_CHARS = 1 << 16
MAX_OPENERS = 32

OPEN_THOUGHT = "<think>"
_CLOSE_THOUGHT = "</think>"
_OPEN_TAG, _CLOSE_TAG = "<answer>", "</answer>"
# In front of the word: marks of headings, quotes, items and bold, as in "### **Answer:** 34".
_LABEL = re.compile(rb"[ \t>#*_-]{0,16}answer[*_]{0,3}[ \t]{0,4}(?::|\xef\xbc\x9a)", re.IGNORECASE)
# A number such as -1,234.5 or 3/4 or 50% or 4.5e33, written backwards: the last number is wanted,
# so the response is searched from its end. A minus after a number or a bracket is not a sign, and
# a full stop after a letter is not a decimal point.
_NUMBER_REVERSED = re.compile(
    r"%?(?:[0-9]+/(?=[0-9])|[0-9]{1,3}[-+]?[eE](?=[0-9]))?[0-9][0-9,]*(?:\.(?:[0-9,]*[0-9]|(?!\w)))?(?:-(?![\w)\]}.,]))?"
)


def last_box(response: str) -> str | None:
    r"""The content of the last balanced box after the reasoning; None where there is no answer.

    An unterminated or over-long last box is no answer, and never makes an earlier one count: the
    response was cut, or goes on guessing. An opener without a body (as in "put it in a \boxed")
    is passed over. In a box inside a box the inner one counts.
    """
    tail = _after_reasoning(response)[-TAIL_CHARS:]
    end = len(tail)
    for _ in range(MAX_OPENERS):
        boxed = tail.rfind("\\boxed", 0, end)
        fbox = tail.rfind("\\fbox", max(boxed, 0), end)
        end = max(boxed, fbox)
        if end < 0:
            return None
        body = end + len("\\fbox" if fbox > boxed else "\\boxed")
        content = _box_content(tail, body)
        if content is not None:
            return _trimmed(content) or None
        if _opens_brace(tail, body):
            return None
    return None


def last_answer_tag(response: str) -> str | None:
    """The content of the last <answer>...</answer> after the reasoning, or of the box in it.

    An unterminated or over-long last tag is no answer, as with boxes.
    """
    tail = _after_reasoning(response)[-TAIL_CHARS:]
    start = tail.rfind(_OPEN_TAG)
    if start < 0:
        return None
    content, closed, _ = tail[start + len(_OPEN_TAG) :].partition(_CLOSE_TAG)
    if not closed or len(content) > MAX_ANSWER_CHARS:
        return None
    return last_box(content) if "\\boxed" in content else _trimmed(content) or None


def last_answer_line(response: str) -> str | None:
    """What follows `Answer:` on the last line after the reasoning that begins with it.

    Case, bold and marks of a heading or an item do not matter, and a box in the line counts as its
    content. A line that says nothing, or is over-long, is no answer, as with boxes; the answer does
    not go on in the next line.
    """
    # As bytes, since lower() may change the length of text.
    tail = _after_reasoning(response)[-TAIL_CHARS:].encode("utf-8", "surrogatepass")
    folded, end = tail.lower(), len(tail)
    for _ in range(MAX_OPENERS):
        end = folded.rfind(b"answer", 0, end)
        if end < 0:
            return None
        start = folded.rfind(b"\n", 0, end) + 1
        label = _LABEL.match(tail, start)
        if label is not None:
            line = tail[label.end() :].partition(b"\n")[0]
            return _line_content(line.decode("utf-8", "surrogatepass"))
    return None


def _line_content(line: str) -> str | None:
    content = line.strip(" \t\r*_`")
    if len(content) > MAX_ANSWER_CHARS:
        return None
    return last_box(content) if "\\boxed" in content else _trimmed(content) or None


def whole_response(response: str) -> str | None:
    """The text after the reasoning; None where there is none, or it is too long for an answer."""
    text = _after_reasoning(response).strip()
    return text if 0 < len(text) <= MAX_ANSWER_CHARS else None


def last_number(response: str) -> str | None:
    """The last number after the reasoning: 1,234.5 or -3/4 or 50%."""
    match = _NUMBER_REVERSED.search(_after_reasoning(response)[-TAIL_CHARS:][::-1])
    if match is None or len(match[0]) > MAX_ANSWER_CHARS:
        return None
    return match[0][::-1].lstrip(",")


def is_answer_form(response: str) -> bool:
    """True where a response is reasoning, then one answer tag, then nothing.

    The reasoning may have no tags, or only the closing one, where the prompt has opened it.
    """
    head, opened, rest = response.strip().partition(_OPEN_TAG)
    content = rest.removesuffix(_CLOSE_TAG)
    is_closed = bool(opened) and content != rest and bool(content.strip())
    is_single = _OPEN_TAG not in content and _CLOSE_TAG not in content
    reasoning, closed, between = head.rpartition(_CLOSE_THOUGHT)
    has_reasoned = not between.strip() if closed else OPEN_THOUGHT not in head
    return is_closed and is_single and has_reasoned and _CLOSE_THOUGHT not in reasoning


def _after_reasoning(response: str) -> str:
    opened, closed = response.rfind(OPEN_THOUGHT), response.rfind(_CLOSE_THOUGHT)
    if opened > closed:
        return ""  # it is still reasoning: a box there is not yet an answer
    return response[closed + len(_CLOSE_THOUGHT) :] if closed >= 0 else response


def _trimmed(text: str) -> str:
    r"""The text without what is white around it: in `73\ ` the backslash belongs to the space."""
    return text.strip().rstrip("\\ \t\n")


def _skip_spaces(text: str, start: int) -> int:
    end = min(len(text), start + 8)
    while start < end and text[start].isspace():
        start += 1
    return start


def _opens_brace(text: str, body: int) -> bool:
    return text.startswith("{", _skip_spaces(text, body))


def _box_content(text: str, body: int) -> str | None:
    start = _skip_spaces(text, body)
    if text.startswith("{", start):
        return _balanced(text, start)
    token = text[start : start + 1]
    # Without braces LaTeX takes one character; letters right after the name make another command.
    return token if token.isalnum() and (start > body or token.isdigit()) else None


def _balanced(text: str, start: int) -> str | None:
    depth, position = 0, start
    end = min(len(text), start + MAX_ANSWER_CHARS + 2)
    while position < end:
        char = text[position]
        if char == "\\":
            position += 1  # an escaped brace is a character, not a bracket
        elif char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                return text[start + 1 : position]
        position += 1
    return None
