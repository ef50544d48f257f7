"""Drives every public method of E2B's code interpreter SDK, with the SDK's own Python.

    python interpret.py sync|async

`async` does less. The server and the key are in the SDK's environment variables. It prints a line
of JSON for each method: what came of it. See drive.py.
"""

import asyncio
import inspect
import json
import os
import sys
import time
from typing import Any

import e2b_code_interpreter as sdk  # type: ignore[import-not-found]  # where it runs, it exists

IS_ASYNC = sys.argv[1] == "async"
Sandbox: Any = sdk.AsyncSandbox if IS_ASYNC else sdk.Sandbox
METHODS = (
    "run_code", "create_code_context", "list_code_contexts", "restart_code_context",
    "remove_code_context",
)  # fmt: skip


async def done(found: Any) -> Any:
    """Return a result of either SDK."""
    return await found if inspect.isawaitable(found) else found


async def error_of(work: Any) -> str:
    """Return what a call fails with."""
    try:
        await done(work())
    except Exception as error:  # noqa: BLE001 - whatever the SDK makes of it
        return f"{type(error).__name__}: {error}"
    raise AssertionError("it did not fail")


async def values(box: Any) -> None:
    """See what is reported of values, outputs and errors."""
    assert (await done(box.run_code("x = 1; x + 1"))).text == "2"
    kept = await done(box.run_code("x"))
    assert (kept.text, kept.execution_count) == ("1", 2)
    heard: list[Any] = []
    code = "import sys; print('é'); print('b', file=sys.stderr); 1/0"
    failed = await done(
        box.run_code(code, on_stdout=heard.append, on_stderr=heard.append, on_error=heard.append)
    )
    assert (failed.logs.stdout, failed.logs.stderr) == (["é\n"], ["b\n"])
    assert (failed.error.name, failed.error.value) == ("ZeroDivisionError", "division by zero")
    assert "1/0" in failed.error.traceback
    assert len(heard) == 3
    frame = (await done(box.run_code("import pandas; pandas.DataFrame({'a': [1, 2]})"))).results[0]
    assert frame.data == {"a": [1, 2]}
    assert "<table" in frame.html
    plot = "from matplotlib import pyplot; pyplot.plot([1, 4]); pyplot.title('T'); pyplot.show()"
    chart = (await done(box.run_code(plot))).results[0]
    assert chart.png.startswith("iVBOR")
    assert (chart.chart.type.value, chart.chart.title) == ("line", "T")
    assert (await done(box.run_code("{'a': [1]}"))).results[0].json == {"a": [1]}
    dated = "import datetime, uuid; [datetime.date(2026, 1, 2), uuid.UUID(int=1)]"
    shown = (await done(box.run_code(dated))).results[0].json
    assert shown == ["2026-01-02", "00000000-0000-0000-0000-000000000001"], shown
    inexact = (await done(box.run_code("[{1, 2}]"))).results[0]
    assert (inexact.json, inexact.text) == (None, "[{1, 2}]")
    shell = (await done(box.run_code("!whoami; pwd"))).logs.stdout
    assert "".join(shell) == "user\r\n/home/user\r\n"
    odd = "import datetime; pandas.DataFrame({'a': [datetime.date(2026, 1, 2), float('nan')]})"
    frame = (await done(box.run_code(odd))).results[0]
    assert frame.data == {"a": ["2026-01-02", None]}


async def languages(box: Any) -> None:
    """Run code in the other languages, with the sandbox's environment and the code's own."""
    for language, code, wanted in (
        ("python", "import os; os.environ['MINE'] + os.environ['ONE']", "it's o'ne"),
        ("js", "process.env.MINE + process.env.ONE", "it's o'ne"),
        ("ts", "const a: string = process.env.MINE + process.env.ONE; a", "it's o'ne"),
        ("r", "cat(Sys.getenv('MINE'), Sys.getenv('ONE'), sep = '')", "it's o'ne"),
        ("bash", 'echo -n "$MINE$ONE"', "it's o'ne"),
    ):
        for envs, expected in (({"ONE": " o'ne"}, wanted), ({"ONE": ""}, "it's")):
            ran = await done(box.run_code(code, language=language, envs=envs))
            found = ran.text if ran.results else "".join(ran.logs.stdout)
            assert (ran.error, found.strip('"')) == (None, expected), (language, ran)
    assert "cannot run java" in await error_of(lambda: box.run_code("1", language="java"))


async def contexts(box: Any) -> None:
    """Create contexts, restart and remove them."""
    made = await done(box.create_code_context(cwd="/tmp"))
    assert (made.language, made.cwd) == ("python", "/tmp")
    assert made.id in [one.id for one in await done(box.list_code_contexts())]
    assert (await done(box.run_code("import os; y = 1; os.getcwd()", context=made))).text == "/tmp"
    await done(box.restart_code_context(made))
    assert (await done(box.run_code("y", context=made))).error.name == "NameError"
    ended = await done(box.run_code("import os; os._exit(3)", context=made))
    assert ended.error.name == "InterpreterEnded"
    assert (await done(box.run_code("5", context=made))).text == "5"
    await done(box.remove_code_context(made))
    assert "not found" in await error_of(lambda: box.run_code("1", context=made))
    assert "no such folder" in await error_of(lambda: box.create_code_context(cwd="/nowhere"))


async def interruptions(box: Any) -> None:
    """Leave code that runs, which is then interrupted, so that the next is run."""
    await done(box.run_code("z = 7"))
    for code in (
        "import time; time.sleep(300)",
        "while True:\n    try: time.sleep(300)\n    except KeyboardInterrupt: pass",
    ):
        assert "Timeout" in await error_of(lambda code=code: box.run_code(code, timeout=1))
        began = time.monotonic()
        assert (await done(box.run_code("6"))).text == "6"
        assert time.monotonic() - began < 200
        if "while" not in code:
            assert (await done(box.run_code("z"))).text == "7"


async def main() -> None:
    """Drive, and report."""
    box = await done(Sandbox.create(timeout=900, envs={"MINE": "it's"}))
    other = await done(Sandbox.create(timeout=900))
    try:
        code = "import random, numpy; (random.random(), numpy.random.rand())"
        drawn = [(await done(one.run_code(code))).text for one in (box, other)]
        assert drawn[0] != drawn[1]
        await done(box.run_code("%reset -f"))
        await done(box.restart_code_context((await done(box.list_code_contexts()))[0]))
        for check in (
            (values, contexts) if IS_ASYNC else (values, languages, contexts, interruptions)
        ):
            await check(box)
    finally:
        await done(other.kill())
        await done(box.kill())
    for name in METHODS:
        line = {"method": f"CodeInterpreter.{name}", "outcome": "works"}
        sys.stdout.write(json.dumps(line) + "\n")


asyncio.run(main())
sys.stdout.flush()
sys.stderr.flush()
# The SDK's HTTP client has threads of native code, which may abort an interpreter that shuts down.
os._exit(0)
