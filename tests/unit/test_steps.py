"""What steps of a build run in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.service.builds.builds import read, written
from sandyard.server.service.builds.plan import NewTemplate, Step, StepKind, check_plan
from sandyard.server.service.builds.steps import Setting, check_steps, source_of, work_of

START = Setting({"A": "1"}, "root", "/srv", login={"A": "other", "PATH": "/bin"})


def after(*steps: tuple[StepKind, tuple[str, ...]]) -> Setting:
    setting = START
    for kind, args in steps:
        setting = setting.after(Step(kind, args, "step"))
    return setting


def test_variables_are_filled_in_from_those_before() -> None:
    setting = after(
        (StepKind.ENV, ("B", "$A-${A}", "C", "$B|${NONE}|$|$1|${|\\")),
        (StepKind.ENV, ("A", "2", "D", "$(id)`id`$A")),
    )
    # Those of one instruction do not see each other, as in Docker.
    assert setting.env == {"A": "2", "B": "1-1", "C": "||$|$1|${|\\", "D": "$(id)`id`1"}
    paths = (StepKind.ENV, ("PATH", "/x:$PATH")), (StepKind.ENV, ("PATH", "$PATH:/y"))
    assert after(*paths).env["PATH"] == "/x:/bin:/y"
    filled = after((StepKind.ENV, ("X", "${A:-no}${NONE:-no}${A:+yes}${NONE:+yes}${A:?x}"))).env
    assert filled["X"] == "1noyes${A:?x}"


def test_values_that_grow_too_large() -> None:
    setting = after((StepKind.ENV, ("B", "x" * 40_000)))
    for step in (
        Step(StepKind.ENV, ("B", "$B" * 1000), "step"),
        Step(StepKind.ENV, ("C", "y" * 40_000), "step"),
        Step(StepKind.WORKDIR, ("$B",), "step"),
        Step(StepKind.USER, ("$B",), "step"),
    ):
        with pytest.raises(InvalidArgumentError):
            setting.after(step)
    grown = NewTemplate(
        "mine", base="base",
        steps=tuple(Step(StepKind.ENV, ("A", "x" if n == 0 else "$A" * 30), "s") for n in range(9)),
    )  # fmt: skip
    with pytest.raises(InvalidArgumentError, match="64 KiB"):
        check_steps(grown)


def test_without_a_user_and_a_folder_it_is_root_at_home() -> None:
    nothing = Setting({}, "", "")
    work = work_of(Step(StepKind.RUN, ("true",), "step"), nothing)
    assert work is not None
    assert (work.user, work.cwd) == ("root", "~")
    copy = work_of(Step(StepKind.COPY, ("a", "b", "1000"), "step", "u"), nothing)
    assert copy is not None
    assert (copy.env["TARGET"], copy.env["OWNER"], copy.env["WHO"]) == ("~/b", "1000:1000", "root")
    assert nothing.after(Step(StepKind.WORKDIR, ("c",), "step")).workdir == "~/c"


@pytest.mark.parametrize(
    ("given_path", "expected"),
    [("/a/b/", "/a/b"), ("c", "/srv/c"), ("./c/../d", "/srv/d"), ("$A/x", "/srv/1/x"), ("/", "/")],
)
def test_working_directories(given_path: str, expected: str) -> None:
    assert after((StepKind.WORKDIR, (given_path,))).workdir == expected


def test_what_changes_nothing_and_users() -> None:
    assert after((StepKind.RUN, ("cd /x",)), (StepKind.COPY, ("a", "b"))) == START
    assert after((StepKind.USER, ("me", "true"))).user == "me"


def test_the_target_of_a_copy_ends_with_a_slash_if_that_was_given() -> None:
    assert START.path("b/") == "/srv/b/"
    assert START.path(".") == "/srv/."
    assert START.path("/x") == "/x"


@pytest.mark.parametrize(
    ("pattern", "source"),
    [
        ("a.txt", "a.txt"), ("./a/b", "a/b"), ("a/*", "a"), ("a/b*/c", "a"), ("*", "."),
        (".", "."), ("a/../b", "b"), ("a/**/*.py", "a"), ("a/", "a"), ("{a,b}/c", "."),
    ],
)  # fmt: skip
def test_the_source_of_a_copy_is_what_comes_before_a_wildcard(pattern: str, source: str) -> None:
    assert source_of(pattern) == source


@given(st.text(max_size=200), st.dictionaries(st.text(max_size=5), st.text(max_size=5)))
def test_any_text_can_be_filled(text: str, env: dict[str, str]) -> None:
    filled = Setting(env, "root", "/").filled(text)
    assert "$" in text or filled == text


STEPS = (
    Step(StepKind.RUN, ("a", "me"), "step 1"),
    Step(StepKind.COPY, ("a", "b", "me:you", "644"), "step 2", "u", force=True),
    Step(StepKind.ENV, ("A", ""), "step 3"),
)


def test_a_plan_with_steps_is_written_and_read() -> None:
    wish = NewTemplate("mine", base="base", steps=STEPS, tags=("v1", "x"))
    check_plan(wish)
    shape = {"vcpus": 1, "memory_mib": 128, "disk_mib": 1024}
    assert read(written(wish) | {"shape": shape})[0] == wish
    assert wish.uploads == (("steps", "u"),)
    old = written(NewTemplate("mine", base="base"))
    del old["steps"], old["tags"]  # an earlier version wrote it
    assert read(old | {"shape": shape})[0] == NewTemplate("mine", base="base")


@pytest.mark.parametrize("mode", ["9", "1", "77777", "rwx", "0o755"])
def test_modes_that_are_none(mode: str) -> None:
    step = Step(StepKind.COPY, ("a", "b", "", mode), "step 1", "u")
    with pytest.raises(InvalidArgumentError, match="step 1, COPY"):
        check_plan(NewTemplate("mine", base="base", steps=(step,)))
