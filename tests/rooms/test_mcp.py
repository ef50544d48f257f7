"""The MCP server, asked by the protocol's own client, over fake machines."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from mcp.client.client import Client
from mcp.client.stdio import StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from tests.support.door import Door, door
from tests.support.house import eventually
from tests.support.ports import free_port

from sandyard.client import AsyncSandyard
from sandyard.mcp.server import SHOWN_MAX, TOOLS, Hands, guarded, http_app, make_server, shown


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Door]:
    async with door(tmp_path, saves=True) as made:
        yield made


async def ask(client: Client, tool: str, **arguments: Any) -> Any:
    """Return what a tool tells."""
    said = await client.call_tool(tool, arguments)
    assert not said.is_error, said
    told = said.structured_content
    assert told is not None
    return told["result"] if set(told) == {"result"} else told


async def refusal(client: Client, tool: str, **arguments: Any) -> str:
    """Return the sentence that a tool fails with."""
    said = await client.call_tool(tool, arguments)
    assert said.is_error, said
    return str(getattr(said.content[0], "text", ""))


async def live(client: Client) -> None:
    """Do what an agent does."""
    assert {one.name for one in (await client.list_tools()).tools} == set(TOOLS)
    box = await ask(client, "create_sandbox", name="agent")
    assert (box["name"], box["status"]) == ("agent", "running")
    assert [one["id"] for one in await ask(client, "list_sandboxes")] == [box["id"]]
    done = await ask(client, "run_command", sandbox="agent", command="hello there")
    assert (done["stdout"], done["exit_code"]) == ("hello there", 0)
    said = await ask(client, "write_file", sandbox="agent", path="d/f.txt", text="hällo\n")
    assert said == "7 bytes are in d/f.txt"
    read = await ask(client, "read_file", sandbox=box["id"], path="/workspace/d/f.txt")
    assert read == {"text": "hällo\n", "size": 7, "next_offset": None}
    listed = await ask(client, "list_files", sandbox="agent", depth=2)
    assert [one["path"] for one in listed["entries"]] == ["/workspace/d", "/workspace/d/f.txt"]
    url = (await ask(client, "get_file_url", sandbox="agent", path="d/f.txt"))["url"]
    assert "signature=" in url
    assert (await ask(client, "pause_sandbox", sandbox="agent"))["status"] == "paused"
    done = await ask(client, "run_command", sandbox="agent", command="on it goes")
    assert done["stdout"] == "on it goes"
    saved = await ask(client, "snapshot_sandbox", sandbox="agent", name="then")
    assert (saved["name"], saved["sandbox"]) == ("then", box["id"])
    back = await ask(client, "roll_back_sandbox", sandbox="agent", snapshot="then")
    assert back["status"] == "running"
    assert await ask(client, "delete_snapshot", snapshot="then") == "then is gone"
    pid = (await ask(client, "start_process", sandbox="agent", command="count 3"))["pid"]
    out = await ask(client, "read_output", sandbox="agent", pid=pid)
    assert out == {"text": "1\n2\n3\n", "next_offset": 6, "lost_bytes": 0, "exit_code": 0}
    pid = (await ask(client, "start_process", sandbox="agent", command="hang"))["pid"]
    out = await ask(client, "read_output", sandbox="agent", pid=pid, wait_s=0.1)
    assert out["exit_code"] is None
    await ask(client, "stop_process", sandbox="agent", pid=pid)

    async def has_ended() -> bool:
        out = await ask(client, "read_output", sandbox="agent", pid=pid)
        return bool(out["exit_code"] == 143)

    await eventually(has_ended)
    await ask(client, "write_binary_file", sandbox="agent", path="b", content="AP8=")
    read = await ask(client, "read_binary_file", sandbox="agent", path="b")
    assert read == {"base64": "AP8=", "size": 2, "next_offset": None}
    ran = await ask(client, "run_code", sandbox="agent", code="value 42")
    assert (ran["value"], ran["error"], ran["images"]) == ("42", None, 0)
    (twin,) = await ask(client, "fork_sandbox", sandbox="agent")
    assert await ask(client, "destroy_sandbox", sandbox=twin["id"]) == f"{twin['id']} is gone"
    assert await ask(client, "destroy_sandbox", sandbox="agent") == f"{box['id']} is gone"
    # What goes wrong is a sentence that says what.
    for tool, arguments, words in (
        ("run_command", {"sandbox": "agent", "command": "x"}, "cannot find"),
        ("run_command", {"sandbox": box["id"], "command": "x"}, "cannot find"),
        ("create_sandbox", {"template": "no-such"}, "template"),
        ("run_command", {"sandbox": "x", "command": "x", "timeout_s": 1e9}, "timeout_s"),
        ("run_command", {"sandbox": "x"}, "command is missing"),
        ("no_such_tool", {}, "there is no tool 'no_such_tool'"),
        ("run_comand", {"command": "x"}, "did you mean 'run_command'"),
        ("run_command", {"sandbox": "x", "comand": "x"}, "did you mean 'command'"),
        ("create_sandbox", {"vcpus": "many"}, "cannot use vcpus"),
        ("write_binary_file", {"sandbox": "x", "path": "p", "content": "%"}, "base64"),
    ):  # fmt: skip
        said = await refusal(client, tool, **arguments)
        assert words in said, tool
        assert "Error executing" not in said


async def test_what_there_is_not_is_not_announced_and_what_tools_do_is(opened: Door) -> None:
    async with yard_of(opened) as yard, Client(make_server(yard, version="1")) as client:
        can = client.server_capabilities
        assert (can.prompts, can.resources) == (None, None)
        assert can.tools is not None
        for tool in (await client.list_tools()).tools:
            assert tool.input_schema["additionalProperties"] is False
            assert tool.annotations is not None
            assert tool.annotations.read_only_hint is tool.name.startswith(
                ("read_", "list_", "take_")
            )
            assert tool.title


def yard_of(opened: Door, key: str | None = None) -> AsyncSandyard:
    return AsyncSandyard(key or opened.yard.key, f"http://127.0.0.1:{opened.port}")


async def test_an_agent_lives_with_its_sandbox(opened: Door) -> None:
    async with yard_of(opened) as yard, Client(make_server(yard, version="1")) as client:
        await live(client)
        box = await ask(client, "create_sandbox")
        for path, data in (("long", b"x" * 150_000), ("binary", b"a\0b")):
            async with opened.yard.client_of(opened.yard.key) as raw:
                url = f"/v1/sandboxes/{box['id']}/files"
                await raw.put(url, params={"path": path}, content=data)
        part = await ask(client, "read_file", sandbox=box["id"], path="long")
        assert (len(part["text"]), part["next_offset"], part["size"]) == (100_000, 100_000, 150_000)
        part = await ask(client, "read_file", sandbox=box["id"], path="long", offset=100_000)
        assert (len(part["text"]), part["next_offset"]) == (50_000, None)
        async with opened.yard.client_of(opened.yard.key) as raw:
            await raw.put(url, params={"path": "ü"}, content="xü€".encode() * 30_000)
        parts, offset = [], 0
        while offset is not None:
            part = await ask(client, "read_file", sandbox=box["id"], path="ü", offset=offset)
            parts.append(part["text"])
            offset = part["next_offset"]
        assert "".join(parts) == "xü€" * 30_000
        hands = Hands(yard)
        await opened.yard.client.patch(f"/v1/sandboxes/{box['id']}", json={"name": "known"})
        by_name = await hands._box("known")
        assert await hands._box(box["id"]) is by_name
        assert await hands._box("known") is by_name
        assert "no text" in await refusal(client, "read_file", sandbox=box["id"], path="binary")
        assert "absent" in str(await refusal(client, "read_file", sandbox=box["id"], path="none"))
        done = await ask(client, "run_command", sandbox=box["id"], command="x" * 90_000)
        assert len(done["stdout"]) < SHOWN_MAX + 100
        assert "are left out" in done["stdout"]


async def test_a_sandbox_that_dies_in_the_middle_is_told_and_the_next_one_works(
    opened: Door,
) -> None:
    async with yard_of(opened) as yard, Client(make_server(yard, version="1")) as client:
        box = await ask(client, "create_sandbox")
        said = await refusal(client, "run_command", sandbox=box["id"], command="die")
        assert box["id"] in said or "sandbox" in said

        async def is_over() -> bool:
            (one,) = await ask(client, "list_sandboxes")
            return bool(one["status"] == "error")

        await eventually(is_over)
        again = await refusal(client, "run_command", sandbox=box["id"], command="x")
        assert "error" in again
        other = await ask(client, "create_sandbox")
        done = await ask(client, "run_command", sandbox=other["id"], command="works")
        assert done["stdout"] == "works"
    unknown = yard_of(opened, "rt_live_" + "x" * 32)
    async with unknown as yard, Client(make_server(yard, version="1")) as client:
        assert "API key" in await refusal(client, "list_sandboxes")


async def test_over_standard_input_and_output(opened: Door) -> None:
    server = StdioServerParameters(
        command=str(Path(sys.executable).parent / "sandyard"),
        args=["mcp"],
        env={
            "PATH": os.environ["PATH"],
            "SANDYARD_URL": f"http://127.0.0.1:{opened.port}",
            "SANDYARD_API_KEY": opened.yard.key,
        },
    )
    async with Client(server) as client:
        await live(client)


async def test_over_http_for_whoever_shows_the_key(opened: Door) -> None:
    port = free_port()
    async with yard_of(opened) as yard:
        app = http_app(make_server(yard, version="1"), ["agents.example.org"])
        served = uvicorn.Server(
            uvicorn.Config(guarded(app, opened.yard.key), port=port, log_config=None, ws="none")
        )
        served.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(served.serve())
            url = f"http://127.0.0.1:{port}/mcp"
            while not served.started:
                await asyncio.sleep(0.01)
            async with httpx2.AsyncClient(timeout=60) as nobody:
                for headers in ({}, {"Authorization": "Bearer rt_live_x"}):
                    answer = await nobody.post(url, headers=headers, json={})
                    assert answer.status_code == 401
                for headers, status in (
                    ({"Host": "evil.example.org"}, 421),
                    ({"Host": f"localhost.evil.org:{port}"}, 421),
                    ({"Origin": "https://evil.example.org"}, 403),
                    ({"Origin": "null"}, 403),
                    ({"Origin": f"http://localhost:{port}"}, 406),
                    ({"Host": "agents.example.org", "Origin": "https://agents.example.org"}, 406),
                ):
                    key = {"Authorization": f"Bearer {opened.yard.key}", "Accept": "text/plain"}
                    answer = await nobody.post(url, headers={**key, **headers}, json={})
                    assert answer.status_code == status, headers
            shows = {"Authorization": f"Bearer {opened.yard.key}", "Host": "agents.example.org"}
            async with (
                httpx2.AsyncClient(headers=shows, timeout=60) as http,
                Client(streamable_http_client(url, http_client=http)) as client,
            ):
                await live(client)
            served.should_exit = True
            await serving


def test_what_is_long_keeps_its_ends() -> None:
    assert shown("x" * SHOWN_MAX) == "x" * SHOWN_MAX
    cut = shown("a" + "x" * SHOWN_MAX + "b")
    assert (cut[0], cut[-1]) == ("a", "b")
    assert "2 characters are left out" in cut
