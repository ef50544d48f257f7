"""The interpreters that run code in sandboxes, run here, and how their reports are read."""

import asyncio
import base64
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandyard.server.core.errors import AgentError, InvalidArgumentError
from sandyard.server.service.sandboxes import reports
from sandyard.server.service.sandboxes.interpreters import argv_of, request_of
from sandyard.server.service.sandboxes.reports import CodeError, Finished, Reports, Result, Text

needs_node = pytest.mark.skipif(not shutil.which("node"), reason="NOT RUN: there is no node here")


class EndedError(Exception):
    """The interpreter has ended."""


@dataclass
class Done:
    """What a piece of code has reported."""

    said: dict[str, bytes] = field(default_factory=lambda: {"stdout": b"", "stderr": b""})
    results: list[Result] = field(default_factory=list)
    error: CodeError | None = None

    @property
    def stdout(self) -> str:
        return self.said["stdout"].decode()

    @property
    def value(self) -> Any:
        main = [one.forms["text"] for one in self.results if one.is_main]
        return main[-1] if main else None


class Interpreter:
    """An interpreter."""

    def __init__(self, language: str) -> None:
        self.language = language

    @contextmanager
    def running(self) -> Iterator["Interpreter"]:
        argv = list(argv_of(self.language))
        if self.language == "python":
            argv[0] = sys.executable
        pipe = subprocess.PIPE
        with subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe) as self.process:
            try:
                yield self
            finally:
                self.process.kill()  # code may have left something that keeps it running

    def run(self, code: str, stdin: str = "", *, stops_after: str | None = None) -> Done:
        """Run code; interrupt it once it has printed `stops_after`."""
        return asyncio.run(self._run(code, stdin, stops_after))

    async def _run(self, code: str, stdin: str, stops_after: str | None) -> Done:
        mark, done = secrets.token_hex(16), Done()
        read, asked = Reports(mark), self.process.stdin
        assert asked is not None
        asked.write(request_of(self.language, mark, code, stdin, 0))
        asked.flush()
        loop = asyncio.get_running_loop()
        heard: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()

        def hear(name: str, stream: Any) -> None:
            data = stream.read1(1 << 14 if len(code) > 1000 else 7)  # cut wherever it likes
            if not data:
                loop.remove_reader(stream)
            heard.put_nowait((name, data))

        streams = (("stdout", self.process.stdout), ("stderr", self.process.stderr))
        for name, stream in streams:
            loop.add_reader(stream, hear, name, stream)  # type: ignore[arg-type]
        try:
            async with asyncio.timeout(20):
                while True:
                    name, data = await heard.get()
                    if not data:
                        raise EndedError(self.process.wait())
                    for report in read.feed(name, data):
                        match report:
                            case Text(stream=where, data=text):
                                done.said[where] += text
                            case Result():
                                done.results.append(report)
                            case Finished(error=error):
                                done.error = error
                                return done
                    if stops_after and stops_after in done.stdout:
                        stops_after = None
                        self.process.send_signal(signal.SIGINT)
        finally:
            for _, stream in streams:
                loop.remove_reader(stream)  # type: ignore[arg-type]

    def name_of_error(self, code: str) -> str:
        error = self.run(code).error
        assert error is not None
        return error.name


