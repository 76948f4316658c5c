"""What all sections of the run file share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
DropRate = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]
EncoderSize = Literal["tiny", "0.3b", "0.6b", "1b"]
Part = Literal["text", "vision", "patch_embedding"]


class Section(BaseModel):
    """A part of the run file: unknown keys are errors, values never change after reading, numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def check_templates(templates: list[str]) -> None:
    """Raises: ValueError for templates that do not have exactly one {}."""
    bad = [text for text in templates if text.count("{}") != 1]
    if bad:
        raise ValueError(f"a template holds the label once, as {{}}; these do not: {bad}")
