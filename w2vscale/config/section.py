"""What sections of settings are made of: their base class, and types with limits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from w2vscale.storage.urls import Place

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
AboveOne = Annotated[float, Field(gt=1.0)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1, le=1_000_000)]  # of a tensor, which then has fewer than 2^63 bytes


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    return pattern


def as_list(value: object) -> object:
    """Return a single path or text as a list of one, and anything else as it is."""
    return [value] if isinstance(value, str | Path) else value


Pattern = Annotated[str, AfterValidator(_check_pattern)]
Places = Annotated[list[Place], BeforeValidator(as_list)]
Scheme = Annotated[str, Field(pattern=r"^[a-z][a-z0-9+.-]*$")]


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_boolean_for_number(cls, value: object, info: ValidationInfo) -> object:
        # pydantic takes true for 1.
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError(f"{value} is neither a number nor text")
        return value


def architecture(default: Any, description: str, **limits: Any) -> Any:
    """A setting that a model's weights belong to: they mean nothing, or do not fit, under another value."""
    return Field(default, description=description, json_schema_extra={"architecture": True}, **limits)


def architecture_of(section: Section) -> dict[str, Any]:
    """The settings of a section that are part of the architecture, as plain values."""
    marks = {name: field.json_schema_extra for name, field in type(section).model_fields.items()}
    names = [name for name, mark in marks.items() if isinstance(mark, dict) and mark.get("architecture")]
    values = section.model_dump(mode="json")
    return {name: values[name] for name in names}
