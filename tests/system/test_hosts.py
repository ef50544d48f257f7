"""Hosts that are set up in unusual ways: either sandboxes work, or the server says why not."""

import json
import os
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.ports import free_port
from tests.support.server import NO_POOL, SANDYARD, RealServer

pytestmark = pytest.mark.machine


@pytest.fixture
def server() -> Iterator[RealServer]:
    """An installation that has not been started; what it starts, the test ends."""
    made = RealServer(free_port(), **NO_POOL, SANDYARD_NODE__DRIVER="qemu-tcg")
    made.share_goldens()
    try:
        yield made
    finally:
        made.client.close()
        about = made.home / "instance.json"
        if about.exists():
            made.instance = json.loads(about.read_text())
            assert made.leftovers() == {}
        shutil.rmtree(made.home)


def sandyard(server: RealServer, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(SANDYARD), *words], env=server.environment, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("closed", ["the home", "a folder above"])
def test_a_home_that_machines_cannot_enter_is_refused_by_name(
    server: RealServer, closed: str, tmp_path: Path
) -> None:
    tmp_path.chmod(0o755)
    outer = tmp_path / "own folder"
    home = outer / "deep/home"
    home.mkdir(parents=True)
    folder = home if closed == "the home" else outer
    folder.chmod(0o700)
    server.environment["SANDYARD_HOME"] = str(home)
    for words in (("template", "build", "base-minimal"), ("serve",)):
        done = sandyard(server, *words)
        assert done.returncode == 1, done.stdout
        said = done.stdout + done.stderr
        assert f"cannot enter {folder}" in said
        assert f"chmod o+x {folder}" in said
        assert "SANDYARD_HOME" in said
    found = sandyard(server, "doctor")
    assert found.returncode == 1
    assert f"cannot enter {folder}" in found.stdout
    # The remedy is one.
    folder.chmod(0o711)
    assert f"machines can reach their files in {home}" in sandyard(server, "doctor").stdout


# In namespaces of its own, so that no setting of the host changes.
START = """
ip link set lo up
mount --bind /run/netns /run/netns; mount --make-shared /run/netns
cd /
mkdir "$SANDYARD_HOME/checkout"; mount --rbind "$CHECKOUT" "$SANDYARD_HOME/checkout"
{condition}
# A checkout below /tmp may be hidden now.
if ! [ -d "$CHECKOUT" ]; then
    mkdir -p "$CHECKOUT"; mount --move "$SANDYARD_HOME/checkout" "$CHECKOUT"
fi
sandyard init --quiet
sandyard serve >"$SANDYARD_HOME/server.log" 2>&1 </dev/null &
for turn in $(seq 600); do
    curl -sf "http://127.0.0.1:$SANDYARD_HTTP__PORT/readyz" >/dev/null && break
    kill -0 $! || {{ cat "$SANDYARD_HOME/server.log"; exit 1; }}
    sleep 0.1
done
sandyard sandbox create --template base-minimal --name one
sandyard sandbox exec one -- sh -c 'echo "answer $((6 * 7))"; hostname'
sandyard stop --all
"""
CONDITIONS = {
    "umask": "umask 077",
    "noexec": "for one in /tmp /dev/shm; do mount -t tmpfs -o noexec,nosuid,nodev tmpfs $one; done",
    "full": "mount -t tmpfs -o size=64k tmpfs /tmp; head -c 1M /dev/zero >/tmp/full || df /tmp",
    "no IPv6": "for one in /proc/sys/net/ipv6/conf/*/disable_ipv6; do echo 1 >$one; done",
    "few descriptors": "ulimit -n 256",
    "foreign tables": """
        nft 'table inet other {
          chain input { type filter hook input priority 0; policy drop; iifname "lo" accept; }
          chain forward { type filter hook forward priority 0; policy drop; }
          chain output { type filter hook output priority 0; policy drop; oifname "lo" accept; }
        }'
        """,
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_sandboxes_work_on_a_host_with(server: RealServer, condition: str) -> None:
    # Not below /tmp, which some of these change.
    home = Path(f"/var/tmp/{server.home.name}")
    server.home.rename(home)
    server.home = home
    environment = {
        **server.environment, "SANDYARD_HOME": str(home), "XDG_CONFIG_HOME": str(home / "xdg"),
        "CHECKOUT": str(Path(__file__).parents[2]),
        "PATH": f"{SANDYARD.parent}:{os.environ['PATH']}",
    }  # fmt: skip
    server.environment = environment
    built = sandyard(server, "template", "build", "base-minimal")
    assert built.returncode == 0, built.stdout + built.stderr
    script = textwrap.dedent(START).format(condition=textwrap.dedent(CONDITIONS[condition]))
    done = subprocess.run(
        ["unshare", "--mount", "--net", "--propagation", "private", "bash", "-euc", script],
        env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    log = home / "server.log"
    said = done.stdout + done.stderr + (log.read_text()[-3000:] if log.exists() else "")
    assert done.returncode == 0, said
    assert "answer 42" in done.stdout, said
