"""Forms (multipart/form-data, RFC 7578), taken part by part as they come."""

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote_to_bytes

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from sandyard.server.core.errors import InvalidArgumentError

_BOUNDARY_MAX = 70  # RFC 2046, 5.1.1
_EXTENDED = re.compile(rb"(?i)filename\*\s*=\s*(utf-8|iso-8859-1)'[^']*'([^;\s\"]*)")
_HEADER_MAX: Final = 8 * 1024


@dataclass(frozen=True)
class Part:
    """The beginning of a part: the field's name, and the file's, if it is one."""

    name: str
    file_name: bytes | None


class Form:
    """One form, of at most `parts_max` parts."""

    def __init__(self, content_type: str, body: AsyncIterator[bytes], *, parts_max: int) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary or len(boundary) > _BOUNDARY_MAX:
            raise InvalidArgumentError(
                "cannot read the upload: send it as multipart/form-data with the field file",
                field="file",
            )
        self._body = body
        self._parts_max = parts_max
        self._found: list[Part | bytes | None] = []
        self._parts = 0
        self._header, self._value = b"", b""
        self._headers: dict[bytes, bytes] = {}
        self._is_whole = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._on_header,
                "on_header_value": self._on_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers,
                "on_part_data": self._on_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )

    async def items(self) -> AsyncIterator[Part | bytes | None]:
        """Yield each part: its beginning, pieces of what is in it, and None at its end.

        Raises:
            InvalidArgumentError: it is no such form, or did not come whole.
        """
        try:
            async for piece in self._body:
                self._parser.write(piece)
                for one in self._found:
                    yield one
                self._found.clear()
        except FormParserError as error:
            raise InvalidArgumentError(f"cannot read the upload: {error}", field="file") from error
        except ClientDisconnect as error:
            raise _broken_off() from error
        if not self._is_whole:
            raise _broken_off()

    # --- what the parser tells --------------------------------------------------------------

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > self._parts_max:
            raise InvalidArgumentError(f"cannot take a form of over {self._parts_max} fields")
        self._headers.clear()

    def _on_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]
        self._check_header()

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        self._check_header()

    def _check_header(self) -> None:
        if len(self._header) + len(self._value) > _HEADER_MAX:
            raise InvalidArgumentError(
                "cannot read the upload: a header in it is too long", field="body"
            )

    def _on_header_end(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header, self._value = b"", b""

    def _on_headers(self) -> None:
        disposition = self._headers.get(b"content-disposition", b"")
        _, options = parse_options_header(disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        self._found.append(Part(name, _file_name(disposition, options)))

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        self._found.append(data[start:end])

    def _on_part_end(self) -> None:
        self._found.append(None)

    def _on_end(self) -> None:
        self._is_whole = True


def _broken_off() -> InvalidArgumentError:
    return InvalidArgumentError("the upload did not come whole; nothing is kept", field="body")


def _file_name(disposition: bytes, options: dict[bytes, bytes]) -> bytes | None:
    """Return a file's name, also one that is written as RFC 5987 has it."""
    if found := _EXTENDED.search(disposition):
        exact = unquote_to_bytes(found[2])
        return exact if found[1].lower() == b"utf-8" else exact.decode("latin-1").encode()
    return options.get(b"filename")
