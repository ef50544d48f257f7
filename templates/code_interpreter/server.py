"""The server of the code interpreter, for E2B's SDKs.

It runs as root, and listens on port 49999 of the loopback interface. Code runs as `user`.

    POST /execute {code, context_id?, language?, env_vars?}     one JSON object a line
    GET, POST /contexts {language?, cwd?};  DELETE /contexts/{id};  POST /contexts/{id}/restart
    GET /health     200 once the default contexts are warm

A client that disconnects interrupts its code.
"""

import asyncio
import contextlib
import json
import logging
import os
import re
import shutil
import signal
from collections import defaultdict
from collections.abc import Mapping

from tornado.httpserver import HTTPServer
from tornado.iostream import StreamClosedError
from tornado.web import Application, HTTPError, RequestHandler

from code_interpreter.contexts import RUN, VARIABLE, Context, RefusedError, account
from code_interpreter.items import Item, error_of
from code_interpreter.kernels import PYTHON, JupyterContext, R
from code_interpreter.scripts import ScriptContext, command_of

log = logging.getLogger(__name__)

PORT = 49999
BODY_MAX = 16 * 1024 * 1024
CONTEXTS_MAX = 100
KEEPALIVE_S = 5.0
_UNREAD_S = 60.0
"""How long a client may read nothing while its code reports something."""
LANGUAGES = ("python", "javascript", "typescript", "bash", "r")
_KNOWN = {"E2B_SANDBOX_ID": "E2b-Sandbox-Id", "E2B_TEMPLATE_ID": "E2b-Template-Id"}
"""Variables of the environment, by the headers in which the platform gives them."""
_OTHER_NAMES = {"js": "javascript", "ts": "typescript", "py": "python", "sh": "bash"}
_PRELOAD = """
def _():
    import io, e2b_charts, numpy, pandas
    from matplotlib import pyplot
    figure = pyplot.figure()
    pyplot.plot([1])
    figure.savefig(io.BytesIO())
    pyplot.close(figure)
_()
del _
"""


class Contexts:
    """All contexts, and the default one of each language."""

    def __init__(self) -> None:
        self.by_id: dict[str, Context] = {}
        self.defaults: dict[str, Context] = {}
        self.making: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.known: dict[str, str] = {}
        """Variables for the environment of code that the sandbox itself does not know."""
        self.is_warm = False

    async def warm(self) -> None:
        """Start the default context of Python, and declare that of JavaScript.

        The machine may be saved with what runs then, and many sandboxes made from it. Node.js must
        not run: its random numbers, and so its UUIDs and keys, would be the same in all of them.
        """
        python = await self.default("python")
        script = self.context_of("javascript", account().pw_dir)
        self.by_id[script.id] = self.defaults["javascript"] = script
        async with python.turn:
            await python.silently(_PRELOAD)
            if not await python.is_alive():
                raise RuntimeError("the interpreter ended while it imported what is used most")
        self.is_warm = True

    async def create(self, language: str, cwd: str) -> Context:
        """Start a context.

        Raises:
            RefusedError: the language is unknown, the folder is missing, or it does not start.
        """
        if len(self.by_id) >= CONTEXTS_MAX:
            raise RefusedError(f"cannot create over {CONTEXTS_MAX} contexts: remove some", 400)
        cwd = os.path.join(account().pw_dir, re.sub("^~(/|$)", "", cwd))
        if not os.path.isdir(cwd):
            raise RefusedError(f"cannot create a context in {cwd}: there is no such folder", 400)
        made = self.context_of(language, cwd)
        self.by_id[made.id] = made
        try:
            async with made.turn:
                await made.start()
                if made.is_removed:
                    await made.end()
                    raise RefusedError("the context was removed while it started")
        except BaseException:
            self.by_id.pop(made.id, None)
            raise
        return made

    async def default(self, language: str) -> Context:
        """Return the context of a language for code that names none. See `create`."""
        if language in self.defaults:
            return self.defaults[language]
        async with self.making[language if language in LANGUAGES else ""]:
            if language not in self.defaults:
                self.defaults[language] = await self.create(language, account().pw_dir)
            return self.defaults[language]

    def find(self, context_id: str) -> Context:
        """Return a context.

        Raises:
            HTTPError: there is none.
        """
        if context_id not in self.by_id:
            raise HTTPError(404, f"Context {context_id[:80]} not found")
        return self.by_id[context_id]

    async def remove(self, context: Context) -> None:
        """End a context."""
        self.by_id.pop(context.id, None)
        if self.defaults.get(context.language) is context:
            del self.defaults[context.language]
        await context.remove()

    def context_of(self, language: str, cwd: str) -> Context:
        """Return a context of a language, which is not started.

        Raises:
            RefusedError: there is none for this language.
        """
        if language in ("javascript", "typescript", "bash"):
            return ScriptContext(language, cwd, self.known, command_of(language))
        if language == "python":
            return JupyterContext(language, cwd, self.known, PYTHON)
        if language == "r" and shutil.which("R"):
            return JupyterContext(language, cwd, self.known, R)
        raise RefusedError(f"cannot run {language[:40]}: this template has {', '.join(LANGUAGES)}")


