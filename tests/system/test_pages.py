"""The pages in a real browser, with real machines behind them; and the desktop template itself."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, sync_playwright
from playwright.sync_api import Error as PlaywrightError
from tests.support.ports import free_port
from tests.support.server import QEMU, RealServer, wait_until

log = logging.getLogger(__name__)
pytestmark = [pytest.mark.machine, pytest.mark.large]

BUILD_LIMIT_S = 1200
CHROMIUM = "/usr/bin/chromium"
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
    "--host-resolver-rules=MAP * 127.0.0.1",  # nothing is asked for elsewhere
]  # fmt: skip
LIVE = """
import http.server, os, time

PAGE = b'''<!doctype html><title>live</title><p id=text></p><script>
const seen = new EventSource("/changes");
seen.onmessage = ({data}) => { document.getElementById("text").textContent = data; };
</script>'''

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        if self.path != "/changes":
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(PAGE)
            return
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        told = None
        while True:
            text = open("/tmp/text").read()
            if text != told:
                self.wfile.write(b"data: " + text.encode() + b"\\\\n\\\\n")
                self.wfile.flush()
                told = text
            time.sleep(0.05)

    def log_message(self, *_):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", 5173), Handler).serve_forever()
""".replace("\\\\n", "\\n")


@pytest.fixture(scope="module")
def server() -> Iterator[RealServer]:
    made = RealServer(free_port(), **QEMU, SANDYARD_POOL__FLOOR="1", SANDYARD_POOL__CEILING="1")
    made.share_goldens("desktop-ubuntu")
    try:
        made.run("template", "build", "desktop-ubuntu", limit_s=BUILD_LIMIT_S)
        made.start()
        yield made
    finally:
        made.remove()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Its own loop must not be taken for the tests'.
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield found
        found.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1100, "height": 700})
    found = context.new_page()
    errors: list[str] = []
    found.on("pageerror", lambda error: errors.append(str(error)))
    found.on(
        "console", lambda one: errors.append(one.text) if "Content Security" in one.text else None
    )
    # Shown where the test fails.
    found.on("console", lambda one: log.warning("the console: %s", one.text))
    found.on("requestfailed", lambda one: log.warning("failed: %s: %s", one.url, one.failure))
    found.on("requestfinished", lambda one: log.warning("came: %s", one.url))
    yield found
    context.close()
    assert errors == []


def key_of(server: RealServer) -> str:
    return server.client.headers["authorization"].removeprefix("Bearer ")


def until(condition: Callable[[], bool], what: str, page: Page) -> None:
    """Wait for something while the browser goes on."""
    limit = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < limit, f"{what}: the page says {page.text_content('body')!r}"
        page.wait_for_timeout(100)


def visit(page: Page, url: str) -> None:
    """Go somewhere; again where links of the host that came or went have broken that off."""
    for _ in range(5):
        try:
            page.goto(url)
        except PlaywrightError as error:
            if "ERR_NETWORK_CHANGED" not in error.message:
                raise
        else:
            return
    pytest.fail(f"{url} was broken off again and again")


def shown(page: Page) -> str:
    """Return what is in the terminal."""
    return str(page.evaluate("document.querySelector('.xterm-rows')?.innerText ?? ''"))


def test_a_terminal_in_a_browser(server: RealServer, page: Page) -> None:
    box = str(server.create(name="term", idleTimeout=0)["id"])
    visit(page, f"http://127.0.0.1:{server.port}/terminal/term")
    page.fill("input[name=key]", "rt_live_wrong")
    page.keyboard.press("Enter")
    until(lambda: "unknown" in (page.text_content("#why") or ""), "the key is refused", page)
    page.fill("input[name=key]", key_of(server))
    page.keyboard.press("Enter")
    until(lambda: "#" in shown(page), "a prompt", page)
    page.keyboard.type("echo hällo-$((6*7)); stty size\n")
    until(lambda: "hällo-42" in shown(page), "what was typed is run", page)
    rows = int(server.execute(box, "stty size </dev/pts/0")["stdout"].split()[0])  # type: ignore[attr-defined]
    page.set_viewport_size({"width": 700, "height": 400})
    until(
        lambda: int(str(server.execute(box, "stty size </dev/pts/0")["stdout"]).split()[0]) < rows,
        "it has the size of its window", page,
    )  # fmt: skip
    # A program that has the whole screen, and gives it back.
    page.keyboard.type(
        r"printf '\033[?1049h\033[2J\033[5;5Hwho''le'; read -n1; printf '\033[?1049l'"
    )
    page.keyboard.press("Enter")
    until(lambda: "whole" in shown(page) and "hällo" not in shown(page), "it has the screen", page)
    page.keyboard.press("q")
    until(lambda: "hällo-42" in shown(page), "the screen is back", page)
    # A page that is loaded again comes back to its shell, and knows the sandbox by its name.
    page.keyboard.type("mine=still; echo as-$((1+1))\n")
    until(lambda: "as-2" in shown(page), "it is there", page)
    page.click("#larger")
    page.select_option("#theme", "light")
    visit(page, f"http://127.0.0.1:{server.port}/terminal/term")
    until(lambda: "as-2" in shown(page), "what was printed is shown again", page)
    until(lambda: page.title() == "term: terminal", "it is called by its name", page)
    page.keyboard.type("echo $mine-here\n")
    until(lambda: "still-here" in shown(page), "the same shell", page)
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    assert page.evaluate("getComputedStyle(document.querySelector('.xterm-rows')).fontSize") == (
        "16px"
    )
    # The connection goes, the shell does not.
    page.keyboard.type("kept=here; echo so-$((1+1))\n")
    until(lambda: "so-2" in shown(page), "it is kept", page)
    server.kill()
    until(lambda: "coming back" in (page.text_content("#said") or ""), "it notices", page)
    server.start()
    until(lambda: not page.text_content("#said"), "it is back", page)
    page.keyboard.type("echo $kept-again; exit 3\n")
    until(lambda: "here-again" in shown(page), "the same shell", page)
    until(lambda: "(3)" in (page.text_content("#said") or ""), "its end is told", page)
    page.click("#again")
    until(lambda: "#" in shown(page), "another one", page)
    # One that ended while nobody looked is not asked for again. By its id, the page is another.
    page.keyboard.type("echo new-$((1+1)); sleep 1; exit\n")
    until(lambda: "new-2" in shown(page), "it is new", page)
    visit(page, f"http://127.0.0.1:{server.port}/terminal/{box}")
    until(lambda: page.title() == "term: terminal", "it is called by its name", page)
    until(lambda: "#" in shown(page), "a shell of its own", page)


@pytest.mark.parametrize("times", [0, 1, 2, 6])
def test_a_page_of_which_not_all_came_is_opened_anew(
    server: RealServer, page: Page, times: int
) -> None:
    broken: list[str] = []

    def break_off(route: Route) -> None:
        if len(broken) < times:
            broken.append(route.request.url)
            route.abort("connectionreset")
        else:
            route.continue_()

    page.route("**/web/vendor/xterm/addon-fit.mjs", break_off)
    unstyled: list[str] = []

    def break_off_once(route: Route) -> None:
        unstyled.append(route.request.url)
        route.abort("connectionreset") if len(unstyled) == 1 else route.continue_()

    page.route("**/web/page.css", break_off_once)
    visit(page, f"http://127.0.0.1:{server.port}/terminal/none#kept")
    if times < 6:
        until(lambda: page.is_visible("input[name=key]"), "it has come", page)
        assert page.evaluate("Object.keys(sessionStorage)") == []
    else:
        said = "not all of this page came"
        until(lambda: said in (page.text_content("#said") or ""), "it says so", page)
    sheets = "[...document.styleSheets].filter(one => one.href?.endsWith('/page.css')).length"
    until(lambda: page.evaluate(sheets) == 1, "its style has come", page)
    assert unstyled
    # What the host's own links break off takes of the tries as well.
    assert (times if times < 6 else 1) <= len(broken) <= times
    assert page.url.endswith("#kept")


def test_a_page_that_changes_while_it_is_looked_at(server: RealServer, page: Page) -> None:
    box = str(server.create(name="live", idleTimeout=0)["id"])
    for path, text in (("/tmp/live.py", LIVE), ("/tmp/text", "first")):
        files = f"/v1/sandboxes/{box}/files"
        server.client.put(files, params={"path": path}, content=text.encode())
    server.execute(box, "nohup python3 /tmp/live.py >/tmp/said 2>&1 & true")
    for access in ("host", "cookie"):
        answer = server.client.get(
            f"/v1/sandboxes/{box}/url", params={"port": 5173, "access": access}
        )
        url = answer.json()["data"]["url"]
        visit(page, url)
        until(lambda: page.title() == "live", "the page is there, by itself in the end", page)
        assert "rt_token" not in page.url
        server.execute(box, f"printf one-{access} > /tmp/text")
        until(lambda: f"one-{access}" in page.inner_text("#text"), "it changes", page)  # noqa: B023
    assert page.evaluate("document.cookie") == ""  # it is ours, and no page's


def test_a_desktop_in_a_browser_and_by_the_api(server: RealServer, page: Page) -> None:
    wait_until(
        lambda: any(one["template"] == "desktop-ubuntu" for one in server.waiting()),
        limit_s=180, what="a desktop waits",
    )  # fmt: skip
    box = str(server.create(template="desktop-ubuntu", name="desk", idleTimeout=0)["id"])
    picture = server.client.get(f"/v1/sandboxes/{box}/desktop/screenshot")
    assert picture.status_code == 200, picture.text
    assert picture.content.startswith(b"\x89PNG")
    windows = server.client.get(f"/v1/sandboxes/{box}/desktop/windows").json()["data"]
    assert {"XTerm", "Tint2"} <= {one["program"] for one in windows}
    made = server.client.get(f"/v1/sandboxes/{box}/vnc").json()["data"]
    visit(page, made["url"])
    until(lambda: page.is_visible("canvas"), "its screen is there", page)
    until(lambda: not page.text_content("#said"), "it is connected", page)
    assert "ticket" not in page.url
    until(lambda: colours(page) > 8, "there is a picture on it", page)
    canvas = page.locator("canvas").bounding_box()
    assert canvas is not None
    term = next(one for one in windows if one["program"] == "XTerm")

    def typed() -> bool:
        # Whoever has just connected is not believed a click for a while.
        page.mouse.click(canvas["x"] + term["x"] + 100, canvas["y"] + term["y"] + 60)
        page.keyboard.type("echo from a browser >/tmp/browser\n")
        page.wait_for_timeout(1500)
        return "from a browser" in str(server.execute(box, "cat /tmp/browser")["stdout"])

    until(typed, "what is typed arrives", page)
    server.act(box, "desktop/click", x=term["x"] + 100, y=term["y"] + 60)
    server.act(box, "desktop/type", text="echo from the api: é€ >/tmp/api\n")
    until(lambda: "é€" in str(server.execute(box, "cat /tmp/api")["stdout"]), "it is typed", page)
    # Nothing on it is named after the machine that it was copied from.
    assert {one["title"] for one in windows if one["program"] == "XTerm"} == {"Terminal"}
    # Ctrl+V pastes at the prompt, as anywhere else, and nothing of how it does is seen.
    page.evaluate("() => { navigator.clipboard.readText = async () => 'echo 你好 >/tmp/pasted'; }")
    page.click("#paste")
    page.mouse.click(canvas["x"] + term["x"] + 100, canvas["y"] + term["y"] + 60)

    def pasted() -> bool:
        page.keyboard.press("Control+v")
        page.wait_for_timeout(1500)
        page.keyboard.press("Enter")
        page.wait_for_timeout(1500)
        return str(server.execute(box, "cat /tmp/pasted")["stdout"]) == "你好\n"

    until(pasted, "it was pasted", page)
    # Chinese, Japanese and Korean can be read on it.
    fonts = server.execute(box, "fc-list ':charset=4f60 3042 ac00' family")["stdout"]
    assert "Droid Sans Fallback" in str(fonts)
    # What is on it is the user's own, and its browser starts.
    server.execute(box, "DISPLAY=:0 setpriv --reuid=1000 --regid=1000 --init-groups env "
                   "HOME=/home/user nohup chromium about:blank >/dev/null 2>&1 & true")  # fmt: skip

    def has_browser() -> bool:
        found = server.client.get(f"/v1/sandboxes/{box}/desktop/windows").json()["data"]
        return any("chromium" in one["program"].lower() for one in found)

    until(has_browser, "its browser is on the screen", page)
    # Asleep and awake again it is the same desktop.
    server.act(box, "pause")
    until(lambda: page.is_visible("#again"), "it says that it has ended", page)
    assert server.status(box) == "paused"  # an open page wakes nobody
    page.evaluate("key => sessionStorage.setItem('sandyard-key', key)", key_of(server))
    page.click("#again")
    until(lambda: not page.text_content("#said"), "the page is back", page)
    until(has_browser, "its windows are still there", page)
    # A machine that is booted anew has its screen as well.
    server.act(box, "restart")
    shot = f"/v1/sandboxes/{box}/desktop/screenshot"
    until(lambda: server.client.get(shot).status_code == 200, "there is a screen again", page)


def colours(page: Page) -> int:
    """Return how many colours a part of the desktop has."""
    found: Any = page.evaluate(
        """() => {
            const canvas = document.querySelector("canvas");
            const {width, height} = canvas;
            const data = canvas.getContext("2d").getImageData(0, 0, width, height).data;
            const seen = new Set();
            for (let at = 0; at < data.length; at += 4 * 97)
                seen.add((data[at] << 16) | (data[at + 1] << 8) | data[at + 2]);
            return seen.size;
        }"""
    )
    return int(found)


def test_the_browser_is_there() -> None:
    assert os.access(CHROMIUM, os.X_OK), "install the packages of scripts/packages"
    assert Path(CHROMIUM).exists()
