"""The routes of a sandbox's daemon that are plain HTTP: files, health, environment, figures."""

import mimetypes
import re
import zlib
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from sandyard.server.core import ops
from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.e2b.envd.box import Box, box_of
from sandyard.server.e2b.envd.filesystem import checked_path, shown
from sandyard.server.e2b.errors import gone, other_type
from sandyard.server.front.bodies import streams_body
from sandyard.server.front.downloads import exactly, file_headers, requested_range
from sandyard.server.front.forms import Form, Part
from sandyard.server.front.streams import HeldStream
from sandyard.server.service.sandboxes.lifecycle import is_over
from sandyard.server.service.services import Services

_FILES_MAX = 1000
_PIECE = 256 * 1024
_LABEL = "x-metadata-"
_LABEL_NAME_MAX = 246
_LABELS_BYTES = 4096
_PRINTABLE = re.compile(r"[\x20-\x7e]*")


async def health(request: Request) -> Response:
    """Tell whether the sandbox runs. This needs no token, and wakes nothing; for who has one the
    machine is asked as well."""
    services: Services = request.app.state.services
    sandbox_id = request.state.target.sandbox_id
    actor = await services.tokens.owner(sandbox_id)
    sandbox = await services.sandboxes.get(actor, sandbox_id, scope="sandbox:write")
    asks = services.tokens.is_access(sandbox_id, request.headers.get("x-access-token", ""))
    is_up = await services.sandboxes.is_up(sandbox, asks_machine=asks)
    if is_over(sandbox, services.clock.now()) or not is_up:
        return gone(sandbox_id)
    return Response(status_code=204)


async def environment(request: Request) -> Response:
    """Return the variables that every process has."""
    box = await box_of(request)
    return JSONResponse({**box.sandbox.env, **box.env})


async def figures(request: Request) -> Response:
    """Return what the sandbox uses."""
    box = await box_of(request)
    _, found = await box.services.sandboxes.stats(box.actor, box.id)
    return JSONResponse(
        {
            "ts": int(box.services.clock.now().timestamp()),
            "cpu_count": box.sandbox.shape.vcpus,
            "cpu_used_pct": found.cpu_percent,
            "mem_used": found.memory_used_bytes,
            "mem_total": found.memory_total_bytes,
            "mem_cache": 0,
            "disk_used": found.disk_used_bytes,
            "disk_total": found.disk_total_bytes,
        }
    )


# --- reading --------------------------------------------------------------------------------


async def read_file(request: Request) -> Response:
    """Send a file, or a range of it."""
    box = _as_named(await box_of(request), request)
    path = checked_path(request.query_params.get("path", "").encode())
    span = requested_range(request.headers.get("range"), request.headers.get("if-range"))
    begin, length = (0, None) if span is None else await _placed(box, path, span)
    is_head = getattr(request.state, "is_head", False)
    wish = ops.Read(path, begin, 0 if is_head else length, home_of=box.user)
    async with AsyncExitStack() as opening:
        files = box.services.files
        reading = await opening.enter_async_context(files.read(box.actor, box.id, wish))
        held = opening.pop_all()
    fact = reading.fact
    name = shown(fact.path).rpartition("/")[2]
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    headers = file_headers(name, fact.modified_ms / 1000, how="inline")
    status, count = 200, None
    if fact.size:  # a file of /proc has none, and ends where it ends
        count = max(0, fact.size - begin) if length is None else length
        headers["Content-Length"] = str(count)
        if span is not None:
            status = 206
            headers["Content-Range"] = f"bytes {begin}-{begin + count - 1}/{fact.size}"
    if span is not None and begin >= fact.size > 0:
        await held.aclose()
        return Response(status_code=416, headers={"Content-Range": f"bytes */{fact.size}"})
    if is_head:
        await held.aclose()
        return Response(status_code=status, media_type=kind, headers=headers)
    pieces = exactly(reading.pieces(count), count)
    return HeldStream(pieces, held, media_type=kind, headers=headers, status_code=status)


async def _placed(
    box: Box, path: bytes, span: tuple[int | None, int | None]
) -> tuple[int, int | None]:
    """Return where a range begins in a file, and how long it is; the whole of one without size."""
    wish = ops.Read(path, 0, 0, home_of=box.user)  # of what a link leads to
    async with box.services.files.read(box.actor, box.id, wish) as looked_at:
        size = looked_at.fact.size
    first, last = span
    if size == 0:
        return 0, None
    if first is None:
        begin = max(0, size - (last or 0))
        return begin, size - begin
    end = size if last is None else min(size, last + 1)
    return first, max(0, end - first)


