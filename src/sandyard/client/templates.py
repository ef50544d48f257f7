"""Templates of one's own: what is to be built, sent to the server, and followed to its end."""

import os
import re
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Self

from sandyard.client.calls import Call, part_of
from sandyard.client.errors import SandyardError
from sandyard.client.models import (
    BuildLine,
    RegistryCredential,
    TemplateBuild,
    TemplateInfo,
    TemplateVersion,
    template_of,
)
from sandyard.client.streams import Followed

_TEMPLATES = "/v1/templates"
_CREDENTIALS = "/v1/registry-credentials"
_UPLOAD_S = 600.0
_PIECE = 1024 * 1024
OnLine = Callable[[BuildLine], object]


class BuildFailedError(SandyardError):
    """A build did not succeed; its log says why."""

    def __init__(self, build: TemplateBuild) -> None:
        super().__init__(
            f"the build of {build.slug} {build.status}: {build.error or 'it was cancelled'}"
            if build.status == "failed"
            else f"the build of {build.slug} was cancelled"
        )
        self.build = build


@dataclass(frozen=True)
class Template:
    """What a template is built from. Every method returns a changed copy.

    ```python
    template = (
        Template("my-agent")
        .from_image("docker.io/library/python:3.13-slim")
        .pip("requests")
        .start("python3 -m http.server 8000", ready="python3 -c '...'")
    )
    client.build(template, on_line=lambda line: print(line.text))
    ```
    """

    slug: str
    fields: Mapping[str, Any] = field(default_factory=dict, repr=False)
    archive: Path | None = None
    context: Path | None = None

    def from_template(self, base: str) -> Self:
        """Build on a template: a slug, `slug:tag` or `slug@digest`."""
        return self._from(base=base)

    def from_image(self, image: str) -> Self:
        """Build on an image in a registry: `name[:tag][@digest]`."""
        return self._from(image=image)

    def credentials(self, credential: str) -> Self:
        """Set the id of a credential for the registry that the image or the Dockerfile needs."""
        return self._with(credentials=credential)

    def network(self, rules: Mapping[str, Any]) -> Self:
        """Set what the build may reach; see `ChangeOptions.network`."""
        return self._with(network=dict(rules))

    def from_archive(self, path: str | os.PathLike[str]) -> Self:
        """Build on an image in a file: from `docker save`, or an OCI layout in a tar archive."""
        return replace(self._from(), archive=Path(path))

    def from_dockerfile(
        self, folder: str | os.PathLike[str] = ".", *, dockerfile: str = "Dockerfile"
    ) -> Self:
        """Build with a Dockerfile in a folder. The folder is sent, without what its `.dockerignore`
        names."""
        text = (Path(folder) / dockerfile).read_text()
        return replace(self._from(dockerfile=text), context=Path(folder))

    def named(self, name: str, description: str = "") -> Self:
        """Set a name and a description for people."""
        return self._with(name=name, description=description)

    def apt(self, *packages: str) -> Self:
        """Install Debian packages."""
        return self._added("apt", packages)

    def pip(self, *packages: str) -> Self:
        """Install Python packages."""
        return self._added("pip", packages)

    def npm(self, *packages: str) -> Self:
        """Install Node.js packages."""
        return self._added("npm", packages)

    def run(self, *commands: str) -> Self:
        """Run shell commands, as root and one after the other."""
        return self._added("run", commands)

    def env(self, **variables: str) -> Self:
        """Set environment variables for the build and for all programs of sandboxes."""
        return self._with(env={**self.fields.get("env", {}), **variables})

    def file(self, path: str, contents: str, *, mode: str = "644") -> Self:
        """Write a file."""
        return self._added("files", ({"path": path, "contents": contents, "mode": mode},))

    def start(self, command: str, *, ready: str | None = None) -> Self:
        """Have a shell command running in every sandbox. `ready` is one that ends with 0 once that
        can be used."""
        return self._with(start=command, ready=ready)

    def user(self, name: str) -> Self:
        """Set the user of programs for which none is named."""
        return self._with(defaultUser=name)

    def workdir(self, path: str) -> Self:
        """Set the working directory of programs for which none is named."""
        return self._with(workdir=path)

    def shape(
        self, *, vcpus: int | None = None, memory: str | None = None, disk: str | None = None
    ) -> Self:
        """Set the default shape of sandboxes."""
        return self._with(defaults={"vcpus": vcpus, "memory": memory, "disk": disk})

    def secret(self, name: str, value: str) -> Self:
        """Give the build's commands a secret, as the file `/run/secrets/NAME` and as `id=NAME` of
        `RUN --mount=type=secret`. It is in nothing that the build makes."""
        return self._with(secrets={**self.fields.get("secrets", {}), name: value})

    def force(self, is_forced: bool = True) -> Self:
        """Use nothing that earlier builds have kept."""
        return self._with(force=is_forced)

    def _from(self, **source: str) -> Self:
        left = {
            name: value
            for name, value in self.fields.items()
            if name not in ("base", "image", "dockerfile")
        }
        return replace(self, fields={**left, **source}, archive=None, context=None)

    def _with(self, **fields: Any) -> Self:
        return replace(self, fields={**self.fields, **fields})

    def _added(self, name: str, more: tuple[Any, ...]) -> Self:
        return self._with(**{name: [*self.fields.get(name, ()), *more]})

    def body(self, uploads: Mapping[str, str]) -> dict[str, Any]:
        """Return the body of the request, with the ids of uploads."""
        return {"slug": self.slug, **self.fields, **uploads}

    def files_to_send(self, held: ExitStack) -> dict[str, IO[bytes]]:
        """Return the files to upload, opened, by the name of their field."""
        if self.archive is not None:
            return {"upload": held.enter_context(self.archive.open("rb"))}
        if self.context is not None:
            packed = held.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - it is held
            pack_context(self.context, packed)
            packed.seek(0)
            return {"context": packed}
        return {}


