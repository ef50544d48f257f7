"""Start a file server that can open no file of a workspace for writing.

The server runs `python3 only_reads.py PROGRAM [ARGUMENT …]`; nothing imports this file. It installs
a seccomp filter and then executes the program. The filter has `open_by_handle_at` fail with EACCES
when it asks for more than reading; FSAL_VFS opens every file of an export that way.

The read-only mount below would refuse the same with EROFS. NFS-Ganesha 4.3 to 6.5 opens a file for
reading and writing when a client asks for a lock of it, and tries again for reading alone after
EACCES, but not after EROFS: without this filter a reader could lock nothing.
"""

import ctypes
import os
import platform
import struct
import sys

# linux/audit.h and the system call tables of each architecture.
_ARCHITECTURES = {"x86_64": (0xC000003E, 304), "aarch64": (0xC00000B7, 265)}
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
# linux/bpf_common.h
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_ANY_SET, _AND, _RETURN = 0x20, 0x15, 0x45, 0x54, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _FLAGS_AT = 0, 4, 32  # struct seccomp_data
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_EACCES = 13


def program(architecture: int, number: int) -> bytes:
    """Return the filter, as classic BPF (linux/filter.h).

    Opens with O_PATH pass: they only look up a name, whatever else their flags say.
    """
    lines = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_JUMP_IF_EQUAL, 0, 6, architecture),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_JUMP_IF_EQUAL, 0, 4, number),
        (_LOAD, 0, 0, _FLAGS_AT),
        (_JUMP_IF_ANY_SET, 2, 0, os.O_PATH),
        (_AND, 0, 0, os.O_ACCMODE),
        (_JUMP_IF_EQUAL, 0, 1, os.O_RDONLY),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ERRNO | _EACCES),
    ]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def install() -> None:
    """Install the filter for this process and all its descendants.

    Raises:
        OSError: the kernel refused it.
        KeyError: the architecture is not supported.
    """
    code = program(*_ARCHITECTURES[platform.machine()])
    kept = ctypes.create_string_buffer(code, len(code))
    head = struct.pack("@HP", len(code) // 8, ctypes.addressof(kept))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, head),
    ):
        if libc.prctl(*arguments, 0, 0) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    install()
    os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606
