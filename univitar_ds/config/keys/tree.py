"""The keys of the run file as a tree: names, types, defaults, limits and descriptions, read from the schema's classes.

In the name of a key, N is any index of a list and NAME any key of a mapping: `stages.N.lr`, `stages.N.weights.NAME`.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from univitar_ds.config.schema import RunConfig

INDEX, ENTRY = "N", "NAME"
_LIMITS = {
    "gt": "above {}",
    "ge": "at least {}",
    "lt": "below {}",
    "le": "at most {}",
    "min_length": "not empty",
    "max_length": "at most {} long",
}
"""The wording of each limit in pydantic's metadata."""
_PLAIN = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


@dataclass(frozen=True)
class Key:
    """A key of the run file. `section`: the class of the section, or of the entries of a list; None for a value."""

    name: str
    field: FieldInfo
    section: type[BaseModel] | None

    @property
    def type(self) -> str:
        """The type with its limits in words, such as "a whole number, at least 1"."""
        return type_text(self.field.annotation, self.field.metadata)

    @property
    def required(self) -> bool:
        return self.field.is_required()

    @property
    def default(self) -> Any:
        """The default as plain values. Must not be used for a required key."""
        value = self.field.get_default(call_default_factory=True)
        return value.model_dump(mode="json") if isinstance(value, BaseModel) else value

    @property
    def description(self) -> str:
        return self.field.description or ""

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.name.split("."))


def keys_below(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[Key]:
    """Yields the keys of a section in the order of the schema, each before the keys below it."""
    for name, field in section.model_fields.items():
        inner = section_class(field.annotation)
        key = Key(prefix + name, field, inner)
        yield key
        if inner is not None:
            yield from keys_below(inner, f"{key.name}.{INDEX}." if is_list(field.annotation) else f"{key.name}.")


@cache
def all_keys() -> dict[str, Key]:
    """Returns all keys of the run file by name."""
    return {key.name: key for key in keys_below()}


def section_class(annotation: Any) -> type[BaseModel] | None:
    """Returns the section class in the type of a value or of the entries of a list; None if there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (list, Union, types.UnionType) or hasattr(annotation, "__metadata__"):
        return next(filter(None, map(section_class, get_args(annotation))), None)
    return None


def is_list(annotation: Any) -> bool:
    return get_origin(annotation) is list


def is_choice(annotation: Any) -> bool:
    """Returns whether a value may be of several plain types, such as a number or a word."""
    while hasattr(annotation, "__metadata__"):
        annotation = annotation.__origin__
    options = [option for option in get_args(annotation) if option is not type(None)]
    union = get_origin(annotation) in (Union, types.UnionType)
    return union and len(options) > 1 and section_class(annotation) is None


def is_mapping(annotation: Any) -> bool:
    return get_origin(annotation) is dict


def section_at(parts: Sequence[Any]) -> type[BaseModel] | None:
    """Returns the class of the section at a path of names and indices of lists; None if there is no section."""
    section: type[BaseModel] | None = RunConfig
    for part in parts:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part) if section else None
        section = section_class(field.annotation) if field else None
    return section


def type_text(annotation: Any, limits: Sequence[Any] = ()) -> str:
    """Returns a type in words, such as "a list (each text)" or "a number, above 0"."""
    if hasattr(annotation, "__metadata__"):  # Annotated
        inner = [limit for entry in annotation.__metadata__ for limit in getattr(entry, "metadata", [entry])]
        return type_text(annotation.__origin__, [*inner, *limits])
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        options = [type_text(option, limits) for option in arguments if option is not type(None)]
        return ", or ".join([*options, *(["null"] if type(None) in arguments else [])])
    words = _words(annotation, origin, arguments)
    return ", ".join([words, *filter(None, (_worded_limit(limit) for limit in limits))])


def _words(annotation: Any, origin: Any, arguments: Sequence[Any]) -> str:
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
    if origin is list:
        return "a list of sections" if section_class(arguments[0]) else f"a list (each {type_text(arguments[0])})"
    if origin is tuple:
        return f"a list of {len(arguments)} (each {type_text(arguments[0])})"
    if origin is dict:
        return f"a mapping of names (each to {type_text(arguments[1])})"
    return "a section" if section_class(annotation) else _PLAIN.get(annotation, "another type")


def _worded_limit(limit: Any) -> str | None:
    for name, words in _LIMITS.items():
        value = getattr(limit, name, None)
        if value is not None:
            return words.format(limit_text(value))
    return None


def limit_text(value: float) -> str:
    """Returns a limit without needless digits, and a large whole number with all of them."""
    return str(value) if isinstance(value, int) else f"{value:g}"
