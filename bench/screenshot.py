"""Takes the README's picture of a desktop, from a sandbox of a server of its own.

    .venv/bin/python -m bench.screenshot

Writes docs/images/desktop.png.
"""

from pathlib import Path

from tests.support.ports import free_port
from tests.support.server import RealServer, wait_until

_PICTURE = Path(__file__).parents[1] / "docs/images/desktop.png"
_TEMPLATE = "desktop-ubuntu"
_TYPED = ("uname -srm; free -m", "python3 -c 'print(sum(range(10**6)))' | tee /tmp/sum")


def photographed(server: RealServer) -> bytes:
    """Return a picture (PNG) of a desktop on which somebody has worked."""
    sandbox = str(server.create(template=_TEMPLATE)["id"])
    path = f"/v1/sandboxes/{sandbox}/desktop"
    wait_until(
        lambda: "Terminal" in server.client.get(f"{path}/windows").text, what="the terminal is open"
    )
    for line in _TYPED:
        body = {"text": f"{line}\n"}
        server.client.post(f"{path}/type", json=body).raise_for_status()
    wait_until(
        lambda: server.execute(sandbox, "test -s /tmp/sum")["exitCode"] == 0,
        what="both lines have run",
    )
    picture = server.client.get(f"{path}/screenshot")
    picture.raise_for_status()
    return picture.content


def main() -> None:
    server = RealServer(free_port(), SANDYARD_POOL__FLOOR="0", SANDYARD_POOL__CEILING="0")
    try:
        server.run("template", "build", _TEMPLATE, limit_s=1200)
        server.start()
        _PICTURE.write_bytes(photographed(server))
    finally:
        server.remove()


if __name__ == "__main__":
    main()
