"""The benches that need no machine work: figures come out of one round."""

import pytest
from tests.support.benches import figures_of

pytestmark = pytest.mark.slow  # each starts servers of its own


@pytest.mark.parametrize(
    ("bench", "arguments"),
    [
        ("control", ["--rounds", "16", "--rows", "10"]),
        pytest.param(
            "fleet", ["--seconds", "0.1", "--rounds", "3", "--mib", "2"], marks=pytest.mark.postgres
        ),
    ],
)
def test_figures_come_out_of_a_round(bench: str, arguments: list[str]) -> None:
    figures_of(bench, *arguments)
