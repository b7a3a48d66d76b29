"""Charts as inline SVG: bars against a limit, and lines. Plain strings, no script, readable in light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

COLOURS = ("#2f6fde", "#d9822b", "#2e9e6b", "#b04fc0", "#c0392b", "#7f8c2d", "#3aa6b9", "#8d6e63")
WIDTH = 760


@dataclass(frozen=True)
class Bar:
    """One bar. `low` and `high` are the quartiles; `mark` stands behind the number; `wrong` hatches the bar."""

    label: str
    value: float
    low: float
    high: float
    mark: str = ""
    wrong: bool = False


def bars(title: str, unit: str, rows: Sequence[Bar], limit: float | None = None) -> str:
    """Horizontal bars, the longest first, with the limit as a line."""
    label_width, right, row_height, top = 310, 120, 30, 44
    height = top + row_height * len(rows) + 30
    most = max([row.high for row in rows] + ([limit] if limit else [])) or 1.0
    scale = (WIDTH - label_width - right) / most
    parts, texts = [f'<text x="0" y="18" class="title">{_text(title)}</text>'], []
    for i, row in enumerate(sorted(rows, key=lambda row: -row.value)):
        y = top + i * row_height
        length = max(1.0, row.value * scale)
        fill = "url(#wrong)" if row.wrong else COLOURS[0] if row.label.startswith("onekernel") else "#8a94a6"
        parts.append(f'<text x="{label_width - 8}" y="{y + 15}" class="label">{_text(row.label)}</text>')
        parts.append(
            f'<rect x="{label_width}" y="{y}" width="{length:.1f}" height="20" fill="{fill}">'
            f"<title>{_text(row.label)}: {row.value:,.4g} {_text(unit)}</title></rect>"
        )
        left, end = label_width + row.low * scale, label_width + row.high * scale
        parts.append(f'<line x1="{left:.1f}" x2="{end:.1f}" y1="{y + 10}" y2="{y + 10}" class="spread"/>')
        texts.append(
            f'<text x="{max(end, label_width + length) + 6:.1f}" y="{y + 15}" class="value">{_short(row.value)}'
            f'<tspan class="mark"> {_text(row.mark)}</tspan></text>'
        )
    if limit:
        x = label_width + limit * scale
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 14}" y2="{height - 24}" class="limit"/>')
        label = f"limit {_short(limit)} {_text(unit)}"
        parts.append(f'<text x="{x:.1f}" y="{height - 8}" class="limit-label">{label}</text>')
    return _svg(title, height, [*parts, *texts])


@dataclass(frozen=True)
class Line:
    """One line: points (x, y), x ascending; `dashed` for a limit."""

    label: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


def lines(title: str, x_title: str, y_title: str, series: Sequence[Line], logarithmic: bool = False) -> str:
    """Lines over x (evenly spaced positions if `logarithmic`, as contexts go from 0 over powers)."""
    left, right, top, bottom, height = 70, 20, 44, 50 + 18 * len(series), 340 + 18 * len(series)
    places = sorted({x for one in series for x, _ in one.points})
    most = max(y for one in series for _, y in one.points) * 1.05 or 1.0

    def at_x(x: float) -> float:
        span = WIDTH - left - right
        if logarithmic or len(places) < 2:
            return left + span * (places.index(x) / max(1, len(places) - 1))
        return left + span * (x - places[0]) / (places[-1] - places[0])

    def at_y(y: float) -> float:
        return height - bottom - (height - top - bottom) * y / most

    parts = [f'<text x="0" y="18" class="title">{_text(title)}</text>']
    for tick in _ticks(most):
        parts.append(
            f'<line x1="{left}" x2="{WIDTH - right}" y1="{at_y(tick):.1f}" y2="{at_y(tick):.1f}" class="grid"/>'
        )
        parts.append(f'<text x="{left - 6}" y="{at_y(tick) + 4:.1f}" class="label">{_short(tick)}</text>')
    for x in places:
        anchor = "end" if len(places) > 1 and x == places[-1] else "middle"
        parts.append(
            f'<text x="{at_x(x):.1f}" y="{height - bottom + 18}" class="tick" text-anchor="{anchor}">{x:,.0f}</text>'
        )
    parts.append(f'<text x="{left}" y="{top - 10}" class="tick">{_text(y_title)}</text>')
    parts.append(f'<text x="{WIDTH - right}" y="{height - bottom + 34}" class="label">{_text(x_title)}</text>')
    for i, one in enumerate(series):
        colour = "currentColor" if one.dashed else COLOURS[i % len(COLOURS)]
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in one.points)
        dash = ' stroke-dasharray="6 4"' if one.dashed else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        for x, y in one.points:
            if not one.dashed:
                parts.append(
                    f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3.5" fill="{colour}">'
                    f"<title>{_text(one.label)} at {x:,.0f}: {y:,.4g}</title></circle>"
                )
        y = height - bottom + 46 + 18 * i
        parts.append(f'<line x1="{left}" x2="{left + 28}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"{dash}/>')
        parts.append(f'<text x="{left + 36}" y="{y + 4}" class="tick">{_text(one.label)}</text>')
    return _svg(title, height, parts)


def _ticks(most: float) -> list[float]:
    """Four to eight round numbers from 0 up."""
    step = 10 ** math.floor(math.log10(most))
    while most / step < 4:
        step /= 2
    return [i * step for i in range(int(most / step) + 1)]


def _short(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _svg(title: str, height: int, parts: Sequence[str]) -> str:
    hatch = (
        '<defs><pattern id="wrong" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="6" height="6" fill="#c0392b33"/><line x1="0" y1="0" x2="0" y2="6" stroke="#c0392b" '
        'stroke-width="3"/></pattern></defs>'
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{_text(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{hatch}{"".join(parts)}</svg>'
    )
