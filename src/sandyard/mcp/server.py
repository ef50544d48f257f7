"""The MCP server: a few tools over the SDK, each bounded, each error a sentence for a model."""

import codecs
import functools
import hmac
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

from mcp.server import MCPServer
from mcp.server.mcpserver import Image
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.transport_security import TransportSecuritySettings
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from sandyard.client import (
    AsyncSandbox,
    AsyncSandyard,
    NotReadyError,
    SandyardError,
)
from sandyard.client.options import CreateOptions

SHOWN_MAX = 30_000
READ_MAX = 100_000
_WRITTEN_MAX = 3_000_000
_ENTRIES_MAX = 500
_BOXES_MAX = 200
_TIMEOUT_MAX_S = 3600.0
_KEPT_MAX = 64
_P = ParamSpec("_P")
_T = TypeVar("_T")

INSTRUCTIONS = """Each sandbox is a real Linux virtual machine with its own kernel, disk and
network. Create one, run commands and code in it, and destroy it when you are done: it costs credits
while it runs. Work in /workspace. A paused sandbox resumes with the next command."""

Ref = Annotated[str, Field(description="The sandbox's id or name.")]
Timeout = Annotated[float, Field(gt=0, le=_TIMEOUT_MAX_S, description="Seconds until it is ended.")]


class Box(BaseModel):
    """A sandbox."""

    id: str
    name: str | None
    status: str
    template: str


class Ran(BaseModel):
    """How a command ended. What is long is cut in its middle, which says so."""

    exit_code: int
    stdout: str
    stderr: str
    timed_out: bool


class CodeRan(BaseModel):
    """What a piece of code printed, the value of its last expression, what it raised."""

    stdout: str
    stderr: str
    value: str | None
    error: str | None


class Entry(BaseModel):
    """A file or folder."""

    path: str
    type: str
    size: int


class Listed(BaseModel):
    """What is in a folder."""

    entries: list[Entry]
    is_cut: bool


class FileText(BaseModel):
    """A part of a file; `next_offset` says where the next begins, if there is more."""

    text: str
    size: int
    next_offset: int | None


class FileUrl(BaseModel):
    """A URL that reads or writes one file, without a key, until it runs out."""

    url: str
    method: str
    expires_at: str


class PortUrl(BaseModel):
    """A URL of what listens on a port, until it runs out."""

    url: str
    port: int
    expires_at: str


