"""Findings of pydantic in the form of our own errors; unknown keys name the nearest known one."""

import difflib
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pydantic

from megatron_rl.errors import ConfigError, ConfigErrors
from megatron_rl.references import References
from megatron_rl.settings import FieldErrors

MAX_SHOWN_CHARS = 200


def explain(
    error: pydantic.ValidationError,
    root: type[pydantic.BaseModel],
    references: References,
) -> list[str]:
    """One line for each finding; root: the whole recipe.

    A value that came by one of the references (path -> its text) is shown as that.
    """
    return [line for found in error.errors() for line in _lines(dict(found), root, references)]


def takes_only_text(path: Sequence[str], root: type[pydantic.BaseModel]) -> bool:
    """True where a setting's value is text and nothing else that one could type; false for no
    setting.
    """
    members = _members(path, root)
    return bool(members) and all(map(_is_text, members))


def takes_text_or_list(path: Sequence[str], root: type[pydantic.BaseModel]) -> bool:
    """True where a setting's value is text, or else a list."""
    members = _members(path, root)
    texts = [member for member in members if get_origin(member) is not list]
    return 0 < len(texts) < len(members) and all(map(_is_text, texts))


def _members(path: Sequence[str], root: type[pydantic.BaseModel]) -> list[Any]:
    """The types that a setting's value may have, but for null."""
    model: Any = root
    for part in path:
        model = _inside(model, part)
    members = get_args(model) if get_origin(model) in (Union, UnionType) else (model,)
    return [member for member in members if member is not NoneType]


def _is_text(kind: Any) -> bool:
    is_literal = get_origin(kind) is Literal
    return kind is str or (is_literal and all(isinstance(v, str) for v in get_args(kind)))


def _lines(
    found: dict[str, Any],
    root: type[pydantic.BaseModel],
    references: References,
) -> list[str]:
    path = [str(part) for part in found["loc"]]
    cause = found.get("ctx", {}).get("error")
    if found["type"] == "extra_forbidden":
        return [_unknown_key(path, root)]
    if isinstance(cause, ConfigErrors):
        return cause.problems
    if isinstance(cause, ConfigError):
        return [str(cause)]
    if found["type"] == "missing":
        return [f"{'.'.join(path)}: is missing. Set it in the recipe or as an override"]
    known = _known_part(path, root)
    if isinstance(cause, FieldErrors):
        return [_line([*known, name], value, rule, references) for name, value, rule in cause.found]
    rule = found["msg"]
    if found["type"] == "string_type" and isinstance(found["input"], dict | list):
        rule += ". YAML reads this as a mapping or a list: put quotes around the text"
    return [_line(known, found["input"], rule, references)]


def _line(path: list[str], value: object, rule: str, references: References) -> str:
    shown, field = references.get(tuple(path), value), ".".join(path)
    return f"{field}={_cut(repr(shown))}: {rule.replace('{field}', field)}"


def _unknown_key(path: list[str], root: type[pydantic.BaseModel]) -> str:
    where, key = _without_kinds(path[:-1], root), path[-1]
    siblings, path = _keys_at(path[:-1], root), [*where, key]
    near = difflib.get_close_matches(key, siblings, n=1)
    if near:
        return f"{'.'.join(path)}: unknown key. Did you mean {'.'.join([*where, near[0]])}?"
    elsewhere = [section for section in root.model_fields if key in _keys_at([section], root)]
    if elsewhere:
        return f"{'.'.join(path)}: unknown key. Did you mean {elsewhere[0]}.{key}?"
    return f"{'.'.join(path)}: unknown key. Known here: {', '.join(sorted(siblings))}"


def _keys_at(path: Sequence[str], root: type[pydantic.BaseModel]) -> list[str]:
    model: Any = root
    for part in path:
        model = _inside(model, part)
    return list(model.model_fields) if _is_section(model) else []


def _known_part(path: list[str], root: type[pydantic.BaseModel]) -> list[str]:
    """The path down to a setting; pydantic appends the types that its value may have."""
    model: Any = root
    for depth, part in enumerate(path):
        model = _inside(model, part)
        if not _is_section(model) and get_origin(model) is not dict and not _kinds(model):
            return _without_kinds(path[: depth + 1], root)
    return _without_kinds(path, root)


def _without_kinds(path: Sequence[str], root: type[pydantic.BaseModel]) -> list[str]:
    """The path as a recipe has it: pydantic adds the kind of a section that has several."""
    model: Any = root
    kept = []
    for part in path:
        if part not in _kinds(model):
            kept.append(part)
        model = _inside(model, part)
    return kept


def _kinds(model: Any) -> dict[str, Any]:
    """kind -> section, where a section may be of several kinds."""
    members = get_args(model) if get_origin(model) in (Union, UnionType) else ()
    return {m.model_fields["kind"].default: m for m in members if _is_section(m)}


def _inside(model: Any, part: str) -> Any:
    """The type of a section's field, of a mapping's entry, or of a section of this kind."""
    if get_origin(model) is dict:
        return get_args(model)[1]
    if kinds := _kinds(model):
        return kinds.get(part)
    field = model.model_fields.get(part) if _is_section(model) else None
    return None if field is None else _or_none(field.annotation)


def _or_none(annotation: Any) -> Any:
    """The section where a field may hold that or null; other types as they are."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
    others = [member for member in members if member is not NoneType]
    return others[0] if len(others) == 1 and _is_section(others[0]) else annotation


def _is_section(model: Any) -> bool:
    return isinstance(model, type) and issubclass(model, pydantic.BaseModel)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[: MAX_SHOWN_CHARS - 3]}..."
