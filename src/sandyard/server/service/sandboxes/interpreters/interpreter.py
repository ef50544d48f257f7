"""Runs pieces of Python code one after another in one namespace. It is started in a sandbox, by any
Python since 3.8, with nothing installed.

Each line of its input is a request in JSON: `code`, `mark`, `stdin`. What it reports is between two
NUL bytes: the mark, a letter and JSON. `B` is the beginning and `E` the end of a piece, on both
outputs; `R` is a result.
"""

from __future__ import annotations

import ast
import base64
import builtins
import contextlib
import io
import json
import linecache
import os
import signal
import sys
import threading
import traceback
import types
from typing import Any, BinaryIO

TEXT_MAX = 4000000
"""Characters of a result's text; more is cut."""
DATA_MAX = 8000000
"""Characters of all other forms of a result; what is over that is left out."""
ESCAPED_MAX = 12000000
"""Characters of the text as JSON, where one may become six."""
FORMS = (
    ("html", "text/html", "_repr_html_"),
    ("markdown", "text/markdown", "_repr_markdown_"),
    ("svg", "image/svg+xml", "_repr_svg_"),
    ("png", "image/png", "_repr_png_"),
    ("jpeg", "image/jpeg", "_repr_jpeg_"),
    ("pdf", "application/pdf", "_repr_pdf_"),
    ("latex", "text/latex", "_repr_latex_"),
    ("json", "application/json", "_repr_json_"),
    ("javascript", "application/javascript", "_repr_javascript_"),
)
BY_KIND = {kind: name for name, kind, _ in FORMS}
FLAGS = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
IS_COROUTINE = 0x80  # inspect.CO_COROUTINE


