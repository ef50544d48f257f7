"""A client of the E2B API, as far as its SDKs are one, without them."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

_HEAD = struct.Struct(">BI")
STREAM = "application/connect+json"


def enveloped(*messages: Mapping[str, Any], flags: int = 0) -> bytes:
    """Return messages in envelopes."""
    written = [json.dumps(one).encode() for one in messages]
    return b"".join(_HEAD.pack(flags, len(one)) + one for one in written)


def opened(data: bytes) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the messages of a stream, and what its end says."""
    messages: list[dict[str, Any]] = []
    at = 0
    while at < len(data):
        flags, size = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        value = json.loads(data[at : at + size])
        at += size
        if flags & 2:
            assert at == len(data), "something comes after the end of a stream"
            return messages, value
        messages.append(value)
    raise AssertionError(f"a stream without an end: {messages}")


@dataclass
class Box:
    """A sandbox of the E2B API, by the headers that name it."""

    client: httpx.AsyncClient
    id: str
    token: str | None
    told: Mapping[str, Any] = field(default_factory=dict)

    def headers(self, **more: str) -> dict[str, str]:
        """Return the headers of a request to its daemon."""
        found = {"E2b-Sandbox-Id": self.id, "E2b-Sandbox-Port": "49983", **more}
        return found if self.token is None else {"X-Access-Token": self.token, **found}

    async def call(self, method: str, message: Mapping[str, Any], **headers: str) -> httpx.Response:
        """Make a call with one answer."""
        given = self.headers(**{"Content-Type": "application/json", **headers})
        body = json.dumps(message)  # which escapes what is not ASCII
        return await self.client.post(f"/{method}", content=body, headers=given)

    async def send(self, method: str, body: bytes, **headers: str) -> httpx.Response:
        """Send bytes for a call that has streams."""
        given = self.headers(**{"Content-Type": STREAM, **headers})
        return await self.client.post(f"/{method}", content=body, headers=given)

    async def stream(
        self, method: str, *messages: Mapping[str, Any], **headers: str
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Make a call that is answered by a stream, and return all of that."""
        answer = await self.send(method, enveloped(*messages), **headers)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == STREAM
        return opened(answer.content)

    async def run(self, *argv: str, **more: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Run a program, and return its events."""
        config = {"cmd": argv[0], "args": list(argv[1:])}
        messages, end = await self.stream("process.Process/Start", {"process": config, **more})
        return [one["event"] for one in messages], end


async def create(client: httpx.AsyncClient, **body: Any) -> Box:
    """Create a sandbox of `base-minimal`, unless the body says otherwise."""
    answer = await client.post("/v2/sandboxes", json={"templateID": "base-minimal", **body})
    assert answer.status_code == 201, answer.text
    told = answer.json()
    return Box(client, told["sandboxID"], told["envdAccessToken"], told)