class Handler(RequestHandler):
    """Base of all routes. Errors are plain text, as E2B's SDKs show them."""

    def initialize(self, contexts: Contexts) -> None:
        self.contexts = contexts
        self.has_left = False

    def prepare(self) -> None:
        """Take over what the platform says of the sandbox in each request."""
        told = {name: self.request.headers.get(header) for name, header in _KNOWN.items()}
        self.contexts.known.update({name: value for name, value in told.items() if value})

    def on_connection_close(self) -> None:
        """Note that the client has left."""
        self.has_left = True

    def body(self) -> dict[str, object]:
        """Return the body, which is a JSON object.

        Raises:
            HTTPError: it is none.
        """
        try:
            found = json.loads(self.request.body or b"{}")
        except ValueError as error:
            raise HTTPError(400, f"cannot read the body: it is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise HTTPError(400, "cannot read the body: it is not a JSON object")
        return found

    def text(self, body: Mapping[str, object], name: str) -> str:
        """Return a string of the body, empty if there is none."""
        value = body.get(name)
        if value is not None and not isinstance(value, str):
            raise HTTPError(400, f"cannot use {name}: it is not a string")
        try:
            (value or "").encode()
        except UnicodeEncodeError as error:
            raise HTTPError(400, f"cannot use {name}: it has a lone surrogate") from error
        return value or ""

    def language(self, body: Mapping[str, object]) -> str:
        """Return the language that is asked for, in its usual name."""
        name = self.text(body, "language").strip().lower()
        return _OTHER_NAMES.get(name, name)

    def answer(self, value: object) -> None:
        """Answer with JSON."""
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps(value))

    def write_error(self, status_code: int, **values: object) -> None:
        """Answer with what went wrong."""
        found = values.get("exc_info")
        error = found[1] if isinstance(found, tuple) else None
        if isinstance(error, RefusedError):
            self.set_status(error.status)
        words = error.log_message if isinstance(error, HTTPError) else str(error or self._reason)
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(words or self._reason)

    def log_exception(self, kind: object, value: object, traceback: object) -> None:
        """Log what is not the client's fault."""
        if not isinstance(value, HTTPError | RefusedError):
            super().log_exception(kind, value, traceback)


class Health(Handler):
    """Whether code can be run."""

    def get(self) -> None:
        if not self.contexts.is_warm:
            raise HTTPError(503, "starting")
        self.finish("OK")


