"""The official SDKs of E2B, unmodified, against a real server and real machines."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.support.e2b_sdks import (
    certificates_for,
    javascript_version,
    node_with_sdk,
    python_with,
    version_of,
)
from tests.support.ports import free_port
from tests.support.server import QEMU, RealServer, longer, wait_until

# Whichever test is the first waits for both templates to be built, where no run has built them yet.
pytestmark = [
    pytest.mark.machine, pytest.mark.large, pytest.mark.timeout(2400),
]  # fmt: skip

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs/reference/e2b.md"
BUILD_LIMIT_S = 1200
DOMAIN = "e2b.localhost"
TEMPLATES = {"e2b-base", "code-interpreter"}
WHICH = ("oldest", "newest")
_REFUSED = {
    "Sandbox.update_network": "refuses by name: `egressProxy`, `httpsPorts`, `dnsServers`",
    "Sandbox.create": "refuses by name: `volumeMounts`, `iam`, `mcp`, the same of `network`",
    "Sandbox.get_metrics": "samples of the last hour, one every 15 s while the sandbox runs",
    "Sandbox.get_host": "needs a domain",
    "Sandbox.download_url": "needs a domain",
    "Sandbox.upload_url": "needs a domain",
}
"""What is to be known of methods that work."""
_NEED_DOMAIN = {"Sandbox.get_host", "Sandbox.download_url", "Sandbox.upload_url"}
_OTHER_FORMS = _NEED_DOMAIN | {
    "Sandbox.create", "Commands.run", "Commands.connect", "Pty.create", "Filesystem.write",
    "Filesystem.watch_dir",
}  # fmt: skip
"""What is written apart in the sync and the async SDK: streams, callbacks, uploads, URLs."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    folder, port = tmp_path_factory.mktemp("tls"), free_port()
    made_for = certificates_for(DOMAIN, folder)
    made = RealServer(
        free_port(), **QEMU, SANDYARD_POOL__FLOOR="1", SANDYARD_POOL__CEILING="2",
        SANDYARD_E2B__DOMAIN=f"{DOMAIN}:{port}", SANDYARD_E2B__PORT=str(port),
        SANDYARD_E2B__TLS_CERTIFICATE=str(made_for.certificate),
        SANDYARD_E2B__TLS_KEY=str(made_for.key),
        AUTHORITY=str(made_for.authority),  # for clients: templates must not depend on it
    )  # fmt: skip
    made.share_goldens(*TEMPLATES)
    try:
        for template in TEMPLATES:
            made.run("template", "build", template, limit_s=BUILD_LIMIT_S)
        made.start()
        # A boot beside theirs may take longer than clients wait for a sandbox.
        wait_until(
            lambda: {one["template"] for one in made.waiting()} >= TEMPLATES,
            limit_s=BUILD_LIMIT_S, what="the pool has both templates",
        )  # fmt: skip
        yield made
    finally:
        made.remove()


def environment(server: RealServer, *, is_plain: bool = False) -> dict[str, str]:
    """Return what a client has to have in its environment, and nothing else."""
    made = server.client.post("/v1/api-keys", json={"name": "e2b", "format": "e2b"})
    key = made.json()["data"]["key"]
    found = {"PATH": os.environ["PATH"], "HOME": str(server.home), "E2B_API_KEY": key}
    if is_plain:
        url = f"http://127.0.0.1:{server.port}"
        return {**found, "E2B_API_URL": url, "E2B_SANDBOX_URL": url}
    names = ("AUTHORITY", "SANDYARD_E2B__DOMAIN")
    authority, domain = (server.environment[name] for name in names)
    trusted = {"SSL_CERT_FILE": authority, "NODE_EXTRA_CA_CERTS": authority}
    return {**found, **trusted, "E2B_DOMAIN": domain}


def driven(which: str, flavor: str, env: Mapping[str, str], *only: str) -> dict[str, str]:
    """Drive an SDK, and return what came of each method, or of `only` some."""
    drive = ROOT / "tests/e2b/drive.py"
    return outcomes_of([python_with(which), drive, flavor, "base", *only], env)


def interpreted(flavor: str, env: Mapping[str, str]) -> dict[str, str]:
    """Run code with the code interpreter's SDK, and return what came of each method."""
    return outcomes_of([python_with("newest"), ROOT / "tests/e2b/interpret.py", flavor], env)


def built(which: str, flavor: str, env: Mapping[str, str]) -> dict[str, str]:
    """Build templates with an SDK, and return what came of each method."""
    return outcomes_of([python_with(which), ROOT / "tests/e2b/build.py", flavor], env)


def outcomes_of(command: Sequence[str | Path], env: Mapping[str, str]) -> dict[str, str]:
    """Run what drives an SDK, and return what came of each method."""
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, check=False, timeout=longer(600),
    )  # fmt: skip
    told = [json.loads(line) for line in done.stdout.splitlines()]
    found = {one["method"]: one["outcome"] for one in told}
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return found


