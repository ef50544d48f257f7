"""Operations on the files of a workspace. All of them block. See `beneath` for their safety."""

import contextlib
import errno
import itertools
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from sandyard.server.core.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    NotFoundError,
    PayloadTooLargeError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.service.workspaces.beneath import (
    PASSING,
    Draft,
    Folder,
    Parts,
    Root,
    passing_name,
)

PIECE = 256 * 1024
LIST_MAX = 100_000
COUNT_MAX = 10_000
"""How many of a folder's entries are counted where it is listed in another."""
WALK_MAX = 1_000_000
DEPTH_MAX = 128
"""How deep folders are copied and measured; they are removed however deep they are."""
_TRIES, _AT_ONCE = 8, 100_000
"""How often, and with how many names each time, one folder is emptied that is written into."""
_LEVELS = 100  # directories that are open at the same time during a removal


@dataclass(frozen=True)
class TreeEntry:
    """An entry of a listing; `count` is the number of entries in a directory."""

    path: Parts
    is_folder: bool
    size: int
    modified: float
    count: int | None = None
    is_link: bool = False

    @property
    def name(self) -> bytes:
        """Its name; empty for the root."""
        return self.path[-1] if self.path else b""


@dataclass(frozen=True)
class Measure:
    """The bytes, files and directories below a path."""

    size: int
    files: int
    folders: int


def _entry(
    path: Parts, found: os.stat_result, count: int | None = None, *, is_link: bool = False
) -> TreeEntry:
    is_folder = stat.S_ISDIR(found.st_mode)
    size = found.st_size if stat.S_ISREG(found.st_mode) else 0
    return TreeEntry(path, is_folder, size, found.st_mtime, count if is_folder else None, is_link)


def look(root: Root, path: Parts) -> TreeEntry:
    """Return the entry at a path."""
    with _typed_errors(path):
        found = root.stat(path)
        if not stat.S_ISDIR(found.st_mode):
            return _entry(path, found)
        with root.folder(path) as folder:
            return _entry(path, found, _count(folder))


def listed(root: Root, path: Parts, *, hidden: bool) -> list[TreeEntry]:
    """List a directory, subdirectories first, by name; with `hidden` also names that begin with a
    dot.

    A link is shown as its target within the workspace, and marked as a link.

    Raises:
        PayloadTooLargeError: it has over LIST_MAX entries.
    """
    found: list[TreeEntry] = []
    with _typed_errors(path), root.folder(path) as folder:
        for name, _ in folder.names():
            if name.startswith(b".") and (not hidden or name.startswith(PASSING)):
                continue
            if len(found) >= LIST_MAX:
                raise PayloadTooLargeError(
                    f"cannot list {shown(path)}: it has over {LIST_MAX} entries; look at it in a "
                    "sandbox",
                    limit=LIST_MAX,
                )
            # Entries that disappear meanwhile are left out.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                found.append(_in(root, folder, path, name))
    return sorted(found, key=lambda one: (not one.is_folder, one.name))


def _in(root: Root, folder: Folder, path: Parts, name: bytes) -> TreeEntry:
    at = folder.look(name)
    if stat.S_ISLNK(at.st_mode):
        with contextlib.suppress(OSError):
            at = root.stat((*path, name))
        return _entry((*path, name), at, is_link=True)
    if not stat.S_ISDIR(at.st_mode):
        return _entry((*path, name), at)
    with folder.folder(name) as inner:
        return _entry((*path, name), at, _count(inner))


def _count(folder: Folder) -> int:
    count = 0
    for _ in folder.names():
        count += 1
        if count >= COUNT_MAX:
            break
    return count


def measured(root: Root, path: Parts) -> Measure:
    """Return the size below a path. Links count as themselves.

    Raises:
        PayloadTooLargeError: it has over WALK_MAX entries.
    """
    with _typed_errors(path):
        found = root.stat(path)
        if not stat.S_ISDIR(found.st_mode):
            return Measure(found.st_size if stat.S_ISREG(found.st_mode) else 0, 1, 0)
        with root.folder(path) as folder:
            size, files, folders, left = 0, 0, 0, WALK_MAX
            for at in _below(folder, DEPTH_MAX):
                left -= 1
                if left < 0:
                    raise PayloadTooLargeError(
                        f"cannot measure {shown(path)}: it has over {WALK_MAX} entries",
                        limit=WALK_MAX,
                    )
                if stat.S_ISDIR(at.st_mode):
                    folders += 1
                else:
                    files += 1
                    size += at.st_size if stat.S_ISREG(at.st_mode) else 0
            return Measure(size, files, folders)


def weighed(root: Root, path: Parts) -> int:
    """Return the size of a copy of a path, in bytes."""
    with _typed_errors(path):
        _check_not_root(path)
        with root.folder(path[:-1]) as above:
            at = above.look(path[-1])
        if stat.S_ISDIR(at.st_mode):
            return measured(root, path).size
        return at.st_size if stat.S_ISREG(at.st_mode) else 0


