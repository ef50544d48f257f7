"""One organization's file server: NFS-Ganesha, in a room of its own.

    exports/<number>/    server.json   who it is, for the next process
                         conf/         what it exports, to whom
                         tree/<id>     a bind of each workspace's folder
                         state/        its clients, for the time after a crash
                         start         what puts that together, and runs it
                         library       the copy of Ganesha's that it sees
                         root/         where its own view of the host's files is put together
                         log

It is root by name alone, for it acts for whoever asks, root among them: of root's capabilities it
keeps seven, and it sees no process but its own, of the host's files its programs and these
folders, and of its network its own port, from which nothing can be reached. It is started detached
and lives on when this process ends, as machines do.
"""

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sandyard.server.core.errors import UnavailableError, UnsupportedError
from sandyard.server.drivers.contract import Place
from sandyard.server.drivers.namespaces import path_of
from sandyard.server.drivers.processes import DetachedProcess, boot_id, start_time
from sandyard.server.node.commands import run
from sandyard.server.node.exports.library import (
    library_of,
    mended,
    minor_versions,
    version_of,
)
from sandyard.server.node.host.firewall import NFS_PORT
from sandyard.server.node.host.mounts import is_mounted
from sandyard.server.tasks import in_thread

log = logging.getLogger(__name__)

PROGRAM = "ganesha.nfsd"
_LIMIT_S = 20.0
_START_S = 20.0
_RELOAD_S = 10.0
_LOOK_S = 0.002
_LOG_MAX = 1024 * 1024
# What its clients make it remember is bounded, if not by much: beyond, it ends and starts anew.
_MEMORY_BYTES, _CLIENTS_MAX = 6 * 1024**3, 4096
_TAIL = 4000
_PIECE = 64 * 1024
# How long a client that is gone keeps what it had locked, and how long after a crash new clients
# wait for those of before; RFC 8881, 8.4.2.
_LEASE_S, _GRACE_S = 12, 15
_STARTED, _REREAD = b"NFS SERVER INITIALIZED", b"Reread exports complete"
# To open by handle, to act for whoever asks, to give files to others: nothing else of root's.
_CAPABILITIES = "chown,dac_override,dac_read_search,fowner,fsetid,setgid,setuid"
# All that is root's by its number alone (settings under /proc, say) is read-only or not there.
_VIEW = """
folder=$1 caps=$2 root=$1/root
mount -t tmpfs -o size=1m,mode=0755,nosuid tmpfs "$root"
cd "$root"
mkdir usr etc proc dev tmp run var run/old conf state tree
for one in bin sbin lib lib64; do [ ! -L "/$one" ] || ln -s "usr/$one" "$one"; done
mount --bind /usr usr
mount -o remount,bind,ro,nosuid,nodev usr
if [ -n "$4" ]; then
  mount --bind "$folder/library" "$root$4"
  mount -o remount,bind,ro,nosuid,nodev "$root$4"
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
exec prlimit --as=$2 setpriv --clear-groups --no-new-privs --inh-caps="-all" --bounding-set="$1" \\
  ganesha.nfsd -F -f /conf/ganesha.conf -L STDERR -p /state/pid' sh "$caps" "$3"
"""


@dataclass(frozen=True)
class Export:
    """A workspace, by number, and the addresses of those that may write to it and read it."""

    number: int
    workspace_id: str
    writers: tuple[str, ...]
    readers: tuple[str, ...]