def test_every_method_works_or_is_refused_by_name(
    server: RealServer, pytestconfig: pytest.Config
) -> None:
    # Each version whole, sync or async; the other way what has another form in it, and so by the
    # server's plain URL.
    outcomes: dict[str, dict[str, str]] = {which: {} for which in WHICH}
    for which, flavor, other in (("oldest", "async", "sync"), ("newest", "sync", "async")):
        outcomes[which] = driven(which, flavor, environment(server))
        assert {one: told for one, told in outcomes[which].items() if told != "works"} == {}
        only = () if pytestconfig.getoption("--every") else _OTHER_FORMS
        is_plain = which == "oldest"
        found = driven(which, other, environment(server, is_plain=is_plain), *only)
        others = {one: told for one, told in found.items() if told != "works"}
        assert others == (dict.fromkeys(_NEED_DOMAIN, "needs a domain") if is_plain else {})
        assert found.keys() >= _OTHER_FORMS
        outcomes[which] |= {one: told for one, told in found.items() if one not in outcomes[which]}
    by_script = outcomes_of([*node_with_sdk(), "base"], environment(server))
    assert {one: told for one, told in by_script.items() if told != "works"} == {}
    for which, flavor in zip(WHICH, ("async", "sync"), strict=True):
        templates = built(which, flavor, environment(server))
        assert [one for one, told in templates.items() if told == "not driven"] == []
        outcomes[which] |= templates
    for flavor in ("sync", "async"):
        outcomes["newest"] |= interpreted(flavor, environment(server))
    # A kill is answered before the machine is gone.
    wait_until(
        lambda: server.client.get("/v1/sandboxes").json()["data"] == [], what="no sandbox is left"
    )
    text = reference(outcomes, by_script)
    if os.environ.get("SANDYARD_WRITE_REFERENCE"):
        REFERENCE.write_text(text)
    assert REFERENCE.read_text() == text, (
        "docs/reference/e2b.md is not what the SDKs do: run this test with "
        "SANDYARD_WRITE_REFERENCE=1 and read the difference"
    )


def test_files_outlive_a_pause_without_memory(server: RealServer) -> None:
    key = {"X-API-Key": environment(server)["E2B_API_KEY"]}

    def sent(path: str, **body: object) -> Any:
        answer = server.client.post(path, json=body, headers=key, timeout=longer(120))
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    box = sent("/v2/sandboxes", templateID="base", timeout=600)["sandboxID"]
    try:
        look_at_files(server, box, sent)
    finally:
        server.client.delete(f"/v1/sandboxes/{box}")


def look_at_files(server: RealServer, box: str, sent: Callable[..., Any]) -> None:
    """See that a file outlives a pause without memory."""
    boot = "cat /proc/sys/kernel/random/boot_id"
    # The kernel writes a file to the disk half a minute later, if it is not told to.
    before = server.client.post(
        f"/v1/sandboxes/{box}/exec", json={"command": f"{boot}; echo kept >/home/user/new"}
    ).json()["data"]["stdout"]
    sent(f"/sandboxes/{box}/pause", memory=False)
    sent(f"/v2/sandboxes/{box}/connect", timeout=600)
    after = server.client.post(
        f"/v1/sandboxes/{box}/exec", json={"command": f"{boot}; cat /home/user/new"}
    ).json()["data"]["stdout"]
    assert after.split()[1] == "kept"
    assert after.split()[0] != before.split()[0]


def reference(outcomes: Mapping[str, Mapping[str, str]], by_script: Mapping[str, str]) -> str:
    """Return the page about the SDKs, of what came of each method."""
    methods = sorted(set().union(*outcomes.values()))
    versions = [version_of(which) for which in WHICH]
    lines = [
        "# The E2B API, by the methods of its SDK",
        "",
        "Generated by `tests/system/test_e2b.py`, which drives every public method of E2B's",
        f"Python SDK in the versions {versions[0]} (async) and {versions[1]} (sync), and of the",
        "other form what is written apart, against a server and real machines.",
        "`scripts/test --all` drives all of both. [How to use it](../howto/e2b.md).",
        "",
        f"| Method | {versions[0]} | {versions[1]} | |",
        "|---|---|---|---|",
    ]
    for one in methods:
        cells = [outcomes[which].get(one, "—") for which in WHICH]
        lines.append(f"| `{one}` | {' | '.join(cells)} | {_REFUSED.get(one, '')} |")
    lines += [
        "",
        f"In JavaScript (npm `e2b` {javascript_version()}) these work, and differ from the above",
        "in nothing but their names:",
        "",
        ", ".join(f"`{one}`" for one in sorted(by_script)) + ".",
        "",
        f"`CodeInterpreter` stands for the class `Sandbox` of `e2b-code-interpreter` "
        f"{version_of('newest', 'e2b-code-interpreter')}. Java is",
        "refused by name; Python, JavaScript, TypeScript, Bash and R work.",
        "",
        "Refused with 400 or 501, and a message that names what is lacking: `Volume` and `Secret`.",
    ]
    return "\n".join(lines) + "\n"
