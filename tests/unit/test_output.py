"""What the command line prints, for people and for programs."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from sandyard.cli import copy, live, output, sandbox, ways
from sandyard.cli import main as entry
from sandyard.cli.credentials import secret_of
from sandyard.cli.sandbox import seconds_of
from sandyard.client import ApiError, Sandbox, Sandyard, SshAccess, TemplateInfo
from sandyard.client.config import ClientConfig
from sandyard.server.links.identities import Authority

IDS = [f"sandbox-{number:012d}" for number in range(3)]


class Terminal(io.StringIO):
    """Standard output that says that it is a terminal."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = io.BytesIO()

    @property
    def buffer(self) -> io.BytesIO:
        return self.bytes

    def isatty(self) -> bool:
        return True


class Pipe(Terminal):
    """Standard output that is none."""

    def isatty(self) -> bool:
        return False


def one(number: int, *, name: str | None = None, reason: str | None = None) -> Sandbox:
    raw = {
        "id": IDS[number], "name": name, "status": "running", "template": "base-ubuntu",
        "createdAt": "2026-05-06T10:00:00.000Z",
        "resources": {"vcpus": 2, "memory": "4GB", "disk": "10GB"},
        "statusReason": {"code": "x", "message": reason} if reason else None,
    }  # fmt: skip
    return Sandbox(Sandyard("rt_live_x", "http://127.0.0.1:1"), raw)


class Client:
    """Stands in for a server."""

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def list(self, **_: object) -> list[Sandbox]:
        return [one(0, name="[/x]"), one(1, name="\x1b[2Jred\n"), one(2)]

    def get(self, reference: str) -> Sandbox:
        return one(0, name=reference, reason="it was \x1b[31mlost")

    def delete(self, reference: str) -> None:
        if reference == "gone":
            raise ApiError("cannot find it \x07", status=404, code="not_found", request_id="req_1")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setattr(sandbox, "open_client", Client)
    return CliRunner()


def test_in_a_pipe_a_row_is_a_line_and_nothing_is_cut(run: CliRunner) -> None:
    told = run.invoke(entry.app, ["sandbox", "list"], env={"COLUMNS": "20"}).stdout.splitlines()
    assert [line.split("\t")[0] for line in told] == ["id", *IDS]
    assert {line.count("\t") for line in told} == {5}
    assert told[1].split("\t")[1] == "[/x]"
    assert told[2].split("\t")[1] == "\\x1b[2Jred "


def test_on_a_narrow_terminal_ids_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    monkeypatch.setattr("sys.stdout", shown)
    monkeypatch.setenv("COLUMNS", "50")
    output.show_table(("id", "name"), [(IDS[0], "a name that is a good deal longer" * 2)])
    name = "a name that is a good deal longer" * 2
    said = shown.getvalue() + shown.bytes.getvalue().decode()
    assert said == f"id    {IDS[0]}\nname  {name}\n"


def test_of_a_list_without_room_the_most_important_columns_are_shown() -> None:
    row = ("name", "running", "4.9", "196/3929 MiB", "0.0/9.7 GiB", "0:21:27",
           "2026-11-30 11:42:24", IDS[0])  # fmt: skip

    def shown(width: int) -> list[object]:
        return [one.header for one in live._table([row], width).columns]

    assert shown(200) == list(live._COLUMNS)
    assert shown(70) == ["name", "status", "CPU %", "memory", "disk", "up"]
    assert shown(30) == ["name", "CPU %", "memory"]


def test_scripts_are_checked_before_a_sandbox_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.rb").write_text("puts 1")
    (tmp_path / "y.rb").write_text("#!/usr/bin/env ruby\n")
    for wrong in (["nofile.py"], ["x.rb", "a"]):
        with pytest.raises(typer.BadParameter):
            copy._check(wrong)
    for right in (["y.rb"], ["python3", "-"], ["echo x.py"], ["ls /a.py"]):
        copy._check(right)


def test_json_of_one_is_an_object_and_of_a_list_a_list(run: CliRunner) -> None:
    got = json.loads(run.invoke(entry.app, ["sandbox", "get", "x", "--json"]).stdout)
    assert got["id"] == IDS[0]
    listed = json.loads(run.invoke(entry.app, ["sandbox", "list", "--json"]).stdout)
    assert [each["id"] for each in listed] == IDS


