"""The base of every config section: frozen, typed, unknown keys refused, numbers as numbers."""

import re
from collections.abc import Iterable, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, JsonValue, model_validator

MAX_INTEGER = 2**63 - 1  # of a tensor of int64, and of what C takes
MAX_REAL = 3.4e38  # of float32, in which losses and moments are computed
MAY_BE_EMPTY: dict[str, JsonValue] = {"empty": "means none"}
"""The json_schema_extra of a text setting for which an empty text is one; others refuse it."""

_LEADING_ZERO = re.compile(r"\s*[-+]?0[0-9_]+(\.[0-9]*)?\s*")


class FieldErrors(ValueError):
    """Fields of one section that cannot be used: name, value, and what is wrong.

    {field} in the latter stands for section and name.
    """

    def __init__(self, found: Sequence[tuple[str, object, str]]) -> None:
        self.found = found
        super().__init__("; ".join(f"{name}={value!r}: {rule}" for name, value, rule in found))


class Settings(BaseModel):
    """A frozen group of settings; the string under a field is its documentation."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_only_looks_like_a_number(cls, values: Any) -> Any:
        if isinstance(values, dict):
            _raise_if_any(
                (name, cls._not_a_number(name, value), value) for name, value in values.items()
            )
        return values

    @model_validator(mode="after")
    def _refuse_what_overflows(self) -> Self:
        _raise_if_any((name, _overflow(value), value) for name, value in self)
        return self

    @model_validator(mode="after")
    def _refuse_empty_texts(self) -> Self:
        _raise_if_any((name, self._empty(name, value), value) for name, value in self)
        return self

    @classmethod
    def _empty(cls, name: str, value: object) -> str | None:
        field = cls.model_fields[name]
        if not isinstance(value, str) or value.strip() or field.json_schema_extra == MAY_BE_EMPTY:
            return None
        is_optional = type(None) in get_args(field.annotation)
        return "is empty. " + ("Set {field}=null for none" if is_optional else "Name one")

    @classmethod
    def _not_a_number(cls, name: object, value: object) -> str | None:
        field = cls.model_fields.get(str(name))
        kinds = set() if field is None else _kinds(field.annotation)
        if not kinds & {int, float} or kinds & {bool, str}:
            return None
        if isinstance(value, bool):
            return "must be a number, which true and false are not"
        if isinstance(value, str) and _LEADING_ZERO.fullmatch(value):
            return "may be octal, by its leading zero. Write it without"
        return None


def _raise_if_any(findings: Iterable[tuple[str, str | None, object]]) -> None:
    found = [(name, value, rule) for name, rule, value in findings if rule is not None]
    if found:
        raise FieldErrors(found)


def _overflow(value: object) -> str | None:
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        return f"must be at most {MAX_INTEGER} in size, as 64 bits hold"
    if isinstance(value, float) and abs(value) > MAX_REAL:
        return f"must be at most {MAX_REAL:g} in size, as float32 holds"
    return None


def _kinds(annotation: Any) -> set[type]:
    """The plain types that a field's value may have; those inside of containers are not told."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return {kind for member in get_args(annotation) for kind in _kinds(member)}
    if origin is Literal:
        return {type(value) for value in get_args(annotation)}
    return {annotation} if isinstance(annotation, type) else set()
