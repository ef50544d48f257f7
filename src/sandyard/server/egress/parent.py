"""The parent of egress processes: it has everything loaded, and forks one for each sandbox.

Starting the interpreter anew would take a quarter of a second and 40 MB for each. The parent itself
holds nothing of a sandbox, and ends with the server; its children continue.
"""

import asyncio
import contextlib
import ctypes
import gc
import json
import logging
import os
import resource
import signal
import socket
import ssl
import sys
import traceback

import dns.rdata

from sandyard.server.core.codec import decode
from sandyard.server.egress.config import JOURNALS, Start
from sandyard.server.egress.dns import dns_sockets
from sandyard.server.egress.process import Sockets, work
from sandyard.server.egress.tls import host_context, rehearse

_MESSAGE_MAX, _DESCRIPTORS_MAX = 4096, 64
_CLONE_NEWNET, _CLONE_NEWNS = 0x40000000, 0x00020000
_MS_NOSUID_NODEV_NOEXEC, _MS_REC, _MS_PRIVATE = 0x0E, 0x4000, 0x40000
_MNT_DETACH = 2
_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38
_BACKLOG = 512
_NICE, _OOM_SCORE = 5, 300
_LIMITS = {
    resource.RLIMIT_NOFILE: 4096,
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_NPROC: 0,
    resource.RLIMIT_FSIZE: 16 * 1024 * 1024,
    resource.RLIMIT_AS: 1024**3,
}
_libc = ctypes.CDLL(None, use_errno=True)  # os.setns came with Python 3.12


def serve(link: socket.socket, extra_ca: str | None = None) -> None:
    """Fork a process for each message of a socket, and answer with its number, until it ends.

    A message is a `Start` as JSON, with its descriptors. Hosts are checked by the authorities that
    this machine trusts, and by those in the file `extra_ca`.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel forgets children that ended
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Nothing can be imported later: children see no files.
    dns.rdata.load_all_types(disable_dynamic_load=True)  # type: ignore[no-untyped-call]
    hosts = host_context(extra_ca)
    rehearse(hosts)
    gc.collect()
    gc.freeze()  # so that children share the memory of what is loaded
    while True:
        data, descriptors, _, _ = socket.recv_fds(link, _MESSAGE_MAX, _DESCRIPTORS_MAX)
        if not data:
            return
        try:
            pid = os.fork()
            if pid == 0:
                link.close()
                _be(data, descriptors, hosts)
        except OSError as error:
            link.send(json.dumps({"error": str(error)}).encode())
        else:
            link.send(json.dumps({"pid": pid}).encode())
        for one in descriptors:
            os.close(one)


def _be(data: bytes, descriptors: list[int], hosts: ssl.SSLContext) -> None:
    """Become the process of a sandbox; does not return."""
    try:
        os.setsid()
        _yield_to_machines()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        start = decode(Start, json.loads(data))
        netns, empty, control, errors, *rest = descriptors
        os.dup2(errors, 1)
        os.dup2(errors, 2)
        _done("setns", _libc.setns(netns, _CLONE_NEWNET))
        datagrams, streams = dns_sockets(start.gateway)
        connections = socket.create_server((start.gateway, start.port), backlog=_BACKLOG)
        _confine(start.uid, empty)
        for one in (netns, empty, errors):
            os.close(one)
        journals, asking = rest[:JOURNALS], [socket.socket(fileno=one) for one in rest[JOURNALS:]]
        sockets = Sockets(
            datagrams, streams, connections, socket.socket(fileno=control), journals,
            asking[: start.datagram_sockets], asking[start.datagram_sockets :],
        )  # fmt: skip
        logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
        asyncio.run(work(sockets, hosts))
    except BaseException:  # noqa: BLE001 - what is not written now is never known
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(1)


def _yield_to_machines() -> None:
    """Run at a lower priority than machines and the server, and be the first to be killed when
    memory runs out: a guest decides how much there is to do."""
    os.setpriority(os.PRIO_PROCESS, 0, _NICE)
    # A new session has a new autogroup, whose priority counts instead where the kernel has those.
    for path, value in (("/proc/self/autogroup", _NICE), ("/proc/self/oom_score_adj", _OOM_SCORE)):
        with contextlib.suppress(OSError), open(path, "w") as file:
            file.write(str(value))


def _leave_files(uid: int, empty: int) -> None:
    """Make a small file system in memory the root of this process, which is then all it sees: TLS
    reads certificates from files alone. No mount of the host stays in use by it."""
    # By its path: the descriptor leads to the mount that the host has.
    folder = os.readlink(f"/proc/self/fd/{empty}").encode()
    options = f"size=256k,mode=700,uid={uid},gid={uid}".encode()
    _done("unshare", _libc.unshare(_CLONE_NEWNS))
    _done("mount", _libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None))
    _done("mount", _libc.mount(b"none", folder, b"tmpfs", _MS_NOSUID_NODEV_NOEXEC, options))
    os.chdir(folder)
    # The old root then lies over the new one, and is taken away.
    _done("pivot_root", _libc.pivot_root(b".", b"."))
    _done("umount", _libc.umount2(b".", _MNT_DETACH))
    os.chdir("/")


def _done(what: str, result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _confine(uid: int, empty: int) -> None:
    """Give up the file system, all privileges, and the ways to more processes and core dumps."""
    _leave_files(uid, empty)
    for kind, most in _LIMITS.items():
        resource.setrlimit(kind, (most, most))
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    for option, value in ((_PR_SET_NO_NEW_PRIVS, 1), (_PR_SET_DUMPABLE, 0)):
        _done("prctl", _libc.prctl(option, value, 0, 0, 0))
