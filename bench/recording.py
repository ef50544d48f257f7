"""Records the terminal session of the README, and a desktop: from a real run, on this host.

    .venv/bin/python -m bench.recording

Runs each command of `SESSION` against a server of its own and draws docs/images/session.svg: a line
appears when its command ended. A screenshot of a desktop becomes docs/images/desktop.png.
"""

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from tests.support.ports import free_port
from tests.support.server import SANDYARD, RealServer, wait_until

_FOLDER = Path(__file__).parents[1] / "docs/images"
_TEMPLATES = ("base-ubuntu", "desktop-ubuntu")
SESSION = [
    "sandyard sandbox create --name demo",
    "sandyard sandbox exec demo -- python3 -c 'print(6 * 7)'",
    "sandyard sandbox exec demo -- sh -c 'echo in memory > /dev/shm/note; uname -srm'",
    "sandyard sandbox pause demo",
    "sandyard sandbox exec demo -- cat /dev/shm/note   # resumes it",
    "sandyard sandbox fork demo --count 2 --name copy",
    "sandyard sandbox exec copy-2 -- cat /dev/shm/note",
    "sandyard sandbox list",
    "sandyard sandbox delete demo copy-1 copy-2",
]
_TYPING_S, _READING_S = 0.7, 0.9
_LINE, _COLUMN, _PAD = 19, 8.0, 14
_STYLE = """
text { font: 13px ui-monospace, "DejaVu Sans Mono", monospace; fill: #d7dde3; white-space: pre }
.command { fill: #ffffff; font-weight: 600 } .prompt { fill: #59b386 } .screen { fill: #16202a }
@keyframes show { from { opacity: 0 } to { opacity: 1 } }
@media (prefers-reduced-motion: no-preference) {
.line { animation: show 0.01s step-end both } }"""


@dataclass(frozen=True)
class Line:
    """A line on the screen, and when it came, in seconds."""

    text: str
    at_s: float
    is_command: bool = False


def recorded(server: RealServer) -> list[Line]:
    """Run the session, and return what was on the screen."""
    lines, now = list[Line](), 0.5
    path = f"{SANDYARD.parent}:{os.environ['PATH']}"
    for command in SESSION:
        lines.append(Line(command, now, is_command=True))
        now += _TYPING_S
        began = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**server.environment, "PATH": path, "NO_COLOR": "1"}, text=True, check=True,
            timeout=120,
        )  # fmt: skip
        now += time.monotonic() - began
        lines += [Line(one, now) for one in done.stdout.splitlines()]
        now += _READING_S
    return lines


def drawn(lines: list[Line]) -> str:
    """Return the session as an animated SVG: it fills the screen once, and stays."""
    width = round(max(len(one.text) for one in lines) * _COLUMN + 3 * _PAD + 16)
    height = len(lines) * _LINE + 2 * _PAD
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>{escape(' '.join(SESSION))}</title>",
        f"<style>{_STYLE}</style>",
        f'<rect class="screen" width="{width}" height="{height}" rx="8"/>',
    ]
    for number, one in enumerate(lines):
        y = _PAD + (number + 1) * _LINE - 5
        prompt = '<tspan class="prompt">$ </tspan>' if one.is_command else ""
        kind = ' class="command"' if one.is_command else ""
        parts.append(
            f'<text class="line" x="{_PAD}" y="{y}" style="animation-delay: {one.at_s:.2f}s">'
            f"{prompt}<tspan{kind}>{escape(one.text)}</tspan></text>"
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def photograph(server: RealServer, target: Path) -> None:
    """Write a screenshot of a desktop on which somebody works."""
    box = f"/v1/sandboxes/{server.create(template='desktop-ubuntu')['id']}"
    for words in ("uname -srm; free -m", "python3 -c 'print(sum(range(10**6)))'"):
        server.client.post(f"{box}/desktop/type", json={"text": f"{words}\n"}).raise_for_status()
        time.sleep(4)
    picture = server.client.get(f"{box}/desktop/screenshot")
    picture.raise_for_status()
    target.write_bytes(picture.content)


def main() -> None:
    """Record both."""
    server = RealServer(free_port(), SANDYARD_POOL__FLOOR="1", SANDYARD_POOL__CEILING="2")
    try:
        for one in _TEMPLATES:
            server.run("template", "build", one, limit_s=1200)
        server.start()
        server.delete(server.create(template="desktop-ubuntu", wait=0)["id"])
        wait_until(
            lambda: {one["template"] for one in server.waiting()} >= set(_TEMPLATES),
            limit_s=600, what="the pool has both",
        )  # fmt: skip
        (_FOLDER / "session.svg").write_text(drawn(recorded(server)))
        photograph(server, _FOLDER / "desktop.png")
    finally:
        server.remove()


if __name__ == "__main__":
    main()
