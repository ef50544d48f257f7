"""`sandyard template …`: what sandboxes are made from."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from sandyard.cli.output import Json, for_each, out, plain, show_json, show_table
from sandyard.cli.sandbox import known_templates, open_client
from sandyard.cli.server import build_shipped, shipped_rows
from sandyard.client import BuildFailedError, Sandyard, Template
from sandyard.client.models import BuildLine, TemplateBuild

app = typer.Typer(
    help="Build and list templates: what sandboxes are made from.", no_args_is_help=True
)

Slug = Annotated[str, typer.Argument(help="The template's slug.", autocompletion=known_templates)]
Secrets = Annotated[
    list[str] | None,
    typer.Option(
        "--secret",
        help="A secret for commands of the build: id=NAME,src=FILE or id=NAME,env=VARIABLE.",
    ),
]
NoCache = Annotated[
    bool, typer.Option("--no-cache", help="Use nothing that earlier builds have kept.")
]
Detach = Annotated[
    bool, typer.Option("--detach", "-d", help="Only request the build, and print its id.")
]


def _build(client: Sandyard, template: Template, *, detach: bool) -> None:
    """Request a build, and follow it on the terminal to its end."""
    slug, build_id = client.request_build(template)
    if detach:
        typer.echo(build_id)
        return
    place = _found(client, slug, build_id).place
    if place is not None and place > 1:
        typer.echo(
            f"queued at place {place}; to cancel: sandyard template cancel {slug} {build_id}"
        )
    following = client.build_log(slug, build_id)
    if out.is_terminal:
        with out.status(f"building {slug}") as spinner:
            for line in following:
                _show_line(line)
                spinner.update(plain(f"building {slug}: {line.phase}"))
    else:
        for line in following:
            _show_line(line)
    build = _found(client, slug, build_id)
    if build.status != "ready":
        raise BuildFailedError(build)
    typer.echo(f"{slug}:{build.version} is ready: sandyard sandbox create --template {slug}")


def _found(client: Sandyard, slug: str, build_id: str) -> TemplateBuild:
    return next(one for one in client.builds(slug) if one.id == build_id)


def _show_line(line: BuildLine) -> None:
    out.print(plain(line.text))


@app.command()
def create(
    slug: Slug,
    base: Annotated[
        str | None, typer.Option(help="A template to build on.", autocompletion=known_templates)
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="An image in a registry, name[:tag][@digest].")
    ] = None,
    archive: Annotated[
        Path | None,
        typer.Option(help="A file of `docker save`, or an OCI layout in a tar archive."),
    ] = None,
    apt: Annotated[list[str] | None, typer.Option(help="A Debian package to install.")] = None,
    pip: Annotated[list[str] | None, typer.Option(help="A Python package to install.")] = None,
    npm: Annotated[list[str] | None, typer.Option(help="A Node.js package to install.")] = None,
    run: Annotated[list[str] | None, typer.Option(help="A command to run.")] = None,
    env: Annotated[list[str] | None, typer.Option(help="A variable, NAME=VALUE.")] = None,
    start: Annotated[
        str | None, typer.Option(help="A command that every sandbox has running.")
    ] = None,
    ready: Annotated[
        str | None, typer.Option(help="A command that ends with 0 once that can be used.")
    ] = None,
    user: Annotated[str | None, typer.Option(help="The default user of programs.")] = None,
    workdir: Annotated[str | None, typer.Option(help="Their default directory.")] = None,
    vcpus: Annotated[int | None, typer.Option(help="Processors by default.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory by default, such as 1GB.")] = None,
    disk: Annotated[str | None, typer.Option(help="Disk by default, such as 10GB.")] = None,
    credentials: Annotated[
        str | None, typer.Option(help="The id of a credential for the registry.")
    ] = None,
    secret: Secrets = None,
    no_cache: NoCache = False,
    detach: Detach = False,
) -> None:
    """Build a template from another one, an image or an archive, and follow the build."""
    template = Template(slug)
    if base is not None:
        template = template.from_template(base)
    if image is not None:
        template = template.from_image(image)
    if archive is not None:
        template = template.from_archive(archive)
    if credentials is not None:
        template = template.credentials(credentials)
    template = with_secrets(template, secret).force(no_cache)
    template = template.apt(*apt or ()).pip(*pip or ()).npm(*npm or ()).run(*run or ())
    template = _with_rest(template, env, start, ready, user, workdir, vcpus, memory, disk)
    with open_client() as client:
        _build(client, template, detach=detach)


def with_secrets(template: Template, secrets: list[str] | None) -> Template:
    """Add secrets that are written as Docker's are."""
    for one in secrets or ():
        given = dict(part.partition("=")[::2] for part in one.split(","))
        name = given.pop("id", "")
        given.pop("type", None)
        source, variable = given.pop("src", given.pop("source", "")), given.pop("env", "")
        if not name or given or (source and variable):
            raise typer.BadParameter(
                f"cannot use --secret {one}: write it as id=NAME,src=FILE or id=NAME,env=VARIABLE"
            )
        if not source and (variable or name) in os.environ:
            value = os.environ[variable or name]
        elif variable:
            raise typer.BadParameter(f"cannot use --secret {one}: {variable} is not set")
        else:
            try:
                value = Path(source or name).expanduser().read_text()
            except (OSError, UnicodeDecodeError) as error:
                raise typer.BadParameter(f"cannot use --secret {one}: {error}") from error
        template = template.secret(name, value)
    return template


