"""The page of figures as a chart for the README: what a user waits for, in milliseconds.

    .venv/bin/python -m bench.chart

Draws docs/images/figures.svg from docs/reference/performance.md.
"""

import re
from pathlib import Path
from xml.sax.saxutils import escape

_DOCS = Path(__file__).parents[1] / "docs"
PAGE = _DOCS / "reference/performance.md"
CHART = _DOCS / "images/figures.svg"
Figures = dict[str, dict[str, float]]

_ROWS = {
    "create, from the pool": "create, from the pool",
    "create → true, from the pool": "create and first command, from the pool",
    "restore → first exec": "create and first command, without a pool",
    "pause, 30 MiB dirty": "pause with memory, 30 MiB changed",
    "resume → exec": "resume and first command",
}
_WIDTH, _LABELS, _ROW, _BAR, _TOP = 760, 300, 34, 9, 44
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f } .small { fill: #57606a; font-size: 12px }
.ours { fill: #2f6f4f } .hand { fill: #b8c0c8 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .small { fill: #9aa4af } .ours { fill: #59b386 } .hand { fill: #4a525b }
}"""


def figures_in(page: str) -> Figures:
    """Return the figures of the latest run from the page's table."""
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|", page, re.MULTILINE)
    return {
        name: {unit: float(value) for unit, value in re.findall(r"([^,]+?) ([\d.]+)(?:, |$)", text)}
        for name, text in rows
        if re.search(r" [\d.]+", text)
    }


def chart_of(page: str) -> str:
    """Return the chart as SVG."""
    figures = figures_in(page)
    (measured,) = re.findall(r"^Measured on (.+)\.$", page, re.MULTILINE)
    rows = []
    for prefix, label in _ROWS.items():
        # The template follows the name of a figure of the pool.
        found = (
            values
            for name, values in figures.items()
            if name == prefix or name.startswith(f"{prefix}, ")
        )
        values = next(found)
        rows.append((label, values["ms"], values.get("by hand ms")))
    longest = max(max(ours, hand or 0) for _, ours, hand in rows)
    scale = (_WIDTH - _LABELS - 70) / longest
    height = _TOP + _ROW * len(rows) + 20
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
        f"<title>{escape(_described(rows))}</title>",
        f"<style>{_STYLE}</style>",
        f'<rect class="ours" x="{_LABELS}" y="10" width="12" height="{_BAR}"/>',
        f'<text x="{_LABELS + 18}" y="19">Sandyard, ms</text>',
        f'<rect class="hand" x="{_LABELS + 130}" y="10" width="12" height="{_BAR}"/>',
        f'<text x="{_LABELS + 148}" y="19">the same steps by hand</text>',
    ]
    for number, (label, ours, hand) in enumerate(rows):
        y = _TOP + number * _ROW
        lines.append(f'<text x="{_LABELS - 12}" y="{y + 13}" text-anchor="end">{label}</text>')
        for kind, value, top in (("ours", ours, y), ("hand", hand, y + _BAR + 1)):
            if value is not None:
                bar = f'x="{_LABELS}" y="{top}" width="{value * scale:.1f}" height="{_BAR}"'
                lines.append(f'<rect class="{kind}" {bar}/>')
        end = _LABELS + max(ours, hand or 0) * scale + 8
        lines.append(f'<text x="{end:.1f}" y="{y + 13}">{ours:g}</text>')
    lines.append(f'<text class="small" x="0" y="{height - 6}">{escape(measured)}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _described(rows: list[tuple[str, float, float | None]]) -> str:
    return "; ".join(
        f"{label}: {ours:g} ms" + (f", by hand {hand:g} ms" if hand is not None else "")
        for label, ours, hand in rows
    )


def main() -> None:
    CHART.parent.mkdir(exist_ok=True)
    CHART.write_text(chart_of(PAGE.read_text()))


if __name__ == "__main__":
    main()
