"""A file that comes as a form, taken piece by piece as it comes."""

from collections.abc import AsyncIterator

from sandyard.server.api.models.workspaces import CODED, coded
from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.front.forms import Form, Part

_PARTS_MAX = 16
_FIELD_MAX = 8 * 1024


class Upload:
    """One form: its field `file` is yielded by `pieces`; other fields are small, and kept."""

    def __init__(self, content_type: str, body: AsyncIterator[bytes]) -> None:
        self._form = Form(content_type, body, parts_max=_PARTS_MAX)
        self._fields: dict[str, bytes] = {}
        self._file_name: bytes | None = None

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield what is in the file, as it comes.

        Raises:
            InvalidArgumentError: it is no such form, or did not come whole.
        """
        field = ""
        async for one in self._form.items():
            match one:
                case Part():
                    field = one.name
                    self._begin(one)
                case bytes() if field == "file":
                    yield one
                case bytes():
                    self._keep(field, one)
                case None:
                    pass

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

    def _begin(self, part: Part) -> None:
        if part.name != "file":
            return
        if self._file_name is not None:
            raise InvalidArgumentError(
                "cannot take several files in one upload: send one after the other",
                field="file",
            )
        self._file_name = part.file_name or b""

    def _keep(self, field: str, data: bytes) -> None:
        so_far = self._fields.get(field, b"") + data
        if len(so_far) > _FIELD_MAX:
            raise InvalidArgumentError(
                f"cannot take the upload: a field in it has over {_FIELD_MAX} bytes", field="body"
            )
        self._fields[field] = so_far
