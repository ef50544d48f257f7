"""What a build is to do: the request, validated, and how it is kept while the build is in
progress."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from sandyard.server.core.egress import Policy
from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.core.ids import check_slug, checked_text
from sandyard.server.service.sandboxes.fields import check_account, checked_env
from sandyard.server.service.templates.templates import check_tag

_SOURCES: Final = ("base", "image", "upload", "dockerfile")
IMAGE: Final = (
    r"[a-z0-9][a-z0-9._-]*(:[0-9]{1,5})?(/[a-z0-9]+([._-]+[a-z0-9]+)*)*"
    r"(:[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?(@sha256:[0-9a-f]{64})?"
)
"""What names of images are like: the grammar of the distribution specification, without its rarer
algorithms."""
_IMAGE = re.compile(IMAGE)
PACKAGE: Final = r"[A-Za-z0-9@][^\s\x00-\x1f\x7f]{0,255}"
"""What names of packages are like."""
_PACKAGE = re.compile(PACKAGE)
_PATH_MAX = 4096
_LIST_MAX = 200
COMMAND_MAX: Final = 64 * 1024
_DOCKERFILE_MAX = 1024 * 1024
FILES_BYTES_MAX: Final = 1024 * 1024
_STEPS_MAX, _STEPS_BYTES_MAX, _TAGS_MAX = 500, 1024 * 1024, 20
_MODE = re.compile(r"(0?[0-7]{3,4})?")
BUILD_SECRET: Final = r"[A-Za-z_][A-Za-z0-9_.-]{0,63}"
"""What names of a build's secrets are like."""
_SECRET = re.compile(BUILD_SECRET)
_SECRETS_MAX, _SECRET_MAX, _SECRET_LINES_MAX = 20, 64 * 1024, 500
NAME_MAX: Final = 100
DESCRIPTION_MAX: Final = 1000


@dataclass(frozen=True)
class NewFile:
    """A file to write: its path, its content, and its permissions."""

    path: str
    data: bytes = field(repr=False)
    mode: int = 0o644


class StepKind(StrEnum):
    """What a step does."""

    RUN = "RUN"
    COPY = "COPY"
    ENV = "ENV"
    WORKDIR = "WORKDIR"
    USER = "USER"


@dataclass(frozen=True)
class Step:
    """A step of a build, as an instruction of a Dockerfile. Its `args`:

    RUN      a shell command, and the user to run it as (default: that of the last USER)
    COPY     a path in the archive `upload`, where to copy it to, then its owner and its mode in
             octal, each of which may be empty; of a folder the contents are copied
    ENV      names, each with its value
    WORKDIR  a path; the folder is created
    USER     the name of a user, who is created, and `true` if they may use sudo

    `phase` is what the log calls it. With `force` nothing that was kept is used from here on.
    """

    kind: StepKind
    args: tuple[str, ...]
    phase: str
    upload: str | None = None
    force: bool = False


@dataclass(frozen=True)
class NewTemplate:
    """The request for a new version of a template. Exactly one of `base`, `image`, `upload` and
    `dockerfile` is given; None means the default.

    `base` is a template. `credentials` is the id of what a registry asks for. `upload` and
    `context` are ids of uploads: an image's archive, and the context of a Dockerfile. `start` is a
    shell command, `ready` one that ends with 0 once what was started can be used. `secrets` are for
    commands of the build alone. `force` means that nothing from earlier builds is used. `steps`
    come after all else. The version gets the `tags`, and `latest`. `stands_for` is the image that
    `base` is used for. If it `is_bare`, an image's own command and health check are ignored.
    `network` is what the build's machines may reach, and later the machines that wait for
    sandboxes; without it, these reach nothing and the build's anything.
    """

    slug: str
    name: str | None = None
    description: str | None = None
    base: str | None = None
    image: str | None = None
    upload: str | None = None
    dockerfile: str | None = field(default=None, repr=False)
    context: str | None = None
    credentials: str | None = None
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
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    force: bool = False
    steps: tuple[Step, ...] = ()
    tags: tuple[str, ...] = ()
    stands_for: str | None = None
    is_bare: bool = False
    network: Policy | None = None

    @property
    def uploads(self) -> tuple[tuple[str, str], ...]:
        """The uploads that the build needs, each with the name of its field."""
        named = (("upload", self.upload), ("context", self.context))
        every = (*named, *(("steps", one.upload) for one in self.steps))
        return tuple((name, one) for name, one in every if one is not None)

    @property
    def is_cached(self) -> bool:
        """Whether its machines may be kept for later builds. What is secret stays in their
        memory."""
        return not self.secrets and self.credentials is None

    @property
    def has_steps(self) -> bool:
        """Whether anything is to be done in a machine of the source."""
        return bool(self.apt or self.pip or self.npm or self.files or self.run or self.steps)


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
    if wish.credentials is not None and wish.image is None and wish.dockerfile is None:
        raise InvalidArgumentError(
            "cannot use credentials: only an image or a dockerfile comes from a registry",
            field="credentials",
        )
    if wish.image is not None and (len(wish.image) > 512 or not _IMAGE.fullmatch(wish.image)):
        raise InvalidArgumentError(
            "cannot use this image: write it as name[:tag][@sha256:digest], such as "
            "docker.io/library/python:3.13-slim",
            field="image",
        )
    _check_text(wish.name, "name", NAME_MAX)
    _check_text(wish.description, "description", DESCRIPTION_MAX)
    _check_text(wish.dockerfile, "dockerfile", _DOCKERFILE_MAX)
    for name in ("start", "ready"):
        _check_text(getattr(wish, name), name, COMMAND_MAX)
    for name in ("apt", "pip", "npm"):
        _check_packages(getattr(wish, name), name)
    if len(wish.run) > _LIST_MAX:
        raise InvalidArgumentError(f"cannot run over {_LIST_MAX} commands", field="run")
    for one in wish.run:
        _check_text(one, "run", COMMAND_MAX)
    checked_env(wish.env)
    _check_secrets(wish.secrets)
    _check_files(wish.files)
    if wish.default_user is not None:
        check_account(wish.default_user, field="default_user")
    if wish.workdir is not None:
        _check_path(wish.workdir, "workdir")
    _check_steps(wish.steps)
    check_tags(wish.tags)


