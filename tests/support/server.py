"""A real `sandyard serve` in a home of its own, and a look at everything it may leave behind."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx

import sandyard.server
from sandyard.server.drivers.processes import uids_at_work
from sandyard.server.drivers.sparse import copy_sparse
from sandyard.server.node.host.identity import SLOTS
from sandyard.server.node.host.mounts import mounts_of
from tests.support.images import CACHE, cache_environment, one_at_a_time
from tests.support.ports import free_port

QEMU = {"SANDYARD_FIRECRACKER__BINARY": "/not/to/be/used"}
"""Settings that have machines run under QEMU, whatever else would work here."""
SANDYARD = Path(sys.executable).parent / "sandyard"
SERVER = Path(sandyard.server.__file__).parent


NO_POOL = {"SANDYARD_POOL__FLOOR": "0", "SANDYARD_POOL__CEILING": "0"}
"""Settings with which no machine is made ahead."""
COLD = {"SANDYARD_NODE__GOLDEN_MACHINES": "false", **NO_POOL}
"""Settings with which every machine boots from cold, slowly enough to be met on its way."""
_KEY = hashlib.sha256(b"installations of tests that share golden machines").digest()
_LONGEST_MS = 3_600_000  # that a command may be given
_USUAL_MIB = (512, 5120)  # memory and disk
_GOLDENS_MAX = 24
_ALL_OF_THEM = "/proc/[0-9]*/cmdline"
# In the shell alone: under emulation each program that it started would take its time.
_COMMAND_LINES = (
    f"for one in {_ALL_OF_THEM}; do line=; while IFS= read -r -d '' word; do line+=\"$word \"; "
    "done <$one; echo \"${line//$'\\n'/ }\"; done 2>/dev/null; true"
)
_BUSY = 4
_EXEC_MS = 30_000 * _BUSY
_pace = [1.0]


@cache
def _kept() -> tempfile.TemporaryDirectory[str]:
    """Return the folder of what installations leave to those that tests make after them."""
    return tempfile.TemporaryDirectory(prefix="kept-", dir="/tmp")


def _kept_verdicts() -> Path:
    """Return where it is kept what was found of this host: which hypervisors boot a machine."""
    return Path(_kept().name) / "verdicts.json"


def kept_goldens() -> Path:
    """Return where golden machines are kept: one is booted for all installations that share, in
    this run and in later ones.

    Their names have a digest of what was booted, and the folder's name one of the code that made
    them: whatever changes, none of before is used.
    """
    folder = CACHE / "goldens" / _digest_of_code()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@cache
def _digest_of_code(server: Path = SERVER) -> str:
    digest = hashlib.sha256()
    for room in ("core", "drivers", "guest", "node"):
        for path in sorted((server / room).rglob("*.py")):
            digest.update(f"{path.relative_to(server)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _about(golden: Path) -> dict[str, Any]:
    """Return what a golden machine is; nothing if it is damaged, or was removed meanwhile."""
    try:
        about: dict[str, Any] = json.loads((golden / "manifest.json").read_text())["about"]
    except (OSError, ValueError):
        return {}
    return about


@contextlib.contextmanager
def paced(times: float) -> Iterator[None]:
    """Have everything that is waited for be given so many times longer: guests are slow."""
    _pace.append(times)
    yield
    _pace.pop()


def is_slow() -> bool:
    """Tell whether guests are given longer than usual."""
    return _pace[-1] > 1


def longer(limit_s: float) -> float:
    """Return how long to wait here for what usually takes no longer than this."""
    return limit_s * _pace[-1]


def some(size: int) -> int:
    """Return how many bytes to try with: fewer where a guest's kernel is slow."""
    return size // 50 if is_slow() else size


def read_filled(path: str) -> str:
    """Return the command that prints a file which another process writes again and again.

    Whoever opens one to write empties it first: it is looked for again where it is empty.
    """
    return f'until read -r n < {path}; do :; done; echo "$n"'


def counting(path: str) -> str:
    """Return the command that leaves a process behind which counts in a file, for ever.

    It starts no others: to start one again and again is all that a slow guest would do.
    """
    return (
        f"(exec 9<> <(:); i=0; while :; do echo $((i+=1)) > {path}; read -rt 0.02 -u 9; done) "
        ">/dev/null 2>&1 &"
    )


def wait_until(
    condition: Callable[[], bool], *, limit_s: float = 30.0, what: str | Callable[[], object] = ""
) -> None:
    """Return once a condition holds; fail at the limit, with `what` or what it returns then.

    The limit is what this takes on a host that does little else; a busy one has several times that.
    """
    limit_s = longer(limit_s) * _BUSY
    until = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > until:
            said = what() if callable(what) else what
            raise AssertionError(f"not within {limit_s:g} s: {said or condition}")
        time.sleep(0.05)