def _with_rest(
    template: Template,
    env: list[str] | None,
    start: str | None,
    ready: str | None,
    user: str | None,
    workdir: str | None,
    vcpus: int | None,
    memory: str | None,
    disk: str | None,
) -> Template:
    for one in env or ():
        name, equals, value = one.partition("=")
        if not equals:
            raise typer.BadParameter(f"cannot use --env {one}: write it as NAME=VALUE")
        template = template.env(**{name: value})
    if start is not None or ready is not None:
        template = template.start(start, ready=ready)  # type: ignore[arg-type]  # None: the image's
    template = template if user is None else template.user(user)
    template = template if workdir is None else template.workdir(workdir)
    return template.shape(vcpus=vcpus, memory=memory, disk=disk)


@app.command()
def build(
    what: Annotated[
        list[str],
        typer.Argument(
            help="A folder with a Dockerfile (`.` or a path with a slash); or, on the host and for "
            "its operator, slugs of the installation's templates."
        ),
    ],
    slug: Annotated[
        str | None,
        typer.Option("--slug", "-t", help="The template's slug. Default: the folder's name."),
    ] = None,
    dockerfile: Annotated[
        str, typer.Option("--file", "-f", help="The Dockerfile in the folder.")
    ] = "Dockerfile",
    start: Annotated[
        str | None, typer.Option(help="A command that every sandbox has running.")
    ] = None,
    ready: Annotated[
        str | None, typer.Option(help="A command that ends with 0 once that can be used.")
    ] = None,
    vcpus: Annotated[int | None, typer.Option(help="Processors by default.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory by default, such as 1GB.")] = None,
    disk: Annotated[str | None, typer.Option(help="Disk by default, such as 10GB.")] = None,
    credentials: Annotated[
        str | None, typer.Option(help="The id of a credential for the registry.")
    ] = None,
    secret: Secrets = None,
    no_cache: NoCache = False,
    detach: Detach = False,
    again: Annotated[
        bool,
        typer.Option(
            "--again", help="Build the installation's templates even if nothing has changed."
        ),
    ] = False,
) -> None:
    """Build a template with a Dockerfile and follow the build. The folder is sent, without what its
    `.dockerignore` names.

    With slugs: build templates of the installation that are not up to date. A failed build leaves
    the current image in use.
    """
    folders = [one for one in what if one in (".", "..") or "/" in one]
    if not folders:
        build_shipped(what, again=again)
        return
    if len(what) > 1:
        raise typer.BadParameter("build one folder at a time")
    folder = Path(folders[0])
    if not (folder / dockerfile).is_file():
        raise typer.BadParameter(f"there is no {dockerfile} in {folder}; name it with --file")
    template = Template(slug or folder.resolve().name.lower())
    template = template.from_dockerfile(folder, dockerfile=dockerfile)
    if credentials is not None:
        template = template.credentials(credentials)
    template = with_secrets(template, secret).force(no_cache)
    template = _with_rest(template, None, start, ready, None, None, vcpus, memory, disk)
    with open_client() as client:
        _build(client, template, detach=detach)


