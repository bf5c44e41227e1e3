"""Chats as data sets hold them in place of a question: a list of messages, each with its role."""

from collections.abc import Mapping, Sequence

from megatron_rl.prompts.nested import UNREAD, looks_like_messages, nested_value
from megatron_rl.prompts.rows import Chat, RowError, preview, text_of

# The second and third names are those of ShareGPT's files.
_ROLES = {name: name for name in ("system", "user", "assistant")} | {
    "human": "user",
    "gpt": "assistant",
    "developer": "system",
}
_KEYS = (("role", "content"), ("from", "value"))


def to_chat(column: str, value: object) -> Chat | None:
    """The turns of a list of messages, or of the text of one; None where it is neither.

    Example: [{"role": "user", "content": "1+1?"}] -> (("user", "1+1?"),).

    Raises:
        RowError: a message has no known role or holds something other than text; a text looks
            like a list of messages and cannot be read as one.
    """
    if isinstance(value, str):
        value = _parsed(column, value)
    if isinstance(value, Mapping):  # one message, as ORZ's rows have it
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        return None
    if not all(isinstance(message, Mapping) for message in value):
        return None
    return tuple(_turn(column, message) for message in value)


def question_of(column: str, chat: Chat) -> Chat:
    """The turns up to the last one of the user; RowError where there is none.

    What follows it is the set's own answer, which no prompt may hold.
    """
    users = [index for index, (role, _) in enumerate(chat) if role == "user"]
    if not users:
        raise RowError(f"{column}: no message has the role user")
    return chat[: users[-1] + 1]


def response_of(chat: Chat) -> str | None:
    """The turn of the assistant that follows the last one of the user; None: there is none."""
    after = [text for role, text in chat[len(question_of("", chat)) :] if role == "assistant"]
    return after[0] if after else None


def _parsed(column: str, text: str) -> object:
    """The messages that a text holds, as in a CSV file; None: it is a question as it is."""
    if not looks_like_messages(text):
        return None
    value = nested_value(text)
    if value is UNREAD:
        raise RowError(
            f"{column}={preview(text)}: looks like a list of messages, and is neither JSON nor a "
            "Python list. Write the column as JSON"
        )
    return value


def _turn(column: str, message: Mapping[str, object]) -> tuple[str, str]:
    for role_key, text_key in _KEYS:
        if role_key in message:
            role = _ROLES.get(str(message[role_key]).casefold())
            if role is None:
                named = preview(message[role_key])
                raise RowError(f"{column}: the role {named} is none of {', '.join(_ROLES)}")
            return role, text_of(f"{column}.{text_key}", _joined(column, message.get(text_key)))
    raise RowError(f"{column}={preview(message)}: a message has role and content")


def _joined(column: str, content: object) -> object:
    """The text of a content in parts, each {"type": "text", "text": ...}."""
    if not isinstance(content, Sequence) or isinstance(content, str):
        return content
    parts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise RowError(f"{column}={preview(part)}: a message may hold text alone")
        parts.append(text)
    return "".join(parts)
