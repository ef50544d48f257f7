"""The part of Firecracker's API that is used here, by its description (firecracker.yaml, v1.12).

Every request and answer is validated. One that does not fit belongs to another version, and is
reported as that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from sandyard.server.core.errors import InternalError


@dataclass(frozen=True)
class Shape:
    """The required and optional members of an object."""

    needs: Mapping[str, object] = field(default_factory=dict)
    may: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """One operation: its arguments, and its answer if it has one."""

    takes: Shape | None
    answers: Shape | None = None


_BUCKET = Shape({"size": range(2**63), "refill_time": range(2**63)}, {"one_time_burst": int})
_LIMITER = Shape(may={"bandwidth": _BUCKET, "ops": _BUCKET})
_STATE = frozenset({"Not started", "Running", "Paused"})

CALLS: Mapping[tuple[str, str], Call] = MappingProxyType(
    {
        ("GET", "/"): Call(
            None,
            Shape({"id": str, "state": _STATE, "vmm_version": str, "app_name": str}),
        ),
        ("GET", "/version"): Call(None, Shape({"firecracker_version": str})),
        ("PUT", "/machine-config"): Call(
            Shape(
                {"vcpu_count": range(1, 33), "mem_size_mib": range(1, 2**31)},
                {"smt": bool, "track_dirty_pages": bool, "huge_pages": frozenset({"None", "2M"})},
            )
        ),
        ("PUT", "/boot-source"): Call(
            Shape({"kernel_image_path": str}, {"boot_args": str, "initrd_path": str})
        ),
        ("PUT", "/drives/{id}"): Call(
            Shape(
                {"drive_id": str, "is_root_device": bool},
                {
                    "path_on_host": str,
                    "is_read_only": bool,
                    "cache_type": frozenset({"Unsafe", "Writeback"}),
                    "io_engine": frozenset({"Sync", "Async"}),
                    "rate_limiter": _LIMITER,
                },
            )
        ),
        ("PATCH", "/drives/{id}"): Call(
            Shape({"drive_id": str}, {"path_on_host": str, "rate_limiter": _LIMITER})
        ),
        ("PUT", "/network-interfaces/{id}"): Call(
            Shape(
                {"iface_id": str, "host_dev_name": str},
                {"guest_mac": str, "rx_rate_limiter": _LIMITER, "tx_rate_limiter": _LIMITER},
            )
        ),
        ("PUT", "/entropy"): Call(Shape(may={"rate_limiter": _LIMITER})),
        ("PUT", "/actions"): Call(Shape({"action_type": frozenset({"InstanceStart"})})),
        ("PATCH", "/vm"): Call(Shape({"state": frozenset({"Paused", "Resumed"})})),
        ("PUT", "/snapshot/create"): Call(
            Shape(
                {"snapshot_path": str, "mem_file_path": str},
                {"snapshot_type": frozenset({"Full", "Diff"})},
            )
        ),
        ("PUT", "/snapshot/load"): Call(
            Shape(
                {"snapshot_path": str},
                {
                    "mem_backend": Shape(
                        {"backend_type": frozenset({"File", "Uffd"}), "backend_path": str}
                    ),
                    "enable_diff_snapshots": bool,
                    "resume_vm": bool,
                    "network_overrides": (Shape({"iface_id": str, "host_dev_name": str}),),
                },
            )
        ),
    }
)
ERROR = Shape({"fault_message": str})


def check(what: str, value: object, shape: Shape | None) -> None:
    """Return if the body of a request or answer is valid.

    Raises:
        InternalError: it is not; the message says where.
    """
    if shape is None:
        if value is not None:
            raise InternalError(f"Firecracker's API: {what} has a body and should have none")
        return
    if not isinstance(value, dict):
        raise InternalError(f"Firecracker's API: {what} is no object")
    if missing := shape.needs.keys() - value.keys():
        raise InternalError(f"Firecracker's API: {what} lacks {sorted(missing)[0]}")
    known = {**shape.may, **shape.needs}
    for name, member in value.items():
        if name not in known:
            raise InternalError(f"Firecracker's API: {what} has {name}, which is not known")
        _check_member(f"{what}.{name}", member, known[name])


def _check_member(what: str, value: object, wanted: object) -> None:
    match wanted:
        case Shape():
            check(what, value, wanted)
            return
        case range():  # first: it is a sequence, too
            fits = isinstance(value, int) and not isinstance(value, bool) and value in wanted
        case (Shape() as each,):
            fits = isinstance(value, list)
            for one in value if isinstance(value, list) else ():
                check(what, one, each)
        case frozenset():
            fits = value in wanted
        case type():
            fits = isinstance(value, wanted)
        case _:
            raise AssertionError(f"not a check: {wanted!r}")
    if not fits:
        raise InternalError(f"Firecracker's API: {what} cannot be {str(value)[:80]!r}")
