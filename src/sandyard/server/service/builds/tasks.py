"""What a build does in a machine of its source, in order."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256

from sandyard.server.service.builds import recipes
from sandyard.server.service.builds.boxes import Box
from sandyard.server.service.builds.cache import digest_of
from sandyard.server.service.builds.config import ImageConfig
from sandyard.server.service.builds.plan import NewTemplate
from sandyard.server.service.builds.steps import Setting, work_of


@dataclass(frozen=True)
class Task:
    """One thing to do: what the log says, all that its result depends on, the work, and the phase
    that it belongs to. If it `is_forced`, neither it nor a later one is taken from the cache."""

    line: str
    key: object
    take: Callable[[Box], Awaitable[None]]
    phase: str = "steps"
    is_forced: bool = False


def tasks_of(wish: NewTemplate, config: ImageConfig, login: Mapping[str, str]) -> list[Task]:
    """Return the tasks. What `login` has, the machine's own variables, changes no key."""
    env = {**config.env, **wish.env}
    tasks: list[Task] = []
    if wish.files:
        line = f"writing {', '.join(one.path for one in wish.files)}"
        digests = [[one.path, one.mode, sha256(one.data).hexdigest()] for one in wish.files]
        tasks.append(Task(line, ["files", digests], partial(_write_files, wish)))
    packages = {"apt": wish.apt, "pip": wish.pip, "npm": wish.npm}
    for kind, names in packages.items():
        if names:
            line = f"installing with {kind}: {' '.join(names)}"
            run = partial(Box.shell, command=recipes.install(kind, names), env=env)
            tasks.append(Task(line, [kind, names, env], run))
    cwd = wish.workdir or config.workdir or "/"
    for command in wish.run:
        run = partial(Box.shell, command=command, env=env, cwd=cwd)
        tasks.append(Task(f"running: {command}", ["run", command, env, cwd], run))
    setting = first_setting(wish, config, login)
    seen: object = [dict(setting.env), setting.user, setting.workdir]
    for step in wish.steps:
        seen = digest_of([seen, step.kind, step.args, step.upload])
        if (work := work_of(step, setting)) is not None:
            take = partial(Box.do, work=work)
            tasks.append(Task(work.line, ["step", seen], take, step.phase, step.force))
        setting = setting.after(step)
    return tasks


def first_setting(wish: NewTemplate, config: ImageConfig, login: Mapping[str, str]) -> Setting:
    """Return what the first step runs in."""
    return Setting(
        env={**config.env, **wish.env},
        user=wish.default_user or config.user,
        workdir=wish.workdir or config.workdir,
        login=login,
    )


def last_setting(wish: NewTemplate, config: ImageConfig, login: Mapping[str, str]) -> Setting:
    """Return the setting after the last step."""
    setting = first_setting(wish, config, login)
    for step in wish.steps:
        setting = setting.after(step)
    return setting


async def _write_files(wish: NewTemplate, box: Box) -> None:
    for one in wish.files:
        await box.write(one.path, one.data, mode=one.mode)