class Execute(Handler):
    """Running code."""

    def initialize(self, contexts: Contexts) -> None:
        super().initialize(contexts)
        self.work: asyncio.Task[None] | None = None
        self.telling = asyncio.Lock()

    async def post(self) -> None:
        body = self.body()
        code, language = self.text(body, "code"), self.language(body)
        context_id, given = self.text(body, "context_id"), body.get("env_vars") or {}
        if not isinstance(given, dict):
            raise HTTPError(400, "cannot use env_vars: it is not an object")
        if context_id and language:
            raise HTTPError(400, "Only one of context_id or language can be provided")
        for name, value in given.items():
            if not VARIABLE.fullmatch(name) or "\0" in self.text(given, name) or value is None:
                raise HTTPError(
                    400,
                    f"cannot use env_vars.{name[:80]}: names consist of letters, digits and _, and "
                    "values are strings without NUL characters",
                )
        context = self.contexts.find(context_id) if context_id else None
        self.set_header("Content-Type", "application/json")
        # Also while an interpreter starts, which may take longer than a proxy waits.
        beating = asyncio.create_task(self.beat())
        # Both errors mean that the client has left.
        with contextlib.suppress(asyncio.CancelledError, StreamClosedError):
            try:
                if context is None:
                    context = await self.contexts.default(language or "python")
                if self.has_left:
                    return
                self.work = asyncio.create_task(context.execute(code, given, self.tell))
                await self.work
            except RefusedError as error:
                if context is None and not self._headers_written:
                    raise
                await self.tell(error_of("InterpreterEnded", str(error)))
            except StreamClosedError:
                raise
            except Exception:
                log.exception("cannot run code: unexpected error")
                words = "unexpected error in the code interpreter; see its log in /var/log"
                await self.tell(error_of("InternalError", words))
            finally:
                beating.cancel()
            await self.tell({"type": "end_of_execution"})

    async def tell(self, item: Item) -> None:
        """Send one line."""
        try:
            async with self.telling, asyncio.timeout(_UNREAD_S):
                self.write(json.dumps(item) + "\n")
                await self.flush()
        except TimeoutError as error:
            raise StreamClosedError from error  # as good as gone

    async def beat(self) -> None:
        """Send a keepalive every `KEEPALIVE_S` seconds, so that no proxy closes the connection."""
        with contextlib.suppress(StreamClosedError):
            while True:
                await asyncio.sleep(KEEPALIVE_S)
                await self.tell({"type": "keepalive"})

    def on_connection_close(self) -> None:
        """Interrupt the code of a client that has left."""
        super().on_connection_close()
        if self.work is not None:
            self.work.cancel()


class All(Handler):
    """The list of contexts."""

    def get(self) -> None:
        self.answer([one.told() for one in self.contexts.by_id.values()])

    async def post(self) -> None:
        body = self.body()
        cwd = self.text(body, "cwd") or account().pw_dir
        made = await self.contexts.create(self.language(body) or "python", cwd)
        if self.has_left:
            await self.contexts.remove(made)
            return
        self.answer(made.told())


class One(Handler):
    """One context."""

    async def delete(self, context_id: str) -> None:
        await self.contexts.remove(self.contexts.find(context_id))
        self.set_status(200)
        self.finish("")


class Restart(Handler):
    """A new interpreter for a context."""

    async def post(self, context_id: str) -> None:
        await self.contexts.find(context_id).restart()
        self.answer(None)


async def main() -> None:
    """Serve forever."""
    # Interpreters must take it, whatever the parent of this process ignores.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    shutil.rmtree(RUN, ignore_errors=True)
    for folder in (RUN, RUN / "ipython"):
        folder.mkdir(parents=True)
        os.chown(folder, account().pw_uid, account().pw_gid)
    contexts = Contexts()
    contexts.known["E2B_SANDBOX"] = "true"
    shared = {"contexts": contexts}
    routes = [
        ("/health", Health, shared), ("/execute", Execute, shared), ("/contexts", All, shared),
        ("/contexts/([^/]+)", One, shared), ("/contexts/([^/]+)/restart", Restart, shared),
    ]  # fmt: skip
    server = HTTPServer(Application(routes), max_body_size=BODY_MAX)
    server.listen(PORT, "127.0.0.1")
    await contexts.warm()
    await asyncio.Event().wait()
