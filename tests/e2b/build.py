"""Builds templates with E2B's Python SDK against a server, with the SDK's own Python.

    python build.py sync|async

The server and the key are in the SDK's environment variables. It prints a line of JSON for each
public method of `Template` and of what builds one: what came of it. See drive.py.
"""

import asyncio
import inspect
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import e2b  # type: ignore[import-not-found]  # where it runs, it is there

IS_ASYNC = sys.argv[1] == "async"
Template: Any = e2b.AsyncTemplate if IS_ASYNC else e2b.Template
Sandbox: Any = e2b.AsyncSandbox if IS_ASYNC else e2b.Sandbox
SMALL: dict[str, Any] = {"cpu_count": 1, "memory_mb": 512}
NEEDS_NETWORK = {"pip_install", "npm_install", "bun_install", "apt_install", "git_clone"}
"""What the SDK makes commands of that download something."""
NEEDS_REGISTRY = {
    "from_debian_image", "from_fedora_image", "from_alpine_image", "from_arch_image",
    "from_python_image", "from_node_image", "from_bun_image",
}  # fmt: skip
TAKEN = {
    "build", "from_base_image", "copy", "copy_items", "run_cmd", "make_dir", "make_symlink",
    "rename", "remove", "set_envs", "set_workdir", "set_user", "set_start_cmd", "to_dockerfile",
    "to_json",
}  # fmt: skip
REFUSED = {
    "from_aws_registry", "from_gcp_registry", "add_mcp_server", "beta_dev_container_prebuild",
    "beta_set_dev_container_start",
}  # fmt: skip
works: set[str] = set()


async def done(found: Any) -> Any:
    """Return a result of either SDK."""
    return await found if inspect.isawaitable(found) else found


async def error_of(work: Any) -> str:
    """Return what a call fails with."""
    try:
        await done(work())
    except Exception as error:  # noqa: BLE001 - whatever the SDK makes of it
        return str(error)
    raise AssertionError("it did not fail")


def a_context() -> str:
    """Return a folder with files to copy."""
    folder = Path(tempfile.mkdtemp(prefix="context-"))
    (folder / "folder" / "deep").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "d.txt", "deep/e ü.txt"):
        (folder / "folder" / name).write_text(name)
    (folder / "folder" / "link").symlink_to("a.txt")
    (folder / "folder" / "nowhere").symlink_to("nothing")
    (folder / "one.sh").write_text("#!/bin/sh\necho one\n")
    (folder / ".dockerignore").write_text("**/*.log\n")
    (folder / "folder" / "x.log").write_text("ignored")
    return str(folder)


async def whole_template() -> None:
    """Take every kind of step, and look at what a sandbox has of it."""
    template = (
        Template(file_context_path=a_context())
        .from_base_image()
        .copy("folder/*", "folder", force_upload=True)
        .copy("one.sh", "/opt/tools/", user="root", mode=0o755)
        .copy_items([{"src": "one.sh", "dest": "two.sh"}, {"src": "folder", "dest": "all"}])
        .run_cmd("test $(whoami) = user && test $(pwd) = /home/user && cat folder/a.txt")
        .run_cmd('test "$(cat "folder/deep/e ü.txt")" = "deep/e ü.txt" && test ! -e folder/x.log')
        .run_cmd('test "$(readlink folder/nowhere)" = nothing && touch folder/mine all/mine')
        .run_cmd("test $(stat -c %U:%a /opt/tools/one.sh) = root:755 && test -f two.sh")
        .make_dir("made/deep", mode=0o750)
        .make_symlink("folder/a.txt", "to-a")
        .rename("folder/b.txt", "folder/c.txt")
        .remove("folder/d.txt")
        .set_envs({"ONE": "1", "TWO": "x y"})
        .set_envs({"PATH": "/opt/tools:$PATH"})
        .run_cmd(["test \"$TWO\" = 'x y'", "one.sh"])
        .run_cmd("whoami > /root/who", user="root")
        .set_workdir("/app/deep")
        .run_cmd("touch here")
        .set_user("other")
        .run_cmd("test $(whoami) = other && test -d ~")
        .set_user("user")
        .set_start_cmd("python3 -m http.server 8123", e2b.wait_for_port(8123))
    )
    assert "RUN touch here" in Template.to_dockerfile(template)
    assert json.loads(Template.to_json(template))["fromImage"].startswith("e2bdev/base")
    lines: list[str] = []
    built = await done(
        Template.build(
            template, "made-here:v1", tags=["stable"], **SMALL,
            on_build_logs=lambda one: lines.append(one.message),
        )
    )  # fmt: skip
    assert built.tags == ["v1", "stable"], built
    assert any("running: touch here" in one for one in lines), lines
    box = await done(Sandbox.create("made-here:stable", timeout=300))
    try:
        found = await done(
            box.commands.run("whoami; pwd; ls /app/deep; one.sh; echo $ONE; ls ~/folder ~/made")
        )
        assert found.stdout.split() == [
            "user", "/app/deep", "here", "one", "1", "/home/user/folder:", "a.txt", "c.txt", "deep",
            "link", "mine", "nowhere", "/home/user/made:", "deep",
        ], found.stdout  # fmt: skip
        served = await done(box.commands.run("curl -s localhost:8123/ | grep -c here"))
        assert served.stdout == "1\n"
    finally:
        await done(box.kill())
    works.update(TAKEN)
    await tags(built)