@app.command()
def logs(
    slug: Slug,
    build: Annotated[str | None, typer.Option(help="A build's id. Default: the latest.")] = None,
) -> None:
    """Print the log of a build, and follow it to its end."""
    with open_client() as client:
        for line in client.build_log(slug, build):
            _show_line(line)


@app.command()
def builds(slug: Slug, as_json: Json = False) -> None:
    """List the latest builds of a template."""
    with open_client() as client:
        found = client.builds(slug)
    if as_json:
        show_json([dict(one.raw) for one in found])
        return
    columns = ("id", "version", "status", "created", "error")
    show_table(columns, [_build_row(one) for one in found])


def _build_row(one: TemplateBuild) -> tuple[str, ...]:
    status = one.raw["phase"] or one.status
    if one.place is not None:
        status = f"{status} ({one.place})"
    return (one.id, str(one.version), status, one.raw["createdAt"], one.error or "")


@app.command()
def cancel(slug: Slug, build: Annotated[str, typer.Argument(help="The build's id.")]) -> None:
    """Cancel a build."""
    with open_client() as client:
        client.cancel_build(slug, build)
    typer.echo(f"cancelling {build}")


@app.command()
def versions(slug: Slug, as_json: Json = False) -> None:
    """List the versions of a template."""
    with open_client() as client:
        found = client.template_versions(slug)
    if as_json:
        show_json([dict(one.raw) for one in found])
        return
    show_table(
        ("version", "tags", "os", "MiB", "digest", "created"),
        [
            (
                str(one.version), " ".join(one.tags), one.raw["os"],
                str(one.raw["sizeBytes"] // 2**20), one.digest, one.raw["createdAt"],
            )
            for one in found
        ],
    )  # fmt: skip


@app.command()
def tag(
    slug: Slug,
    name: Annotated[str, typer.Argument(help="The tag.")],
    version: Annotated[
        int | None, typer.Argument(help="The version to give it to. Default: the latest.")
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Remove the tag.")] = False,
) -> None:
    """Give a version of a template a tag, which another one loses."""
    with open_client() as client:
        if delete:
            client.untag_template(slug, name)
            typer.echo(f"removed {slug}:{name}")
            return
        chosen = version
        if chosen is None:
            latest = [one for one in client.template_versions(slug) if "latest" in one.tags]
            if not latest:
                raise typer.BadParameter(f"{slug} has no latest version; name one")
            chosen = latest[0].version
        client.tag_template(slug, name, chosen)
    typer.echo(f"{slug}:{name} is version {chosen}")


@app.command()
def delete(
    references: Annotated[
        list[str],
        typer.Argument(
            help="Slugs, or slug:VERSION for one version.", autocompletion=known_templates
        ),
    ],
    as_json: Json = False,
) -> None:
    """Delete templates of the organization, or versions of them. Their sandboxes keep running."""
    with open_client() as client:

        def delete_one(reference: str) -> str:
            slug, _, version = reference.partition(":")
            if version and not version.isdigit():
                raise typer.BadParameter(f"cannot delete {reference}: name a version by its number")
            client.delete_template(slug, int(version) if version else None)
            return f"deleted {reference}"

        for_each(references, delete_one, as_json=as_json)


@app.command("list")
def list_(
    as_json: Json = False,
    here: Annotated[
        bool,
        typer.Option("--here", help="Those on this host's disk, without a server; for operators."),
    ] = False,
) -> None:
    """List the templates that sandboxes can be made from."""
    if here:
        columns, rows = shipped_rows()
        show_table(columns, rows)
        return
    with open_client() as client:
        found = client.templates()
    if as_json:
        show_json([dict(one.raw) for one in found])
        return
    show_table(
        ("slug", "status", "os", "MiB", "digest", "error"),
        [_row(one.raw) for one in found],
    )


def _row(raw: Any) -> tuple[str, ...]:
    size = "" if raw["sizeBytes"] is None else str(raw["sizeBytes"] // 2**20)
    error = (raw["error"] or "").split("\n")[0]
    return (raw["slug"], raw["status"], raw["os"] or "", size, raw["digest"] or "", error)