def _below(folder: Folder, depth: int) -> Iterator[os.stat_result]:
    for name, is_folder in folder.names():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            yield folder.look(name)
            if is_folder and not depth:
                raise InvalidArgumentError(
                    f"cannot look through this: its directories are over {DEPTH_MAX} deep",
                    field="path",
                )
            if is_folder:
                try:
                    with folder.folder(name) as inner:
                        yield from _below(inner, depth - 1)
                except OSError as error:
                    if error.errno != errno.ELOOP:  # it is a link by now
                        raise


def opened(root: Root, path: Parts) -> tuple[int, TreeEntry]:
    """Open a file and return its descriptor, which the caller owns, and its entry."""
    with _typed_errors(path):
        fd = root.open_file(path)
    return fd, _entry(path, os.fstat(fd))


def make_folder(root: Root, path: Parts) -> TreeEntry:
    """Create a directory and its parents.

    Raises:
        AlreadyExistsError: the name is taken.
    """
    with _typed_errors(path):
        _check_not_root(path)
        with root.folder(path[:-1], makes=True) as above:
            above.make(path[-1])
    return look(root, path)


@contextlib.contextmanager
def drafted(root: Root, folder: Parts) -> Iterator[Draft]:
    """Begin a file in a directory, which is created if necessary. It appears when it is kept."""
    with _typed_errors(folder), root.folder(folder, makes=True) as place, place.draft() as draft:
        yield draft


def write(draft: Draft, folder: Parts, data: bytes) -> None:
    """Append to a draft."""
    with _typed_errors(folder):
        draft.write(data)


def keep(draft: Draft, path: Parts, *, replaces: bool) -> None:
    """Give a draft its name. See Draft.keep."""
    with _typed_errors(path):
        draft.keep(path[-1], replaces=replaces)


def move(root: Root, source: Parts, target: Parts, *, replaces: bool) -> TreeEntry:
    """Move or rename a file or directory.

    Raises:
        AlreadyExistsError: the target exists, and must not be replaced.
    """
    with _typed_errors(source, target):
        _check_not_root(source)
        _check_not_root(target)
        with root.folder(source[:-1]) as old:
            old.look(source[-1])
            if source == target and not replaces:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            with root.folder(target[:-1], makes=True) as new, _placed(target, replaces=replaces):
                old.rename(source[-1], new, target[-1], replaces=replaces)
    return _seen(root, target)


def copy(root: Root, source: Parts, target: Parts, *, replaces: bool) -> TreeEntry:
    """Copy a file, or a directory and its contents. The copy appears when it is complete. Links are
    copied as links; special files are skipped.

    Raises:
        AlreadyExistsError: the target exists, and must not be replaced.
        InvalidArgumentError: a directory would be copied into itself.
    """
    with _typed_errors(source, target):
        _check_not_root(source)
        _check_not_root(target)
        if target[: len(source)] == source and target != source and leads_to_folder(root, source):
            raise InvalidArgumentError(f"cannot copy {shown(source)} into itself", field="target")
        passing = passing_name()
        with (
            root.folder(source[:-1]) as old,
            root.folder(target[:-1], makes=True) as new,
            root.folder(()) as top,
        ):
            kind = stat.S_IFMT(old.look(source[-1]).st_mode)
            if kind not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            try:
                _copy(old, source[-1], top, passing, DEPTH_MAX)
                with _placed(target, replaces=replaces):
                    top.rename(passing, new, target[-1], replaces=replaces)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    _remove(top, passing)
                raise
    return _seen(root, target)


