"""A file server: NFS-Ganesha for one machine, in a confined environment.

    exports/<slot>-<port>/   server.json   whose it is, for the next process
                             conf/         what it exports
                             tree/<id>     a bind mount of each workspace's folder
                             state/        its client, for the time after a crash
                             start         the script that confines and starts it
                             library       the copy of Ganesha's library that it loads
                             root/         where its view of the host's files is assembled
                             log

It listens in its machine's slot, so only that machine reaches it. The bind mounts of workspaces
that the machine may only read are read-only to the kernel: whatever the protocol offers, nothing
is written through them.

The server is root by number, because it acts as the users its client names, root among them. Of
root's capabilities it keeps seven. It sees no other process, only programs and these folders of
the host's files, and of the network only its own guest. It is started detached and outlives this
process, as machines do.
"""

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from sandyard.server.core.errors import UnavailableError, UnsupportedError
from sandyard.server.drivers.contract import Place
from sandyard.server.drivers.namespaces import path_of
from sandyard.server.drivers.processes import DetachedProcess, boot_id, start_time
from sandyard.server.node.commands import run
from sandyard.server.node.exports import only_reads
from sandyard.server.node.exports.library import (
    library_of,
    lock_options,
    minor_versions,
    patched,
)
from sandyard.server.node.exports.shares import Part
from sandyard.server.node.host.firewall import GATEWAY_IP, GUEST_IP
from sandyard.server.node.host.mounts import is_mounted
from sandyard.server.tasks import in_thread

log = logging.getLogger(__name__)

PROGRAM = "ganesha.nfsd"
_LIMIT_S = 20.0
_START_S = 20.0
_RELOAD_S = 10.0
_LOOK_S = 0.002
_LOG_MAX = 1024 * 1024
# Bounds on what its client can make it remember. Beyond them it ends, and is started again. It
# maps some 430 MB from the start.
_MEMORY_BYTES, _CLIENTS_MAX = 1024**3, 64
_TAIL = 4000
_PIECE = 64 * 1024
# How long a client that is gone keeps what it had locked, and how long after a crash new clients
# wait for those of before; RFC 8881, 8.4.2.
_LEASE_S, _GRACE_S = 12, 15
_STARTED, _REREAD = b"NFS SERVER INITIALIZED", b"Reread exports complete"
# To open by handle, to act for its client's users, to give files to others: no other of root's.
_CAPABILITIES = "chown,dac_override,dac_read_search,fowner,fsetid,setgid,setuid"
_PYTHON = "/usr/bin/python3"
_NUMBERS = 65_534
# All that is root's by its number alone (settings under /proc, say) is read-only or not there.
_VIEW = """
folder=$1 caps=$2 memory=$3 library=$4 root=$1/root
shift 4
mount -t tmpfs -o size=1m,mode=0755,nosuid tmpfs "$root"
cd "$root"
mkdir usr etc proc dev tmp run var run/old conf state tree
for one in bin sbin lib lib64; do [ ! -L "/$one" ] || ln -s "usr/$one" "$one"; done
mount --bind /usr usr
mount -o remount,bind,ro,nosuid,nodev usr
if [ -n "$library" ]; then
  mount --bind "$folder/library" "$root$library"
  mount -o remount,bind,ro,nosuid,nodev "$root$library"
fi
for one in ld.so.cache netconfig; do [ ! -e "/etc/$one" ] || cp "/etc/$one" etc/; done
echo "root:x:0:0::/:" > etc/passwd
ln -s /proc/self/mounts etc/mtab
for one in null urandom; do : > "dev/$one"; mount --bind "/dev/$one" "dev/$one"; done
mount --bind "$folder/conf" conf
mount -o remount,bind,ro,nosuid,nodev,noexec conf
mount --bind "$folder/state" state
mount -o remount,bind,nosuid,nodev,noexec state
mount --rbind "$folder/tree" tree
mount -t tmpfs -o size=64k,mode=1777,nosuid,nodev,noexec tmpfs tmp
mount -t proc -o ro,nosuid,nodev,noexec proc proc
mount -o remount,ro "$root"
pivot_root . run/old
exec chroot . /usr/bin/sh -ec '
umount -l /run/old
caps=$1 memory=$2
shift 2
exec prlimit --as=$memory setpriv --clear-groups --no-new-privs --inh-caps="-all" \\
  --bounding-set="$caps" \\
  "$@" ganesha.nfsd -F -f /conf/ganesha.conf -L STDERR -p /state/pid' sh "$caps" "$memory" "$@"
"""