def test_get_says_why_and_a_guest_moves_no_cursor(run: CliRunner) -> None:
    told = run.invoke(entry.app, ["sandbox", "get", "x"])
    assert "reason\tit was \\x1b[31mlost" in told.stdout
    assert "\x1b" not in told.stderr + told.stdout


def test_of_several_references_each_is_tried(run: CliRunner) -> None:
    done = run.invoke(entry.app, ["sandbox", "delete", "a", "gone", "b"])
    assert done.exit_code == 1
    assert done.stdout.split("\n")[:2] == ["deleted a", "deleted b"]
    again = run.invoke(entry.app, ["sandbox", "destroy", "a"])
    assert (again.exit_code, again.stdout) == (0, "deleted a\n")
    assert "cannot find it \\x07" in done.stderr


@pytest.mark.parametrize("raw", [False, True])
def test_bytes_reach_a_pipe_as_they_are_and_a_terminal_when_asked(raw: bool) -> None:
    data = b"\x00\xff\x1b]0;title\x07\r\n"
    pipe, terminal = Pipe(), Terminal()
    output.write_raw(pipe, data, raw=raw)
    output.write_raw(terminal, data, raw=raw)
    assert pipe.bytes.getvalue() == data
    if raw:
        assert terminal.bytes.getvalue() == data
    else:
        assert terminal.getvalue() == "\\x00\ufffd\\x1b]0;title\\x07\n"


def run_main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["sandyard", *arguments])
    with pytest.raises(SystemExit) as ended:
        entry.main()
    told = capsys.readouterr()
    return int(ended.value.code or 0), told.out, told.err


def test_the_version_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told, _ = run_main(monkeypatch, capsys, "--version")
    assert code == 0
    assert re.fullmatch(r"sandyard [0-9.]+\+[0-9a-f]{8}\n", told)