def _copy(source: str, target: str) -> None:
    # What is sealed is also where its holes are.
    copy_sparse(Path(source), Path(target))
    shutil.copymode(source, target)


class RealServer:
    """One installation. Its home is short enough for sockets and readable by no one else."""

    def __init__(self, port: int, **environment: str) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="sy-", dir="/tmp"))
        self.home.chmod(0o711)
        self.port = port
        self.ssh_port = free_port()
        self.environment = {
            **os.environ,
            **cache_environment(),
            "SANDYARD_HOME": str(self.home),
            "SANDYARD_HTTP__PORT": str(port),
            "SANDYARD_SSH__PORT": str(self.ssh_port),
            "XDG_CONFIG_HOME": str(self.home / "xdg"),
            "SANDYARD_POOL__FLOOR": "2",  # however large the host is that tests run on
            **environment,
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.client = httpx.Client()
        self.instance: dict[str, object] = {}
        self._shared: Collection[str] = ()

    def share_goldens(self, *templates: str) -> None:
        """Begin with the golden machines of others that shared theirs, and leave its own to them:
        of base-minimal, and of these templates.

        To be called before the first start: all of them seal what they save with one key.
        """
        self._shared = {"base-minimal", *templates}
        key = self.home / "secret.key"
        key.touch(mode=0o600)
        key.write_bytes(_KEY)
        (self.home / "goldens").mkdir(mode=0o700)
        for golden in kept_goldens().iterdir():
            if self._is_shared(golden):
                with contextlib.suppress(OSError):  # it was removed meanwhile; then it is damaged
                    to = self.home / "goldens" / golden.name
                    shutil.copytree(golden, to, copy_function=_copy)

    def _is_shared(self, golden: Path) -> bool:
        about = _about(golden)
        if golden.name.endswith(".part") or about.get("template") not in self._shared:
            return False
        # Of its other shapes tests expect that nothing is ready.
        shape = (about["memory_mib"], about["disk_mib"])
        return about["template"] != "base-minimal" or shape == _USUAL_MIB

    def _leave_goldens(self) -> None:
        for golden in (self.home / "goldens").glob("*"):  # a test may have removed the folder
            kept = kept_goldens() / golden.name
            # One that is there already, and was replaced here, is damaged.
            if self._is_shared(golden) and _about(golden) != _about(kept):
                passing = kept.with_name(f"{golden.name}.{self.home.name}.part")
                shutil.move(golden, passing)
                shutil.rmtree(kept, ignore_errors=True)
                with contextlib.suppress(OSError):  # another process was faster
                    passing.rename(kept)
                shutil.rmtree(passing, ignore_errors=True)
        _drop_old_goldens()

    def run(
        self, *command: str | Path, check: bool = True, limit_s: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Run the command line of this installation."""
        done = subprocess.run(
            [str(SANDYARD), *map(str, command)], env=self.environment, text=True,
            capture_output=True, check=False, timeout=longer(limit_s),
        )  # fmt: skip
        assert not (check and done.returncode), f"{command}: {done.stdout[-2000:]}{done.stderr}"
        return done

    def start(self) -> None:
        """Start the server and return when it is ready."""
        if self.process is not None:
            self.process.wait(60)
        else:
            self._prepare()
        with (self.home / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(SANDYARD), "serve"], env=self.environment, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        config = (self.home / "xdg/sandyard/config.toml").read_text()
        key = config.split('api_key = "')[1].split('"')[0]
        self.client.close()
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}",
            headers={"Authorization": f"Bearer {key}"},
            timeout=longer(300),  # whatever is asked for comes to its own limit before
        )
        try:
            wait_until(self.is_ready, limit_s=60, what="the server is ready")
        except AssertionError as error:
            said = (self.home / "server.log").read_text(errors="replace")[-3000:]
            raise AssertionError(f"{error}; it said:\n{said}") from None
        self.instance = json.loads((self.home / "instance.json").read_text())

    def _prepare(self) -> None:
        with one_at_a_time():
            self.run("template", "build", "base-minimal")
        if not self.verdicts.exists() and _kept_verdicts().exists():
            self.verdicts.parent.mkdir(exist_ok=True)
            shutil.copy(_kept_verdicts(), self.verdicts)
        self.run("init", "--quiet")

    def is_ready(self) -> bool:
        """Tell whether the server answers that it is ready."""
        with contextlib.suppress(httpx.HTTPError):
            return self.client.get("/readyz").status_code == 200
        return False

    def kill(self) -> None:
        """Kill the server as a crash would."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def stop(self) -> None:
        """Stop the server in an orderly way."""
        assert self.process is not None
        self.process.terminate()
        assert self.process.wait(60) == 0, (self.home / "server.log").read_text()[-3000:]

    def create(self, *, wait: int = 60, **body: object) -> dict[str, object]:
        """Create a sandbox of the minimal template and return it once it runs."""
        answer = self.client.post(
            "/v1/sandboxes", params={"wait": wait}, json={"template": "base-minimal", **body}
        )
        assert answer.status_code == 201, answer.text
        data: dict[str, object] = answer.json()["data"]
        if wait and data["status"] == "creating":
            self.wait_running(data["id"])
            data = self.get(data["id"])
        assert wait == 0 or data["status"] == "running", data
        return data

    def execute(self, reference: object, command: str, **body: object) -> dict[str, object]:
        """Run a command and return how it ended."""
        asked = longer(int(str(body.get("timeout", _EXEC_MS))))
        body["timeout"] = min(round(asked), _LONGEST_MS)
        answer = self.client.post(
            f"/v1/sandboxes/{reference}/exec", json={"command": command, **body},
            timeout=longer(300) + asked / 1000,
        )  # fmt: skip
        assert answer.status_code == 200, answer.text
        data: dict[str, object] = answer.json()["data"]
        return data

    def running(self, reference: object) -> list[str]:
        """Return the command lines of what runs in a sandbox, whose template may have no `ps`; the
        look itself is left out."""
        done = self.execute(reference, _COMMAND_LINES)
        assert done["exitCode"] == 0, done
        return [one for one in str(done["stdout"]).splitlines() if _ALL_OF_THEM not in one]

    def get(self, reference: object) -> dict[str, object]:
        """Return a sandbox as it is now."""
        data: dict[str, object] = self.client.get(f"/v1/sandboxes/{reference}").json()["data"]
        return data

    def delete(self, reference: object) -> None:
        """Delete a sandbox."""
        answer = self.client.delete(f"/v1/sandboxes/{reference}")
        assert answer.status_code == 200, answer.text

    def record_of(self, sandbox_id: object) -> dict[str, Any]:
        """Return the record of the machine behind a sandbox; empty if there is none."""
        return next((one for one in self.records() if one["sandbox_id"] == sandbox_id), {})

    def records(self) -> list[dict[str, Any]]:
        """Return the records of all machines."""
        found = []
        for path in (self.home / "machines").glob("*/resident.json"):
            with contextlib.suppress(FileNotFoundError):
                found.append(json.loads(path.read_text()))
        return found

    def folder_of(self, sandbox_id: object) -> Path:
        """Return the folder of the machine behind a sandbox."""
        return self.home / "machines" / str(self.record_of(sandbox_id)["id"])

    def pid_of(self, sandbox_id: object) -> int:
        """Return the pid of the machine behind a sandbox."""
        return int(self.record_of(sandbox_id)["handle"]["pid"])

    def act(self, reference: object, action: str, **body: object) -> Any:
        """Ask for an action on a sandbox and return what it answered."""
        answer = self.client.post(f"/v1/sandboxes/{reference}/{action}", json=body)
        if answer.status_code == 503 and "ask again" in answer.text:
            # The request has waited long enough; what it asked for goes on.
            moving = ("creating", "pausing", "resuming")
            wait_until(lambda: self.status(reference) not in moving, limit_s=60, what=action)
            return self.get(reference)
        assert answer.status_code in (200, 201), answer.text
        return answer.json()["data"]

    def status(self, reference: object) -> str:
        """Return a sandbox's status."""
        return str(self.get(reference)["status"])

    def wait_running(self, reference: object, *, limit_s: float = 60.0) -> None:
        """Return once a sandbox runs; fail at once, with its reason, if it will not."""

        def runs() -> bool:
            found = self.get(reference)
            assert found["status"] not in ("failed", "error"), found["statusReason"]
            return found["status"] == "running"

        wait_until(runs, limit_s=limit_s, what=f"{reference} runs")

    def metric(self, name: str) -> float:
        """Return the sum of a metric's samples whose line begins so."""
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(one.rpartition(" ")[2]) for one in lines if one.startswith(name))

    def waiting(self) -> list[dict[str, Any]]:
        """Return the records of the machines that wait in the pool."""
        return [one for one in self.records() if one["phase"] == "waiting"]

    # --- what is there ----------------------------------------------------------------------

    @property
    def verdicts(self) -> Path:
        """Where it is written which hypervisors boot a machine here."""
        return self.home / "cache/verdicts.json"

    @property
    def prefix(self) -> str:
        """What the names of this installation's links and namespaces begin with."""
        return f"syd-{self.instance['id']}"

    def processes(self) -> set[int]:
        """Return the accounts of this installation under which something runs."""
        return {one for uids in (self.uids(), self.egress_uids()) for one in uids_at_work(uids)}

    def uids(self) -> range:
        """Return the accounts of machines."""
        first = 1_900_000_000 + int(str(self.instance["index"])) * SLOTS
        return range(first, first + SLOTS)

    def egress_uids(self) -> range:
        """Return the accounts of what enforces network rules."""
        first = self.uids().start + 64 * SLOTS
        return range(first, first + SLOTS)

    def namespaces(self) -> set[str]:
        """Return this installation's network namespaces."""
        folder = Path("/run/netns")
        return {path.name for path in folder.glob(f"{self.prefix}-*")} if folder.is_dir() else set()

    def links(self) -> set[str]:
        """Return this installation's links on the host."""
        return {path.name for path in Path("/sys/class/net").glob(f"{self.prefix}*")}

    def machines(self) -> set[str]:
        """Return the sandboxes that have a machine here."""
        return {str(one["sandbox_id"]) for one in self.records() if one["sandbox_id"]}

    def folders(self) -> set[str]:
        """Return the folders of machines and snapshots."""
        both = (self.home / "machines", self.home / "snapshots")
        return {path.name for one in both if one.is_dir() for path in one.iterdir()}

    def mounts(self) -> set[str]:
        """Return what is mounted below the home."""
        lines = Path("/proc/self/mounts").read_text().splitlines()
        return {one for one in (line.split()[1] for line in lines) if str(self.home) in one}

    def file_servers(self) -> set[int]:
        """Return the processes that keep a file server of this installation."""
        found = set()
        for one in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if f"{self.home}/exports/".encode() in one.read_bytes():
                    found.add(int(one.parent.name))
        return found

    def unfinished(self) -> set[Path]:
        """Return the files in the home that something was still being written to."""
        found = ((Path(folder), folders + files) for folder, folders, files in os.walk(self.home))
        return {at / name for at, names in found for name in names if name.endswith(".part")}

    def leftovers(self) -> dict[str, object]:
        """Return everything that may not be there once an installation was removed."""
        tables = subprocess.run(
            ["nft", "list", "ruleset"], capture_output=True, text=True, check=True
        ).stdout
        found = {
            "processes": self.processes(),
            "namespaces": self.namespaces(),
            "links": self.links(),
            "folders": self.folders(),
            "rules": f"sandyard_{self.instance['id']}" in tables,
            "mounts": self.mounts(),
            "view": mounts_of(self.home).parent.exists(),
            "unfinished": self.unfinished(),
            "file servers": self.file_servers(),
        }
        return {name: value for name, value in found.items() if value}

    def remove(self) -> None:
        """Take the installation down whole and check that nothing is left of it."""
        if self.process is not None and self.process.poll() is None:
            self.stop()
        self.client.close()
        if self.instance:
            self.run("stop", "--all")
            assert self.leftovers() == {}
        if self.verdicts.exists():
            shutil.copy(self.verdicts, _kept_verdicts())
        if self._shared:
            self._leave_goldens()
        shutil.rmtree(self.home)


def _drop_old_goldens() -> None:
    """Keep those of the latest two trees that were tested, of each the latest ones."""
    for folder in _latest_first(CACHE / "goldens")[2:]:
        shutil.rmtree(folder, ignore_errors=True)
    for golden in _latest_first(kept_goldens())[_GOLDENS_MAX:]:
        shutil.rmtree(golden, ignore_errors=True)


def _latest_first(folder: Path) -> list[Path]:
    changed = {}
    for one in folder.iterdir():
        with contextlib.suppress(OSError):  # it was removed meanwhile
            changed[one] = one.stat().st_mtime
    return sorted(changed, key=lambda one: changed[one], reverse=True)


def keep_a_golden(environment: dict[str, str]) -> None:
    """Have a golden machine for all installations with these settings that share theirs.

    For guests that are slow: a boot, or to exercise one member of a pool, takes minutes; a clone
    seconds.
    """
    made = RealServer(
        free_port(), **environment, SANDYARD_POOL__FLOOR="1", SANDYARD_POOL__CEILING="1"
    )
    made.share_goldens()
    try:
        made.start()
        wait_until(lambda: made.metric("sandyard_goldens{") >= 1, limit_s=120, what="a golden")
    finally:
        made.remove()
