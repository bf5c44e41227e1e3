"""`megatron-rl settings`: every key of a recipe with its type, its default and what it means.

megatron-rl settings                             all of them, by section
megatron-rl settings rollout                     one section
megatron-rl settings rollout.temperature         one key
megatron-rl settings rollout --recipe R.yaml     with the values of a recipe, where they differ
"""

import argparse
import difflib
import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

import pydantic_core
from pydantic.fields import FieldInfo

from megatron_rl.config import RunConfig, load_config
from megatron_rl.errors import InputError
from megatron_rl.references import hidden
from megatron_rl.settings import Settings

WIDTH = 98
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "of length >="}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A key, or a group of keys, whose kind is then ""."""

    path: str  # "rollout.temperature"; "reward.parts.<name>.weight" in a mapping
    kind: str = ""  # "float > 0"
    default: str = ""  # "1.0"; "must be set"
    text: str  # as it stands under the field
    variant: str = ""  # "kind: clipped_ratio": the member of a union that has these keys

    @property
    def is_group(self) -> bool:
        return not self.kind


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.add_argument("key", nargs="?", metavar="section[.key]", help="default: all of them")
    parser.add_argument("--recipe", type=Path, help="say its values, too")


def run(options: argparse.Namespace) -> int:
    chosen = choose(list(entries(RunConfig)), options.key)
    config = None if options.recipe is None else load_config(options.recipe, [])
    told = "\n".join(line for entry in chosen for line in lines(entry, config))
    print(hidden(told.strip("\n")))
    return 0


def entries(section: type[Settings], path: str = "", variant: str = "") -> Iterator[Entry]:
    """Every key under a section, each group before its keys.

    The key that only names the member of a union has a common text.
    """
    for name, field in section.model_fields.items():
        at = f"{path}.{name}" if path else name
        is_tag = variant.startswith(f"{name}: ")
        groups = list(_groups(at, field))
        is_section = any(group.path == at and not group.variant for group, _ in groups)
        if not is_section:
            yield Entry(
                path=at,
                kind=_kind(field.annotation, field.metadata),
                default=_default(field),
                text=_one_line(
                    field.description or ("Chooses these settings." if is_tag else None)
                ),
                variant=variant,
            )
        for group, inner in groups:
            yield group
            yield from entries(inner, group.path, group.variant)


def choose(known: Sequence[Entry], key: str | None) -> list[Entry]:
    """The entries of a section or a key.

    Raises:
        InputError: there is none.
    """
    chosen = [
        entry
        for entry in known
        if key is None or entry.path == key or entry.path.startswith(f"{key}.")
    ]
    if not chosen:
        near = difflib.get_close_matches(str(key), {entry.path for entry in known}, n=1)
        sections = ", ".join(RunConfig.model_fields)
        hint = f"Did you mean {near[0]}?" if near else f"Sections: {sections}"
        raise InputError(f"settings: there is no section or key {key!r}. {hint}")
    return chosen


def lines(entry: Entry, config: RunConfig | None = None) -> Iterator[str]:
    """The lines of an entry on the terminal."""
    title = f"{entry.path} ({entry.variant})" if entry.variant else entry.path
    if entry.is_group:
        yield ""
        yield title
        yield from textwrap.wrap(entry.text, WIDTH, initial_indent="  ", subsequent_indent="  ")
        yield ""
        return
    facts = f"{entry.kind}; {entry.default}{_in_recipe(entry, config)}"
    yield from textwrap.wrap(f"  {entry.path}   {facts}", WIDTH, subsequent_indent="      ")
    yield from textwrap.wrap(entry.text, WIDTH, initial_indent="      ", subsequent_indent="      ")


def _groups(path: str, field: FieldInfo) -> Iterator[tuple[Entry, type[Settings]]]:
    """The sections that a field's value may be, or that may stand in its mapping."""
    for member in _members(field.annotation):
        inner, at = member, path
        if get_origin(member) is dict:
            inner, at = get_args(member)[1], f"{path}.<name>"
        if _is_section(inner):
            yield Entry(path=at, text=_one_line(inner.__doc__), variant=_variant(inner)), inner


def _variant(section: type[Settings]) -> str:
    """The key and its one value by which a union knows this member; "" outside of unions."""
    return next(
        (
            f"{name}: {values[0]}"
            for name, field in section.model_fields.items()
            if get_origin(field.annotation) is Literal
            and len(values := get_args(field.annotation)) == 1
        ),
        "",
    )


def _members(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(part for one in get_args(annotation) for part in _members(one))
    return (annotation,)


def _kind(annotation: Any, rules: Sequence[Any] = ()) -> str:
    """A type in words, with its bounds: "float > 0", "auto | never", "list of text, or null"."""
    bounds = " and ".join(
        f"{sign} {getattr(rule, name)}"
        for rule in rules
        for name, sign in BOUNDS.items()
        if getattr(rule, name, None) is not None
    )
    members = _members(annotation)
    names = dict.fromkeys(_name(member) for member in members if member is not NoneType)
    kind = f"{' or '.join(names)} {bounds}".rstrip()
    return f"{kind}, or null" if NoneType in members else kind


def _name(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _name(inner[0])
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (list, tuple):
        return f"list of {_name(inner[0])}"
    if origin is dict:
        return f"mapping of name to {_name(inner[1])}"
    if _is_section(annotation):
        return "section"
    plain = {Any: "anything", str: "text"}
    return str(plain.get(annotation, getattr(annotation, "__name__", annotation)))


def _is_section(annotation: Any) -> TypeGuard[type[Settings]]:
    return isinstance(annotation, type) and issubclass(annotation, Settings)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        extra = field.json_schema_extra
        return str(extra["filled"]) if isinstance(extra, dict) else "must be set"
    return f"default {_value(field.get_default(call_default_factory=True, validated_data={}))}"


def _in_recipe(entry: Entry, config: RunConfig | None) -> str:
    """The recipe's value, where it has this key and another value than the default."""
    value: Any = config
    for part in entry.path.split("."):
        if part not in getattr(type(value), "model_fields", ()):
            return ""
        value = getattr(value, part)
    return "" if entry.default == f"default {_value(value)}" else f"; here {_value(value)}"


def _value(value: Any) -> str:
    """A value as a recipe may spell it."""
    return json.dumps(value, ensure_ascii=False, default=pydantic_core.to_jsonable_python)


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
