"""The code interpreter of templates/: how it reads interpreters, and contexts in Bash, run here."""

import asyncio
import json
import os
import pwd
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path

import pytest
from code_interpreter import contexts, scripts
from code_interpreter.contexts import Context, RefusedError, quote
from code_interpreter.items import ENDED, Item, result_of
from code_interpreter.scripts import Reports, ScriptContext, command_of
from hypothesis import given
from hypothesis import strategies as st

from sandyard.server.service.sandboxes import interpreters

MARK = "0" * 32
HEAD = f"\0{MARK}".encode()


def fed(pieces: list[bytes], name: str = "stdout") -> list[Item]:
    reports = Reports(MARK)
    found = [one for piece in pieces for one in reports.feed(name, piece)]
    assert name in reports.ended
    return found


@given(st.lists(st.integers(0, 200), max_size=8), st.text(max_size=20))
def test_output_is_read_whatever_pieces_it_comes_in(cuts: list[int], text: str) -> None:
    printed = text.replace("\0", "")
    value = json.dumps({"text": "'v'", "isMain": True}).encode()
    data = b"".join(
        (
            b"earlier" + HEAD + b"B{}\0", printed.encode(), HEAD + b"R" + value + b"\0",
            HEAD + b'E{"error":null}\0' + b"later",
        )
    )  # fmt: skip
    edges = [0, *sorted(min(one, len(data)) for one in cuts), len(data)]
    found = fed([data[begin:end] for begin, end in pairwise(edges)])
    assert "".join(str(one["text"]) for one in found if one["type"] == "stdout") == printed
    assert [one for one in found if one["type"] == "result"] == [
        {"type": "result", "is_main_result": True, "text": "v"}
    ]


def test_damaged_reports_lose_nothing_but_themselves() -> None:
    pieces = [HEAD + b"B{}\0", HEAD + b"Rnonsense\0", HEAD + b"R{}\0", b"\0x", HEAD + b"E{}\0"]
    assert [one["text"] for one in fed(pieces)] == ["\0x"]


def test_unknown_forms_of_a_value_are_extra() -> None:
    data = {"text/plain": "1", "image/png": "x", "application/odd": {"a": 1}}
    assert result_of(data, is_main=False) == {
        "type": "result", "is_main_result": False, "text": "1", "png": "x",
        "extra": {"application/odd": {"a": 1}},
    }  # fmt: skip


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20))
def test_any_value_of_a_variable_is_quoted(value: str) -> None:
    context = ScriptContext("python", "/", {}, ())
    before = dict(os.environ)
    try:
        exec(context.setting({"A_A": value, "B_B": None}), {})
        assert os.environ["A_A"] == value
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_a_word_of_a_shell_is_quoted() -> None:
    for word in ("a b", "it's", '"$HOME"', "`x`", "a\nb", "\\"):
        done = subprocess.run(
            ["bash", "-c", f"printf %s {quote(word)}"], capture_output=True, check=True
        )
        assert done.stdout.decode() == word


@pytest.fixture
async def bash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Context]:
    me = pwd.getpwuid(os.getuid())
    monkeypatch.setattr(contexts, "account", lambda: me)
    monkeypatch.setattr(contexts, "STATE", tmp_path / "state")
    monkeypatch.setattr(contexts, "GRACE_S", 10.0)
    monkeypatch.setattr(scripts, "FOLDER", Path(interpreters.__file__).parent)
    made = ScriptContext("bash", str(tmp_path), {}, command_of("bash"))
    yield made
    await made.remove()