@pytest.mark.parametrize(
    ("content", "words"), [(None, "no server is configured"), ("url = [", "cannot read")]
)
def test_a_configuration_that_is_missing_or_broken_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    content: str | None,
    words: str,
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("SANDYARD_URL", "SANDYARD_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    if content is not None:
        (tmp_path / "sandyard").mkdir()
        (tmp_path / "sandyard/config.toml").write_text(content)
    code, _, told = run_main(monkeypatch, capsys, "sandbox", "list")
    assert code == 1
    assert words in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sandbox", "exec", "--timeout", "inf", "x", "y"), "time-out"),
        (("sandbox", "exec", "--timeout", "nan", "-i", "x", "y"), "time-out"),
        (("run", "--timeout", "-1", "x"), "time-out"),
        (("sandbox", "get", "\udcff"), "cannot reach"),
        (("sandbox", "exec", "x", "\udcff"), "cannot reach"),
        (("login", "--key", ""), "API key"),
        (("login", "--url", "http://localhost:80a", "--key", "k"), "cannot connect"),
        (("mcp", "--http", "--port", "99999"), "65535"),
        (("run", "--"), "Missing argument"),
    ],
)
def test_what_makes_no_sense_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("SANDYARD_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("SANDYARD_API_KEY", "rt_live_x")
    code, _, told = run_main(monkeypatch, capsys, *words)
    assert code in (1, 2)
    assert said in " ".join(told.split()), told
    assert "Traceback" not in told


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("words", "code"), [("sandbox list", 1), ("--version", 0)])
def test_a_stream_that_is_closed_breaks_nothing(
    closed: str, words: str, code: int, tmp_path: Path
) -> None:
    sandyard = Path(sys.executable).parent / "sandyard"
    done = subprocess.run(
        ["bash", "-c", f"exec 3>&2; {sandyard} {words} {closed}; echo $? >&3"],
        env={"XDG_CONFIG_HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert done.stderr.rstrip().endswith(str(code))


def test_json_moves_no_cursor_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    value = {"a": "\u009b2J\x1b[1m \u202e ü\n\x7f"}
    for kind in (Terminal, Pipe):
        out = kind()
        monkeypatch.setattr("sys.stdout", out)
        output.show_json(value)
        said = out.getvalue() or out.bytes.getvalue().decode()
        assert json.loads(said) == value
        assert not set(said) & set("\u009b\x1b\u202e\x7f")
        assert ("ü" in said) is (kind is Terminal)


KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA"


def access(**other: object) -> SshAccess:
    told = {
        "host": "gw.example",
        "port": 2222,
        "user": "sandbox-abc",
        "command": "",
        "host_key": KEY,
    }
    told |= other
    told.setdefault("known_hosts", f"[{told['host']}]:{told['port']} {told['host_key']}")
    return SshAccess(**told)  # type: ignore[arg-type]


def log_in(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    told: SshAccess,
) -> tuple[list[str] | None, str]:
    """Return the command that `sandbox ssh` became, if any, and what it printed."""
    became: list[list[str]] = []

    class Client:
        config = ClientConfig("http://api.example", "rt_live_x")

        def ssh(self, _: str) -> SshAccess:
            return told

    @contextmanager
    def opened() -> Iterator[Client]:
        yield Client()

    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
    monkeypatch.setattr(ways, "open_client", opened)
    monkeypatch.setattr("sandyard.cli.ways.shutil.which", lambda _: "/usr/bin/ssh")
    monkeypatch.setattr("sandyard.cli.ways.os.execve", lambda _, words, __: became.append(words))
    _, _, said = run_main(monkeypatch, capsys, "sandbox", "ssh", "x", "uname", "-a")
    return (became[0] if became else None), said


def test_ssh_is_given_a_destination_and_no_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words, _ = log_in(monkeypatch, capsys, tmp_path, access())
    assert words is not None
    assert words[-4:] == ["--", "sandbox-abc@gw.example", "uname", "-a"]
    assert (tmp_path / "sandyard/known_hosts").read_text() == f"[gw.example]:2222 {KEY}\n"
    for host in ("2001:db8::1", "192.0.2.1", "a_b.example"):
        assert log_in(monkeypatch, capsys, tmp_path, access(host=host))[0] is not None


@pytest.mark.parametrize(
    "other",
    [
        {"user": "-oProxyCommand=touch /tmp/x"}, {"user": "a b"}, {"user": "$(id)"}, {"user": ""},
        {"host": "-oProxyCommand=x"}, {"host": "a;id"}, {"host": "a`id`"}, {"host": "a\nb"},
        {"host": ""}, {"port": 0}, {"port": 70000}, {"host_key": f"{KEY}\n* {KEY}"},
        {"known_hosts": f"* {KEY}"}, {"known_hosts": f"[gw.example]:2222 {KEY}\n* {KEY}"},
    ],
)  # fmt: skip
def test_a_hostile_server_runs_nothing_by_ssh(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    other: dict[str, object],
) -> None:
    words, said = log_in(monkeypatch, capsys, tmp_path, access(**other))
    assert words is None
    assert "cannot log in" in " ".join(said.split())
    assert not (tmp_path / "sandyard/known_hosts").exists()


def test_a_secret_comes_from_a_file_or_a_pipe_and_with_a_warning_from_an_argument(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    kept = tmp_path / "key"
    kept.write_text(" rt_live_file\n")
    ask = partial(secret_of, what="API key", option="--key-file")
    assert ask(None, kept) == "rt_live_file"
    monkeypatch.setattr("sys.stdin", io.StringIO("rt_live_pipe\nmore"))
    assert ask(None, None) == "rt_live_pipe"
    monkeypatch.setattr("sys.stdin", io.StringIO("rt_live_dash\n"))
    assert ask(None, Path("-")) == "rt_live_dash"
    assert capsys.readouterr().err == ""
    assert ask("rt_live_word", None) == "rt_live_word"
    assert "visible in the list of processes" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    for given, file, said in (
        (None, None, "empty"), ("", None, "empty"), ("x", kept, "once"),
        (None, tmp_path / "none", "cannot read"), (None, tmp_path, "cannot read"),
    ):  # fmt: skip
        with pytest.raises(typer.BadParameter, match=said):
            ask(given, file)


def test_secrets_are_not_shown_by_repr() -> None:
    assert "rt_live" not in repr(ClientConfig("http://x", "rt_live_secret"))
    assert "PRIVATE" not in repr(Authority.new("test", datetime.now(UTC)))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("90", 90), ("45s", 45), ("30m", 1800), ("12h", 43_200), ("30d", 2_592_000)],
)
def test_times_are_seconds_or_have_a_unit(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "d", "-1", "1.5h", "30 d", "1w", "٣d", "1" * 12])
def test_what_is_no_time_is_refused_with_what_to_write(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="write seconds"):
        seconds_of(text)