def test_python_is_kept_between_pieces() -> None:
    with Interpreter("python").running() as python:
        assert python.run("x = 40\nx + 2").value == "42"
        done = python.run("import sys\nprint('hü', x)\nprint('e', file=sys.stderr)\nNone")
        assert (done.stdout, done.said["stderr"], done.results) == ("hü 40\n", b"e\n", [])
        assert python.run("def f(n):\n    return n * x\nf(2)").value == "80"
        assert python.run("_ + 1").value == "81"
        assert python.run("import asyncio\nawait asyncio.sleep(0, 'slept')").value == "'slept'"
        assert python.run("").value is None
        error = python.run("1\ndef g():\n    raise KeyError('no ü')\ng()").error
        assert error is not None
        assert (error.name, error.value) == ("KeyError", "'no ü'")
        assert "raise KeyError('no ü')" in error.traceback
        assert "interpreter" not in error.traceback
        for code, name in (("x = (", "SyntaxError"), ("exit(3)", "SystemExit"), ("1/0", "ZeroDi")):
            assert python.name_of_error(code).startswith(name)
        assert python.run("print('\\0' * 3 + 'x'); '\\0'").stdout == "\0\0\0x\n"
        assert python.run("import pickle\nclass A: pass\npickle.loads(pickle.dumps(A())).__class__"
                          ).value == "<class '__main__.A'>"  # fmt: skip
        with pytest.raises(EndedError, match="5"):
            python.run("import os; os._exit(5)")


def test_python_reads_its_input_and_no_request() -> None:
    with Interpreter("python").running() as python:
        done = python.run("input('name? ') + input()", "ann\nbob ü\n")
        assert (done.stdout, done.value) == ("name? ", "'annbob ü'")
        assert python.run("import sys; sys.stdin.read()").value == "''"
        assert python.name_of_error("input()") == "EOFError"
        assert python.run("import subprocess; subprocess.run(['cat']).returncode").value == "0"


def test_python_shows_values_in_all_their_forms() -> None:
    code = """
class Page:
    def _repr_html_(self): return "<b>é</b>"
    def _repr_png_(self): return b"\\x89PNG"
    def _repr_svg_(self): raise ValueError("none today")
    def _repr_json_(self): return {"a": [1]}
    def __repr__(self): return "page"
display(Page(), 5)
Page()
"""
    with Interpreter("python").running() as python:
        one, two, three = python.run(code).results
        page = {
            "text": "page", "html": "<b>é</b>", "json": {"a": [1]},
            "png": base64.b64encode(b"\x89PNG").decode(),
        }  # fmt: skip
        assert (one.forms, one.is_main, one.is_truncated) == (page, False, False)
        assert (two.forms, three.forms, three.is_main) == ({"text": "5"}, page, True)
        bundle = (
            "class B:\n def _repr_mimebundle_(self, **_): return {'text/html': 'h', 'x': 1}\nB()"
        )
        assert python.run(bundle).results[0].forms["html"] == "h"
        (large,) = python.run("'x' * 5_000_000" + " " * 1000).results
        assert (len(str(large.forms["text"])), large.is_truncated) == (4_000_000, True)
        (whole,) = python.run("'x' * 2_000_000" + " " * 1000).results
        assert (len(str(whole.forms["text"])), whole.is_truncated) == (2_000_002, False)


def test_python_shows_the_figures_of_matplotlib() -> None:
    # What pyplot is to the interpreter: this host has none.
    code = """
import sys, types
class Figure:
    def get_axes(self): return [1]
    def savefig(self, file, **_): file.write(b"drawn")
    def __repr__(self): return "Figure(1)"
pyplot = types.ModuleType("matplotlib.pyplot")
shown = [1, 2]
pyplot.get_fignums = lambda: list(shown)
pyplot.figure = lambda number: Figure()
pyplot.close = lambda which: shown.clear()
sys.modules["matplotlib.pyplot"] = pyplot
"""
    with Interpreter("python").running() as python:
        results = python.run(code).results
        drawn = {"text": "Figure(1)", "png": base64.b64encode(b"drawn").decode()}
        assert [one.forms for one in results] == [drawn, drawn]
        assert python.run("1").value == "1"


def test_a_child_of_a_piece_answers_nobody() -> None:
    with Interpreter("python").running() as python:
        code = "import os, sys\nif os.fork() == 0: sys.exit()\nos.wait()[1]"
        assert python.run(code).value == "0"
        for what, ended in (
            ("sys.exit(3)", 3),
            ("1/0", 1),
            ("sys.exit('why')", 1),
            ("sys.exit()", 0),
        ):
            code = f"if os.fork() == 0: {what}\nos.waitstatus_to_exitcode(os.wait()[1])"
            assert python.run(code).value == str(ended), what
        assert python.run("6 * 7").value == "42"


