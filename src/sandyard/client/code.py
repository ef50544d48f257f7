"""Runs code in a persistent interpreter: later pieces of code see earlier definitions.

The interpreter is a process in the sandbox. It reads one request per line, and marks the end of a
piece's output on both streams with a secret word.
"""

import json
import secrets
from dataclasses import dataclass, field
from typing import Any

from sandyard.client.calls import SAID_MAX
from sandyard.client.errors import SandyardError
from sandyard.client.models import CodeError, CodeResult, Exited, Lost, Printed, ProcessEvent

PYTHON = r"""
import ast, asyncio, inspect, json, linecache, os, sys, traceback, types
asked = os.fdopen(os.dup(0), "rb")
nothing = os.open(os.devnull, os.O_RDONLY)
os.dup2(nothing, 0)
os.close(nothing)
own = os.getpid()
main = types.ModuleType("__main__")
sys.modules["__main__"] = main
scope = main.__dict__
loop = None
flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
def run(code, name):
    global loop
    value = eval(code, scope)
    if inspect.iscoroutine(value) and code.co_flags & inspect.CO_COROUTINE:
        loop = loop or asyncio.new_event_loop()
        value = loop.run_until_complete(value)
    return value
def end(raised):
    code = raised.code if isinstance(raised, SystemExit) else 1
    if not isinstance(raised, SystemExit):
        traceback.print_exception(type(raised), raised, raised.__traceback__)
    elif code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit((code or 0) & 255)
for number, line in enumerate(asked):
    wish = json.loads(line)
    name, value, error = "<code %d>" % number, None, None
    try:
        source = wish["code"]
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        tree = compile(source, name, "exec", flags | ast.PyCF_ONLY_AST)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        run(compile(tree, name, "exec", flags), name)
        if last is not None:
            found = run(compile(ast.Expression(last.value), name, "eval", flags), name)
            if found is not None:
                scope["_"], value = found, repr(found)
    except BaseException as raised:
        if os.getpid() != own:
            end(raised)
        kind, trace = type(raised), raised.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename != name:
            trace = trace.tb_next
        try:
            text = "".join(traceback.format_exception(kind, raised, trace))
            error = [kind.__name__, str(raised), text]
        except Exception:
            error = [kind.__name__, "it does not say", ""]
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:
            pass
    if os.getpid() != own:
        end(SystemExit(0))  # a forked child that returned here: it must not answer
    said = json.dumps([None if value is None else value[:1000000], error])
    for number_of, rest in ((2, ""), (1, said)):
        mark = ("\0" + wish["mark"] + rest + "\0").encode()
        while mark:
            mark = mark[os.write(number_of, mark):]
"""

NODE = r"""
const vm = require('vm'), util = require('util'), fs = require('fs');
globalThis.require = require;
const write = (fd, text) => {
  let left = Buffer.from(text);
  while (left.length) {
    try { left = left.subarray(fs.writeSync(fd, left)); }
    catch (error) { if (error.code !== 'EAGAIN') throw error; }
  }
};
const compiled = (code) => {
  const script = (text) => new vm.Script(text, {filename: '<code>'});
  try { return script(code); }
  catch (failed) {
    if (!/\bawait\b/.test(code)) throw failed;
    try { return script(`(async () => (${code}\n))()`); }
    catch { return script(`(async () => {${code}\n})()`); }
  }
};
const answer = async (wish) => {
  let value = null, error = null;
  try {
    const found = await compiled(wish.code).runInThisContext();
    if (found !== undefined) value = util.inspect(found).slice(0, 1000000);
  } catch (failed) {
    try {
      const text = [failed?.name ?? 'Error', failed?.message ?? failed, failed?.stack ?? ''];
      error = text.map(String);
    } catch { error = ['Error', 'it does not say', '']; }
  }
  const said = JSON.stringify([value, error]).replace(/[\u007f-\uffff]/g,
    (one) => '\\u' + one.charCodeAt(0).toString(16).padStart(4, '0'));
  write(2, `\0${wish.mark}\0`);
  write(1, `\0${wish.mark}${said}\0`);
};
process.on('uncaughtException', (error) => console.error(error));
process.on('unhandledRejection', (error) => console.error(error));
let turn = Promise.resolve(), rest = '';
process.stdin.setEncoding('utf8');
process.stdin.on('data', (data) => {
  const lines = (rest + data).split('\n');
  rest = lines.pop();
  for (const line of lines) turn = turn.then(() => answer(JSON.parse(line)));
});
"""

