"""What a build is to do: the request, validated, and how it is kept while the build is in
progress."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.core.ids import check_slug, checked_text
from sandyard.server.service.sandboxes.fields import check_account, checked_env

_SOURCES: Final = ("base", "image", "upload", "dockerfile")
_IMAGE = re.compile(
    r"[a-z0-9][a-z0-9._-]*(:[0-9]{1,5})?(/[a-z0-9]+([._-]+[a-z0-9]+)*)*"
    r"(:[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?(@sha256:[0-9a-f]{64})?"
)  # the grammar of the distribution specification, without its rarer algorithms
_PACKAGE = re.compile(r"[A-Za-z0-9@][^\s\x00-\x1f\x7f]{0,255}")
_PATH_MAX = 4096
_LIST_MAX = 200
_COMMAND_MAX = 64 * 1024
_DOCKERFILE_MAX = 1024 * 1024
FILES_BYTES_MAX: Final = 1024 * 1024
_NAME_MAX, _DESCRIPTION_MAX = 100, 1000


@dataclass(frozen=True)
class NewFile:
    """A file to write: its path, its content, and its permissions."""

    path: str
    data: bytes = field(repr=False)
    mode: int = 0o644


@dataclass(frozen=True)
class NewTemplate:
    """The request for a new version of a template. Exactly one of `base`, `image`, `upload` and
    `dockerfile` is given; None means the default.

    `base` is a template. `upload` and `context` are ids of uploads: an image's archive, and the
    context of a Dockerfile. `start` is a shell command, `ready` one that ends with 0 once what was
    started can be used.
    """

    slug: str
    name: str | None = None
    description: str | None = None
    base: str | None = None
    image: str | None = None
    upload: str | None = None
    dockerfile: str | None = field(default=None, repr=False)
    context: str | None = None
    apt: tuple[str, ...] = ()
    pip: tuple[str, ...] = ()
    npm: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    files: tuple[NewFile, ...] = ()
    run: tuple[str, ...] = ()
    start: str | None = None
    ready: str | None = None
    default_user: str | None = None
    workdir: str | None = None
    vcpus: int | None = None
    memory: str | None = None
    disk: str | None = None

    @property
    def has_steps(self) -> bool:
        """Whether anything is to be done in a machine of the source."""
        return bool(self.apt or self.pip or self.npm or self.files or self.run)


def check_plan(wish: NewTemplate) -> None:
    """Refuse an invalid request.

    Raises:
        InvalidArgumentError: a value is invalid; `facts` name the field.
    """
    check_slug(wish.slug)
    given = [one for one in _SOURCES if getattr(wish, one) is not None]
    if len(given) != 1:
        raise InvalidArgumentError(
            f"cannot build the template from {' and '.join(given) or 'nothing'}: give exactly one "
            "of base, image, upload and dockerfile",
            field=given[1] if given else "base",
        )
    if wish.context is not None and wish.dockerfile is None:
        raise InvalidArgumentError(
            "cannot use context: it is the context of a dockerfile", field="context"
        )
    if wish.image is not None and (len(wish.image) > 512 or not _IMAGE.fullmatch(wish.image)):
        raise InvalidArgumentError(
            "cannot use this image: write it as name[:tag][@sha256:digest], such as "
            "docker.io/library/python:3.13-slim",
            field="image",
        )
    _check_text(wish.name, "name", _NAME_MAX)
    _check_text(wish.description, "description", _DESCRIPTION_MAX)
    _check_text(wish.dockerfile, "dockerfile", _DOCKERFILE_MAX)
    for name in ("start", "ready"):
        _check_text(getattr(wish, name), name, _COMMAND_MAX)
    for name in ("apt", "pip", "npm"):
        _check_packages(getattr(wish, name), name)
    if len(wish.run) > _LIST_MAX:
        raise InvalidArgumentError(f"cannot run over {_LIST_MAX} commands", field="run")
    for one in wish.run:
        _check_text(one, "run", _COMMAND_MAX)
    checked_env(wish.env)
    _check_files(wish.files)
    if wish.default_user is not None:
        check_account(wish.default_user, field="default_user")
    if wish.workdir is not None:
        _check_path(wish.workdir, "workdir")


def _check_text(text: str | None, field_name: str, most: int) -> None:
    if text is None:
        return
    checked_text(text, field=field_name)
    if not text.strip() or len(text.encode()) > most:
        raise InvalidArgumentError(
            f"cannot use {{field}}: it needs 1 to {most} bytes", field=field_name
        )


def _check_packages(names: tuple[str, ...], field_name: str) -> None:
    if len(names) > _LIST_MAX:
        raise InvalidArgumentError(
            f"cannot install over {_LIST_MAX} packages at once", field=field_name
        )
    for one in names:
        checked_text(one, field=field_name)
        if not _PACKAGE.fullmatch(one):
            raise InvalidArgumentError(
                f"cannot install {one[:80]!r}: it is no name of a package", field=field_name
            )


def _check_files(files: tuple[NewFile, ...]) -> None:
    if len(files) > _LIST_MAX:
        raise InvalidArgumentError(f"cannot write over {_LIST_MAX} files", field="files")
    for one in files:
        _check_path(one.path, "files")
        if not 0 <= one.mode <= 0o7777:
            raise InvalidArgumentError(
                "cannot use mode: give it in octal, such as 644", field="files"
            )
    if sum(len(one.data) for one in files) > FILES_BYTES_MAX:
        raise InvalidArgumentError(
            "cannot write over 1 MiB of files: put them into the context of a Dockerfile",
            field="files",
        )


def _check_path(path: str, field_name: str) -> None:
    checked_text(path, field=field_name)
    is_plain = path.startswith("/") and ".." not in path.split("/") and path != "/"
    if field_name == "workdir":
        is_plain = is_plain or path == "/"
    if not is_plain or len(path.encode()) > _PATH_MAX or path.endswith("/") is not (path == "/"):
        raise InvalidArgumentError(
            f"cannot use the path {path[:80]!r}: it begins with / and has no ..", field=field_name
        )