class Following(Followed[BuildLine]):
    """The log of a build, each line once, and the build at its end."""

    def __init__(self, slug: str, build: str | None) -> None:
        query = {} if build is None else {"build": build}
        super().__init__(f"{part_of(_TEMPLATES, slug)}/logs", query)
        self._after = 0
        self.build: TemplateBuild | None = None

    @property
    def query(self) -> dict[str, Any]:
        """See `Followed.query`."""
        return {**self._query, "after": self._after}

    def _event(self, name: str, data: Any, number: str | None) -> BuildLine | None:
        self._after = self._after if number is None else int(number)
        if name == "end":
            self.is_over, self.build = True, _build_of(data)
        return BuildLine(data["text"], data["phase"], data["time"]) if name == "line" else None


def _build_of(raw: Mapping[str, Any]) -> TemplateBuild:
    return TemplateBuild(
        raw["id"], raw["slug"], raw["version"], raw["status"], raw.get("error"), raw
    )


def _version_of(raw: Mapping[str, Any]) -> TemplateVersion:
    return TemplateVersion(raw["slug"], raw["version"], raw["digest"], tuple(raw["tags"]), raw)


def _nothing(_: Any) -> None:
    return None


def listing() -> Call[list[TemplateInfo]]:
    """Return the call that lists templates."""
    return Call("GET", _TEMPLATES, lambda a: [template_of(one) for one in a["data"]], safe=True)


def upload(file: IO[bytes]) -> Call[str]:
    """Upload an archive or a context."""
    return Call(
        "POST",
        f"{_TEMPLATES}/uploads",
        lambda a: str(a["data"]["uploadId"]),
        content=file,
        limit_s=_UPLOAD_S,
    )


def request(body: Mapping[str, Any]) -> Call[tuple[str, str]]:
    """Request a build."""
    return Call("POST", _TEMPLATES, lambda a: (a["data"]["slug"], a["data"]["buildId"]), body=body)


def _path(slug: str, *parts: object) -> str:
    path = part_of(_TEMPLATES, slug)
    for one in parts:
        path = part_of(path, one)
    return path


def builds(slug: str) -> Call[list[TemplateBuild]]:
    """List the builds of a template."""
    path = _path(slug, "builds")
    return Call("GET", path, lambda a: [_build_of(one) for one in a["data"]], safe=True)


def cancel(slug: str, build: str) -> Call[TemplateBuild]:
    """Cancel a build."""
    return Call("POST", _path(slug, "builds", build, "cancel"), lambda a: _build_of(a["data"]))


def versions(slug: str) -> Call[list[TemplateVersion]]:
    """List the versions of a template."""
    path = _path(slug, "versions")
    return Call("GET", path, lambda a: [_version_of(one) for one in a["data"]], safe=True)


