"""Faults in the values of a run file, one sentence each: the place, the value, the limit and the remedy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError

from univitar_ds.config.keys.foreign import unknown_key
from univitar_ds.config.keys.tree import is_choice, is_list, limit_text, section_class, type_text
from univitar_ds.config.schema import RunConfig
from univitar_ds.errors import shortened

_LIMITS = {
    "greater_than": ("gt", "must be above {}"),
    "greater_than_equal": ("ge", "must be at least {}"),
    "less_than": ("lt", "must be below {}"),
    "less_than_equal": ("le", "must be at most {}"),
    "too_short": ("min_length", "must have at least {} entry"),
    "too_long": ("max_length", "must have at most {} entries"),
    "string_too_long": ("max_length", "must be at most {} characters long"),
}
"""For pydantic's error types about limits: the name of the limit in the error, and the wording."""
_WORDS = {
    "string_pattern_mismatch": "must begin with a letter or a digit and have only letters, digits, dots, underscores "
    "and dashes",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
}


class Fault(NamedTuple):
    """One fault. `place`: keys and indices that lead to the value; `sentence`: the message, which begins with them."""

    place: tuple[Any, ...]
    sentence: str


def faults_of(error: ValidationError) -> list[Fault]:
    """Returns the faults that pydantic has found, each once."""
    found: dict[Fault, None] = {}
    choices: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for fault in error.errors():
        place, branch = _place_of(fault)
        if branch is None:
            found[Fault(place, _sentence(place, fault))] = None
        else:
            choices.setdefault(branch, []).append(fault)
    for branch, faults in choices.items():
        found |= dict.fromkeys(_of_choice(branch, faults))
    return list(found)


def _place_of(fault: dict[str, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...] | None]:
    """Returns the place of a fault, and the place of the choice of types that it belongs to, or None.

    pydantic's location of a fault also names the branch of a choice, which the place leaves out.
    """
    annotation: Any = RunConfig
    place: list[Any] = []
    branch = None
    known = fault["loc"][:-1] if fault["type"] == "extra_forbidden" else fault["loc"]  # a key may have any name
    for part in known:
        section = section_class(annotation)
        if isinstance(part, int):
            place.append(part)
        elif section is not None and part in section.model_fields:
            annotation = section.model_fields[part].annotation
            place.append(part)
        elif (section is not None and ("[" in str(part) or part == section.__name__)) or is_choice(annotation):
            branch = tuple(place)
        else:
            place.append(part)
            annotation = None
    return (*place, *fault["loc"][len(known) :]), branch


def _of_choice(place: tuple[Any, ...], faults: Sequence[dict[str, Any]]) -> Iterator[Fault]:
    """Yields the faults of a value that may be a section or something else: those in the section, else a single one."""
    inside = [fault for fault in faults if len(_place_of(fault)[0]) > len(place) or fault["type"] == "value_error"]
    if inside:
        for fault in inside:
            at = _place_of(fault)[0]
            yield Fault(at, _sentence(at, fault))
        return
    yield Fault(place, f"{_name(place)} must be {_type_at(place)}, got {_shown(faults[0]['input'])}")


def _sentence(place: tuple[Any, ...], fault: dict[str, Any]) -> str:
    kind, name = fault["type"], _name(place)
    if kind == "extra_forbidden":
        return unknown_key(place)
    if kind == "missing" and isinstance(place[-1], int):
        return f"{_name(place[:-1])} must be {_type_at(place[:-1])}; entry {place[-1]} is missing"
    if kind == "missing":
        return f"{name} is missing"
    if kind in ("value_error", "assertion_error"):
        message = fault["msg"].removeprefix("Value error, ")
        return f"{name}: {message}" if name else message
    return f"{name or 'the run file'} {_demand(place, fault)}, got {_shown(fault['input'])}"


def _demand(place: tuple[Any, ...], fault: dict[str, Any]) -> str:
    kind = fault["type"]
    if kind in _WORDS:
        quotes = "; write it in quotes" if kind == "string_type" and isinstance(fault["input"], int | float) else ""
        return _WORDS[kind] + quotes
    if kind == "too_short" and isinstance(fault["input"], str):
        return "must not be empty"
    if kind in _LIMITS:
        limit, words = _LIMITS[kind]
        return words.format(limit_text(fault["ctx"][limit]))
    return f"must be {_type_at(place)}"


def _type_at(place: tuple[Any, ...]) -> str:
    """Returns the type at a place in words, with the keys of a section."""
    annotation: Any = RunConfig
    limits: Sequence[Any] = ()
    for part in place:
        section = section_class(annotation)
        if isinstance(part, int):
            annotation, limits = _entry_of(annotation), ()
        elif section is not None and part in section.model_fields:
            annotation, limits = section.model_fields[part].annotation, section.model_fields[part].metadata
        else:
            annotation, limits = _entry_of(annotation), ()
    section = section_class(annotation)
    words = type_text(annotation, limits)
    if section is not None and not is_list(annotation):
        return words.replace("a section", f"a section with keys {', '.join(section.model_fields)}")
    return words


def _entry_of(annotation: Any) -> Any:
    """Returns the type of the entries of a list, tuple or mapping."""
    return getattr(annotation, "__args__", (annotation,))[-1]  # keys of Python's dicts may be of any type


def _name(place: Sequence[Any]) -> str:
    return shortened(".".join(map(str, place)), 120)


def _shown(value: Any) -> str:
    return shortened(json.dumps(value, default=str, ensure_ascii=False))
