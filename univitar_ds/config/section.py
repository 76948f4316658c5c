"""The base class and the value types of all sections of the run file."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
DropRate = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]
EncoderSize = Literal["tiny", "0.3b", "0.6b", "1b"]
Part = Literal["text", "vision", "patch_embedding"]
Checkpointing = Annotated[int, Field(ge=0)] | Literal["auto", "selective"]
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Pattern of a run's name, which is also the name of its folder."""
NAME_LIMIT = 255
"""Maximum length of a run's name: the limit of file systems."""


class Section(BaseModel):
    """Base class of the sections: unknown keys are errors, values are immutable, numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Turns booleans into text for fields of numbers, because pydantic would accept true as 1."""
        is_number = isinstance(value, bool) and _takes_numbers_alone(cls.model_fields[info.field_name].annotation)
        return str(value).lower() if is_number else value


@cache
def _takes_numbers_alone(annotation: Any) -> bool:
    """Whether a field accepts numbers, but neither booleans nor arbitrary text."""
    kinds = set(_kinds(annotation))
    return bool(kinds & {int, float}) and not kinds & {bool, str}


def _kinds(annotation: Any) -> list[Any]:
    """Returns an annotation and everything that is nested in it."""
    return [annotation, *(kind for inner in get_args(annotation) for kind in _kinds(inner))]


def check_templates(templates: list[str]) -> None:
    """Raises ValueError if a template does not have exactly one {}."""
    bad = [text for text in templates if text.count("{}") != 1]
    if bad:
        raise ValueError(f"a template must contain {{}} once, for the label; these do not: {bad}")
