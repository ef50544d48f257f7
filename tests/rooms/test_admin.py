"""The operator's commands, with no server at all."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sandyard.cli.main import app


class Operator:
    """Types `sandyard admin …` on the host of an installation."""

    def __init__(self, home: Path) -> None:
        self.environment = {"SANDYARD_HOME": str(home), "XDG_CONFIG_HOME": str(home)}

    def __call__(self, *words: str, fails: bool = False) -> str:
        done = CliRunner().invoke(app, ["admin", *words], env=self.environment)
        assert (done.exit_code != 0) is fails, done.output
        # A mistake comes out of `main` as one sentence; here it is the exception's.
        return f"{done.output} {done.exception}" if fails else done.stdout


def test_an_operator_sets_up_a_team(tmp_path: Path) -> None:
    admin = Operator(tmp_path)
    slug = admin("org", "create", "Acme Inc", "ada@acme.example").split()[1]
    assert slug.startswith("acme-inc-")
    admin("user", "add", slug, "bob@acme.example")
    assert "member already" in admin("user", "add", slug, "bob@acme.example", fails=True)
    secret = admin("key", "create", slug, "bob@acme.example", "ci", "--expires-in", "30d").strip()
    assert secret.startswith("rt_live_")
    assert secret not in admin("key", "list", slug)
    assert "admin:resources" in admin(
        "key", "create", slug, "bob@acme.example", "x", "--scope", "admin:resources", fails=True
    )
    admin("user", "role", slug, "bob@acme.example", "admin")
    assert "granted 5.00; balance 105.00" in admin("grant", slug, "500", "--reference", "r")
    assert "done before" in admin("grant", slug, "500", "--reference", "r")
    assert "taken away 1.00; balance 104.00" in admin("grant", slug, "--", "-100")
    ledger = admin("ledger", slug)
    assert [line.split()[2] for line in ledger.splitlines()[1:]] == ["adjustment", "grant", "grant"]
    admin("org", "limit", slug, "sandboxes", "3")
    admin("org", "plan", slug, "team")
    listed = admin("org", "list")
    assert slug in listed
    assert "team" in listed
    admin("user", "operator", "ada@acme.example")
    assert "yes" in admin("user", "list", slug)
    key_id = admin("key", "list", slug).splitlines()[1].split()[0]
    assert "revoked" in admin("key", "revoke", slug, key_id)
    admin("user", "remove", slug, "bob@acme.example")
    assert "bob" not in admin("user", "list", slug)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("org", "plan", "default", "gold"), "known are"),
        (("org", "limit", "default", "sandboxes", "many"), "whole number"),
        (("org", "limit", "default", "beds", "1"), "can be limited"),
        (("user", "add", "default", "nobody"), "no e-mail address"),
        (("user", "role", "default", "admin@localhost", "king"), "admin and member"),
        (("key", "create", "default", "a@b.c", "k"), "cannot find the user"),
        (("key", "create", "default", "admin@localhost", "k", "--scope", "all"), "known are"),
        (("grant", "nobody", "5"), "admin org list"),
        (("grant", "default", "0"), "cannot post 0"),
    ],
)
def test_what_an_operator_gets_wrong_is_said(
    tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    # A terminal's borders and line ends are no part of the sentence.
    told = " ".join(Operator(tmp_path)(*words, fails=True).replace("│", " ").split())
    assert said in told, json.dumps(told)