class Client:
    """What one client of a context has heard."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.heard: list[Item] = []
        self.has_heard = asyncio.Event()

    async def tell(self, item: Item) -> None:
        self.heard.append(item)
        if item["type"] == "stdout":
            self.has_heard.set()

    async def run(self, code: str, **variables: str) -> str:
        self.heard.clear()
        await self.context.execute(code, variables, self.tell)
        return "".join(str(one["text"]) for one in self.heard if one["type"] == "stdout")


async def test_code_shares_its_interpreter_and_not_its_variables(
    bash: Context, tmp_path: Path
) -> None:
    client = Client(bash)
    assert await client.run("x=5; pwd") == f"{tmp_path}\n"
    assert await client.run("echo $x $ONE", ONE="it's") == "5 it's\n"
    assert await client.run("echo ${ONE-none}") == "none\n"
    # The sandbox's own environment may change while the interpreter runs.
    (tmp_path / "state").write_text('{"env": {"ONE": "mine", "bad name": "x"}}{"rest')
    assert await client.run("echo $ONE") == "mine\n"
    assert await client.run("echo $ONE", ONE="other") == "other\n"
    assert await client.run("echo $ONE") == "mine\n"
    (tmp_path / "state").unlink()
    assert await client.run("echo ${ONE-none} $x") == "none 5\n"
    assert await client.run("false") == ""
    assert client.heard[-1]["name"] == "CommandFailed"


async def test_a_slow_machine_gives_an_interpreter_more_time_to_start(
    bash: Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert isinstance(bash, ScriptContext)
    (tmp_path / "state").write_text('{"env": {}, "pace": 20}')
    monkeypatch.setattr(contexts, "START_S", 0.5)
    shell = command_of("bash")
    bash.command = (shell[0], "-c", 'sleep 1; exec "$0" "$@"', *shell)
    assert await Client(bash).run("echo started") == "started\n"


async def test_an_interpreter_that_does_not_start_says_why(
    monkeypatch: pytest.MonkeyPatch, bash: Context, tmp_path: Path
) -> None:
    monkeypatch.setattr(contexts, "START_S", 0.2)
    silent = ScriptContext("bash", str(tmp_path), {}, ("sleep", "300"))
    with pytest.raises(RefusedError, match=r"cannot start bash in .*: it was not ready within"):
        await silent.start()
    await silent.remove()


async def test_an_interpreter_that_ends_has_a_successor(bash: Context) -> None:
    client = Client(bash)
    assert await client.run("x=5; exit 3") == ""
    assert client.heard[-1] == ENDED
    assert await client.run("echo ${x-none}") == "none\n"
    await bash.restart()
    assert await client.run("echo new") == "new\n"


async def test_a_client_that_leaves_interrupts_its_code_alone(bash: Context) -> None:
    leaving, staying = Client(bash), Client(bash)
    running = asyncio.ensure_future(leaving.run("x=5; echo begun; sleep 300"))
    await asyncio.wait_for(leaving.has_heard.wait(), 30)
    waiting = asyncio.ensure_future(staying.run("echo $x"))
    running.cancel()
    assert await asyncio.wait_for(waiting, 30) == "5\n"
    # A shell that starts a program just then does not notice, and is interrupted again.
    leaving.has_heard.clear()
    code = "k=0; trap 'k=$((k+1))' INT; echo begun; while [ $k -lt 2 ]; do read -t 1 <> <(:); done"
    running = asyncio.ensure_future(leaving.run(code))
    await asyncio.wait_for(leaving.has_heard.wait(), 30)
    running.cancel()
    assert await asyncio.wait_for(staying.run("echo $x; trap : INT"), 30) == "5\n"
    # Code that does not end is ended with its interpreter.
    bash_grace, contexts.GRACE_S = contexts.GRACE_S, 0.2
    try:
        leaving.has_heard.clear()
        code = "trap '' INT; echo begun; while :; do read -t 1 <> <(:); done"
        running = asyncio.ensure_future(leaving.run(code))
        await asyncio.wait_for(leaving.has_heard.wait(), 30)
        running.cancel()
        assert await asyncio.wait_for(staying.run("echo ${x-none}"), 30) == "none\n"
    finally:
        contexts.GRACE_S = bash_grace


async def test_code_that_waits_for_a_context_which_is_removed_is_refused(bash: Context) -> None:
    first, second = Client(bash), Client(bash)
    running = asyncio.ensure_future(first.run("echo begun; sleep 300"))
    await asyncio.wait_for(first.has_heard.wait(), 30)
    waiting = asyncio.ensure_future(second.run("echo never"))
    await bash.remove()
    await running
    assert first.heard[-1] == ENDED
    with pytest.raises(RefusedError, match="removed"):
        await waiting
    assert not await bash.is_alive()


async def test_code_may_set_what_the_interpreter_needs(bash: Context) -> None:
    client = Client(bash)
    assert await client.run("echo $PATH", PATH="/nowhere") == "/nowhere\n"
    assert "/bin" in await client.run("echo $PATH")
    assert await client.run("echo $HOME", HOME="/h") == "/h\n"
    assert await client.run("echo $HOME") == f"{contexts.account().pw_dir}\n"


@pytest.mark.parametrize(
    "code",
    [
        "sleep 300 & exit", "setsid sleep 300 & echo $!; exit", "exec >&-",
        "exec >&- 2>&-", "kill -9 $$", "yes & exit", "setsid yes & echo $!; exit",
    ],
)  # fmt: skip
async def test_processes_that_stay_do_not_keep_an_ended_interpreter(
    bash: Context, code: str
) -> None:
    client = Client(bash)
    async with asyncio.timeout(60):
        printed = await client.run(code)
        assert client.heard[-1] == ENDED
        assert await client.run("echo new") == "new\n"
        await bash.restart()
        assert await client.run("echo newer") == "newer\n"
    if "setsid sleep" in code:  # it is in no group of the interpreter's, and prints nothing
        (pid,) = (int(word) for word in printed.split() if word.isdigit())
        os.kill(pid, signal.SIGKILL)


async def test_programs_that_print_between_pieces_go_on(bash: Context) -> None:
    client = Client(bash)
    code = "(sleep 0.2; head -c 3000000 /dev/zero | tr '\\0' x; touch done) & echo begun"
    assert "begun" in await client.run(code)
    waits = "until [ -e done ]; do sleep 0.05; done; echo done"
    assert (await asyncio.wait_for(client.run(waits), 60)).endswith("done\n")


async def test_a_client_that_leaves_output_behind_is_let_go(bash: Context) -> None:
    other = Client(bash)
    stuck = asyncio.Event()

    async def never(item: Item) -> None:
        if item["type"] == "stdout":
            stuck.set()
            await asyncio.Event().wait()

    code = "trap '' INT; while :; do head -c 3000000 /dev/zero | tr '\\0' x; done"
    running = asyncio.ensure_future(bash.execute(f"echo; {code}", {}, never))
    async with asyncio.timeout(60):
        await stuck.wait()
        contexts_grace, contexts.GRACE_S = contexts.GRACE_S, 0.5
        running.cancel()
        try:
            assert await other.run("echo other") == "other\n"
        finally:
            contexts.GRACE_S = contexts_grace


async def test_a_context_is_restarted_though_nobody_reads_its_output(
    bash: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts, "GRACE_S", 0.2)
    stuck = asyncio.Event()

    async def never(item: Item) -> None:
        if item["type"] == "stdout":
            stuck.set()
            await asyncio.Event().wait()

    running = asyncio.ensure_future(bash.execute("echo x; sleep 300", {}, never))
    async with asyncio.timeout(60):
        await stuck.wait()
        await bash.restart()
        assert await Client(bash).run("echo new") == "new\n"
    assert running.cancelled()


async def test_a_client_that_leaves_at_the_last_item_ends_no_interpreter(bash: Context) -> None:
    client = Client(bash)
    await client.run("x=5")

    async def leaving(item: Item) -> None:
        if item["type"] == "error":
            raise ConnectionError

    with pytest.raises(ConnectionError):
        await bash.execute("false", {}, leaving)
    assert await client.run("echo $x") == "5\n"


async def test_a_restart_comes_before_code_that_waits(bash: Context) -> None:
    first, second = Client(bash), Client(bash)
    running = asyncio.ensure_future(first.run("x=5; echo begun; sleep 300"))
    await asyncio.wait_for(first.has_heard.wait(), 30)
    waiting = asyncio.ensure_future(second.run("y=6; echo ${x-none}"))
    await asyncio.sleep(0)  # it waits for its turn, before the restart does
    await bash.restart()
    assert await waiting == "none\n"
    await running
    assert await second.run("echo $y") == "6\n"


async def test_a_start_that_is_cancelled_leaves_nothing(bash: Context) -> None:
    slow = ScriptContext("bash", "/", {}, ("sleep", "300"))
    starting = asyncio.ensure_future(slow.start())
    while slow.process is None:
        await asyncio.sleep(0.01)
    pid = slow.process.pid
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not await slow.is_alive()
    assert not Path(f"/proc/{pid}").exists()


async def test_what_cannot_start_says_so(bash: Context) -> None:
    for command in (("/nowhere",), (sys.executable, "-c", "raise SystemExit(3)")):
        broken = ScriptContext("bash", "/", {}, command)
        with pytest.raises(RefusedError, match="cannot start bash in /"):
            await broken.start()