class Server:
    """See the module. One call at a time."""

    def __init__(self, folder: Path, place: Place, org_id: str) -> None:
        self.folder = folder
        self.place = place
        self.org_id = org_id
        self._sources: dict[str, Path] = {}
        self._process: DetachedProcess | None = None
        self._child: asyncio.subprocess.Process | None = None

    @property
    def is_up(self) -> bool:
        """Whether it runs, as far as is known."""
        return self._process is not None

    # --- its process ----------------------------------------------------------------------

    async def start(self) -> None:
        """Return once it serves what it was told to, by `export`.

        Raises:
            UnavailableError: it does not come up; the message is the end of what it said.
        """
        await in_thread(self._prepare)
        mended_at = await in_thread(self._mend_library)
        await self._bind_tree()
        for workspace_id, source in self._sources.items():
            await self._bind(workspace_id, source)
        caps = "-all," + ",".join(f"+{one}" for one in _CAPABILITIES.split(","))
        beginning = self._log_size()
        with (self.folder / "log").open("ab") as said:
            try:
                child = await asyncio.create_subprocess_exec(
                    "nsenter", f"--net={path_of(self.place.netns)}",
                    "unshare", "--mount", "--ipc", "--uts", "--pid", "--fork",
                    "--propagation", "slave",
                    "sh", "-e", str(self.folder / "start"), str(self.folder), caps,
                    str(_MEMORY_BYTES), mended_at,
                    stdin=asyncio.subprocess.DEVNULL, stdout=said, stderr=said,
                    env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
                    cwd="/", start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise UnavailableError(f"cannot start a file server: {error}") from error
        self._child = child
        try:
            process = self._process = await self._child_of(child.pid)
            await self._await_said(_STARTED, beginning, limit_s=_START_S)
            if not await in_thread(self._sees, process.pid, list(self._sources)):
                raise UnavailableError("the file server does not see what it is to export")
        except BaseException:
            await self.stop()
            raise

    async def _child_of(self, parent: int) -> DetachedProcess:
        """Return the server itself, the first process of its own namespace, noted for later."""
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
        """Find the process that an earlier one of this server started; False if it is gone."""
        try:
            told = json.loads((self.folder / "server.json").read_text())
            pid, started, boot = int(told["pid"]), int(told["started"]), str(told["boot"])
        except (OSError, ValueError, TypeError, KeyError):
            return False
        self._process = DetachedProcess.find(pid, started=started, boot=boot)
        return self._process is not None

    async def ended(self) -> None:
        """Return once its process has ended."""
        process = self._process
        if process is not None:
            await process.wait()
            if self._process is process:
                self.let_go()

    async def stop(self) -> None:
        """End its process.

        Raises:
            UnavailableError: it would not go.
        """
        process, self._process = self._process, None
        if process is not None:
            with contextlib.closing(process):
                await process.kill()
        child, self._child = self._child, None
        if child is not None:
            # Broken off early, what it has started is not known yet.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LIMIT_S):
                    await child.wait()

    def let_go(self) -> None:
        """Let go of its process, which lives on."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def _prepare(self) -> None:
        for name, mode in (("conf", 0o755), ("state", 0o700), ("root", 0o755), ("tree", 0o755)):
            (self.folder / name).mkdir(mode=mode, parents=True, exist_ok=True)
        (self.folder / "start").write_text(_VIEW)
        self.bound_log()

    def _mend_library(self) -> str:
        """Lay a mended copy of its library ready; return what it shall stand for, or nothing."""
        library = library_of()
        if library is None:
            log.warning("the file server's library is unknown here, and goes without its mends")
            return ""
        better, missing = mended(library.read_bytes(), version_of(library))
        for sentence in missing:
            log.warning("the file server's library is not one that is known: %s", sentence)
        copy, part = self.folder / "library", self.folder / "library.part"
        try:
            if not copy.exists() or copy.read_bytes() != better:
                part.write_bytes(better)
                part.replace(copy)
        except OSError as error:  # the disk is full: to serve is worth more
            log.warning("a file server goes without its own library: %s", error)
            return ""
        return str(library)

    def _note(self, pid: int, started: int) -> None:
        told = {
            "org_id": self.org_id, "slot": self.place.number, "pid": pid, "started": started,
            "boot": boot_id(),
        }  # fmt: skip
        part = self.folder / "server.json.part"
        part.write_text(json.dumps(told))
        part.replace(self.folder / "server.json")

    async def keep_clients(self, clients: Mapping[str, str]) -> None:
        """Before a start, have these be waited for, by their names, at their addresses.

        A server that ended by itself waits for those of before, so that each may claim anew what it
        had locked; it knows them by the addresses that they had at first, and would wait for those
        who are gone as long as it may.
        """
        await in_thread(self._keep_clients, clients)

    def _keep_clients(self, clients: Mapping[str, str]) -> None:
        known = {name.encode().hex(): address for name, address in clients.items()}
        for entry in (self.folder / "state").glob("v4*/*/*"):
            found = [address for name, address in known.items() if name in entry.name]
            if not found:
                shutil.rmtree(entry, ignore_errors=True)
                continue
            with contextlib.suppress(OSError):
                entry.rename(entry.with_name(f"::ffff:{found[0]}-{entry.name.partition('-')[2]}"))

    # --- what it exports ------------------------------------------------------------------

    async def export(self, exports: list[Export]) -> None:
        """Export this and nothing else, from now on if it runs.

        It is stopped if it does not see what it is to export: it would give out what lies below.

        Raises:
            UnavailableError: it does not do it.
        """
        used = [one.workspace_id for one in exports if one.writers or one.readers]
        process = self._process
        if process is not None and not await in_thread(self._sees, process.pid, used):
            log.error("a file server does not see what it is to export, and is started anew")
            await self.stop()
        await in_thread(self._configure, exports)
        process = self._process
        if process is None:
            return
        beginning = self._log_size()
        process.send(signal.SIGHUP)
        await self._await_said(_REREAD, beginning, limit_s=_RELOAD_S)

    def _configure(self, exports: list[Export]) -> None:
        for name in ("conf", "tree"):
            (self.folder / name).mkdir(mode=0o755, parents=True, exist_ok=True)
        part = self.folder / "conf/ganesha.conf.part"
        minors = minor_versions(library_of())
        part.write_text(configuration(exports, address=self.place.ip, minors=minors))
        part.chmod(0o644)
        part.replace(self.folder / "conf/ganesha.conf")

    async def bind(self, workspace_id: str, source: Path) -> None:
        """Have a workspace's folder in its tree.

        Raises:
            UnavailableError: it is no file system of its own, or would not be bound.
        """
        await in_thread(self._prepare)
        await self._bind_tree()
        await self._bind(workspace_id, source)
        self._sources[workspace_id] = source

    async def _bind(self, workspace_id: str, source: Path) -> None:
        if not source.is_mount():
            # Out of a folder that lies beside others these could be reached.
            raise UnavailableError(f"cannot export {source}: it is no file system of its own")
        place = self.folder / "tree" / workspace_id
        place.mkdir(mode=0o755, exist_ok=True)
        if not _are_same(place, source):
            await run(["mount", "--bind", source, place], limit_s=_LIMIT_S)

    def _sees(self, pid: int, workspace_ids: list[str]) -> bool:
        """Tell whether the process's own view of the host's files has these where it looks."""
        tree = Path(f"/proc/{pid}/root/tree")
        known = ((one, self._sources.get(one)) for one in workspace_ids)
        return all(
            source and source.is_mount() and _are_same(tree / one, source) for one, source in known
        )

    async def unbind(self, workspace_id: str) -> None:
        """Have it there no more; what the server still has open of it goes when it lets go."""
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
        """Remove all that is left of it; its process has ended.

        Raises:
            InternalError, OSError: something would not go.
        """
        tree = self.folder / "tree"
        for one in sorted(tree.iterdir()) if tree.is_dir() else ():
            await self.unbind(one.name)
        while is_mounted(tree):
            await run(["umount", "--recursive", tree], limit_s=_LIMIT_S)
        await in_thread(shutil.rmtree, self.folder, ignore_errors=True)

    # --- what it says ---------------------------------------------------------------------

    def bound_log(self) -> None:
        """Keep its log from growing for ever."""
        with contextlib.suppress(OSError):
            if (self.folder / "log").stat().st_size > _LOG_MAX:
                os.truncate(self.folder / "log", 0)

    def _log_size(self) -> int:
        try:
            return (self.folder / "log").stat().st_size
        except FileNotFoundError:
            return 0

    async def _await_said(self, what: bytes, beginning: int, *, limit_s: float) -> None:
        at, kept = beginning, b""
        try:
            async with asyncio.timeout(limit_s):
                while True:
                    more = self._said(at)
                    at, kept = at + len(more), kept[-len(what) :] + more
                    if what in kept:
                        return
                    if self._process is None or start_time(self._process.pid) is None:
                        raise UnavailableError(f"the file server ended: {self._tail()}")
                    await asyncio.sleep(_LOOK_S)
        except TimeoutError as error:
            raise UnavailableError(f"the file server does not answer: {self._tail()}") from error

    def _said(self, beginning: int) -> bytes:
        try:
            with (self.folder / "log").open("rb") as file:
                file.seek(beginning)
                return file.read(_PIECE)
        except FileNotFoundError:
            return b""

    def _tail(self) -> str:
        said = self._said(max(0, self._log_size() - _TAIL)).decode(errors="replace")
        return said.strip().rpartition("\n")[2]


def _are_same(one: Path, other: Path) -> bool:
    """Tell whether two paths are of one file system, here and now."""
    try:
        return one.stat().st_dev == other.stat().st_dev
    except OSError:
        return False


def configuration(exports: list[Export], *, address: str, minors: str) -> str:
    """Return the configuration of a server that exports this at an address, by NFSv4.`minors`."""
    blocks = "".join(_block(one) for one in exports if one.writers or one.readers)
    return f"""
NFS_CORE_PARAM {{
  Protocols = 4; NFS_Port = {NFS_PORT}; Bind_addr = {address};
  Enable_NLM = false; Enable_RQUOTA = false; Enable_UDP = false;
  allow_set_io_flusher_fail = true; mount_path_pseudo = true;
}}
NFSv4 {{
  Minor_Versions = {minors}; RecoveryBackend = fs; RecoveryRoot = /state;
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


def _block(export: Export) -> str:
    clients: Mapping[str, tuple[str, ...]] = {"RW": export.writers, "RO": export.readers}
    allowed = "".join(
        f"  CLIENT {{ Clients = {', '.join(addresses)}; Access_Type = {access}; Protocols = 4; }}\n"
        for access, addresses in clients.items()
        if addresses
    )
    return (
        f"EXPORT {{\n  Export_Id = {export.number}; Path = /tree/{export.workspace_id};\n"
        f"  Pseudo = /{export.workspace_id}; FSAL {{ Name = VFS; }}\n{allowed}}}\n"
    )


def check_here() -> None:
    """Return if file servers can be started on this host.

    Raises:
        UnsupportedError: its program is missing.
    """
    if shutil.which(PROGRAM, path="/usr/sbin:/usr/bin") is None:
        raise UnsupportedError(
            "cannot mount workspaces: NFS-Ganesha is not installed; scripts/up installs it"
        )
