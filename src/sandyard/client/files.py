"""Files of a sandbox: `Sandyard(…).files("name")`."""

import os
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import httpx

from sandyard.client.errors import TransferError

_PIECE = 1024 * 1024
Progress = Callable[[int], object]


class Channel(Protocol):
    """What speaks HTTP for the parts of a client."""

    def ask(self, method: str, path: str, **options: Any) -> Any:
        """Return the answer's JSON, or raise what the server's error means."""
        ...

    def stream(self, method: str, path: str, **options: Any) -> Any:
        """Return a context manager of an answer that is read as it comes."""
        ...


@dataclass(frozen=True)
class FileInfo:
    """What the sandbox's file system tells of a file; `raw` has every field."""

    path: str
    name: str
    type: str
    size: int
    mode: str
    owner: str | None
    modified_at: str
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder."""
        return self.type == "folder"


class Files:
    """The files of one sandbox, as `user` sees them.

    A path that does not begin with / is below /workspace. What goes wrong is an `ApiError`, whose
    `details["reason"]` tells what: absent, exists, not_a_folder, is_a_folder, denied or no_space.
    """

    def __init__(self, channel: Channel, sandbox_path: str, user: str = "root") -> None:
        self._channel = channel
        self._path = f"{sandbox_path}/files"
        self._user = user

    def read(self, path: str) -> bytes:
        """Return a file's bytes."""
        return b"".join(self.read_pieces(path))

    def read_text(self, path: str) -> str:
        """Return a file as text, with U+FFFD for what is not UTF-8."""
        return self.read(path).decode(errors="replace")

    def read_pieces(self, path: str) -> Iterator[bytes]:
        """Yield a file's bytes as they come; nothing more of it is held."""
        with self._reading(self._path, path) as answer:
            yield from answer.iter_bytes(_PIECE)

    def write(
        self,
        path: str,
        data: bytes | str | Iterable[bytes],
        *,
        mode: str | None = None,
        owner: str | None = None,
    ) -> int:
        """Write a file, and return how many bytes it has; the old one stays until that is done."""
        content = data.encode() if isinstance(data, str) else data
        given = {"path": path, "user": self._user, "mode": mode, "owner": owner}
        query = {name: value for name, value in given.items() if value is not None}
        answer = self._channel.ask("PUT", self._path, params=query, content=content, timeout=None)
        return int(answer["data"]["size"])

    def list(self, path: str = "", *, depth: int = 1) -> list[FileInfo]:
        """Return what is in a folder, by name, each folder followed by what is in it."""
        query = {"path": path or "/workspace", "depth": depth, "user": self._user}
        found = self._channel.ask("GET", f"{self._path}/list", params=query)["data"]["entries"]
        return [_info(one) for one in found]

    def info(self, path: str) -> FileInfo:
        """Return what a path leads to."""
        query = {"path": path, "user": self._user}
        return _info(self._channel.ask("GET", f"{self._path}/stat", params=query)["data"])

    def make_folder(self, path: str) -> FileInfo:
        """Make a folder, and those above it; one that is there is fine."""
        body = {"path": path, "user": self._user}
        return _info(self._channel.ask("POST", f"{self._path}/mkdir", json=body)["data"])

    def move(self, source: str, target: str, *, overwrite: bool = False) -> FileInfo:
        """Give a file or folder another path."""
        return self._transfer("move", source, target, overwrite)

    def copy(self, source: str, target: str, *, overwrite: bool = False) -> FileInfo:
        """Copy a file, or a folder with all that is in it."""
        return self._transfer("copy", source, target, overwrite)

    def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file, an empty folder, or with `recursive` a full one."""
        query = {"path": path, "user": self._user, "recursive": recursive}
        self._channel.ask("DELETE", self._path, params=query)

    def upload(self, local: str | Path, path: str, *, on_progress: Progress | None = None) -> None:
        """Copy a file or folder of this computer to a path in the sandbox.

        `on_progress` is told of each number of bytes that went out.

        Raises:
            ApiError: the sandbox would not take it.
            OSError: it cannot be read here.
        """
        source = Path(local)
        if source.is_dir():
            query = {"path": path, "user": self._user}
            with _packed(source) as archive:
                self._channel.ask(
                    "PUT", f"{self._path}/archive", params=query,
                    content=_told(_pieces_of(archive), on_progress), timeout=None,
                )  # fmt: skip
            return
        with source.open("rb") as file:
            mode = f"{source.stat().st_mode & 0o777:04o}"
            self.write(path, _told(_pieces_of(file), on_progress), mode=mode)

    def download(
        self, path: str, local: str | Path, *, on_progress: Progress | None = None
    ) -> None:
        """Copy a file or folder of the sandbox to a path of this computer.

        What is there stays until a file has come whole. Of a folder nothing is written outside of
        `local`, whatever the sandbox says; devices, and links that lead out of it, are refused.

        Raises:
            ApiError: there is no such thing.
            TransferError: of a folder not all may be, or can be, written here.
            OSError: it cannot be written here.
        """
        target, found = Path(local), self.info(path)
        if not found.is_folder:
            part = target.with_name(f".{target.name}.part")
            try:
                with part.open("wb") as file:
                    for piece in _told(self.read_pieces(path), on_progress):
                        file.write(piece)
                part.replace(target)
            finally:
                part.unlink(missing_ok=True)
            return
        target.mkdir(parents=True, exist_ok=True)
        with self._reading(f"{self._path}/archive", path) as answer:
            source = _Pieces(_told(answer.iter_bytes(_PIECE), on_progress))
            try:
                with tarfile.open(fileobj=source, mode="r|") as archive:  # type: ignore[call-overload]
                    archive.extractall(target, filter="data")
            except tarfile.TarError as error:
                raise TransferError(f"cannot copy {path} here: {error}") from error

    @contextmanager
    def _reading(self, url: str, path: str) -> Iterator[httpx.Response]:
        query = {"path": path, "user": self._user}
        with self._channel.stream("GET", url, params=query) as answer:
            yield answer

    def _transfer(self, action: str, source: str, target: str, overwrite: bool) -> FileInfo:
        body = {"from": source, "to": target, "overwrite": overwrite, "user": self._user}
        return _info(self._channel.ask("POST", f"{self._path}/{action}", json=body)["data"])


class _Pieces:
    """Pieces, as a file that can be read once."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._left = b""

    def read(self, size: int) -> bytes:
        while len(self._left) < size and (more := next(self._pieces, None)) is not None:
            self._left += more
        data, self._left = self._left[:size], self._left[size:]
        return data


