"""Values as JSON: the one encoding for everything that crosses between processes.

A frozen dataclass is an object with its fields in camelCase, without those that are None. A time is
ISO 8601, bytes are base64, an enum is its value.

Decoding is strict about types, and ignores what the newer of two ends may send in addition: unknown
keys, and unknown values of an enum that has a member UNKNOWN or is optional, which become that
member or None. Data from guests is decoded here, too: anything invalid raises CodecError and
nothing else.
"""

import base64
import binascii
import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from enum import Enum
from typing import Any, TypeVar

_T = TypeVar("_T")
_INT_MAX = 2**63 - 1
_REFUSED = object()
_Read = Callable[[object, str], Any]


class CodecError(ValueError):
    """The data is invalid; the message says where."""


def encode(value: object) -> Any:
    """Return a value as JSON types.

    Raises:
        TypeError: its type is not supported.
    """
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if dataclasses.is_dataclass(value):
        return {
            outer: encode(found)
            for inner, outer in _names(type(value))  # type: ignore[arg-type]  # a class
            if (found := getattr(value, inner)) is not None
        }
    if isinstance(value, Mapping):
        return {str(name): encode(one) for name, one in value.items()}
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Sequence):
        return [encode(one) for one in value]
    if isinstance(value, frozenset):
        return [encode(one) for one in sorted(value)]
    raise TypeError(f"no way to write {type(value).__name__}")


def decode(kind: type[_T], raw: object) -> _T:
    """Return a value of a type from JSON types.

    Raises:
        CodecError: it is not of that type.
    """
    reader: _Read = _reader(kind)  # type: ignore[arg-type]  # a class can be hashed
    value: _T = reader(raw, getattr(kind, "__name__", str(kind)))
    return value


@functools.cache
def _names(kind: Any) -> list[tuple[str, str]]:
    """Return the fields of a dataclass and their names in JSON."""
    return [(one.name, _camel(one.name)) for one in dataclasses.fields(kind)]


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


@functools.cache
def _reader(kind: Any) -> _Read:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _optional(arguments)
    if origin in (tuple, Sequence):
        return _sequence(_reader(arguments[0]))
    if origin is frozenset:
        return _set(_reader(arguments[0]))
    if origin is Mapping:
        return _mapping(_reader(arguments[1]))
    if isinstance(kind, type):
        if issubclass(kind, Enum):
            return _enum(kind, getattr(kind, "UNKNOWN", _REFUSED))
        if dataclasses.is_dataclass(kind):
            return _dataclass(kind)
    found: _Read | None = _PLAIN.get(kind)
    if found is None:
        raise TypeError(f"no way to read {kind}")
    return found


def _dataclass(kind: Any) -> _Read:
    hints = typing.get_type_hints(kind)
    plan = [
        (
            one.name,
            _camel(one.name),
            _reader(hints[one.name]),
            one.default is not dataclasses.MISSING
            or one.default_factory is not dataclasses.MISSING,
        )
        for one in dataclasses.fields(kind)
    ]
    nullable = {inner for inner, *_ in plan if type(None) in typing.get_args(hints[inner])}

    def read(raw: object, where: str) -> Any:
        if not isinstance(raw, dict):
            raise CodecError(f"{where} is not an object")
        values = {}
        for inner, outer, reader, has_default in plan:
            found = raw.get(outer)
            if found is not None:
                values[inner] = reader(found, f"{where}.{outer}")
            elif has_default:
                continue
            elif inner in nullable:
                values[inner] = None
            else:
                raise CodecError(f"{where}.{outer} is missing")
        return kind(**values)

    return read


def _optional(arguments: tuple[Any, ...]) -> _Read:
    kinds = [one for one in arguments if one is not type(None)]
    if len(kinds) != 1:
        raise TypeError("a field is of one kind, or None")
    (kind,) = kinds
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _enum(kind, None)
    reader = _reader(kind)
    return lambda raw, where: None if raw is None else reader(raw, where)


def _sequence(reader: _Read) -> _Read:
    def read(raw: object, where: str) -> Any:
        if not isinstance(raw, list):
            raise CodecError(f"{where} is not a list")
        return tuple(reader(one, where) for one in raw)

    return read


def _set(reader: _Read) -> _Read:
    read = _sequence(reader)
    return lambda raw, where: frozenset(read(raw, where))


def _mapping(reader: _Read) -> _Read:
    def read(raw: object, where: str) -> Any:
        if not isinstance(raw, dict):
            raise CodecError(f"{where} is not an object")
        return {_text(name, where): reader(one, where) for name, one in raw.items()}

    return read


def _enum(kind: type[Enum], unknown: object) -> _Read:
    values = [one.value for one in kind]
    types_ = {type(one) for one in values}

    def read(raw: object, where: str) -> Any:
        if type(raw) in types_ and raw in values:
            return kind(raw)
        if unknown is _REFUSED or (raw is not None and type(raw) not in types_):
            raise CodecError(f"{where} is none of those it can be")
        return unknown

    return read


def _text(raw: object, where: str) -> str:
    if not isinstance(raw, str):
        raise CodecError(f"{where} is not text")
    # JSON escapes can contain lone surrogates, which UTF-8 cannot; they must not get further.
    return raw if raw.isascii() else raw.encode("utf-8", "replace").decode()


def _int(raw: object, where: str) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int) or abs(raw) > _INT_MAX:
        raise CodecError(f"{where} is not a whole number")
    return raw


def _float(raw: object, where: str) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        raise CodecError(f"{where} is not a number")
    if isinstance(raw, int):
        return float(_int(raw, where))
    if not math.isfinite(raw):
        raise CodecError(f"{where} is not a number")
    return raw


def _bool(raw: object, where: str) -> bool:
    if not isinstance(raw, bool):
        raise CodecError(f"{where} is neither true nor false")
    return raw


def _bytes(raw: object, where: str) -> bytes:
    try:
        return base64.b64decode(_text(raw, where), validate=True)
    except (binascii.Error, ValueError) as error:
        raise CodecError(f"{where} is not base64") from error


def _moment(raw: object, where: str) -> datetime:
    try:
        moment = datetime.fromisoformat(_text(raw, where))
    except ValueError as error:
        raise CodecError(f"{where} is not a time") from error
    if moment.tzinfo is None:
        raise CodecError(f"{where} is a time of no zone")
    return moment


_PLAIN: dict[Any, _Read] = {
    str: _text,
    int: _int,
    float: _float,
    bool: _bool,
    bytes: _bytes,
    datetime: _moment,
}
