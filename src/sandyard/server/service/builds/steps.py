"""What steps of a build run in: the variables, the user and the working directory that the steps
before them have set, by the rules of Dockerfiles."""

import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.service.builds import recipes
from sandyard.server.service.builds.plan import NewTemplate, Step, StepKind
from sandyard.server.service.sandboxes.fields import check_account, checked_env

HOME: Final = "~"
"""The working directory that stands for the user's home."""
_VARIABLE = re.compile(
    r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)(?:(:[-+])([^}]*))?\})"
)
_WILD = re.compile(r"[*?\[{]")
_VALUE_MAX: Final = 64 * 1024
_PATH_MAX: Final = 4096


@dataclass(frozen=True)
class Setting:
    """The user, directory and environment of a step.

    Without a `user` it runs as root, and without a `workdir` in the user's home; a `workdir` may
    also begin with `~`. `login` are the machine's own variables, which `env` may refer to.
    """

    env: Mapping[str, str]
    user: str
    workdir: str
    login: Mapping[str, str] = field(default_factory=dict)

    def after(self, step: Step) -> "Setting":
        """Return what the next step runs in.

        Raises:
            InvalidArgumentError: variables or a path are too long with all that they refer to, or
                the user can be none.
        """
        match step.kind:
            case StepKind.ENV:
                names, values = step.args[::2], step.args[1::2]
                given = {name: self.filled(one) for name, one in zip(names, values, strict=True)}
                return replace(self, env=checked_env({**self.env, **given}))
            case StepKind.WORKDIR:
                return replace(self, workdir=posixpath.normpath(self.path(step.args[0])))
            case StepKind.USER:
                user = self.filled(step.args[0])
                check_account(user, field="steps")
                return replace(self, user=user)
            case _:
                return self

    def filled(self, text: str) -> str:
        """Return a text with the values of the variables in it. One that is not set is empty.

        Raises:
            InvalidArgumentError: it would have over 64 KiB.
        """
        known = {**self.login, **self.env}
        pieces, size, end = [], 0, 0
        for found in _VARIABLE.finditer(text):
            value = known.get(found[1] or found[2], "")
            if found[3] is not None:
                value = {":-": value or found[4], ":+": found[4] if value else ""}[found[3]]
            pieces += [text[end : found.start()], value]
            size, end = size + found.start() - end + len(value), found.end()
            if size > _VALUE_MAX:
                break
        if size + len(text) - end > _VALUE_MAX:
            raise InvalidArgumentError(
                "cannot take the steps: a value has over 64 KiB with its variables filled in",
                field="steps",
            )
        return "".join([*pieces, text[end:]])

    def path(self, text: str) -> str:
        """Return the path that a text means. It ends with / if that did, and begins with ~ if it is
        below the user's home.

        Raises:
            InvalidArgumentError: it would be too long.
        """
        path = posixpath.join(self.workdir or HOME, self.filled(text))
        if len(path.encode()) > _PATH_MAX:
            raise InvalidArgumentError("cannot take the steps: a path is too long", field="steps")
        return path


@dataclass(frozen=True)
class Work:
    """What is run for a step: what the log says of it, a command with its environment, and the
    upload that has to be in the machine before that."""

    line: str
    command: str
    env: Mapping[str, str]
    cwd: str = "/"
    user: str = "root"
    upload: str | None = None


def check_steps(wish: NewTemplate) -> None:
    """Refuse steps that cannot be taken, whatever the template or image has that they begin with.

    Raises: see `Setting.after`.
    """
    setting = Setting(wish.env, "", "")
    for step in wish.steps:
        setting.path("".join(step.args[1:2]) if step.kind is StepKind.COPY else "")
        setting = setting.after(step)


def work_of(step: Step, setting: Setting) -> Work | None:
    """Return what is run for a step in a setting; None if nothing is.

    Raises: see `Setting.after`.
    """
    args, after, owner = step.args, setting.after(step), setting.user or "root"
    match step.kind:
        case StepKind.RUN:
            user = "".join(args[1:]) or owner
            return Work(f"running: {args[0]}", args[0], setting.env, setting.workdir or HOME, user)
        case StepKind.WORKDIR:
            env = {"TARGET": after.workdir, "OWNER": _owner(owner), "WHO": owner}
            return Work(f"working directory: {after.workdir}", recipes.MAKE_WORKDIR, env)
        case StepKind.USER:
            env = {"NAME": after.user, "SUDO": "".join(args[1:])}
            return Work(f"user: {after.user}", recipes.ADD_USER, env)
        case StepKind.COPY:
            target = setting.path(args[1])
            env = {
                "SOURCE": source_of(args[0]),
                "TARGET": target,
                "OWNER": _owner("".join(args[2:3]) or owner),
                "WHO": owner,
                "MODE": "".join(args[3:]),
            }
            line = f"copying {args[0]} to {target}"
            return Work(line, recipes.COPY, env, upload=step.upload)
        case StepKind.ENV:
            return None


def _owner(user: str) -> str:
    """Return a user as chown takes it, with the group of their login."""
    if ":" in user:
        return user
    return f"{user}:{user}" if user.isdigit() else f"{user}:"


def source_of(pattern: str) -> str:
    """Return the path that the files of a COPY are below: what comes before the first wildcard. The
    client has chosen the files already."""
    plain = []
    for part in posixpath.normpath(pattern).split("/"):
        if _WILD.search(part):
            break
        plain.append(part)
    return "/".join(plain) or "."