@contextmanager
def _packed(folder: Path) -> Iterator[IO[bytes]]:
    """Yield a tar archive of a folder, made as it is read."""
    reader, writer = os.pipe()
    trouble: list[BaseException] = []

    def pack() -> None:
        try:
            with (
                os.fdopen(writer, "wb") as file,
                tarfile.open(fileobj=file, mode="w|") as archive,
            ):
                archive.add(folder, arcname=".")
        except BrokenPipeError:
            pass  # nobody reads on: what is told of that is elsewhere
        except OSError as error:
            trouble.append(error)

    packing = threading.Thread(target=pack, daemon=True)
    packing.start()
    with os.fdopen(reader, "rb") as archive:
        yield archive
    packing.join()
    if trouble:
        raise trouble[0]


def _pieces_of(file: IO[bytes]) -> Iterator[bytes]:
    while data := file.read(_PIECE):
        yield data


def _told(pieces: Iterator[bytes], on_progress: Progress | None) -> Iterator[bytes]:
    for piece in pieces:
        yield piece
        if on_progress is not None:
            on_progress(len(piece))


def _info(raw: Mapping[str, Any]) -> FileInfo:
    return FileInfo(
        path=raw["path"],
        name=raw["name"],
        type=raw["type"],
        size=raw["size"],
        mode=raw["mode"],
        owner=raw["owner"],
        modified_at=raw["modifiedAt"],
        raw=raw,
    )
