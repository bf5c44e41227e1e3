"""The answer a response commits to: the content of its last box.

Every search is bounded: a policy may well learn to repeat an opening box a hundred thousand times.
"""

MAX_ANSWER_CHARS = 512
TAIL_CHARS = 1 << 16
MAX_OPENERS = 32


def last_box(response: str) -> str | None:
    r"""Content of the last balanced box after the reasoning; None where there is no answer.

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
            return content.strip() or None
        if _opens_brace(tail, body):
            return None
    return None


def _after_reasoning(response: str) -> str:
    opened, closed = response.rfind("<think>"), response.rfind("</think>")
    if opened > closed:
        return ""  # still reasoning: what stands in a box there is not yet an answer
    return response[closed + len("</think>") :] if closed >= 0 else response


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