class Hands:
    """What the tools do. Sandboxes that were used lately are kept with their interpreters."""

    def __init__(self, yard: AsyncSandyard) -> None:
        self._yard = yard
        self._boxes: OrderedDict[str, AsyncSandbox] = OrderedDict()

    async def _box(self, reference: str) -> AsyncSandbox:
        known = self._boxes.get(reference)
        if known is None:
            found = await AsyncSandbox.connect(reference, client=self._yard)
            # Kept by its id, whatever it was asked for by: one interpreter a sandbox.
            known = self._boxes.setdefault(found.id, found)
        self._keep(known)
        return known

    def _keep(self, box: AsyncSandbox) -> None:
        self._boxes[box.id] = box
        self._boxes.move_to_end(box.id)
        while len(self._boxes) > _KEPT_MAX:
            self._boxes.popitem(last=False)

    async def create_sandbox(
        self,
        template: Annotated[
            str, Field(description="What it is made from; base-ubuntu has Python and Node.")
        ] = "base-ubuntu",
        name: Annotated[str | None, Field(description="A name of your own for it.")] = None,
    ) -> Box:
        """Create a sandbox, and return it once it runs."""
        options: CreateOptions = {} if name is None else {"name": name}
        try:
            box = await AsyncSandbox.create(template, client=self._yard, wait_s=120, **options)
        except NotReadyError as error:
            raise ToolError(f"{error}; it was deleted, create another") from error
        self._keep(box)
        return _description(box)

    async def list_sandboxes(self) -> list[Box]:
        """List the sandboxes that there are, newest first: 200 of them at most."""
        found: list[Box] = []
        async for one in self._yard.list():
            found.append(_description(one))
            if len(found) == _BOXES_MAX:
                break
        return found

    async def run_command(
        self,
        sandbox: Ref,
        command: Annotated[str, Field(description="A line for bash.")],
        timeout_s: Timeout = 60.0,
        cwd: Annotated[str, Field(description="The folder to run it in.")] = "/workspace",
        stdin: Annotated[str | None, Field(description="What it reads.")] = None,
    ) -> Ran:
        """Run a command in a sandbox to its end. For what is to go on, append `&`, with its output
        sent to a file."""
        box = await self._box(sandbox)
        done = await box.exec(command, timeout_s=timeout_s, cwd=cwd, stdin=stdin)
        return Ran(
            exit_code=done.exit_code,
            stdout=shown(done.stdout),
            stderr=shown(done.stderr),
            timed_out=done.timed_out,
        )

    async def run_code(
        self,
        sandbox: Ref,
        code: Annotated[str, Field(description="What to run.")],
        language: Literal["python", "node"] = "python",
        timeout_s: Timeout = 60.0,
    ) -> CodeRan:
        """Run Python or JavaScript in an interpreter that is kept: variables, functions and imports
        are there for the next piece. The value of the last expression is returned."""
        box = await self._box(sandbox)
        done = await box.run_code(code, language=language, timeout_s=timeout_s)
        error = done.error
        raised = None if error is None else error.traceback or f"{error.name}: {error.message}"
        return CodeRan(
            stdout=shown(done.stdout),
            stderr=shown(done.stderr),
            value=None if done.value is None else shown(done.value),
            error=None if raised is None else shown(raised),
        )

    async def read_file(
        self,
        sandbox: Ref,
        path: Annotated[str, Field(description="Below /workspace if it begins without /.")],
        offset: Annotated[int, Field(ge=0, description="The first byte.")] = 0,
    ) -> FileText:
        """Read a text file, at most 100 000 bytes of it."""
        box = await self._box(sandbox)
        data, size = b"", (await box.files.info(path)).size
        async for piece in box.files.read_pieces(path, offset=offset, length=READ_MAX):
            data = (data + piece)[:READ_MAX]
            if len(data) == READ_MAX:
                break
        if b"\0" in data[:8192]:
            raise ToolError(f"{path} is no text: {size} bytes; use run_command or get_file_url")
        # A character that is cut in two begins the next part.
        whole = codecs.getincrementaldecoder("utf-8")("replace")
        text = whole.decode(data, final=len(data) < READ_MAX)
        end = offset + len(data) - len(whole.getstate()[0])
        return FileText(
            text=text,
            size=size,
            next_offset=end if end < size else None,
        )

    async def write_file(
        self,
        sandbox: Ref,
        path: Annotated[str, Field(description="Below /workspace if it begins without /.")],
        text: Annotated[str, Field(max_length=_WRITTEN_MAX, description="All of the file.")],
    ) -> str:
        """Write a text file, with the folders above it; one that is there is replaced whole."""
        box = await self._box(sandbox)
        return f"{await box.files.write(path, text)} bytes are in {path}"

    async def list_files(
        self,
        sandbox: Ref,
        path: Annotated[str, Field(description="The folder.")] = "/workspace",
        depth: Annotated[int, Field(ge=1, le=10, description="1: what is right in it.")] = 1,
    ) -> Listed:
        """List what is in a folder, at most 500 entries."""
        box = await self._box(sandbox)
        found = await box.files.list(path, depth=depth)
        entries = [Entry(path=e.path, type=e.type, size=e.size) for e in found[:_ENTRIES_MAX]]
        return Listed(entries=entries, is_cut=len(found) > _ENTRIES_MAX)

    async def get_file_url(
        self,
        sandbox: Ref,
        path: Annotated[str, Field(description="The file.")],
        method: Annotated[
            Literal["GET", "PUT"], Field(description="GET to read it, PUT to write it.")
        ] = "GET",
        expires_s: Annotated[int, Field(ge=1, le=604_800)] = 3600,
    ) -> FileUrl:
        """Make a URL that reads or writes one file without a key."""
        box = await self._box(sandbox)
        made = await box.files.sign(path, method=method, expires_s=expires_s)
        return FileUrl(url=made.url, method=made.method, expires_at=made.expires_at)

    async def get_preview_url(
        self,
        sandbox: Ref,
        port: Annotated[int, Field(ge=1, le=65535, description="What listens on it is shown.")],
    ) -> PortUrl:
        """Make a URL of a port that needs no key."""
        made = await (await self._box(sandbox)).url(port)
        return PortUrl(url=made.url, port=made.port, expires_at=made.expires_at)

    async def take_screenshot(self, sandbox: Ref) -> Image:
        """Take a picture of the screen of a sandbox made from desktop-ubuntu."""
        return Image(data=await (await self._box(sandbox)).desktop.screenshot(), format="png")

    async def click(
        self,
        sandbox: Ref,
        x: Annotated[int, Field(ge=0, description="Pixels from the left.")],
        y: Annotated[int, Field(ge=0, description="Pixels from the top.")],
        button: Literal["left", "middle", "right"] = "left",
        count: Annotated[int, Field(ge=1, le=5, description="2 is a double click.")] = 1,
    ) -> str:
        """Click somewhere on the screen of a sandbox."""
        await (await self._box(sandbox)).desktop.click(x, y, button=button, count=count)
        return "clicked"

    async def type_text(
        self,
        sandbox: Ref,
        text: Annotated[str, Field(max_length=10_000, description="Line ends press Return.")],
    ) -> str:
        """Type a text into whatever has the focus on the screen of a sandbox."""
        await (await self._box(sandbox)).desktop.type(text)
        return "typed"

    async def press_keys(
        self,
        sandbox: Ref,
        keys: Annotated[str, Field(description="Such as Return, ctrl+c or alt+F4.")],
    ) -> str:
        """Press keys together on the screen of a sandbox."""
        await (await self._box(sandbox)).desktop.press(keys)
        return "pressed"

    async def scroll(
        self,
        sandbox: Ref,
        x: Annotated[int, Field(ge=0, description="Pixels from the left.")],
        y: Annotated[int, Field(ge=0, description="Pixels from the top.")],
        down: Annotated[int, Field(ge=-100, le=100, description="Notches; below 0 up.")] = 3,
    ) -> str:
        """Turn the wheel over a place on the screen of a sandbox."""
        await (await self._box(sandbox)).desktop.scroll(x, y, dy=down)
        return "scrolled"

    async def pause_sandbox(self, sandbox: Ref) -> Box:
        """Save a sandbox to disk, processes and all; it costs only its storage then."""
        return _description(await (await self._box(sandbox)).pause())

    async def fork_sandbox(
        self,
        sandbox: Ref,
        count: Annotated[int, Field(ge=1, le=20, description="How many.")] = 1,
    ) -> list[Box]:
        """Make sandboxes that begin as this one is now: files, memory and processes. Try several
        ways from one point, and keep the best."""
        made = await (await self._box(sandbox)).fork(count)
        until = time.monotonic() + 120
        for one in made:
            # All are reported, because all exist and cost, even if one of them failed.
            with suppress(NotReadyError):
                await one.wait_until_ready(max(0.0, until - time.monotonic()))
            self._keep(one)
        return [_description(one) for one in made]

    async def destroy_sandbox(self, sandbox: Ref) -> str:
        """Delete a sandbox and all that is in it."""
        box = await self._box(sandbox)
        for known in (sandbox, box.id):
            self._boxes.pop(known, None)
        await box.delete()
        return f"{box.id} is gone"