ARGV = {"python": ["python3", "-u", "-c", PYTHON], "node": ["node", "-e", NODE]}
"""What runs a language."""


def argv_of(language: str) -> list[str]:
    """Return the command of a language's interpreter.

    Raises:
        ValueError: the language is not supported.
    """
    try:
        return ARGV[{"javascript": "node", "js": "node"}.get(language, language)]
    except KeyError as error:
        raise ValueError(f"cannot run {language!r}: it is one of {', '.join(ARGV)}") from error


class SessionEndedError(SandyardError):
    """The interpreter ended during the call; the next call starts a new one."""


@dataclass
class Piece:
    """A piece of code in progress, and its result so far."""

    code: str
    mark: str = field(default_factory=lambda: secrets.token_hex(16))
    _said: dict[str, bytearray] = field(
        default_factory=lambda: {"stdout": bytearray(), "stderr": bytearray()}
    )
    _ended: dict[str, bytes] = field(default_factory=dict)
    _heads: dict[str, int] = field(default_factory=dict)
    _shown: dict[str, int] = field(default_factory=dict)
    is_cut: bool = False

    def request(self) -> bytes:
        """Return the line that requests it."""
        return json.dumps({"code": self.code, "mark": self.mark}).encode() + b"\n"

    @property
    def is_done(self) -> bool:
        """Whether it has finished on both streams."""
        return len(self._ended) == len(self._said)

    def feed(self, event: ProcessEvent) -> None:
        """Process output of the interpreter.

        Raises:
            SessionEndedError: the interpreter ended.
        """
        match event:
            case Exited(exit_code=code, signal=signal):
                said = self._said["stderr"].decode(errors="replace").strip()[-500:]
                how = signal or f"exit code {code}"
                raise SessionEndedError(
                    f"the interpreter ended ({how}), and with it what it knew: {said}"
                )
            case Lost():
                self.is_cut = True
            case Printed(stream=stream, data=data) if stream in self._said:
                self._take(stream, data)
            case _:
                pass

    def _take(self, stream: str, data: bytes) -> None:
        said, head = self._said[stream], b"\0" + self.mark.encode()
        if len(said) > SAID_MAX and self._heads.get(stream, -1) < 0:
            # The middle goes: its end may be a part of the mark. All of it was told by now.
            self.is_cut = True
            gone, half = len(said) - SAID_MAX, SAID_MAX // 2
            del said[half : half + gone]
            self._shown[stream] = max(half, self._shown.get(stream, 0) - gone)
        # Not from the beginning each time: what is printed may be long, and so may its end.
        before, at = len(said), self._heads.get(stream, -1)
        said += data
        if at < 0:
            at = self._heads[stream] = said.find(head, max(0, before - len(head)))
        if at >= 0:
            end = said.find(b"\0", max(at + len(head), before))
            if end >= 0:
                self._ended[stream] = bytes(said[at + len(head) : end])
                del said[at:]

    def new_text(self, stream: str) -> bytes:
        """Return new output of a stream, without what may be the start of the end mark."""
        said, head = self._said.get(stream, bytearray()), b"\0" + self.mark.encode()
        begin, at = self._shown.get(stream, 0), self._heads.get(stream, -1)
        end = len(said) if at < 0 else min(at, len(said))
        if at < 0:
            tail = said.rfind(b"\0", max(begin, end - len(head)))
            if tail >= 0 and head.startswith(said[tail:]):
                end = tail
        self._shown[stream] = end
        return bytes(said[begin:end])

    def result(self) -> CodeResult:
        """Return the result."""
        value, error = json.loads(self._ended["stdout"])
        return self._result(value, CodeError(*error) if error else None)

    def broken(self, name: str, message: str) -> CodeResult:
        """Return the result up to the point where it was interrupted."""
        return self._result(None, CodeError(name, message, ""))

    def _result(self, value: Any, error: CodeError | None) -> CodeResult:
        stdout, stderr = (one.decode(errors="replace") for one in self._said.values())
        return CodeResult(stdout, stderr, value, error, truncated=self.is_cut)
