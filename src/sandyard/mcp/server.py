"""The MCP server: a few tools over the SDK, each bounded, each error a sentence for a model."""

import asyncio
import base64
import codecs
import difflib
import functools
import hmac
import inspect
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal, ParamSpec, TypeVar
from urllib.parse import urlsplit

from mcp.server import MCPServer
from mcp.server.mcpserver import Context, Image
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.transport_security import TransportSecuritySettings
from mcp.types import (
    CallToolResult,
    ImageContent,
    InputRequiredResult,
    TextContent,
    ToolAnnotations,
)
from mcp.types import Tool as ToolDescription
from pydantic import BaseModel, Field, ValidationError
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from sandyard.client import (
    AsyncSandbox,
    AsyncSandyard,
    Exited,
    Lost,
    NotReadyError,
    Printed,
    SandyardError,
)

SHOWN_MAX = 30_000
READ_MAX = 100_000
_WRITTEN_MAX = 3_000_000
_ENTRIES_MAX = 500
_BOXES_MAX = 200
_TIMEOUT_MAX_S = 3600.0
_KEPT_MAX = 64
_IMAGES_MAX = 8
_LEAST_S = 0.2
_OWN_NAMES = ("localhost", "127.0.0.1", "[::1]")
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
    """What a piece of code printed, the value of its last expression, what it raised. `images` are
    charts and pictures that it showed, which follow as content."""

    stdout: str
    stderr: str
    value: str | None
    error: str | None
    images: int = 0


class Started(BaseModel):
    """A process that runs in the background."""

    pid: int


class Output(BaseModel):
    """Output of a background process. `next_offset` is where to read on; `exit_code` is null while
    it runs. `lost_bytes` are no longer kept."""

    text: str
    next_offset: int
    lost_bytes: int
    exit_code: int | None


class SavedState(BaseModel):
    """A snapshot."""

    id: str
    name: str | None
    sandbox: str


class FileBytes(BaseModel):
    """A part of a file in base64; `next_offset` says where the next begins, if there is more."""

    base64: str
    size: int
    next_offset: int | None


class Entry(BaseModel):
    """A file or directory."""

    path: str
    type: str
    size: int