def test_an_error_is_json_with_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "_wanted", set())
    monkeypatch.setenv("SANDYARD_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("SANDYARD_API_KEY", "rt_live_x")
    code, _, said = run_main(monkeypatch, capsys, "sandbox", "get", "x")
    assert (code, said.startswith("error: ")) == (1, True)
    code, printed, said = run_main(monkeypatch, capsys, "sandbox", "get", "x", "--json")
    failed = json.loads(said)["error"]
    assert (code, printed, failed["code"]) == (1, "", "connection_failed")
    assert "scripts/up" in failed["message"]


def test_what_became_of_each_is_json_with_json(capsys: pytest.CaptureFixture[str]) -> None:
    def work(reference: str) -> str:
        if reference == "b":
            raise ApiError("b is away", status=404, code="not_found", request_id="req_1")
        return f"deleted {reference}"

    with pytest.raises(typer.Exit) as ended:
        output.for_each(["a", "b", "c"], work, as_json=True)
    assert ended.value.exit_code == 1
    shown = json.loads(capsys.readouterr().out)
    assert [(one["reference"], one["ok"]) for one in shown] == [
        ("a", True), ("b", False), ("c", True),
    ]  # fmt: skip
    assert shown[1]["error"] == {
        "code": "not_found", "message": "b is away", "requestId": "req_1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("before", "now", "added"),
    [
        ("", "a\n", "a\n"), ("a\n", "a\n", ""), ("a\n", "a\nb\n", "b\n"),
        ("a\nb\n", "b\nc\n", "c\n"), ("a\n", "x\ny\n", "x\ny\n"), ("a\n", "", ""),
        ("aaa", "aaaa", "a"),
    ],
)  # fmt: skip
def test_what_was_added_to_a_log_of_which_the_end_is_kept(
    before: str, now: str, added: str
) -> None:
    assert sandbox.appended(before, now) == added


def test_a_failure_counts_also_where_nobody_reads_the_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def shown(_: object) -> None:
        raise typer.Exit(0)

    def work(_: str) -> str:
        raise ApiError("it is away", status=404, code="not_found", request_id="req_1")

    monkeypatch.setattr(output, "show_json", shown)
    with pytest.raises(typer.Exit) as ended:
        output.for_each(["a"], work, as_json=True)
    assert ended.value.exit_code == 1


@pytest.mark.parametrize("words", [("template", "versions"), ("sandbox", "create", "--template")])
def test_templates_are_completed(monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    class Client:
        def __enter__(self) -> "Client":
            return self

        def __exit__(self, *_: object) -> None: ...

        def templates(self) -> list[TemplateInfo]:
            return [TemplateInfo(one, one, "ready", {}) for one in ("base-minimal", "desktop")]

    monkeypatch.setattr(sandbox, "Sandyard", lambda **_: Client())
    line = " ".join(("sandyard", *words, "base"))
    done = CliRunner().invoke(
        entry.app, prog_name="sandyard",
        env={"_SANDYARD_COMPLETE": "complete_bash", "COMP_WORDS": line,
             "COMP_CWORD": str(len(words) + 1)},
    )  # fmt: skip
    assert done.stdout.split() == ["base-minimal"]


def test_a_list_is_cut_at_a_limit(run: CliRunner) -> None:
    listed = run.invoke(entry.app, ["sandbox", "list", "--json", "--limit", "2"]).stdout
    assert [each["id"] for each in json.loads(listed)] == IDS[:2]