# --- writing --------------------------------------------------------------------------------


@streams_body
async def write_files(request: Request) -> Response:
    """Write files: those of a form, or one that is the body."""
    box = _as_named(await box_of(request), request)
    labels = _labels_of(request)
    body = _plain(request)
    given = request.headers.get("content-type", "")
    path = request.query_params.get("path")
    kind = given.partition(";")[0].strip().lower()
    try:
        if kind == "application/octet-stream":
            if not path:
                raise InvalidArgumentError("cannot write a file: path is missing", field="path")
            where = checked_path(path.encode())
            return JSONResponse([await _write(box, where, labels, body)])
        if kind != "multipart/form-data":
            raise other_type(kind)
        form = Form(given, body, parts_max=_FILES_MAX).items()
        return JSONResponse([one async for one in _written(box, form, path, labels)])
    except ClientDisconnect as error:
        raise InvalidArgumentError("the file did not come whole", field="body") from error


async def _written(
    box: Box,
    form: AsyncIterator[Part | bytes | None],
    path: str | None,
    labels: Mapping[str, str],
) -> AsyncIterator[dict[str, object]]:
    """Write the files of a form, and yield the answer for each."""
    async for one in form:
        if not isinstance(one, Part) or one.name != "file":
            continue
        where = path.encode() if path else one.file_name
        if not where:
            raise InvalidArgumentError("cannot write a file: it has no name", field="path")
        yield await _write(box, checked_path(where), labels, _until_end(form))


async def _until_end(form: AsyncIterator[Part | bytes | None]) -> AsyncIterator[bytes]:
    """Yield what is in the part that has just begun."""
    async for one in form:
        if one is None:
            return
        if isinstance(one, bytes):
            yield one


async def _write(
    box: Box, path: bytes, labels: Mapping[str, str], body: AsyncIterator[bytes]
) -> dict[str, object]:
    """Write one file over what is there, as watchers of the file expect it."""
    wish = ops.Write(
        path, in_place=True, parents=True, owner=box.user, home_of=box.user, labels=labels
    )
    _, fact = await box.services.files.write(box.actor, box.id, wish, body)
    where = shown(path if fact is None else fact.path)
    entry: dict[str, object] = {"name": where.rpartition("/")[2], "type": "file", "path": where}
    return {**entry, "metadata": dict(labels)} if labels else entry


def _labels_of(request: Request) -> dict[str, str]:
    """Return the labels in a request's headers."""
    found: dict[str, str] = {}
    for header, value in request.headers.items():
        if not header.startswith(_LABEL):
            continue
        name = header.removeprefix(_LABEL)
        if not 1 <= len(name) <= _LABEL_NAME_MAX:
            raise InvalidArgumentError(
                f"cannot use the header {header[:80]}: the name of metadata has 1 to "
                f"{_LABEL_NAME_MAX} characters"
            )
        if not (_PRINTABLE.fullmatch(name) and _PRINTABLE.fullmatch(value)):
            raise InvalidArgumentError(
                f"cannot use the header {header[:80]}: metadata is printable ASCII"
            )
        found.setdefault(name, value)
    size = sum(len(ops.LABEL) + len(name) + len(value) for name, value in found.items())
    if size > _LABELS_BYTES:
        raise InvalidArgumentError(f"cannot keep over {_LABELS_BYTES} bytes of metadata of a file")
    return found


async def _plain(request: Request) -> AsyncIterator[bytes]:
    """Yield a request's body, unpacked.

    Raises:
        InvalidArgumentError: it is packed in a way that is not supported, or not whole.
    """
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding == "identity":
        async for data in request.stream():
            yield data
        return
    if coding != "gzip":
        raise InvalidArgumentError(
            f"cannot unpack a body with the Content-Encoding {coding[:40]}: use gzip or none"
        )
    unpacking = zlib.decompressobj(wbits=31)
    try:
        async for data in request.stream():
            rest = data
            while rest:
                if unpacking.eof:  # another member follows (RFC 1952, 2.2)
                    unpacking = zlib.decompressobj(wbits=31)
                piece = unpacking.decompress(rest, _PIECE)
                rest = unpacking.unused_data or unpacking.unconsumed_tail
                if piece:
                    yield piece
    except zlib.error as error:
        raise InvalidArgumentError(f"cannot unpack the body: {error}", field="body") from error
    if not unpacking.eof:
        raise InvalidArgumentError("the file did not come whole", field="body")


def _as_named(box: Box, request: Request) -> Box:
    """Return a sandbox with the account that the query names, if it names one."""
    name = request.query_params.get("username")
    return box.as_user(name) if name else box