def check_tags(tags: Sequence[str]) -> None:
    """Refuse tags that no version can have.

    Raises:
        InvalidArgumentError: see `check_tag`; or there are too many.
    """
    if len(tags) > _TAGS_MAX:
        raise InvalidArgumentError(f"cannot use over {_TAGS_MAX} tags", field="tags")
    for one in tags:
        check_tag(one)


def _check_steps(steps: tuple[Step, ...]) -> None:
    if len(steps) > _STEPS_MAX:
        raise InvalidArgumentError(f"cannot take over {_STEPS_MAX} steps", field="steps")
    size = 0
    for one in steps:
        for arg in one.args:
            checked_text(arg, field="steps")
            size += len(arg.encode())
        count = len(one.args)
        match one.kind:
            case StepKind.RUN:
                is_right = count in (1, 2) and bool(one.args[0].strip())
                users = one.args[1:]
            case StepKind.COPY:
                is_right = 2 <= count <= 4 and one.upload is not None and all(one.args[:2])
                is_right = is_right and _MODE.fullmatch("".join(one.args[3:])) is not None
                users = tuple(part for part in "".join(one.args[2:3]).split(":", 1) if part)
            case StepKind.ENV:
                is_right, users = count > 0 and count % 2 == 0, ()
                checked_env(dict(zip(one.args[::2], one.args[1::2], strict=False)))
            case StepKind.WORKDIR:
                is_right, users = count == 1 and bool(one.args[0]), ()
            case StepKind.USER:
                is_right = count in (1, 2) and "".join(one.args[1:]) in ("", "true", "false")
                users = one.args[:1]
        if not is_right:
            raise InvalidArgumentError(
                f"cannot take {one.phase}, {one.kind}: its arguments are wrong", field="steps"
            )
        for user in users:
            check_account(user, field="steps")
    if size > _STEPS_BYTES_MAX:
        raise InvalidArgumentError("cannot take over 1 MiB of steps", field="steps")


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
                f"cannot install {one[:80]!r}: it is not a package name", field=field_name
            )


def _check_secrets(secrets: Mapping[str, str]) -> None:
    if len(secrets) > _SECRETS_MAX:
        raise InvalidArgumentError(f"cannot use over {_SECRETS_MAX} secrets", field="secrets")
    for name, value in secrets.items():
        if not _SECRET.fullmatch(name):
            raise InvalidArgumentError(
                f"cannot use a secret named {name[:80]!r}: it begins with a letter or _, and has "
                "letters, digits, _, . and - after that, at most 64",
                field="secrets",
            )
        checked_text(value, field="secrets")
        if not 1 <= len(value.encode()) <= _SECRET_MAX:
            raise InvalidArgumentError(
                f"cannot use the secret {name}: it needs 1 to {_SECRET_MAX} bytes", field="secrets"
            )
    # Each is looked for in each line of the log.
    if sum(len(one.splitlines()) for one in secrets.values()) > _SECRET_LINES_MAX:
        raise InvalidArgumentError(
            f"cannot use secrets of over {_SECRET_LINES_MAX} lines together", field="secrets"
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
        is_plain = is_plain or path in ("/", "~")
    if not is_plain or len(path.encode()) > _PATH_MAX or path.endswith("/") is not (path == "/"):
        raise InvalidArgumentError(
            f"cannot use the path {path[:80]!r}: it begins with / and has no ..", field=field_name
        )
