"""A client of Firecracker's API: one method for each call, each with a time limit."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from sandyard.server.core.errors import (
    ConflictError,
    InternalError,
    NoCapacityError,
    UnavailableError,
)
from sandyard.server.drivers.firecracker import schema

_LIMIT_S = 10.0
_SAVE_LIMIT_S = 300.0
_ID = re.compile(r"^(/drives|/network-interfaces)/[a-z]+$")
# Firecracker tells the host's error by its text (std::io::Error's Display): ENOSPC and EDQUOT.
_FULL = re.compile(r"os error (28|122)\b")
Limiter = Mapping[str, Mapping[str, int]]


def limiter(mib_per_s: int) -> Limiter | None:
    """Return a rate limiter for so many MiB per second; None for 0."""
    if mib_per_s == 0:
        return None
    return {"bandwidth": {"size": mib_per_s * 2**20, "refill_time": 1000}}


class RefusedError(InternalError):
    """Firecracker refused a request."""


class Api:
    """The API of one Firecracker process."""

    def __init__(self, socket: Path) -> None:
        self._client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(socket)),
            base_url="http://firecracker",
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; the machine continues."""
        await self._client.aclose()

    async def state(self, *, limit_s: float = _LIMIT_S) -> str:
        """Return `Not started`, `Running` or `Paused`."""
        answer = await self._call("GET", "/", limit_s=limit_s)
        return str(answer["state"])

    async def version(self) -> str:
        """Return the version of the process."""
        answer = await self._call("GET", "/version")
        return str(answer["firecracker_version"])

    async def configure(self, *, vcpus: int, memory_mib: int) -> None:
        """Set CPUs and memory, with tracking of written pages so that only those are saved."""
        await self._call(
            "PUT",
            "/machine-config",
            {
                "vcpu_count": vcpus, "mem_size_mib": memory_mib, "smt": False,
                "track_dirty_pages": True,
            },
        )  # fmt: skip

    async def boot_from(self, *, kernel: str, initrd: str, arguments: str) -> None:
        """Set the kernel, initramfs and kernel arguments."""
        await self._call(
            "PUT",
            "/boot-source",
            {"kernel_image_path": kernel, "initrd_path": initrd, "boot_args": arguments},
        )

    async def add_drive(
        self, name: str, path: str, *, is_read_only: bool, limiter: Limiter | None = None
    ) -> None:
        """Add a disk; what the guest flushes is flushed to the host's file."""
        body: dict[str, object] = {
            "drive_id": name, "path_on_host": path, "is_root_device": False,
            "is_read_only": is_read_only, "cache_type": "Writeback",
        }  # fmt: skip
        await self._call("PUT", f"/drives/{name}", body | _named("rate_limiter", limiter))

    async def reread_drive(self, name: str, path: str) -> None:
        """Read the size of a disk's file again, so that the guest sees it."""
        await self._call("PATCH", f"/drives/{name}", {"drive_id": name, "path_on_host": path})

    async def add_network(
        self, name: str, *, tap: str, mac: str, limiter: Limiter | None = None
    ) -> None:
        """Add a network interface on a tap."""
        body: dict[str, object] = {"iface_id": name, "host_dev_name": tap, "guest_mac": mac}
        body |= _named("rx_rate_limiter", limiter) | _named("tx_rate_limiter", limiter)
        await self._call("PUT", f"/network-interfaces/{name}", body)

    async def add_entropy(self) -> None:
        """Add a source of random numbers."""
        await self._call("PUT", "/entropy", {})

    async def start(self) -> None:
        """Boot the configured machine."""
        await self._call("PUT", "/actions", {"action_type": "InstanceStart"})

    async def pause(self) -> None:
        """Suspend the guest."""
        await self._call("PATCH", "/vm", {"state": "Paused"})

    async def resume(self) -> None:
        """Resume the guest."""
        await self._call("PATCH", "/vm", {"state": "Resumed"})

    async def save(self, *, state: str, memory: str, is_whole: bool = False) -> None:
        """Write the devices' state, and the memory pages written since the last save.

        The pages are written over those in the file, if that has the right size. With `is_whole`,
        all of the memory is written.

        Raises:
            NoCapacityError: the host's disk is full.
        """
        await self._call(
            "PUT",
            "/snapshot/create",
            {
                "snapshot_type": "Full" if is_whole else "Diff",
                "snapshot_path": state,
                "mem_file_path": memory,
            },
            limit_s=_SAVE_LIMIT_S,
        )

    async def load(self, *, state: str, memory: str, network: str, tap: str) -> None:
        """Restore the machine from a saved state, suspended.

        Raises:
            ConflictError: the state is incomplete, or does not fit; the process then ends.
        """
        try:
            await self._call(
                "PUT",
                "/snapshot/load",
                {
                    "snapshot_path": state,
                    "mem_backend": {"backend_type": "File", "backend_path": memory},
                    "enable_diff_snapshots": True,
                    "resume_vm": False,
                    "network_overrides": [{"iface_id": network, "host_dev_name": tap}],
                },
            )
        except RefusedError as error:
            raise ConflictError(f"the saved state cannot be loaded: {error.message}") from error

    async def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None = None,
        *,
        limit_s: float = _LIMIT_S,
    ) -> Mapping[str, object]:
        what = f"{method} {path}"
        call = schema.CALLS[method, _ID.sub(r"\1/{id}", path)]
        schema.check(what, body, call.takes)
        try:
            answer = await self._client.request(method, path, json=body, timeout=limit_s)
            content = answer.json() if answer.content else None
        except (httpx.HTTPError, OSError, ValueError) as error:
            raise UnavailableError(f"cannot reach Firecracker ({what}): {error!r}") from error
        if answer.is_success:
            schema.check(f"the answer to {what}", content, call.answers)
            return content or {}
        schema.check(f"the refusal of {what}", content, schema.ERROR)
        message = str(content["fault_message"]) if content else ""
        if _FULL.search(message):
            raise NoCapacityError("cannot do this: the host's disk is full; free some space")
        raise RefusedError(f"Firecracker refused {what}: {message[:500]}")


def _named(name: str, limiter: Limiter | None) -> dict[str, object]:
    return {} if limiter is None else {name: limiter}