class Namespace:
    """The module `__main__` of the code, and what goes with it."""

    def __init__(self, asked: BinaryIO) -> None:
        self.asked = asked
        self.own = os.getpid()
        self.main = types.ModuleType("__main__")
        sys.modules["__main__"] = self.main
        self.main.__dict__["__builtins__"] = builtins
        builtins.display = self.display  # type: ignore[attr-defined]  # as in a notebook
        self.loop: Any = None
        self.mark = ""
        self.is_running = False
        self.is_reporting = False
        self.is_interrupted = False

    # --- one piece --------------------------------------------------------------------------

    def serve(self) -> None:
        """Answer requests until there are no more."""
        number = 0
        for line in self.asked:
            try:
                wish = json.loads(line)
                source, self.mark = wish["code"], wish["mark"]
            except (ValueError, KeyError, TypeError):
                continue  # the rest of a request that was broken off
            number += 1
            sys.stdin = io.TextIOWrapper(io.BytesIO(wish.get("stdin", "").encode()), "utf-8")
            self.report("B", {}, streams=(2, 1))
            error = self.attempt(source, f"<code {number}>")
            self.flush()
            if os.getpid() != self.own:
                os._exit(0)  # a forked child that returned here: it must not answer
            self.report("E", {}, streams=(2,))
            self.report("E", {"error": error})

    def attempt(self, source: str, name: str) -> dict[str, str] | None:
        """Run a piece of code, and return its error."""
        try:
            self.is_running = True
            try:
                self.run(source, name)
                self.show_figures()
            finally:
                self.is_running = False
        except BaseException as raised:
            if os.getpid() != self.own:
                self.end_child(raised)
            return self.error_of(raised, name)
        return None

    def run(self, source: str, name: str) -> None:
        """Run a piece of code, and report the value of its last expression."""
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        tree = compile(source, name, "exec", FLAGS | ast.PyCF_ONLY_AST)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        self.evaluate(compile(tree, name, "exec", FLAGS))
        if last is not None:
            found = self.evaluate(compile(ast.Expression(last.value), name, "eval", FLAGS))
            if found is not None:
                self.main.__dict__["_"] = found
                self.show(found, is_main=True)

    def evaluate(self, code: types.CodeType) -> object:
        """Evaluate code, with `await` outside of functions."""
        value = eval(code, self.main.__dict__)
        if isinstance(value, types.CoroutineType) and code.co_flags & IS_COROUTINE:
            if self.loop is None:
                import asyncio  # not before it is needed: it takes long to load

                self.loop = asyncio.new_event_loop()
            return self.loop.run_until_complete(value)
        return value

    def interrupt(self, number: int, frame: types.FrameType | None) -> None:
        """Interrupt a piece of code; what interrupts no code is ignored."""
        if not self.is_running or os.getpid() != self.own:
            return
        if self.is_reporting:  # this would damage the report, and the next one
            self.is_interrupted = True
            return
        raise KeyboardInterrupt

    # --- what is reported -------------------------------------------------------------------

    def report(self, letter: str, value: object, streams: tuple[int, ...] = (1,)) -> None:
        """Write a report in one piece, whatever the code has made of `sys.stdout`."""
        message = f"\0{self.mark}{letter}{json.dumps(value)}\0".encode()
        self.is_reporting = True
        try:
            for descriptor in streams:
                left = message
                while left:
                    left = left[os.write(descriptor, left) :]
        finally:
            self.is_reporting = False
        if self.is_interrupted:
            self.is_interrupted = False
            raise KeyboardInterrupt

    def flush(self) -> None:
        """Flush the streams, which the code may have replaced."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()

    def display(self, *values: object, **_: object) -> None:
        """Report values as results, each in all the forms that it has."""
        for value in values:
            self.show(value, is_main=False)

    def show(self, value: object, *, is_main: bool) -> None:
        """Report a value in all its forms."""
        self.flush()
        forms, is_cut = forms_of(value)
        self.report("R", dict(forms, isMain=is_main, truncated=is_cut))

    def show_figures(self) -> None:
        """Report open figures of matplotlib, if that is in use, and close them."""
        pyplot = sys.modules.get("matplotlib.pyplot")
        if pyplot is None:
            return
        for number in pyplot.get_fignums():
            figure, file = pyplot.figure(number), io.BytesIO()
            if figure.get_axes():
                figure.savefig(file, format="png", bbox_inches="tight")
                picture = base64.b64encode(file.getvalue()).decode()
                is_cut = len(picture) > DATA_MAX
                forms = {"text": repr(figure), **({} if is_cut else {"png": picture})}
                self.report("R", dict(forms, isMain=False, truncated=is_cut))
        pyplot.close("all")

    def error_of(self, raised: BaseException, name: str) -> dict[str, str]:
        """Return an error, with its traceback from the code on."""
        kind, trace = type(raised), raised.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename != name:
            trace = trace.tb_next
        try:
            text = "".join(traceback.format_exception(kind, raised, trace))
            return {"name": kind.__name__, "value": str(raised), "traceback": text}
        except Exception:
            return {"name": kind.__name__, "value": "it does not say", "traceback": ""}

    def end_child(self, raised: BaseException) -> None:
        """End a forked child as Python would."""
        code = 1
        if not isinstance(raised, SystemExit):
            traceback.print_exception(type(raised), raised, raised.__traceback__)
        elif raised.code is None or isinstance(raised.code, int):
            code = raised.code or 0
        else:
            sys.stderr.write(f"{raised.code}\n")
        self.flush()
        os._exit(code & 255)


def forms_of(value: object) -> tuple[dict[str, object], bool]:
    """Return a value in all its forms, and whether something of it was cut or left out."""
    found: dict[str, object] = {}
    bundle = getattr(type(value), "_repr_mimebundle_", None)
    if bundle is not None:
        with contextlib.suppress(Exception):
            form = bundle(value)
            form = form[0] if isinstance(form, tuple) else form
            found.update({BY_KIND[kind]: one for kind, one in form.items() if kind in BY_KIND})
    for name, _, method in FORMS:
        show = getattr(type(value), method, None)
        if show is None or name in found:
            continue
        with contextlib.suppress(Exception):
            form = show(value)
            form = form[0] if isinstance(form, tuple) else form
            if form is not None:
                found[name] = form
    forms: dict[str, object] = {}
    is_cut, left = False, DATA_MAX
    for name, one in found.items():
        shown = base64.b64encode(one).decode() if isinstance(one, bytes) else one
        try:
            size = len(json.dumps(shown))
        except (TypeError, ValueError, RecursionError):
            continue
        if size > left or (name != "json" and not isinstance(shown, str)):
            is_cut = True
        else:
            forms[name] = shown
            left -= size
    text = repr(value)
    shown = text[:TEXT_MAX]
    if len(json.dumps(shown)) > ESCAPED_MAX:
        shown = shown[: TEXT_MAX // 2]
    forms["text"] = shown
    return forms, is_cut or len(text) > len(shown)


def main() -> None:
    """Serve requests from this process's input, which the code itself does not get."""
    asked = os.fdopen(os.dup(0), "rb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.environ.setdefault("MPLBACKEND", "agg")
    sys.argv[:] = [""]
    space = Namespace(asked)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, space.interrupt)
    space.serve()


if __name__ == "__main__":
    main()
