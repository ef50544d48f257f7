"""Template definitions: the contents of a template, as written in `templates/*.toml`."""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

from sandyard.server.core.egress import NO_RULES, Policy
from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.core.ids import is_slug
from sandyard.server.core.shapes import Shape, shape_of

_FAMILIES = ("debian", "ubuntu")
_ARGUMENTS_MAX = 1024
ARGUMENTS_ARE = (
    f"one line of at most {_ARGUMENTS_MAX} plain ASCII characters, with quotes in pairs, and "
    "without `--`, `console=` and `sandyard.`, which are Sandyard's own"
)
_ADDED = frozenset({"packages", "wheels", "steps", "warmup"})
_WHEEL = re.compile(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+ --hash=sha256:[0-9a-f]{64}")
_PACKAGE = Path(__file__).parents[3]
_OURS = "sandyard:"
"""What comes after it is the path of a file in the package `sandyard`."""
_KERNEL_LINE = re.compile(rb"^kernel(_modules|_arguments)?[ \t]*=.*\n", re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """A distribution that a template can be built from."""

    family: str
    suite: str
    os: str
    components: tuple[str, ...]
    kernel: str
    packages: tuple[str, ...]


@dataclass(frozen=True)
class NodeRuntime:
    """Node.js with npm, taken from a Python package that carries the official build."""

    package: str
    version: str
    sha256: str


@dataclass(frozen=True)
class Definition:
    """A template as described by its file. `digest` changes with any change of the file.

    `start` is a script that PID 1 runs in every machine, and restarts whenever it ends.
    """

    slug: str
    name: str
    description: str
    kind: str
    defaults: Shape
    sources: tuple[Source, ...]
    packages: tuple[str, ...]
    node: NodeRuntime | None
    steps: tuple[str, ...]
    start: str | None
    warmup: tuple[str, ...]
    digest: str
    build_id: str = ""
    """The build that made it, if it is a version."""
    is_hidden: bool = False
    """Whether it is for the platform's own use alone."""
    env: Mapping[str, str] = field(default_factory=dict)
    """The environment of every program, unless the sandbox's own says otherwise."""
    user: str = ""
    """The account of programs for which none is named; root if it is empty."""
    workdir: str = ""
    """The working directory of programs for which none is given."""
    ready: str | None = None
    """A command that ends with 0 once what was started can be used."""
    kernel: Path | None = None
    """A kernel instead of the distribution's."""
    kernel_modules: Path | None = None
    kernel_arguments: str = ""
    wheels: tuple[str, ...] = ()
    """Python packages for /opt/venv that the distribution lacks, as pip's requirements with hashes;
    none is installed with what it depends on."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Files to add, by their absolute paths in the template."""
    policy: Policy = NO_RULES
    """What its machines may reach before they are a sandbox's."""
    packages_digest: str = ""
    """Changes when anything does that decides which packages are installed, and how."""


def load_definitions(folder: Path) -> dict[str, Definition]:
    """Return all definitions in a folder by slug.

    Raises:
        InvalidArgumentError: a file is invalid; the message names it.
    """
    definitions = (load_definition(path) for path in sorted(folder.glob("*.toml")))
    return {definition.slug: definition for definition in definitions}


def load_definition(path: Path) -> Definition:
    """Return the definition in a file.

    Raises:
        InvalidArgumentError: it is not TOML, or a key is missing, unknown or of the wrong type; or
            so is the file beside it that it extends.
    """
    try:
        data = path.read_bytes()
        values, packages = tomllib.loads(data.decode()), _without_kernel(data)
        if "extends" in values:
            extended = path.with_name(f"{_text(values, 'extends')}.toml").read_bytes()
            values = _merged(tomllib.loads(extended.decode()), values)
            data, packages = extended + data, _without_kernel(extended) + packages
        files = _files(values, path.parent)
        data += b"".join(f"{name}\0".encode() + one.read_bytes() for name, one in files.items())
        definition = _parse(values, sha256(data).hexdigest(), path.parent)
        return replace(definition, files=files, packages_digest=sha256(packages).hexdigest())
    except OSError as error:
        raise InvalidArgumentError(f"cannot read the template {path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidArgumentError(f"cannot read the template {path}: {error!r}") from error
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"cannot read the template {path}: {error.message}") from error


def _without_kernel(data: bytes) -> bytes:
    """Return a file without what it says of a kernel of the operator's own."""
    # Above the first table: in those, a kernel is a distribution's package.
    head, table, rest = data.partition(b"\n[")
    return _KERNEL_LINE.sub(b"", head + b"\n")[:-1] + table + rest


def _merged(extended: dict[str, object], own: dict[str, object]) -> dict[str, object]:
    """Return the keys of a template that extends another: lists of both, the rest of its own where
    it has any."""
    if "extends" in extended:
        raise ValueError("a template that is extended may not extend another one")
    merged = extended | {name: value for name, value in own.items() if name != "extends"}
    for name in _ADDED & extended.keys() & own.keys():
        merged[name] = [*_list(extended, name), *_list(own, name)]
    if "files" in merged:
        merged["files"] = _table(extended.get("files", {})) | _table(own.get("files", {}))
    return merged


def _parse(data: dict[str, object], digest: str, folder: Path) -> Definition:
    known = {"slug", "name", "description", "kind", "defaults", "sources", "packages", "runtimes"}
    known |= {
        "user",
        "workdir",
        "wheels",
        "files",
        "steps",
        "start",
        "warmup",
        "hidden",
        "kernel",
        "kernel_modules",
        "kernel_arguments",
    }
    if unknown := set(data) - known:
        raise ValueError(f"unknown keys: {', '.join(sorted(unknown))}")
    slug, kind = _text(data, "slug"), _text(data, "kind")
    if not is_slug(slug):
        raise ValueError(f"{slug!r} is not a slug of lower-case letters, digits and dashes")
    if kind not in ("headless", "desktop"):
        raise ValueError("kind is headless or desktop")
    sources = tuple(_source(_table(entry)) for entry in _list(data, "sources"))
    if not sources:
        raise ValueError("at least one source is needed")
    if "kernel_modules" in data and "kernel" not in data:
        raise ValueError("kernel_modules are those of a kernel, which is to be named as well")
    defaults = _table(data["defaults"])
    runtimes = _table(data.get("runtimes", {}))
    node = _table(runtimes["node"]) if "node" in runtimes else None
    return Definition(
        slug=slug,
        name=_text(data, "name"),
        description=_text(data, "description"),
        kind=kind,
        defaults=shape_of(
            Shape(_number(defaults, "vcpus"), 0, 0),
            memory=_text(defaults, "memory"),
            disk=_text(defaults, "disk"),
        ),
        sources=sources,
        packages=_texts(data, "packages"),
        node=NodeRuntime(_text(node, "package"), _text(node, "version"), _text(node, "sha256"))
        if node
        else None,
        wheels=_wheels(data),
        steps=_texts(data, "steps") if "steps" in data else (),
        start=_script(data),
        warmup=_texts(data, "warmup") if "warmup" in data else (),
        digest=digest,
        is_hidden=_flag(data, "hidden"),
        user=_text(data, "user") if "user" in data else "",
        workdir=_text(data, "workdir") if "workdir" in data else "",
        kernel=folder / _text(data, "kernel") if "kernel" in data else None,
        kernel_modules=(
            folder / _text(data, "kernel_modules") if "kernel_modules" in data else None
        ),
        kernel_arguments=_arguments(data),
    )


def _files(data: dict[str, object], folder: Path) -> dict[str, Path]:
    files = _table(data.get("files", {}))
    for name in files:
        if not name.startswith("/") or ".." in Path(name).parts:
            raise ValueError(f"files are named by absolute paths, not {name!r}")
    found: dict[str, Path] = {}
    for name in files:
        source = _text(files, name)
        inner = source.removeprefix(_OURS)
        path = folder / source if inner == source else _PACKAGE / inner
        if path.is_dir():
            inside = (one for one in path.rglob("*") if one.is_file())
            found |= {f"{name}/{one.relative_to(path)}": one for one in sorted(inside)}
        else:
            found[name] = path
    return {name: path for name, path in found.items() if "__pycache__" not in path.parts}


def _wheels(data: dict[str, object]) -> tuple[str, ...]:
    wheels = _texts(data, "wheels") if "wheels" in data else ()
    for one in wheels:
        if not _WHEEL.fullmatch(one):
            raise ValueError(f"wheels are like `name==1.0 --hash=sha256:…`, not {one!r}")
    return wheels


def _script(data: dict[str, object]) -> str | None:
    if "start" not in data:
        return None
    text = _text(data, "start")
    if not text.startswith("#!/"):
        raise ValueError("start is a script: its first line is `#!/bin/sh`, or another program")
    return text


def _arguments(data: dict[str, object]) -> str:
    text = _text(data, "kernel_arguments") if "kernel_arguments" in data else ""
    if not is_command_line(text):
        raise ValueError(f"kernel_arguments is {ARGUMENTS_ARE}")
    return text


def is_command_line(text: str) -> bool:
    """Tell whether a text is accepted as additional kernel arguments."""
    words = text.split()
    is_plain = len(text) <= _ARGUMENTS_MAX and text.isascii() and text.isprintable()
    is_ours = any(one == "--" or one.startswith(("console=", "sandyard.")) for one in words)
    return is_plain and not is_ours and text.count('"') % 2 == 0


def arguments_for(common: str, definition: "Definition") -> str:
    """Return the kernel arguments of a template: the installation's and its own.

    Raises:
        InvalidArgumentError: together they are too long.
    """
    text = f"{common} {definition.kernel_arguments}".strip()
    if not is_command_line(text):
        raise InvalidArgumentError(
            f"cannot use kernel_arguments: together with the template's they are to be "
            f"{ARGUMENTS_ARE}",
            field="node.kernel_arguments",
        )
    return text


def _source(data: dict[str, object]) -> Source:
    family = _text(data, "family")
    if family not in _FAMILIES:
        raise ValueError(f"family is one of {', '.join(_FAMILIES)}")
    return Source(
        family=family,
        suite=_text(data, "suite"),
        os=_text(data, "os"),
        components=_texts(data, "components"),
        kernel=_text(data, "kernel"),
        packages=_texts(data, "packages") if "packages" in data else (),
    )


def _table(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is not a table")
    return value


def _list(data: dict[str, object], key: str) -> list[object]:
    value = data[key]
    if not isinstance(value, list):
        raise TypeError(f"{key} is not a list")
    return value


def _text(data: dict[str, object], key: str) -> str:
    value = data[key]
    if not isinstance(value, str):
        raise TypeError(f"{key} is not text")
    return value


def _number(data: dict[str, object], key: str) -> int:
    value = data[key]
    if not isinstance(value, int):
        raise TypeError(f"{key} is not a whole number")
    return value


def _flag(data: dict[str, object], key: str) -> bool:
    value = data.get(key, False)
    if not isinstance(value, bool):
        raise TypeError(f"{key} is not true or false")
    return value


def _texts(data: dict[str, object], key: str) -> tuple[str, ...]:
    values = _list(data, key)
    if not all(isinstance(value, str) for value in values):
        raise TypeError(f"{key} is not a list of texts")
    return tuple(str(value) for value in values)
