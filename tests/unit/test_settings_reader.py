"""What is said of settings that cannot be used."""

from pathlib import Path

import pytest

from sandyard.server.app.settings_reader import read_settings, unknown_variables
from sandyard.server.core.errors import InvalidArgumentError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SANDYARD_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("POOL__FLOOR", "many", "SANDYARD_POOL__FLOOR: input should be a valid integer, unable to"),
        ("HTTP__PORT", "99999", "SANDYARD_HTTP__PORT: input should be less than or equal to 65535"),
        ("POOL__FLOR", "3", "there is no such setting; did you mean SANDYARD_POOL__FLOOR?"),
        ("BACKUP__FOLDER", "/b", "backup in .*: backup.folder needs backup.passphrase_file$"),
        ("ACCOUNTS__DEFAULT_PLAN", "gold", "config.toml: accounts.default_plan is 'gold'"),
        ("PLANS", "{", "cannot use the settings: error parsing"),
    ],
)
def test_a_variable_that_cannot_be_used_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(f"SANDYARD_{name}", value)
    with pytest.raises(InvalidArgumentError, match=said) as caught:
        read_settings()
    assert "pydantic" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[http]\nport = 'a'\n", "http.port in .*/config.toml: input should be a valid integer"),
        ("[pool]\nflor = 1\n", "toml: there is no such setting; did you mean pool.floor?"),
        ("[htpp]\nport = 1\n", "htpp in .*/config.toml: there is no such setting"),
        ("[http\n", "cannot read .*/config.toml: "),
    ],
)
def test_a_file_that_cannot_be_used_is_named(home: Path, content: str, said: str) -> None:
    (home / "config.toml").write_text(content)
    with pytest.raises(InvalidArgumentError, match=said):
        read_settings()


def test_settings_that_can_be_used_are_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "config.toml").write_text("[http]\nport = 81\n[pool]\nfloor = 2\n")
    monkeypatch.setenv("SANDYARD_HTTP__PORT", "82")
    settings = read_settings()
    assert (settings.http.port, settings.pool.floor, settings.home) == (82, 2, home)


def test_variables_that_nothing_reads_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unknown_variables() == []
    for known in ("URL", "API_KEY", "PROFILE", "HTTP__PORT", "PLANS", "TEST_KERNEL"):
        monkeypatch.setenv(f"SANDYARD_{known}", "x")
    assert unknown_variables() == []
    monkeypatch.setenv("SANDYARD_HTTP_PORT", "81")
    monkeypatch.setenv("SANDYARD_WHATEVER", "81")
    port, other = unknown_variables()
    assert port.endswith("has no effect; did you mean SANDYARD_HTTP__PORT?")
    assert other == "the variable SANDYARD_WHATEVER is unknown and has no effect"
