"""The chart of the README, drawn from the page of figures."""

from xml.etree import ElementTree as ET

import pytest
from bench.chart import CHART, PAGE, chart_of, figures_in

_TABLE = """# Figures

Measured on 2 cores of a <host> & more, machines by qemu.

| What | Now | The run before |
|---|---|---|
| get, 10 rows | cpu ms 0.6, p50 ms 0.62, a second 1601.5 |  |
| restore → first exec | ms 464, by hand ms 357.7, ratio 1.3 | ms 465.6 |
| pause, 30 MiB dirty | ms 56.6, by hand ms 43, ratio 1.32 |  |
| resume → exec | ms 463.8, by hand ms 368.9, ratio 1.26 |  |
| create, from the pool, base-ubuntu | ms 18.9, p95 ms 30.7 |  |
| create → true, from the pool, base-ubuntu | ms 44.5, p95 ms 69.3 |  |
"""


def test_figures_are_read_from_the_page() -> None:
    found = figures_in(_TABLE)
    assert found["get, 10 rows"] == {"cpu ms": 0.6, "p50 ms": 0.62, "a second": 1601.5}
    assert found["pause, 30 MiB dirty"] == {"ms": 56.6, "by hand ms": 43, "ratio": 1.32}
    assert "What" not in found


def test_each_bar_is_as_long_as_its_figure() -> None:
    drawn = ET.fromstring(chart_of(_TABLE))
    space = "{http://www.w3.org/2000/svg}"
    widths = [float(one.get("width", "")) for one in drawn.findall(f"{space}rect")][2:]
    expected = [18.9, 44.5, 464, 357.7, 56.6, 43, 463.8, 368.9]
    assert widths == pytest.approx([one / 464 * max(widths) for one in expected], abs=0.1)
    words = [one.text for one in drawn.findall(f"{space}text")]
    assert words[-1] == "2 cores of a <host> & more, machines by qemu"
    title = drawn.find(f"{space}title")
    assert title is not None
    assert "create, from the pool: 18.9 ms" in str(title.text)


def test_the_chart_is_of_the_page() -> None:
    assert CHART.read_text() == chart_of(PAGE.read_text()), "python -m bench.chart draws it anew"
