"""The only access to a workspace's files: by descriptors, beneath its root.

Other writers may be hostile and active at the same time: any name may become a link between two
system calls. So paths are resolved only by openat2(2), which stays beneath the root, and the type
of what was opened is read from the descriptor. Operations on names (create, rename, delete) take a
single name in an open directory, and never follow links.

Everything here blocks, and raises OSError.
"""

import contextlib
import ctypes
import errno
import os
import secrets
import stat
from collections.abc import Iterator

from sandyard.server.core.errors import UnsupportedError

Parts = tuple[bytes, ...]
"""A path beneath the root, name by name; () is the root."""

_OPENAT2 = 437
_NO_XDEV, _NO_MAGICLINKS, _BENEATH = 0x01, 0x02, 0x08
_RENAME_NOREPLACE = 1
_TRIES = 64
_LOOK = os.O_PATH | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
PASSING = b".sandyard-passing-"
"""How names begin that are there for a moment: of what is being written, copied, removed."""

_libc = ctypes.CDLL(None, use_errno=True)


class _How(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


def passing_name() -> bytes:
    """Return a unique temporary name."""
    return PASSING + secrets.token_hex(8).encode()


def _open(root: int, path: bytes, flags: int) -> int:
    """Open a path beneath a root. Links that stay beneath it are followed."""
    how = _How(flags, 0, _BENEATH | _NO_MAGICLINKS | _NO_XDEV)
    for _ in range(_TRIES):
        found = int(
            _libc.syscall(_OPENAT2, root, path or b".", ctypes.byref(how), ctypes.sizeof(how))
        )
        if found >= 0:
            return found
        number = ctypes.get_errno()
        # A parent is being renamed: the kernel cannot determine the path, and gives up.
        if number not in (errno.EAGAIN, errno.EINTR):
            break
    if number == errno.ENOSYS:
        raise UnsupportedError("cannot open files safely: this kernel has no openat2 (Linux 5.6)")
    raise OSError(number, os.strerror(number))


class Root:
    """A workspace's root, held open. Use it as a context manager."""

    def __init__(self, path: os.PathLike[str]) -> None:
        self._fd = os.open(path, _FOLDER | os.O_NOFOLLOW)

    def __enter__(self) -> "Root":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def stat(self, path: Parts) -> os.stat_result:
        """Return the status of a path, following links."""
        with self._looked_at(path) as fd:
            return os.fstat(fd)

    @contextlib.contextmanager
    def _looked_at(self, path: Parts) -> Iterator[int]:
        fd = _open(self._fd, b"/".join(path), _LOOK)
        try:
            yield fd
        finally:
            os.close(fd)

    def open_file(self, path: Parts) -> int:
        """Open a regular file for reading; never open or wait for anything else.

        Raises:
            OSError: EISDIR for a directory, EINVAL for a special file.
        """
        with self._looked_at(path) as fd:
            mode = os.fstat(fd).st_mode
            if stat.S_ISDIR(mode):
                raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISREG(mode):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            # The same file that was examined, whatever has its name by now.
            return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    @contextlib.contextmanager
    def folder(self, path: Parts, *, makes: bool = False) -> Iterator["Folder"]:
        """Open a directory; with `makes`, create it and its parents."""
        fd = self._made(path) if makes else _open(self._fd, b"/".join(path), _FOLDER)
        try:
            yield Folder(fd)
        finally:
            os.close(fd)

    def _made(self, path: Parts) -> int:
        there = len(path)
        while True:
            try:
                fd = _open(self._fd, b"/".join(path[:there]), _FOLDER)
                break
            except FileNotFoundError:
                there -= 1
        try:
            for end in range(there + 1, len(path) + 1):
                with contextlib.suppress(FileExistsError):
                    Folder(fd).make(path[end - 1])
                below = _open(self._fd, b"/".join(path[:end]), _FOLDER)
                os.close(fd)
                fd = below
        except BaseException:
            os.close(fd)
            raise
        return fd


class Folder:
    """An open directory, and operations on single names in it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def look(self, name: bytes) -> os.stat_result:
        """Return the status of a name, without following it."""
        return os.lstat(name, dir_fd=self.fd)

    def names(self) -> Iterator[tuple[bytes, bool]]:
        """Yield the entries: name, and whether it is a directory."""
        # A descriptor of its own, because a directory's position is shared.
        fd = os.open(b".", _FOLDER, dir_fd=self.fd)
        try:
            with os.scandir(fd) as found:
                for one in found:
                    yield os.fsencode(one.name), one.is_dir(follow_symlinks=False)
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def folder(self, name: bytes) -> Iterator["Folder"]:
        """Open a subdirectory that is not a link."""
        fd = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=self.fd)
        try:
            yield Folder(fd)
        finally:
            os.close(fd)

    def open_file(self, name: bytes) -> int:
        """Open a regular file that is not a link. See Root.open_file."""
        fd = os.open(name, _LOOK | os.O_NOFOLLOW, dir_fd=self.fd)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        finally:
            os.close(fd)

    def make(self, name: bytes) -> None:
        """Create a subdirectory with this one's owner."""
        os.mkdir(name, 0o755, dir_fd=self.fd)
        with self.folder(name) as made:
            self.hand_over(made.fd)

    def hand_over(self, fd: int) -> None:
        """Give an entry this directory's owner, if running as root."""
        whose = os.fstat(self.fd)
        with contextlib.suppress(PermissionError):
            os.fchown(fd, whose.st_uid, whose.st_gid)

    def copy_link(self, name: bytes, target: "Folder", to: bytes) -> None:
        """Create a link elsewhere with the same target as one here."""
        os.symlink(os.readlink(name, dir_fd=self.fd), to, dir_fd=target.fd)

    def rename(self, name: bytes, target: "Folder", to: bytes, *, replaces: bool) -> None:
        """Rename an entry, also into another directory; replace the target, or fail if it exists.

        Raises:
            OSError: EEXIST if the target exists and must not be replaced.
        """
        if replaces:
            os.rename(name, to, src_dir_fd=self.fd, dst_dir_fd=target.fd)
            return
        done = _libc.renameat2(self.fd, name, target.fd, to, _RENAME_NOREPLACE)
        if done == 0:
            return
        number = ctypes.get_errno()
        if number != errno.EINVAL:
            raise OSError(number, os.strerror(number))
        # Network file systems lack that flag. There a link replaces nothing, and a
        # directory at most an empty one.
        if stat.S_ISDIR(self.look(name).st_mode):
            with contextlib.suppress(FileNotFoundError):
                target.look(to)
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            os.rename(name, to, src_dir_fd=self.fd, dst_dir_fd=target.fd)
        else:
            os.link(name, to, src_dir_fd=self.fd, dst_dir_fd=target.fd, follow_symlinks=False)
            self.unlink(name)

    def unlink(self, name: bytes) -> None:
        """Delete a file or link."""
        os.unlink(name, dir_fd=self.fd)

    def remove_empty(self, name: bytes) -> None:
        """Delete an empty directory."""
        os.rmdir(name, dir_fd=self.fd)

    def draft(self) -> "Draft":
        """Begin a file without a name."""
        return Draft(self)


class Draft:
    """A file that is being written and has no name yet. Use it as a context manager.

    If the process ends, the file is gone.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._passing: bytes | None = None
        flags = os.O_WRONLY | os.O_CLOEXEC
        try:
            self.fd = os.open(b".", flags | os.O_TMPFILE, 0o600, dir_fd=folder.fd)
        except OSError as error:
            if os.fstat(folder.fd).st_nlink == 0:  # the folder was removed
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from error
            # A network file system knows no file without a name.
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
            self._passing = passing_name()
            flags |= os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            self.fd = os.open(self._passing, flags, 0o600, dir_fd=folder.fd)

    def __enter__(self) -> "Draft":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
        if self._passing is not None:
            with contextlib.suppress(FileNotFoundError):
                self._folder.unlink(self._passing)

    def write(self, data: bytes) -> None:
        """Append data."""
        view = memoryview(data)
        while view:
            view = view[os.write(self.fd, view) :]

    def keep(
        self, name: bytes, *, replaces: bool, mode: int = 0o644, is_synced: bool = True
    ) -> None:
        """Sync the file and give it a name; replace an existing file atomically, or fail if it
        exists.

        A replaced file's owner and permissions are kept, instead of `mode`.

        Raises:
            OSError: EEXIST if the name exists and must not be replaced; EISDIR for a directory.
        """
        folder = self._folder
        before = None
        with contextlib.suppress(FileNotFoundError):
            before = folder.look(name)
        if before is not None and not replaces:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        if before is not None and stat.S_ISDIR(before.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if before is not None and stat.S_ISREG(before.st_mode):
            with contextlib.suppress(PermissionError):
                os.fchown(self.fd, before.st_uid, before.st_gid)
            os.fchmod(self.fd, before.st_mode & 0o777)
        else:
            folder.hand_over(self.fd)
            os.fchmod(self.fd, mode & 0o777)
        if is_synced:
            os.fsync(self.fd)
        if not replaces:
            self._link(name)
        else:
            passing = passing_name()
            self._link(passing)
            try:
                folder.rename(passing, folder, name, replaces=True)
            except BaseException:
                folder.unlink(passing)
                raise
        if is_synced:
            os.fsync(folder.fd)

    def _link(self, name: bytes) -> None:
        at = self._folder.fd
        if self._passing is None:
            # Its own descriptor is the one link that is followed.
            os.link(f"/proc/self/fd/{self.fd}", name, dst_dir_fd=at, follow_symlinks=True)
        else:
            os.link(self._passing, name, src_dir_fd=at, dst_dir_fd=at, follow_symlinks=False)
