"""What all requests and answers share: camelCase, times in UTC with a Z, the envelopes."""

from datetime import UTC, datetime
from typing import Annotated, Generic, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    model_validator,
)
from pydantic.alias_generators import to_camel

T = TypeVar("T")


def _with_z(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


Time = Annotated[
    datetime,
    PlainSerializer(_with_z, return_type=str),
    Field(examples=["2026-05-06T10:00:00.000Z"]),
]


class Model(BaseModel):
    """Base of all models: camelCase in JSON, strict types, unknown fields ignored."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="ignore", strict=True
    )


class Body(Model):
    """Base of request bodies: null is the same as an absent field."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: object) -> object:
        return _given(given)


def _given(given: object) -> object:
    if not isinstance(given, dict):
        return given
    return {name: value for name, value in given.items() if value is not None}


Env = Annotated[dict[str, str], BeforeValidator(_given), Field(examples=[{"DEBUG": "1"}])]
"""Environment variables; one that is null is none."""


def bounds(least: int, most: int) -> dict[str, JsonValue]:
    """Return what the description says of a number's bounds, which a service keeps."""
    return {"minimum": least, "maximum": most}


class Meta(Model):
    """Metadata of every response."""

    request_id: str


class PageMeta(Meta):
    """Metadata of a list."""

    has_more: bool
    next_cursor: str | None


class Data(Model, Generic[T]):
    """The envelope of an answer."""

    data: T
    meta: Meta


class Page(Model, Generic[T]):
    """The envelope of a list. The cursor is there twice, because clients look in both places."""

    data: list[T]
    has_more: bool
    next_cursor: str | None
    meta: PageMeta


class ErrorBody(Model):
    """What went wrong."""

    code: str
    message: str
    request_id: str
    details: dict[str, JsonValue] | None = None


class ErrorAnswer(Model):
    """The envelope of an error."""

    error: ErrorBody


class RemovedOut(Model):
    """What was removed."""

    id: str
    deleted: bool
