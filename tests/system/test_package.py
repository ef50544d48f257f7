"""The package as somebody installs it who only wants the SDK."""

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from tests.support.ports import free_port
from tests.support.server import wait_until

ROOT = Path(__file__).parents[2]
PROJECT = """
from collections.abc import Iterator

import sandyard
from sandyard import AsyncSandbox, Sandbox, Sandyard, SandyardError
from sandyard.client import Exited, Printed


def outputs(sbx: Sandbox) -> Iterator[bytes]:
    for event in sbx.run(["make", "-j4"], timeout_s=60):
        if isinstance(event, Printed):
            yield event.data
        elif isinstance(event, Exited):
            code: int = event.exit_code


async def twice(name: str) -> str:
    async with await AsyncSandbox.create("base-ubuntu", name=name, env={"A": "1"}) as sbx:
        text: str = (await sbx.exec("echo", check=True)).stdout
        async for change in sbx.files.watch(recursive=True):
            text += change.path
        return text + str((await sbx.run_code("1")).value)


def main() -> None:
    with Sandyard() as yard, Sandbox.create(client=yard) as sbx:
        for piece in outputs(sbx):
            print(len(piece))
        size: int = sbx.files.info("x").size + sbx.fork()[0].snapshot().size_bytes
        try:
            sbx.files.write("x", b"y")
        except SandyardError as error:
            print(error)
"""
WRONG = """
from sandyard import Sandbox

with Sandbox.create() as sbx:
    sbx.exec(5)
    sbx.files.write("x", 7)
    sbx.no_such_thing()
    number: int = sbx.exec("x").stdout
"""


FRAMEWORKS = (
    "deepagents", "deepagents-code", "inspect-ai", "harbor", "openai-agents", "smolagents",
    "verifiers", "langchain-tests", "anthropic", "claude-agent-sdk", "mcp",
)  # fmt: skip
"""Where agents of others are run; most of them pin what they need."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the package alone in it."""
    home = tmp_path_factory.mktemp("fresh")
    source = home / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(home / "venv")], check=True)
    pip = [
        str(home / "venv/bin/python"),
        "-m",
        "pip",
        "install",
        "-q",
        "--disable-pip-version-check",
    ]
    subprocess.run([*pip, str(source)], check=True, timeout=300)
    return home / "venv"


@pytest.mark.machine  # no machine is started, but it takes a while, and a registry
def test_it_works_without_the_server(environment: Path, tmp_path: Path) -> None:
    def run(*words: str, ok: bool = True) -> str:
        done = subprocess.run(
            [str(environment / "bin" / words[0]), *words[1:]], capture_output=True, text=True,
            check=False, cwd=tmp_path, env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        )  # fmt: skip
        assert (done.returncode == 0) is ok, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    assert "True" in run("python", "-c", "import sandyard; print(bool(sandyard.Sandbox))")
    assert "sandyard[cli]" in run("sandyard", "sandbox", "list", ok=False)
    listed = run("python", "-m", "pip", "list", "--format=freeze").lower()
    for name in ("fastapi", "sqlalchemy", "uvicorn", "mcp=", "typer", "rich", "websockets"):
        assert name not in listed
    source = f"{environment.parent / 'source'}[cli]"
    run("python", "-m", "pip", "install", "-q", "--disable-pip-version-check", source)
    assert "no server is configured" in run("sandyard", "sandbox", "list", ok=False)
    assert "needs the server" in run("sandyard", "serve", ok=False)
    assert "sandyard[mcp]" in run("sandyard", "mcp", ok=False)
    assert "Real virtual machines" in run("sandyard", "--help")


@pytest.mark.machine
def test_it_can_be_installed_next_to_agent_frameworks(environment: Path, tmp_path: Path) -> None:
    """Resolved, and not installed: their packages are large."""
    source = environment.parent / "source"
    wanted = [f"sandyard[attach,cli] @ file://{source}", *FRAMEWORKS]
    (tmp_path / "wanted").write_text("\n".join(wanted))
    done = subprocess.run(
        [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-cache", "--python-version",
         "3.12", str(tmp_path / "wanted")],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {line.partition("==")[0] for line in done.stdout.splitlines() if "==" in line}
    assert {*FRAMEWORKS, "httpx", "typer", "websockets"} <= found


@pytest.mark.machine
def test_with_its_extra_the_server_starts(environment: Path, tmp_path: Path) -> None:
    """All that the server imports is declared: an environment of this project's own has more."""
    source = environment.parent / "source"
    pip = [str(environment.parent / "server/bin/python"), "-m", "pip", "install", "-q"]
    subprocess.run([sys.executable, "-m", "venv", str(environment.parent / "server")], check=True)
    subprocess.run(
        [*pip, "--disable-pip-version-check", f"{source}[server]"], check=True, timeout=300
    )
    port = free_port()
    own = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "SANDYARD_HOME": str(tmp_path / "home"),
        "SANDYARD_NODE__DRIVER": "fake", "SANDYARD_HTTP__PORT": str(port),
        "SANDYARD_SSH__PORT": str(free_port()),
    }  # fmt: skip
    sandyard = str(environment.parent / "server/bin/sandyard")
    subprocess.run([sandyard, "init", "--quiet"], env=own, check=True, timeout=60)
    with (tmp_path / "log").open("wb") as log:
        serving = subprocess.Popen([sandyard, "serve"], env=own, stdout=log, stderr=log)

    def answers() -> bool:
        assert serving.poll() is None, (tmp_path / "log").read_text()
        try:
            return httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
        except httpx.HTTPError:
            return False

    try:
        wait_until(answers, what="the server is ready")
    finally:
        serving.terminate()
        serving.wait(30)


@pytest.mark.machine
def test_a_project_that_uses_it_is_checked_by_its_types(environment: Path, tmp_path: Path) -> None:
    python = str(environment / "bin/python")

    def check(text: str) -> "subprocess.CompletedProcess[str]":
        (tmp_path / "project.py").write_text(text)
        return subprocess.run(
            [sys.executable, "-m", "mypy", "--strict", "--python-executable", python,
             "--config-file", "", "project.py"],
            capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip

    done = check(PROJECT)
    assert done.returncode == 0, done.stdout
    wrong = check(WRONG).stdout
    for line in (5, 6, 7, 8):
        assert f"project.py:{line}: error" in wrong, wrong