async def ready_template() -> None:
    """Take a command that tells when a template without a start command is ready."""
    command = "test -e ~/ready || (touch ~/ready; false)"
    template = Template().from_template("made-here").set_ready_cmd(command)
    built = await done(Template.build(template, "ready-here", **SMALL))
    box = await done(Sandbox.create(built.template_id, timeout=300))
    try:
        found = await done(box.commands.run("ls ~/ready"))
        assert found.stdout == "/home/user/ready\n", found.stdout
    finally:
        await done(box.kill())
    works.add("set_ready_cmd")


async def tags(built: Any) -> None:
    """Move the tags of what was built."""
    assert await done(Template.exists("made-here"))
    assert await done(Template.alias_exists("made-here"))
    assert not await done(Template.exists("never-made"))
    assigned = await done(Template.assign_tags("made-here:v1", ["production", "default"]))
    assert assigned.build_id == built.build_id
    assert {"production", "default"} <= set(assigned.tags)
    found = await done(Template.get_tags("made-here"))
    assert {one.tag for one in found} == {"v1", "stable", "production", "default", "latest"}
    assert {one.build_id for one in found} == {built.build_id}
    await done(Template.remove_tags("made-here", ["production"]))
    assert "made-here" in await error_of(lambda: Template.assign_tags("made-here:no", "x"))
    works.update(("exists", "alias_exists", "assign_tags", "get_tags", "remove_tags"))


async def failures() -> None:
    """See a build fail at its step, with the client's own line as the place."""
    template = Template().from_template("made-here").skip_cache()
    template = template.run_cmd("true").run_cmd("echo why; exit 3")
    background = await done(Template.build_in_background(template, "fails-here", **SMALL))
    until_s = time.monotonic() + 300
    while True:
        status = await done(Template.get_build_status(background))
        if status.status.value not in ("building", "waiting"):
            break
        assert time.monotonic() < until_s, "the build does not end"
        await asyncio.sleep(0.3)
    assert (status.status.value, status.reason.step) == ("error", "2"), status
    assert "why" in [one.message for one in status.log_entries]
    works.update(("build_in_background", "get_build_status", "from_template", "skip_cache"))
    template = Template().from_dockerfile("FROM ubuntu:22.04\nRUN false\n")
    assert "ended with 1" in await error_of(lambda: Template.build(template, "fails-here", **SMALL))
    template = Template().from_image("a.example/b", username="me", password="x")
    assert "credentials" in await error_of(lambda: Template.build(template, "fails-here", **SMALL))
    works.update(("from_dockerfile", "from_image", "from_ubuntu_image"))


def outcome(name: str) -> str:
    """Return what came of a method."""
    if name in works:
        return "works"
    if name in NEEDS_NETWORK:
        return "is `run_cmd`"
    if name in NEEDS_REGISTRY:
        return "is `from_image`"
    return "refused" if name in REFUSED else "not driven"


async def main() -> None:
    """Build, and report."""
    await whole_template()
    await ready_template()
    await failures()
    builder = type(Template().from_base_image())
    for name in sorted({*dir(Template), *dir(builder)}):
        if not name.startswith("_"):
            line = {"method": f"Template.{name}", "outcome": outcome(name)}
            sys.stdout.write(json.dumps(line) + "\n")


os.chdir(tempfile.gettempdir())
asyncio.run(main())
sys.stdout.flush()
sys.stderr.flush()
# The SDK's HTTP client has threads of native code, which may abort an interpreter that shuts down.
os._exit(0)