@needs_node
def test_javascript_is_kept_between_pieces() -> None:
    with Interpreter("node").running() as node:
        assert node.run("const x = 40; x + 2").value == "42"
        assert node.run("const x = 41; x").value == "41"
        assert node.run("console.log('hü', x); console.error('e')").stdout == "hü 41\n"
        assert node.run("const y = await Promise.resolve(7)").error is None
        assert node.run("y").value == "7"
        assert node.run("Promise.resolve({a: 1})").value == "{ a: 1 }"
        assert node.run("{a: 1}").value == "{ a: 1 }"
        assert node.run("{ let z = 1; z }").value == "1"
        assert node.run("const fs = require('fs'); typeof fs.readFileSync").value == "'function'"
        assert node.run("class A {}; class A2 extends A {}; new A2()").value == "A2 {}"
        for code, name in (("nope", "ReferenceError"), ("x = (", "SyntaxError")):
            assert node.name_of_error(code) == name
        error = node.run("\n\nnull.x").error
        assert error is not None
        assert "code-" in error.traceback
        assert ":3:6" in error.traceback
        assert "inspector" not in error.traceback
        assert node.run("throw 'just text'").error is not None
        assert node.run("'é\\0'").value == "'é\\x00'"
        assert node.run("display(5); 6").results[0].forms == {"text": "5"}
        with pytest.raises(EndedError):
            node.run("process.exit(5)")


@needs_node
def test_javascript_imports_modules() -> None:
    with Interpreter("node").running() as node:
        code = "import fs, {readFileSync as read} from 'node:fs'\nimport * as os from 'node:os'\n"
        assert node.run(f"{code}typeof fs.statSync + typeof read + os.EOL.length").value == (
            "'functionfunction1'"
        )
        assert node.run("typeof read").value == "'function'"
        assert node.run("(await import('node:path')).sep").value == "'/'"
        assert node.run("`${(await import('os')).EOL.length} import('x')`").value == (
            "\"1 import('x')\""
        )
        error = node.run("import './none.mjs'").error
        assert error is not None
        assert "none.mjs" in error.value


@needs_node
def test_javascript_reads_its_input() -> None:
    with Interpreter("node").running() as node:
        code = "let all = ''; for await (const one of process.stdin) all += one; all"
        assert node.run(code, "hello\nü").value == "'hello\\nü'"
        assert node.run(code).value == "''"


@needs_node
def test_javascript_runs_once_whatever_it_throws() -> None:
    with Interpreter("node").running() as node:
        node.run("globalThis.n = 0")
        assert node.name_of_error("n += 1; JSON.parse('await {')") == "SyntaxError"
        assert node.run("n").value == "1"
        assert node.run("throw Object.create(null)").error is not None
        assert node.run("n").value == "1"


def test_bash_is_kept_between_pieces() -> None:
    with Interpreter("bash").running() as bash:
        assert bash.run("x=5; f() { echo f $1; }; cd /").error is None
        assert bash.run("echo $x; f é; pwd").stdout == "5\nf é\n/\n"
        done = bash.run("read -r a; echo got $a; cat; false", "one\ntwo")
        assert done.stdout == "got one\ntwo"
        assert done.error == CodeError("CommandFailed", "exit code 1", "")
        assert bash.run("echo e >&2; cat").said == {"stdout": b"", "stderr": b"e\n"}
        assert bash.name_of_error("if") == "CommandFailed"
        with pytest.raises(EndedError, match="3"):
            bash.run("exit 3")


