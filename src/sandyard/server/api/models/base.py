"""What all requests and answers share: camelCase, times in UTC with a Z, the envelopes."""

from contextvars import ContextVar
from datetime import UTC, datetime
from functools import cache
from typing import Annotated, Final, Generic, TypeVar

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
from pydantic.config import JsonDict

from sandyard.server.api.errors import UnknownFieldError
from sandyard.server.core.ids import NAME_MAX
from sandyard.server.service.sandboxes.fields import ACCOUNT, ENV_NAME

T = TypeVar("T")


def _with_z(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


Time = Annotated[
    datetime,
    PlainSerializer(_with_z, return_type=str),
    Field(examples=["2026-05-06T10:00:00.000Z"]),
]


Content = Annotated[str, Field(json_schema_extra={"contentMediaType": "text/plain"})]
"""Text that may have any character; elsewhere U+0000 is refused, and the schema says so."""


class Model(BaseModel):
    """Base of all models: camelCase in JSON, strict types, unknown fields ignored."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="ignore", strict=True
    )


STRICT: ContextVar[bool] = ContextVar("strict", default=False)
"""Whether the request being read asks for unknown fields to be refused."""


class Body(Model):
    """Base of request bodies: null is the same as an absent field. See `api.strictness` for unknown
    fields."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: object) -> object:
        if STRICT.get() and isinstance(given, dict):
            for name in given:
                if name not in _names_of(cls):
                    raise UnknownFieldError(str(name)[:100], sorted(_names_of(cls)))
        return _given(given)


@cache
def _names_of(kind: type[BaseModel]) -> frozenset[str]:
    return frozenset(field.alias or name for name, field in kind.model_fields.items())


def _given(given: object) -> object:
    if not isinstance(given, dict):
        return given
    return {name: _whole(value) for name, value in given.items() if value is not None}


def _whole(value: object) -> object:
    """Return 5 for 5.0: JSON has one kind of number (RFC 8259, 6)."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Env = Annotated[
    dict[str, str],
    BeforeValidator(_given),
    Field(
        examples=[{"DEBUG": "1"}],
        json_schema_extra={"propertyNames": {"pattern": ENV_NAME}},
    ),
]
"""Environment variables; one that is null is none."""


def _text(given: object) -> object:
    return str(given) if isinstance(given, int) and not isinstance(given, bool) else given


UserName = Annotated[
    str,
    BeforeValidator(_text),
    Field(
        min_length=1,
        max_length=64,
        description="A name or a number.",
        json_schema_extra={"pattern": ACCOUNT},
    ),
]
"""A user of a sandbox."""
Cwd = Annotated[
    str,
    Field(
        min_length=1,
        max_length=4096,
        description="The working directory; a relative one is below /workspace.",
    ),
]
DEFAULT_CWD: Final = (
    "The working directory; a relative one is below /workspace. Default: the template's, else "
    "/workspace."
)
DEFAULT_USER: Final = "A name or a number. Default: the template's, else root."
MakeCwd = Annotated[bool, Field(description="Make the working directory, if it is not there.")]


PRINTABLE: Final = r"^ *[\p{L}\p{M}\p{N}\p{P}\p{S}][\p{L}\p{M}\p{N}\p{P}\p{S} ]*$"
"""The pattern of names: printable characters, not all of them spaces."""
Title = Annotated[
    str, Field(json_schema_extra={"minLength": 1, "maxLength": 100, "pattern": PRINTABLE})
]
"""A name for people; the service checks it."""


Name = Annotated[
    str,
    Field(
        json_schema_extra={
            "minLength": 1,
            "maxLength": NAME_MAX,
            "allOf": [{"pattern": PRINTABLE}, {"pattern": r"^(?!\.{1,2}$)[^/]+$"}],
        }
    ),
]
"""A name of a sandbox or a snapshot; the service checks it."""


BASE64: Final = "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"
"""The pattern of base64."""


ONE_LINE: Final = "^[!-~]+( +[!-~]+)*$"
"""The pattern of printable ASCII without spaces around it: what any header can carry."""


NOT_BLANK: Final = r"^[^\x00]*[^\x00\s][^\x00]*$"
"""The pattern of text that is more than white space."""


_LABEL = "[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_TOP_LABEL = "[A-Za-z_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
NAME_OF_HOST: Final = rf"(\*\.{_LABEL}\.)?({_LABEL}\.)*{_TOP_LABEL}\.?"
"""What names of hosts are like, and `*.` for all below one; other letters may be used, too."""


def filled(size_max: int) -> JsonDict:
    """Return what the description says of text that is not blank and no longer than this."""
    return {"minLength": 1, "maxLength": size_max, "pattern": NOT_BLANK}


def either(*names: str) -> dict[str, JsonValue]:
    """Return what the description says of fields of which exactly one is given."""
    return {
        "oneOf": [
            {"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in names
        ]
    }


def at_least_one(*names: str) -> dict[str, JsonValue]:
    """Return what the description says of fields of which one or more are given."""
    return {
        "anyOf": [
            {"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in names
        ]
    }


def in_base64(encoding: str, name: str) -> JsonDict:
    """Return what the description says of a text that is base64 if another field says so."""
    return {
        "if": {"properties": {encoding: {"const": "base64"}}, "required": [encoding]},
        "then": {"properties": {name: {"pattern": BASE64}}},
    }


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
