"""Command lines that need no shell: what is said of them is what bash makes of them."""

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sandyard.server.guest.plain import is_plain, program_of, words_of

PLAIN = {
    "true": ["true"],
    "  node \t -v ": ["node", "-v"],
    "python3 -c ''": ["python3", "-c", ""],
    "python3 -c 'print(\"a b\")'": ["python3", "-c", 'print("a b")'],
    'python3 -c "print(1 + 1)\nprint(2)"': ["python3", "-c", "print(1 + 1)\nprint(2)"],
    "env A=b x@y:z,1%": ["env", "A=b", "x@y:z,1%"],
    "./a.out a'b'\"c\"d": ["./a.out", "abcd"],
    "ls '*' \"~\" 'é' /tmp": ["ls", "*", "~", "é", "/tmp"],
}
NOT_PLAIN = (
    "", "  ", "a;b", "a|b", "a&", "a&&b", "a>b", "a<b", "$A", "a $A", 'a "$A"', "a `b`", 'a "`b`"',
    "a *", "a ?", "a [b]", "a {b,c}", "a ~", "~/a", "A=b", "A=b env", "a\nb", "a \\b", 'a "\\b"',
    "a 'b", 'a "b', "!a", "! a", "a # b", "#a", "(a)", "'a' b", '"a"', "''", "%1", "%",
    "echo a", "cd /", ".", ". a", "exit 3", "if", "time a", "coproc a", "function", "[ a ]", "kill",
    "printf a", "test", "[[", ":", "a é", "é", "a\0", "a '\0'", "exec a", "true a", "false --help",
    "a\x0bb", "a\xa0b", "a '\x01'", 'a "\x7f"',
)  # fmt: skip


@pytest.mark.parametrize("line", PLAIN)
def test_one_program_and_its_words_need_no_shell(line: str) -> None:
    assert words_of(line) == PLAIN[line]


@pytest.mark.parametrize("line", NOT_PLAIN)
def test_whatever_might_mean_more_is_left_to_the_shell(line: str) -> None:
    assert words_of(line) is None


def test_what_bash_would_do_itself_is_left_to_it() -> None:
    own = subprocess.run(
        ["bash", "-c", "compgen -k; compgen -b"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(own) > 70
    assert [one for one in own if words_of(one) is not None] == ["false", "true"]


PLAIN_PIECES = [
    "a", "b/c", "-x", "=", "%", "@", ":", ",", ".", "+", " ", "\t", "''", "'a b'", "'$x'", '"c d"',
    '""', "'\"'", '"\'"', '"a!b"', "'\n'", '"é"', "'\udcff'", "' \t '",
]  # fmt: skip


@pytest.mark.parametrize(
    "word",
    ["a" * 100_000, "'a'" * 30_000, "'" + "a" * 100_000, "a'" * 50_001],
    ids=["plain", "quoted", "open", "mixed"],
)
def test_a_long_word_is_read_once(word: str) -> None:
    found = words_of(f"echo-it {word}")
    assert found == (None if word.count("'") % 2 else ["echo-it", word.replace("'", "")])


PIECES = [
    *PLAIN_PIECES, '"$x"', "~", "*", "$x", "\\", "#", "!", "{a,b}", "\n", "'", '"', "é", "a=~"
]  # fmt: skip


@given(
    st.one_of(
        st.lists(st.sampled_from(PLAIN_PIECES), max_size=12).map("".join),
        st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
    )
)
@example("x a=~ b")
@example("x :~ =~")
def test_bash_reads_the_same_words(rest: str) -> None:
    if (words := words_of(f"x {rest}")) is None:
        return
    said = subprocess.run(
        ["bash", "-c", os.fsencode(f"set -- x {rest}\nprintf '%s\\0' \"$@\"")],
        capture_output=True,
        env={"PATH": os.environ["PATH"], "HOME": "/root"},
        cwd="/",
        check=True,
    )
    assert said.stdout.split(b"\0")[:-1] == [os.fsencode(one) for one in words]


def made_by_bash(env: dict[str, str], folder: Path) -> dict[bytes, bytes]:
    said = subprocess.run(
        ["bash", "-c", "env -0"], capture_output=True, env=env, cwd=folder, check=True
    )
    assert said.stderr == b""
    found = [one.partition(b"=") for one in said.stdout.split(b"\0") if one]
    return {name: value for name, _, value in found}


VARIABLES = subprocess.run(
    ["bash", "-c", "compgen -v"], capture_output=True, text=True, check=True,
    env={"PATH": os.environ["PATH"]},
).stdout.split()  # fmt: skip


@pytest.mark.parametrize(
    "name",
    sorted(
        {
            *VARIABLES,
            "LC_ALL",
            "PS1",
            "ENV",
            "TMOUT",
            "A",
            "HOME",
            "TERM",
            "LANG",
            "SSH_CLIENT",
            "SSH2_CLIENT",
            "SSH_CONNECTION",
        }
    ),
)
def test_a_program_gets_the_environment_that_bash_would_give_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    env = {"PATH": "/usr/bin:/bin", "HOME": "/root"}
    env.setdefault(name, "no_Such")
    if not is_plain(env):
        return
    found = program_of(["env", "-0"], env)
    assert found is not None
    path, own = found
    assert path == "/usr/bin/env"
    assert made_by_bash(env, tmp_path) == {k.encode(): v.encode() for k, v in own.items()}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PATH", ""), ("PATH", "/bin:"), ("PATH", "bin"), ("PATH", ".:/bin"), ("PATH", "/bin/"),
        ("BASH_ENV", "/x"), ("BASH_FUNC_ls%%", "() { :; }"), ("SHELLOPTS", "xtrace"), ("A-B", "c"),
        ("LC_ALL", "xx"), ("_", "x"), ("", "x"), ("SSH_CLIENT", "127.0.0.1 1 22"),
    ],
)  # fmt: skip
def test_an_environment_that_bash_goes_by_is_left_to_it(name: str, value: str) -> None:
    assert is_plain({"PATH": "/bin:/usr/bin", "HOME": "/root"})
    assert not is_plain({"PATH": "/bin", name: value})


def test_a_program_is_found_as_bash_would_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    (first / "a").mkdir(parents=True)
    second.mkdir()
    (first / "b").write_text("no program")
    for one in (second / "a", second / "b"):
        one.write_text("#!/bin/sh\necho $0\n")
        one.chmod(0o755)
    monkeypatch.chdir(first)
    env = {"PATH": f"{tmp_path}/none:{first}:{second}", "HOME": "/root"}
    for name in ("a", "b"):
        found = program_of([name], env)
        assert found is not None
        assert found[0] == str(second / name)
        said = subprocess.run(["/bin/bash", "-c", name], capture_output=True, env=env, check=True)
        assert said.stdout.decode().strip() == found[0]
    (second / "true").symlink_to(second / "a")
    found = program_of(["true"], env)
    assert found is not None
    assert found[0] == "/usr/bin/true"
    assert program_of(["c"], env) is None
    assert program_of(["./a"], env) is None
    assert program_of(["../second/a"], env) is not None
