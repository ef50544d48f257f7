"""What all requests and answers share: camelCase, times in UTC with a Z, the envelopes."""

from datetime import UTC, datetime
from typing import Annotated, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, PlainSerializer
from pydantic.alias_generators import to_camel

T = TypeVar("T")


def _with_z(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


Time = Annotated[
    datetime,
    PlainSerializer(_with_z, return_type=str),
    Field(examples=["2026-05-06T10:00:00.000Z"]),
]


class Model(BaseModel):
    """Base of all: camelCase outside, strict about types, deaf to fields it does not know."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="ignore", strict=True
    )


class Meta(Model):
    """Beside every answer."""

    request_id: str


class PageMeta(Meta):
    """Beside every list."""

    has_more: bool
    next_cursor: str | None


class Data(Model, Generic[T]):
    """The envelope of an answer."""

    data: T
    meta: Meta


class Page(Model, Generic[T]):
    """The envelope of a list; where it goes on stands twice, since clients look in both places."""

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