class Listed(BaseModel):
    """The contents of a directory."""

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
        vcpus: Annotated[int | None, Field(ge=1, description="Virtual CPUs.")] = None,
        memory: Annotated[str | None, Field(description="Such as 2GB.")] = None,
        disk: Annotated[str | None, Field(description="Such as 10GB.")] = None,
        idle_timeout_s: Annotated[
            int | None, Field(ge=0, description="Seconds without use until it is paused; 0: never.")
        ] = None,
        expires_in_s: Annotated[
            int | None, Field(ge=1, description="Seconds until it is deleted.")
        ] = None,
        snapshot: Annotated[
            str | None, Field(description="A snapshot to start from, instead of the template.")
        ] = None,
    ) -> Box:
        """Create a sandbox, and return it once it runs."""
        given = {
            "name": name, "vcpus": vcpus, "memory": memory, "disk": disk, "snapshot": snapshot,
            "idle_timeout": idle_timeout_s, "expires_in": expires_in_s,
        }  # fmt: skip
        options: Any = {key: value for key, value in given.items() if value is not None}
        chosen = None if snapshot is not None else template
        try:
            box = await AsyncSandbox.create(chosen, client=self._yard, wait_s=120, **options)
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
        cwd: Annotated[
            str | None,
            Field(description="The directory to run it in. Default: the template's, or /workspace"),
        ] = None,
        stdin: Annotated[str | None, Field(description="What it reads.")] = None,
    ) -> Ran:
        """Run a command in a sandbox to its end. For what is to go on, use start_process."""
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
        language: Literal["python", "node", "bash"] = "python",
        timeout_s: Timeout = 60.0,
        stdin: Annotated[str, Field(description="What input() reads.")] = "",
    ) -> Annotated[CallToolResult, CodeRan]:
        """Run Python, JavaScript or Bash in an interpreter that is kept: variables, functions and
        imports are there for the next piece. The value of the last expression is returned, and
        charts as images."""
        box = await self._box(sandbox)
        done = await box.run_code(code, language=language, timeout_s=timeout_s, stdin=stdin)
        error = done.error
        raised = None if error is None else error.traceback or f"{error.name}: {error.message}"
        images = [one.png for one in done.results if one.png is not None][:_IMAGES_MAX]
        ran = CodeRan(
            stdout=shown(done.stdout),
            stderr=shown(done.stderr),
            value=None if done.value is None else shown(done.value),
            error=None if raised is None else shown(raised),
            images=len(images),
        )
        return CallToolResult(
            content=[
                TextContent(type="text", text=ran.model_dump_json()),
                *(
                    ImageContent(
                        type="image", data=base64.b64encode(one).decode(), mime_type="image/png"
                    )
                    for one in images
                ),
            ],
            structured_content=ran.model_dump(),
        )

    async def start_process(
        self,
        sandbox: Ref,
        command: Annotated[str, Field(description="A line for bash, such as a server.")],
        cwd: Annotated[
            str | None,
            Field(description="The directory to run it in. Default: the template's, or /workspace"),
        ] = None,
    ) -> Started:
        """Start a command in the background. It goes on until it ends or is stopped."""
        box = await self._box(sandbox)
        process = await box.processes.start(command, cwd=cwd)
        return Started(pid=(await process.info()).pid)

    async def read_output(
        self,
        sandbox: Ref,
        pid: Annotated[int, Field(ge=1, description="From start_process.")],
        offset: Annotated[int, Field(ge=0, description="The first byte.")] = 0,
        wait_s: Annotated[
            float, Field(ge=0, le=60, description="Wait so long for output, or the end.")
        ] = 1.0,
    ) -> Output:
        """Read what a background process has printed. The last 256 KiB are kept."""
        process = (await self._box(sandbox)).processes.get(pid)
        data, lost = b"", 0
        code: int | None = None
        with suppress(TimeoutError):
            async with asyncio.timeout(max(wait_s, _LEAST_S)):
                async for event in process.events(offset):
                    match event:
                        case Printed(data=piece):
                            data += piece
                        case Lost(count=count):
                            lost += count
                        case Exited(exit_code=ended):
                            code = ended
                    if len(data) >= SHOWN_MAX:
                        break
        data = data[:SHOWN_MAX]
        return Output(
            text=data.decode(errors="replace"),
            next_offset=offset + lost + len(data),
            lost_bytes=lost,
            exit_code=code,
        )

    async def stop_process(
        self,
        sandbox: Ref,
        pid: Annotated[int, Field(ge=1, description="From start_process.")],
        signal: Annotated[str, Field(description="Such as SIGINT or SIGKILL.")] = "SIGTERM",
    ) -> str:
        """Send a signal to a background process, and to everything that it has started."""
        process = (await self._box(sandbox)).processes.get(pid)
        await process.signal(signal, everything=True)
        return f"{signal} was sent to {pid}"

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
            raise ToolError(f"{path} is no text: {size} bytes; use read_binary_file")
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
        """Write a text file. Missing parents are created; an existing file is replaced."""
        box = await self._box(sandbox)
        return f"{await box.files.write(path, text)} bytes are in {path}"

    async def read_binary_file(
        self,
        sandbox: Ref,
        path: Annotated[str, Field(description="Below /workspace if it begins without /.")],
        offset: Annotated[int, Field(ge=0, description="The first byte.")] = 0,
    ) -> FileBytes:
        """Read a file of any content in base64, at most 100 000 bytes of it."""
        box = await self._box(sandbox)
        data, size = b"", (await box.files.info(path)).size
        async for piece in box.files.read_pieces(path, offset=offset, length=READ_MAX):
            data = (data + piece)[:READ_MAX]
            if len(data) == READ_MAX:
                break
        end = offset + len(data)
        return FileBytes(
            base64=base64.b64encode(data).decode(),
            size=size,
            next_offset=end if end < size else None,
        )

    async def write_binary_file(
        self,
        sandbox: Ref,
        path: Annotated[str, Field(description="Below /workspace if it begins without /.")],
        content: Annotated[
            str, Field(max_length=_WRITTEN_MAX, description="All of the file, in base64.")
        ],
    ) -> str:
        """Write a binary file. Missing parent directories are created; an existing file is
        replaced."""
        try:
            data = base64.b64decode(content, validate=True)
        except ValueError as error:
            raise ToolError("cannot use content: it is not base64") from error
        box = await self._box(sandbox)
        return f"{await box.files.write(path, data)} bytes are in {path}"

    async def list_files(
        self,
        sandbox: Ref,
        path: Annotated[str, Field(description="The directory.")] = "/workspace",
        depth: Annotated[int, Field(ge=1, le=10, description="How many levels deep.")] = 1,
    ) -> Listed:
        """List a directory, at most 500 entries."""
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

    async def snapshot_sandbox(
        self,
        sandbox: Ref,
        name: Annotated[str | None, Field(description="A name of your own for it.")] = None,
    ) -> SavedState:
        """Save the state of a sandbox as it is now, to return to it or to create others from it. It
        keeps running; a snapshot costs storage until it is deleted."""
        box = await self._box(sandbox)
        made = await box.snapshot(name)
        return SavedState(id=made.id, name=made.name, sandbox=box.id)

    async def roll_back_sandbox(
        self,
        sandbox: Ref,
        snapshot: Annotated[str, Field(description="One of its snapshots, by id or name.")],
    ) -> Box:
        """Put a sandbox back to one of its snapshots. What it is now is lost."""
        box = await (await self._box(sandbox)).roll_back(snapshot)
        return _description(await box.wait_until_ready(120))

    async def delete_snapshot(
        self, snapshot: Annotated[str, Field(description="Its id or name.")]
    ) -> str:
        """Delete a snapshot. Sandboxes that were created from it stay."""
        await self._yard.delete_snapshot(snapshot)
        return f"{snapshot} is gone"

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