@contextlib.contextmanager
def _placed(target: Parts, *, replaces: bool) -> Iterator[None]:
    """Return the error for a target that cannot be replaced."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.EISDIR) or (
            replaces and error.errno in (errno.ENOTEMPTY, errno.EEXIST)
        ):
            raise AlreadyExistsError(
                f"cannot take the place of {shown(target)}: of a directory that is not empty, or "
                "between a file and a directory, nothing takes the place; remove it first"
            ) from error
        raise


def leads_to_folder(root: Root, path: Parts) -> bool:
    """Tell whether a path leads to a directory."""
    return stat.S_ISDIR(root.stat(path).st_mode)


def _copy(old: Folder, name: bytes, new: Folder, to: bytes, depth: int) -> None:
    mode = old.look(name).st_mode
    if stat.S_ISLNK(mode):
        old.copy_link(name, new, to)
    elif stat.S_ISDIR(mode):
        if not depth:
            raise InvalidArgumentError(
                f"cannot copy this: its directories are over {DEPTH_MAX} deep", field="source"
            )
        new.make(to)
        with old.folder(name) as inside, new.folder(to) as made:
            for one, _ in inside.names():
                with contextlib.suppress(FileNotFoundError):
                    _copy(inside, one, made, one, depth - 1)
    elif stat.S_ISREG(mode):
        fd = old.open_file(name)
        try:
            with new.draft() as draft:
                while data := os.read(fd, PIECE):
                    draft.write(data)
                draft.keep(to, replaces=False, mode=mode, is_synced=False)
        finally:
            os.close(fd)


def remove(root: Root, path: Parts) -> None:
    """Delete a file, a link, or a directory with its contents. It disappears at once.

    Raises:
        NotFoundError: it does not exist.
    """
    with _typed_errors(path):
        _check_not_root(path)
        with root.folder(path[:-1]) as above:
            if not stat.S_ISDIR(above.look(path[-1]).st_mode):
                above.unlink(path[-1])
                return
            passing = passing_name()
            with root.folder(()) as top:
                above.rename(path[-1], top, passing, replaces=False)
                _remove(top, passing)


def sweep(root: Root, *, before: float) -> int:
    """Remove leftovers of copies and deletes that were interrupted before a time, in seconds since
    1970; return how many."""
    count = 0
    with root.folder(()) as top:
        for name in [name for name, _ in top.names() if name.startswith(PASSING)]:
            with contextlib.suppress(OSError, SandyardError):
                at = top.look(name)
                # A rename changes one time, a new entry in a directory the other.
                if max(at.st_ctime, at.st_mtime) < before:
                    _remove(top, name)
                    count += 1
    return count


def _remove(top: Folder, name: bytes) -> None:
    """Delete an entry of any depth, even while others write into it."""
    left, tries = [name], Counter[bytes]()
    while left:
        one = left.pop()
        try:
            if not stat.S_ISDIR(top.look(one).st_mode):
                top.unlink(one)
                continue
            left += _empty(top, one, top, _LEVELS)
            top.remove_empty(one)
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
                raise
            tries[one] += 1
            # A directory with very many entries takes several turns.
            if tries[one] > _TRIES:
                raise UnavailableError(
                    "cannot remove all of it now: something writes into it all the time; it is "
                    "out of sight, and the rest goes later"
                ) from error
            left.append(one)


def _empty(folder: Folder, name: bytes, top: Folder, levels: int) -> list[bytes]:
    """Delete a directory's contents. Entries that lie too deep are moved to the top, under the
    returned names. Entries created meanwhile may stay."""
    hung: list[bytes] = []
    with folder.folder(name) as inside:
        # A directory that is filled as fast as it is read has no end.
        for one, is_folder in list(itertools.islice(inside.names(), _AT_ONCE)):
            try:
                if not is_folder:
                    inside.unlink(one)
                elif levels:
                    hung += _empty(inside, one, top, levels - 1)
                    inside.remove_empty(one)
                else:
                    passing = passing_name()
                    inside.rename(one, top, passing, replaces=False)
                    hung.append(passing)
            except OSError as error:
                if error.errno not in (
                    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.EEXIST,
                    errno.ELOOP,
                ):  # fmt: skip
                    raise
    return hung


def _seen(root: Root, path: Parts) -> TreeEntry:
    """Return the entry after an operation; a dangling link is returned as a link."""
    with _typed_errors(path), root.folder(path[:-1]) as folder:
        return _in(root, folder, path[:-1], path[-1])


def _check_not_root(path: Parts) -> None:
    if not path:
        raise InvalidArgumentError(
            "cannot do this to the workspace's root: name something in it", field="path"
        )


def shown(path: Parts) -> str:
    """Return a path for display."""
    return "/" + b"/".join(path).decode("utf-8", "replace")


@contextlib.contextmanager
def _typed_errors(path: Parts, target: Parts | None = None) -> Iterator[None]:
    """Return the error for an error of the operating system."""
    try:
        yield
    except OSError as error:
        raise _trouble(error, shown(path), shown(target if target is not None else path)) from error


def _trouble(error: OSError, path: str, target: str) -> SandyardError:
    number = error.errno
    if number in (errno.ENOENT, errno.ENOTDIR):
        return NotFoundError(
            f"cannot find {path}: it does not exist, or a parent is not a directory"
        )
    if number in (errno.EXDEV, errno.ELOOP):
        return NotFoundError(f"cannot find {path}: a link in the path leads out of the workspace")
    if number in (errno.EEXIST, errno.ENOTEMPTY):
        return AlreadyExistsError(
            f"cannot put anything at {target}: something is there; name another target, or say "
            "that it is to be overwritten"
        )
    if number == errno.EISDIR:
        return InvalidArgumentError(f"cannot do this to {path}: it is a directory", field="path")
    if number in (errno.ENOSPC, errno.EDQUOT):
        return PayloadTooLargeError(
            "cannot write this: the workspace is full, of bytes or of files; remove something first"
        )
    if number in (errno.ENAMETOOLONG, errno.EILSEQ):
        return InvalidArgumentError(
            f"cannot use the path {path[:80]}: it is too long", field="path"
        )
    if number == errno.EINVAL:
        return InvalidArgumentError(
            f"cannot do this to {path}: it is not a regular file, or it would be moved into itself",
            field="path",
        )
    if number in (errno.EPERM, errno.EACCES, errno.EROFS):
        return InvalidArgumentError(f"cannot change {path}: {error.strerror}", field="path")
    return UnavailableError(f"cannot reach the workspace now: {error.strerror}")