@pytest.mark.parametrize(
    ("language", "code", "name"),
    [
        ("python", "print('on'); import time\nfor _ in range(999): time.sleep(0.1)",
         "KeyboardInterrupt"),
        pytest.param("node", "console.log('on'); await new Promise(() => setInterval(() => 0, 9))",
                     "InterruptedError", marks=needs_node),
    ],
)  # fmt: skip
def test_an_interruption_leaves_what_was_defined(language: str, code: str, name: str) -> None:
    with Interpreter(language).running() as interpreter:
        interpreter.run("x = 5")
        interpreter.process.send_signal(signal.SIGINT)  # nothing runs
        error = interpreter.run(code, stops_after="on").error
        assert error is not None
        assert error.name == name
        assert interpreter.run("x").value == "5"


def test_an_interruption_in_the_middle_of_a_report_damages_none() -> None:
    code = (
        "import os, signal\n"
        "write = os.write\n"
        "def interrupted(*given):\n"
        "    os.write = write\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return write(*given)\n"
        "os.write = interrupted\n"
        "display('x' * 800_000)" + " " * 1000  # what is shorter is read in small pieces
    )
    with Interpreter("python").running() as interpreter:
        interpreter.run("y = 5")
        done = interpreter.run(code)
        assert [len(str(one.forms["text"])) for one in done.results] == [800_002]
        assert done.error is not None
        assert (done.error.name, done.stdout) == ("KeyboardInterrupt", "")
        assert interpreter.run("y").value == "5"


@pytest.mark.parametrize("language", ["python", pytest.param("node", marks=needs_node), "bash"])
def test_a_request_that_was_broken_off_does_no_harm(language: str) -> None:
    with Interpreter(language).running() as interpreter:
        whole = request_of(language, secrets.token_hex(16), "x = 'never'", "", 0)
        assert interpreter.process.stdin is not None
        interpreter.process.stdin.write(whole[: len(whole) // 2])
        print_it = "echo ok" if language == "bash" else "'ok'"
        done = interpreter.run(print_it)
        assert done.stdout == "ok\n" if language == "bash" else done.value == "'ok'"


def test_other_languages_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="python, node, bash"):
        argv_of("perl")


# --- reports --------------------------------------------------------------------------------------

MARK = "0123456789abcdef0123456789abcdef"


def framed(letter: str, body: str = "{}") -> bytes:
    return f"\0{MARK}{letter}{body}\0".encode()


BEGIN, END = framed("B"), framed("E", '{"error": null}')


@given(
    st.lists(st.one_of(st.binary(max_size=40), st.sampled_from([b"\0", f"\0{MARK[:9]}".encode()]))),
    st.lists(st.integers(1, 50)),
)
def test_text_is_told_exactly_however_it_is_cut(pieces: list[bytes], cuts: list[int]) -> None:
    text = b"".join(pieces)
    data = b"before" + BEGIN + text + framed("R", '{"text": "5"}') + END + b"after"
    read, told, results, ends = Reports(MARK), b"", list[Result](), list[Finished]()
    list(read.feed("stderr", BEGIN + framed("E")))
    while data:
        size = cuts.pop() if cuts else len(data)
        for one in read.feed("stdout", data[:size]):
            match one:
                case Text(data=found):
                    told += found
                case Result():
                    results.append(one)
                case Finished():
                    ends.append(one)
        data = data[size:]
    assert told == text
    assert results == [Result({"text": "5"}, is_main=False, is_truncated=False)]
    assert ends == [Finished(None)]


@given(st.binary(max_size=60))
def test_damaged_reports_end_nothing(body: bytes) -> None:
    read = Reports(MARK)
    body = body.replace(b"\0", b"")
    list(read.feed("stderr", BEGIN + framed("E")))
    (result,) = read.feed("stdout", BEGIN + b"\0" + MARK.encode() + b"R" + body + b"\0")
    assert isinstance(result, Result)
    (end,) = read.feed("stdout", b"\0" + MARK.encode() + b"E" + body + b"\0")
    assert isinstance(end, Finished)


def test_a_report_without_an_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "REPORT_MAX", 1000)
    read = Reports(MARK)
    list(read.feed("stdout", BEGIN + f"\0{MARK}R".encode()))
    with pytest.raises(AgentError):
        list(read.feed("stdout", bytes(b"x" * 2000)))