@dataclass(frozen=True)
class Owner:
    """The owner of a server: the machine in a slot, identified by its NFS client name; and the
    port."""

    slot: int
    port: int
    client: str


class Server:
    """One file server; supports one call at a time."""

    def __init__(self, folder: Path, place: Place, part: Part) -> None:
        self.folder = folder
        self.place = place
        self.part = part
        self._sources: dict[str, Path] = {}
        self._process: DetachedProcess | None = None
        self._child: asyncio.subprocess.Process | None = None

    @property
    def owner(self) -> Owner:
        """The owner of this server."""
        return Owner(self.place.number, self.part.port, self.part.client)

    def _is_read_only(self, workspace_id: str) -> bool:
        return all(one.workspace_id != workspace_id for one in self.part.writable)

    @property
    def is_up(self) -> bool:
        """Whether it is running, as far as is known."""
        return self._process is not None

    # --- its process ----------------------------------------------------------------------

    async def start(self) -> None:
        """Return once the server exports what `export` named.

        Raises:
            UnavailableError: it does not start; the message is the end of its log.
        """
        await in_thread(self._prepare)
        library = await in_thread(self._patch_library)
        await self._bind_tree()
        for workspace_id, source in self._sources.items():
            await self._bind(workspace_id, source)
        caps = "-all," + ",".join(f"+{one}" for one in _CAPABILITIES.split(","))
        through = []
        if not self.part.writable and os.access(_PYTHON, os.X_OK):
            through = [_PYTHON, "-I", "-S", "/conf/only_reads.py"]
        beginning = self._log_size()
        with (self.folder / "log").open("ab") as output:
            try:
                child = await asyncio.create_subprocess_exec(
                    "nsenter", f"--net={path_of(self.place.netns)}",
                    "unshare", "--mount", "--ipc", "--uts", "--pid", "--fork",
                    "--propagation", "slave",
                    "sh", "-e", str(self.folder / "start"), str(self.folder), caps,
                    str(_MEMORY_BYTES), library, *through,
                    stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
                    env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
                    cwd="/", start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise UnavailableError(f"cannot start a file server: {error}") from error
        self._child = child
        try:
            process = self._process = await self._child_of(child.pid)
            await self._await_logged(_STARTED, beginning, limit_s=_START_S)
            if not await in_thread(self._sees, process.pid, list(self._sources)):
                raise UnavailableError(
                    "the file server does not see the workspaces that it should export"
                )
        except BaseException:
            await self.stop()
            raise

    async def _child_of(self, parent: int) -> DetachedProcess:
        """Return the server process itself, which is the first process of its PID namespace, and
        save its id."""
        place = Path(f"/proc/{parent}/task/{parent}/children")
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                pid = next((int(one) for one in place.read_text().split()), None)
            except OSError:
                raise UnavailableError(f"cannot start a file server: {self._tail()}") from None
            started = None if pid is None else start_time(pid)
            if pid is not None and started is not None:
                process = DetachedProcess.find(pid, started=started, boot=boot_id())
                if process is not None:
                    self._note(pid, started)
                    return process
            elif start_time(parent) is None:
                raise UnavailableError(f"cannot start a file server: {self._tail()}")

    async def recover(self) -> bool:
        """Find the process that an earlier run of this program started; return False if it has
        ended."""
        record = await in_thread(_record_in, self.folder)
        if record is None:
            return False
        self._process = DetachedProcess.find(record.pid, started=record.started, boot=record.boot)
        return self._process is not None

    async def ended(self) -> None:
        """Return once the process has ended."""
        process = self._process
        if process is not None:
            await process.wait()
            if self._process is process:
                self.detach()

    async def stop(self) -> None:
        """End the process.

        Raises:
            UnavailableError: it did not end.
        """
        process, self._process = self._process, None
        if process is not None:
            with contextlib.closing(process):
                await process.kill()
        child, self._child = self._child, None
        if child is not None:
            # If interrupted early, its process is not known yet.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LIMIT_S):
                    await child.wait()

    def detach(self) -> None:
        """Stop watching the process, which keeps running."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def _prepare(self) -> None:
        for name, mode in (("conf", 0o755), ("state", 0o700), ("root", 0o755), ("tree", 0o755)):
            (self.folder / name).mkdir(mode=mode, parents=True, exist_ok=True)
        (self.folder / "start").write_text(_VIEW)
        shutil.copyfile(only_reads.__file__, self.folder / "conf/only_reads.py")
        self.bound_log()

    def _patch_library(self) -> str:
        """Prepare a patched copy of the library; return the path it is mounted over, or nothing."""
        library = library_of()
        if library is None:
            log.warning(
                "the file server's library was not found; starting it unpatched, locks may fail"
            )
            return ""
        better = patched(library.read_bytes())
        copy, part = self.folder / "library", self.folder / "library.part"
        try:
            if not copy.exists() or copy.read_bytes() != better:
                part.write_bytes(better)
                part.replace(copy)
        except OSError as error:  # the disk is full: a server without patches is better than none
            log.warning("cannot write the file server's library; starting it unpatched: %s", error)
            return ""
        return str(library)

    def _note(self, pid: int, started: int) -> None:
        record = {
            "slot": self.place.number, "port": self.part.port, "client": self.part.client,
            "pid": pid, "started": started, "boot": boot_id(),
        }  # fmt: skip
        part = self.folder / "server.json.part"
        part.write_text(json.dumps(record))
        part.replace(self.folder / "server.json")

    def forget_strangers(self) -> None:
        """Before a start, remove saved records of clients other than this server's machine.

        After a crash, a server waits for its previous clients to reclaim their locks. A guest may
        have invented clients, which would never do so.
        """
        name = self.part.client.encode().hex()
        for entry in (self.folder / "state").glob("v4*/*/*"):
            if name not in entry.name:
                shutil.rmtree(entry, ignore_errors=True)

    # --- what it exports ------------------------------------------------------------------

    async def export(self) -> None:
        """Export exactly the bound workspaces, now if it is running, else when it starts.

        A server that does not see a workspace, or sees it writable although it must be read-only,
        is stopped: it would export the folder below the mount point, or let its client write.

        Raises:
            UnavailableError: it does not apply the new configuration.
        """
        process = self._process
        if process is not None and not await in_thread(
            self._sees, process.pid, list(self._sources)
        ):
            log.warning("a file server has lost its mount of a workspace; restarting it")
            await self.stop()
        await in_thread(self._configure)
        process = self._process
        if process is None:
            return
        beginning = self._log_size()
        process.send(signal.SIGHUP)
        await self._await_logged(_REREAD, beginning, limit_s=_RELOAD_S)

    def _configure(self) -> None:
        for name in ("conf", "tree"):
            (self.folder / name).mkdir(mode=0o755, parents=True, exist_ok=True)
        part = self.folder / "conf/ganesha.conf.part"
        part.write_text(configuration(self.part, list(self._sources), library=library_of()))
        part.chmod(0o644)
        part.replace(self.folder / "conf/ganesha.conf")

    async def bind(self, workspace_id: str, source: Path) -> None:
        """Bind-mount a workspace's folder into its tree.

        Raises:
            UnavailableError: the folder is not a mount point, or cannot be bound.
        """
        await in_thread(self._prepare)
        await self._bind_tree()
        await self._bind(workspace_id, source)
        self._sources[workspace_id] = source

    async def _bind(self, workspace_id: str, source: Path) -> None:
        if not source.is_mount():
            # From a plain folder a client could reach the folders next to it by guessed handles.
            raise UnavailableError(f"cannot export {source}: it is no file system of its own")
        place = self.folder / "tree" / workspace_id
        place.mkdir(exist_ok=True)
        if place.is_mount() and not _is_as_wanted(place, source, self._is_read_only(workspace_id)):
            await run(["umount", "--lazy", place], limit_s=_LIMIT_S)
        if not place.is_mount():
            await run(["mount", "--bind", source, place], limit_s=_LIMIT_S)
            if self._is_read_only(workspace_id):
                options = "remount,bind,ro,nosuid,nodev,noatime"
                await run(["mount", "-o", options, place], limit_s=_LIMIT_S)

    def _sees(self, pid: int, workspace_ids: list[str]) -> bool:
        """Tell whether the process sees these workspaces in its tree, read-only where required."""
        tree = Path(f"/proc/{pid}/root/tree")
        return all(
            source.is_mount() and _is_as_wanted(tree / one, source, self._is_read_only(one))
            for one, source in self._sources.items()
            if one in workspace_ids
        )

    async def unbind(self, workspace_id: str) -> None:
        """Remove a workspace from its tree; open files remain until the server closes them."""
        place = self.folder / "tree" / workspace_id
        while place.is_mount():
            await run(["umount", "--lazy", place], limit_s=_LIMIT_S)
        self._sources.pop(workspace_id, None)
        with contextlib.suppress(OSError):
            place.rmdir()

    async def _bind_tree(self) -> None:
        tree = self.folder / "tree"
        if not is_mounted(tree):
            await run(["mount", "--bind", tree, tree], limit_s=_LIMIT_S)
            # What is mounted here later shows in the server's own view as well.
            await run(["mount", "--make-private", tree], limit_s=_LIMIT_S)
            await run(["mount", "--make-shared", tree], limit_s=_LIMIT_S)

    async def remove(self) -> None:
        """Remove everything that belongs to it; its process has ended.

        Raises:
            InternalError, OSError: something could not be removed.
        """
        tree = self.folder / "tree"
        for one in sorted(tree.iterdir()) if tree.is_dir() else ():
            await self.unbind(one.name)
        while is_mounted(tree):
            await run(["umount", "--recursive", tree], limit_s=_LIMIT_S)
        await in_thread(shutil.rmtree, self.folder, ignore_errors=True)

    # --- what it says ---------------------------------------------------------------------

    def bound_log(self) -> None:
        """Limit the size of its log."""
        with contextlib.suppress(OSError):
            if (self.folder / "log").stat().st_size > _LOG_MAX:
                os.truncate(self.folder / "log", 0)

    def _log_size(self) -> int:
        try:
            return (self.folder / "log").stat().st_size
        except FileNotFoundError:
            return 0

    async def _await_logged(self, what: bytes, beginning: int, *, limit_s: float) -> None:
        at, kept = beginning, b""
        try:
            async with asyncio.timeout(limit_s):
                while True:
                    more = self._log_from(at)
                    at, kept = at + len(more), kept[-len(what) :] + more
                    if what in kept:
                        return
                    if self._process is None or start_time(self._process.pid) is None:
                        raise UnavailableError(f"the file server ended: {self._tail()}")
                    await asyncio.sleep(_LOOK_S)
        except TimeoutError as error:
            raise UnavailableError(f"the file server does not answer: {self._tail()}") from error

    def _log_from(self, beginning: int) -> bytes:
        try:
            with (self.folder / "log").open("rb") as file:
                file.seek(beginning)
                return file.read(_PIECE)
        except FileNotFoundError:
            return b""

    def _tail(self) -> str:
        text = self._log_from(max(0, self._log_size() - _TAIL)).decode(errors="replace")
        return text.strip().rpartition("\n")[2]


def _is_as_wanted(place: Path, source: Path, read_only: bool) -> bool:
    """Tell whether a path shows the same file system as another, read-only if required."""
    try:
        is_read_only = bool(os.statvfs(place).f_flag & os.ST_RDONLY)
        return place.stat().st_dev == source.stat().st_dev and (is_read_only or not read_only)
    except OSError:
        return False


@dataclass(frozen=True)
class _Record:
    """The contents of `server.json`; in an earlier version, several machines shared a server."""

    owner: Owner | None
    pid: int
    started: int
    boot: str


def _record_in(folder: Path) -> _Record | None:
    try:
        record = json.loads((folder / "server.json").read_text())
        owner = None
        if "client" in record:
            owner = Owner(int(record["slot"]), int(record["port"]), str(record["client"]))
        return _Record(owner, int(record["pid"]), int(record["started"]), str(record["boot"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def owner_in(folder: Path) -> Owner | None:
    """Return the owner of the server that an earlier process started in a folder; None if
    unknown."""
    record = _record_in(folder)
    return None if record is None else record.owner


def configuration(part: Part, workspace_ids: list[str], *, library: Path | None) -> str:
    """Return the configuration of a server for these workspaces of a part and a library.

    The server's owner and scope are unique: a client treats two servers with the same ones as one
    server (RFC 8881, 2.10.5), and a machine may have two that started in the same second.
    """
    name = f"{part.client}-{part.port}"
    writable = {one.workspace_id for one in part.writable}
    blocks = "".join(
        _block(one, number, "RW" if one in writable else "RO")
        for one, number in _numbered(part).items()
        if one in workspace_ids
    )
    return f"""
NFS_CORE_PARAM {{
  Protocols = 4; NFS_Port = {part.port}; Bind_addr = {GATEWAY_IP};
  Enable_NLM = false; Enable_RQUOTA = false; Enable_UDP = false;
  allow_set_io_flusher_fail = true; mount_path_pseudo = true;
}}
NFSv4 {{
  Minor_Versions = {minor_versions(library)}; {lock_options(library)}
  RecoveryBackend = fs; RecoveryRoot = /state;
  Server_Owner = "{name}"; Server_Scope = "{name}";
  Lease_Lifetime = {_LEASE_S}; Grace_Period = {_GRACE_S};
  Only_Numeric_Owners = true; Delegations = false; Max_Client_Ids = {_CLIENTS_MAX};
}}
NFS_KRB5 {{ Active_krb5 = false; }}
MDCACHE {{ Dir_Chunk = 0; Entries_HWMark = 20000; }}
EXPORT_DEFAULTS {{
  Access_Type = None; Squash = No_Root_Squash; Protocols = 4; Transports = TCP; SecType = sys;
  Attr_Expiration_Time = 0;
}}
LOG {{ Default_Log_Level = EVENT; }}
{blocks}"""


def _block(workspace_id: str, number: int, access: str) -> str:
    return (
        f"EXPORT {{\n  Export_Id = {number}; Path = /tree/{workspace_id};\n"
        f"  Pseudo = /{workspace_id}; FSAL {{ Name = VFS; }}\n"
        f"  CLIENT {{ Clients = {GUEST_IP}; Access_Type = {access}; Protocols = 4; }}\n}}\n"
    )


def _numbered(part: Part) -> dict[str, int]:
    """Return the export number of each workspace.

    A machine's file handles contain these numbers, so they stay the same over restarts. 0 is the
    root of all exports.
    """
    numbers: dict[str, int] = {}
    for one in part.mounts:
        first = int.from_bytes(sha256(one.encode()).digest()[:4])
        among = (1 + (first + step) % _NUMBERS for step in range(_NUMBERS))
        taken = set(numbers.values())
        numbers[one] = next(number for number in among if number not in taken)
    return numbers


def check_here() -> None:
    """Return if file servers can be started on this host.

    Raises:
        UnsupportedError: the program is missing.
    """
    if shutil.which(PROGRAM, path="/usr/sbin:/usr/bin") is None:
        raise UnsupportedError(
            "cannot mount workspaces: NFS-Ganesha is not installed; scripts/up installs it"
        )