TOOLS = (
    "create_sandbox", "list_sandboxes", "run_command", "run_code", "read_file", "write_file",
    "list_files", "get_file_url", "get_preview_url", "take_screenshot", "click", "type_text",
    "press_keys", "scroll", "pause_sandbox", "fork_sandbox", "destroy_sandbox",
)  # fmt: skip


def make_server(yard: AsyncSandyard, *, version: str) -> MCPServer[None]:
    """Return the server of the tools, over a client of Sandyard."""
    server: MCPServer[None] = MCPServer(
        "sandyard",
        title="Sandyard",
        description="Real virtual machines for agents",
        instructions=INSTRUCTIONS,
        version=version,
        log_level="WARNING",
    )
    hands = Hands(yard)
    for name in TOOLS:
        server.add_tool(_plain_errors(getattr(hands, name)), name=name)
    return server


def http_app(server: MCPServer[None]) -> ASGIApp:
    """Return the server over streamable HTTP. Whoever asks shows a key, so that a page in a browser
    cannot; the library's own check of host names would refuse those of a proxy in front."""
    off = TransportSecuritySettings(enable_dns_rebinding_protection=False)
    app: ASGIApp = server.streamable_http_app(transport_security=off)
    return app


def guarded(app: ASGIApp, key: str) -> ASGIApp:
    """Require the API key for every request: any process on this machine, or page in a browser, can
    reach the port."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {key}".encode()):
                said = {"error": "show the API key: Authorization: Bearer <key>"}
                refused = JSONResponse(said, 401, {"WWW-Authenticate": "Bearer"})
                await refused(scope, receive, send)
                return
        await app(scope, receive, send)

    return serve


def shown(text: str) -> str:
    """Return text with its middle cut out if it is too long for a model to read."""
    if len(text) <= SHOWN_MAX:
        return text
    half = SHOWN_MAX // 2
    return f"{text[:half]}\n… {len(text) - 2 * half} characters are left out …\n{text[-half:]}"


def _description(box: AsyncSandbox) -> Box:
    return Box(id=box.id, name=box.name, status=box.status, template=box.template)


def _plain_errors(tool: Callable[_P, Awaitable[_T]]) -> Callable[_P, Awaitable[_T]]:
    """Have what the SDK raises reach the model as a sentence."""

    @functools.wraps(tool)
    async def told(*args: _P.args, **kwargs: _P.kwargs) -> Any:
        try:
            return await tool(*args, **kwargs)
        except SandyardError as error:
            raise ToolError(str(error)) from error

    return told