_READS = ToolAnnotations(read_only_hint=True, open_world_hint=False)
_ADDS = ToolAnnotations(read_only_hint=False, destructive_hint=False, open_world_hint=False)
_CHANGES = ToolAnnotations(read_only_hint=False, destructive_hint=True, open_world_hint=False)
_RUNS = ToolAnnotations(read_only_hint=False, destructive_hint=True, open_world_hint=True)
_REPLACES = ToolAnnotations(
    read_only_hint=False, destructive_hint=True, idempotent_hint=True, open_world_hint=False
)

TOOLS: dict[str, ToolAnnotations] = {
    "create_sandbox": _ADDS, "list_sandboxes": _READS, "run_command": _RUNS, "run_code": _RUNS,
    "start_process": _RUNS, "read_output": _READS, "stop_process": _CHANGES,
    "read_file": _READS, "write_file": _REPLACES, "read_binary_file": _READS,
    "write_binary_file": _REPLACES, "list_files": _READS, "get_file_url": _ADDS,
    "get_preview_url": _ADDS, "take_screenshot": _READS, "click": _RUNS, "type_text": _RUNS,
    "press_keys": _RUNS, "scroll": _RUNS, "pause_sandbox": _ADDS, "snapshot_sandbox": _ADDS,
    "roll_back_sandbox": _REPLACES, "delete_snapshot": _CHANGES, "fork_sandbox": _ADDS,
    "destroy_sandbox": _CHANGES,
}  # fmt: skip
"""The tools, with the annotations that describe each to a client."""


