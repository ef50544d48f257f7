"""A guest's agent that lies: it is the sandbox that is at fault, never the server."""

import json
from pathlib import Path

import pytest
from tests.support.house import open_yard

from sandyard.server.core.wire import Channel, encode_frame
from sandyard.server.fakes.driver import FakeMachine


def line(**said: object) -> bytes:
    return json.dumps({"v": 1, "ok": True, "values": {}, **said}).encode() + b"\n"


def ended(payload: bytes) -> bytes:
    return line() + encode_frame(Channel.EXIT, payload)


HUGE = 10**400
KEYS = ("pid", "items", "entries", "fact", "file", "cpu", "size", "path", "memory_used")
LIES = {
    "no JSON": b"hello\n",
    "not UTF-8": b"\xff\xfe\n",
    "a list": b"[]\n",
    "a number": b"5\n",
    "nothing of what was asked": line(),
    "values that are a list": line(values=[]),
    "values of other kinds": line(values={key: {"a": []} for key in KEYS}),
    "values that are null": line(values=dict.fromkeys(KEYS)),
    "another version": line(v=99),
    "a version that is none": line(v="x"),
    "an error nobody knows": line(ok=False, error="sesame", message="open"),
    "an error that is no text": line(ok=False, error=["x"], message={"y": 1}),
    "its token is refused": line(ok=False, error="unauthorized", message=""),
    "a line without end": b"x" * (2 << 20),
    "deep": b"[" * 100_000 + b"\n",
    "huge numbers": line(values=dict.fromkeys(KEYS, HUGE)),
    "frames of no channel": line() + b"\xff" * 64,
    "a frame too large": line() + b"\xff\xff\xff\xff\x01",
    "an end that is no JSON": ended(b"gone"),
    "an end of other kinds": ended(b'{"exit_code": "x", "duration_ms": []}'),
    "an end of huge numbers": ended(b'{"exit_code": 1e999, "duration_ms": -1}'),
    "an end that is not UTF-8": ended(b"\xff\xfe"),
    "an end that is deep": ended(b"[" * 50_000),
    "nothing at all": b"",
}
ASKED: tuple[tuple[str, str, dict[str, object]], ...] = (
    ("POST", "exec", {"json": {"command": "true"}}),
    ("GET", "stats", {}),
    ("GET", "processes", {}),
    ("POST", "processes", {"json": {"command": "true"}}),
    ("GET", "processes/5", {}),
    ("POST", "processes/5/signal", {"json": {"signal": "TERM"}}),
    ("GET", "files/stat", {"params": {"path": "/x"}}),
    ("GET", "files/list", {"params": {"path": "/x"}}),
    ("GET", "files", {"params": {"path": "/x"}}),
    ("PUT", "files", {"params": {"path": "/x"}, "content": b"x"}),
    ("DELETE", "files", {"params": {"path": "/x"}}),
    ("POST", "files/mkdir", {"json": {"path": "/x"}}),
    ("POST", "files/move", {"json": {"from": "/x", "to": "/y"}}),
    ("POST", "files/copy", {"json": {"from": "/x", "to": "/y"}}),
    ("GET", "files/archive", {"params": {"path": "/x"}}),
)


@pytest.mark.parametrize("lie", LIES)
async def test_a_lie_of_an_agent_is_not_an_error_of_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lie: str
) -> None:
    async with open_yard(tmp_path, heartbeat_s=600.0) as yard:
        box = await yard.create()

        async def lies(*given: object) -> bool:
            given[-1].write(LIES[lie])  # type: ignore[attr-defined]
            return False

        monkeypatch.setattr(FakeMachine, "_converse", lies)
        said = {}
        for method, path, more in ASKED:
            answer = await yard.client.request(
                method,
                f"/v1/sandboxes/{box['id']}/{path}",
                timeout=20,
                **more,  # type: ignore[arg-type]
            )
            said[f"{method} {path}"] = answer.status_code
            assert answer.status_code in (200, 201, 400, 404, 409, 502, 503), (path, answer.text)
            if answer.status_code == 502:
                error = answer.json()["error"]
                assert error["code"] == "agent_error"
                assert "agent of the sandbox" in error["message"]
        assert {502, 503, 400} & set(said.values()), said
        assert not [one for one in caplog.records if one.exc_info], caplog.text
