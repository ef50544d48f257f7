"""A file that comes as a form (multipart/form-data), taken piece by piece as it comes."""

import re
from collections.abc import AsyncIterator
from urllib.parse import unquote_to_bytes

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from sandyard.server.api.models.workspaces import CODED, coded
from sandyard.server.core.errors import InvalidArgumentError

_PARTS_MAX = 16
_BOUNDARY_MAX = 70  # RFC 2046, 5.1.1
_EXTENDED = re.compile(rb"(?i)filename\*\s*=\s*(utf-8|iso-8859-1)'[^']*'([^;\s\"]*)")
_HEADER_MAX, _FIELD_MAX = 8 * 1024, 8 * 1024


class Upload:
    """One form: its field `file` is yielded by `pieces`; other fields are small, and kept."""

    def __init__(self, content_type: str, body: AsyncIterator[bytes]) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary or len(boundary) > _BOUNDARY_MAX:
            raise InvalidArgumentError(
                "cannot read the upload: send it as multipart/form-data with the field file",
                field="file",
            )
        self._body = body
        self._pieces: list[bytes] = []
        self._fields: dict[str, bytes] = {}
        self._file_name: bytes | None = None
        self._parts = 0
        self._field = ""
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
                "on_end": self._on_end,
            },
        )

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield what is in the file, as it comes.

        Raises:
            InvalidArgumentError: it is no such form, or did not come whole.
        """
        try:
            async for piece in self._body:
                self._parser.write(piece)
                for one in self._pieces:
                    yield one
                self._pieces.clear()
        except FormParserError as error:
            raise InvalidArgumentError(f"cannot read the upload: {error}", field="file") from error
        except ClientDisconnect as error:
            raise InvalidArgumentError(
                "the upload did not come whole; nothing is kept", field="body"
            ) from error
        if not self._is_whole:
            raise InvalidArgumentError(
                "the upload did not come whole; nothing is kept", field="body"
            )

    def name(self) -> bytes:
        """Return what the file is to be called: the field `name`, else its own name.

        Raises:
            InvalidArgumentError: there was no file, or it has no name.
        """
        if self._file_name is None:
            raise InvalidArgumentError(
                "cannot find a file in the upload: it goes into the field file", field="file"
            )
        name = self._fields.get("name") or self._file_name
        if name.startswith(CODED):
            return coded(name.removeprefix(CODED), field="name")
        if not name:
            raise InvalidArgumentError(
                "cannot tell what to call the file: add the field name", field="name"
            )
        return name

    # --- what the parser tells --------------------------------------------------------------

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > _PARTS_MAX:
            raise InvalidArgumentError(f"cannot take a form of over {_PARTS_MAX} fields")
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
        told = self._headers.get(b"content-disposition", b"")
        _, options = parse_options_header(told)
        self._field = options.get(b"name", b"").decode("utf-8", "replace")
        if self._field == "file":
            if self._file_name is not None:
                raise InvalidArgumentError(
                    "cannot take several files in one upload: send one after the other",
                    field="file",
                )
            self._file_name = _file_name(told, options)

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._field == "file":
            self._pieces.append(data[start:end])
            return
        so_far = self._fields.get(self._field, b"") + data[start:end]
        if len(so_far) > _FIELD_MAX:
            raise InvalidArgumentError(
                f"cannot take the upload: a field in it has over {_FIELD_MAX} bytes", field="body"
            )
        self._fields[self._field] = so_far

    def _on_end(self) -> None:
        self._is_whole = True


def _file_name(told: bytes, options: dict[bytes, bytes]) -> bytes:
    """Return a file's name, also one that is written as RFC 5987 has it."""
    if found := _EXTENDED.search(told):
        exact = unquote_to_bytes(found[2])
        return exact if found[1].lower() == b"utf-8" else exact.decode("latin-1").encode()
    return options.get(b"filename", b"")