class Server(MCPServer[None]):
    """The tools, whose arguments are checked by name, and whose errors are sentences."""

    def __init__(self, yard: AsyncSandyard, *, version: str) -> None:
        super().__init__(
            "sandyard",
            title="Sandyard",
            description="Real virtual machines for agents",
            instructions=INSTRUCTIONS,
            version=version,
            log_level="WARNING",
        )
        hands = Hands(yard)
        self._known = {name: _parameters(getattr(hands, name)) for name in TOOLS}
        for name, annotations in TOOLS.items():
            tool = _plain_errors(getattr(hands, name))
            self.add_tool(tool, name=name, title=_title(name), annotations=annotations)
        # There are none of these, so they must not be announced. The library has no public way.
        for method in list(self._lowlevel_server._request_handlers):
            if method.startswith(("prompts/", "resources/")):
                del self._lowlevel_server._request_handlers[method]

    async def list_tools(self) -> list[ToolDescription]:
        """See MCPServer; arguments that there are not are refused, which the schemas say."""
        found = await super().list_tools()
        for one in found:
            one.input_schema = {**one.input_schema, "additionalProperties": False}
        return found

    async def call_tool(
        self, name: str, arguments: dict[str, Any], context: Context[None, Any] | None = None
    ) -> CallToolResult | InputRequiredResult:
        """See MCPServer.

        Raises:
            ToolError: the tool or an argument does not exist, or the tool failed; the message is a
                sentence for a model.
        """
        known = self._known.get(name)
        if known is None:
            raise ToolError(f"there is no tool {name!r}; {_near(name, list(TOOLS))}")
        for given in arguments:
            if given not in known:
                raise ToolError(f"there is no argument {given!r} of {name}; {_near(given, known)}")
        try:
            return await super().call_tool(name, arguments, context)
        except ToolError as error:
            if isinstance(error.__cause__, ValidationError):
                raise ToolError(_sentence(error.__cause__)) from error.__cause__
            if isinstance(error.__cause__, ToolError):
                raise error.__cause__ from None
            raise


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _parameters(tool: Callable[..., object]) -> list[str]:
    return list(inspect.signature(tool).parameters)


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"


def _sentence(error: ValidationError) -> str:
    """Say which argument cannot be used, and why."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"{field} is missing: give it"
    value = repr(first["input"])
    return f"cannot use {field}: {first['msg']}; it is {value[:100]}"


def make_server(yard: AsyncSandyard, *, version: str) -> Server:
    """Return the server of the tools, over a client of Sandyard."""
    return Server(yard, version=version)


def http_app(server: MCPServer[None], hosts: Sequence[str] = ()) -> ASGIApp:
    """Return the server over streamable HTTP. Besides this computer's own names it is served under
    `hosts`, to programs and to pages of these hosts alone: a page of another could otherwise have
    its name lead here (DNS rebinding)."""
    names = [*_OWN_NAMES, *hosts]
    origins = [f"{scheme}://{name}" for name in names for scheme in ("http", "https")]
    checks = TransportSecuritySettings(
        enable_dns_rebinding_protection=True,
        allowed_hosts=[*names, *(f"{name}:*" for name in names)],
        allowed_origins=[*origins, *(f"{origin}:*" for origin in origins)],
    )
    app: ASGIApp = server.streamable_http_app(transport_security=checks)
    return app


def host_of(text: str) -> str:
    """Return the host name in a text, which may be a URL.

    Raises:
        ValueError: it is none.
    """
    host = urlsplit(text if "//" in text else f"//{text}").hostname
    if not host:
        raise ValueError(f"{text!r} is no name of a host")
    return f"[{host}]" if ":" in host else host


def guarded(app: ASGIApp, key: str) -> ASGIApp:
    """Require the API key for every request: any process on this machine, or page in a browser, can
    reach the port."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {key}".encode()):
                body = {"error": "show the API key: Authorization: Bearer <key>"}
                refused = JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})
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
    async def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> Any:
        try:
            return await tool(*args, **kwargs)
        except SandyardError as error:
            raise ToolError(str(error)) from error

    return wrapped