def tag(slug: str, tag: str, version: int) -> Call[None]:
    """Give a version a tag."""
    return Call("PUT", _path(slug, "tags", tag), _nothing, body={"version": version}, safe=True)


def delete(*parts: object) -> Call[None]:
    """Delete a template, a version or a tag."""
    return Call("DELETE", _path(*map(str, parts)), _nothing)


def _credential_of(raw: Mapping[str, Any]) -> RegistryCredential:
    return RegistryCredential(raw["id"], raw["host"], raw["username"], raw)


def add_credential(host: str, username: str, password: str) -> Call[RegistryCredential]:
    """Add a credential for a registry."""
    body = {"host": host, "username": username, "password": password}
    return Call("POST", _CREDENTIALS, lambda a: _credential_of(a["data"]), body=body)


def credentials() -> Call[list[RegistryCredential]]:
    """List the credentials for registries."""
    return Call(
        "GET", _CREDENTIALS, lambda a: [_credential_of(one) for one in a["data"]], safe=True
    )


def delete_credential(credential: str) -> Call[None]:
    """Delete a credential."""
    return Call("DELETE", part_of(_CREDENTIALS, credential), _nothing)


def ended(following: Following) -> TemplateBuild:
    """Return the build that was followed to its end.

    Raises:
        BuildFailedError: it did not succeed.
    """
    """Return the build that was followed to its end.

    Raises:
        BuildFailedError: it did not succeed.
    """
    build = following.build
    if build is None:
        raise SandyardError("the server did not tell how the build ended")
    if build.status != "ready":
        raise BuildFailedError(build)
    return build


# --- the context of a Dockerfile ------------------------------------------------------------------


def pack_context(folder: Path, target: IO[bytes]) -> None:
    """Write the tar archive of a folder, without what its `.dockerignore` names. Links are packed
    as links, and never followed.

    Raises:
        OSError: it cannot be read.
    """
    rules = _rules(folder / ".dockerignore")
    with tarfile.open(fileobj=target, mode="w|") as archive:
        for place, folders, files in os.walk(folder):
            inner = os.path.relpath(place, folder)
            at = "" if inner == "." else f"{inner}/"
            folders.sort()
            kept = []
            for name in folders:
                is_left_out = _is_ignored(f"{at}{name}", rules)
                # An exception may name something below.
                if not is_left_out or any(not one.ignores for one in rules):
                    kept.append(name)
                if not is_left_out:
                    archive.add(os.path.join(place, name), f"{at}{name}", recursive=False)
            folders[:] = [one for one in kept if not os.path.islink(os.path.join(place, one))]
            for name in sorted(files):
                if not _is_ignored(f"{at}{name}", rules):
                    archive.add(os.path.join(place, name), f"{at}{name}", recursive=False)


@dataclass(frozen=True)
class _Rule:
    pattern: re.Pattern[str]
    ignores: bool


def _rules(path: Path) -> list[_Rule]:
    """Return the rules of a `.dockerignore`, as Docker's documentation has them."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    rules = []
    for line in lines:
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        ignores = not text.startswith("!")
        text = os.path.normpath(text.removeprefix("!").strip()).strip("/")
        if text not in ("", "."):
            rules.append(_Rule(re.compile(_expression(text)), ignores))
    return rules


def _expression(pattern: str) -> str:
    """Return a pattern's regular expression: `*` and `?` match within a name, `**` any number of
    directories. What it matches counts with everything below."""
    found, at = "", 0
    while at < len(pattern):
        if pattern.startswith("**/", at):
            found, at = found + "(?:.*/)?", at + 3
        elif pattern.startswith("**", at):
            found, at = found + ".*", at + 2
        elif pattern[at] == "*":
            found, at = found + "[^/]*", at + 1
        elif pattern[at] == "?":
            found, at = found + "[^/]", at + 1
        elif pattern[at] == "[" and "]" in pattern[at:]:
            end = pattern.index("]", at) + 1
            found, at = found + pattern[at:end], end
        else:
            skip = pattern[at] == "\\" and at + 1 < len(pattern)
            found, at = found + re.escape(pattern[at + skip]), at + 1 + skip
    return f"{found}(?:/.*)?"


def _is_ignored(path: str, rules: list[_Rule]) -> bool:
    is_ignored = False
    for rule in rules:  # the last one that matches decides
        if rule.pattern.fullmatch(path):
            is_ignored = rule.ignores
    return is_ignored
