"""The HTML page: charts and tables of one or several documents. One file, nothing loaded from anywhere."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence

from onekernel.bench import gate, power
from onekernel.bench.charts import Bar, Line, bars, lines
from onekernel.bench.document import Document, Figure, figures, fits_in_cache, limit_of
from onekernel.bench.tables import notes, rows_of
from onekernel.bench.workload import COLD_START, DECODE, PREFILL, Cell

STYLE = """
:root { color-scheme: light dark; --line: #8885; --faint: #888; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; }
h2 { font-size: 1.25rem; margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1rem; }
svg { width: 100%; max-width: 760px; height: auto; display: block; margin: 1.5rem 0; }
svg text { font: 13px system-ui, sans-serif; fill: currentColor; } svg .title { font-weight: 600; font-size: 15px; }
svg .value { paint-order: stroke; stroke: Canvas; stroke-width: 4px; }
svg .label { text-anchor: end; } svg .mark { fill: var(--faint); } svg .grid { stroke: var(--line); }
svg .spread { stroke: currentColor; stroke-width: 2; }
svg .limit { stroke: #c0392b; stroke-dasharray: 6 4; stroke-width: 2; }
svg .limit-label { text-anchor: end; fill: #c0392b; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.85rem; } th, td { padding: 0.25rem 0.6rem; }
th, td { border-bottom: 1px solid var(--line); text-align: right; } td:first-child, td:nth-child(2), td:last-child,
th:first-child, th:nth-child(2), th:last-child { text-align: left; } tr.limit-row td { font-style: italic; }
tr.wrong td { color: #c0392b; } pre { overflow-x: auto; background: #8881; padding: 0.8rem; font-size: 0.8rem; }
.faint { color: var(--faint); }
"""


def page(found: Sequence[tuple[str, Document]]) -> str:
    """All documents (file name, document), one section each."""
    body = "\n".join(_section(name, document) for name, document in found)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>onekernel benchmarks</title><style>{STYLE}</style></head><body>\n<h1>onekernel benchmarks</h1>\n"
        "<p>Every engine got the same token ids on the same machine in one run. Bars are medians, the line in a bar "
        "spans the quartiles. The limit is what the model's bytes and FLOPs allow at the memory bandwidth and "
        "the matrix throughput that were measured in the same run. A speed counts only with the agreement of its "
        "output with a float32 reference; a hatched bar is an engine whose output is wrong.</p>\n"
        f"{body}\n</body></html>\n"
    )


def _section(name: str, document: Document) -> str:
    device = document["limit"]["device"]["name"]
    parts = [f"<h2>{_text(document['checkpoint']['name'])} on {_text(device)}</h2>", _facts(name, document)]
    parts += _bar_charts(document)
    parts += _line_charts(document)
    parts += _sweep_charts(document)
    parts.append(_table(document))
    parts.append("<ul>" + "".join(f"<li>{_text(note)}</li>" for note in notes(document)) + "</ul>")
    return "\n".join(parts)


def _facts(name: str, document: Document) -> str:
    commit = document["commit"]
    changed = " with local changes" if commit.get("changed") else ""
    versions = {k: v for engine in document["engines"] for k, v in engine.get("versions", {}).items()}
    facts = [
        f"file      {name}, {document['created']}",
        f"commit    {commit.get('hash')}{changed}",
        f"command   {' '.join(document['command'])}",
        f"machine   {json.dumps(document['machine'])}",
        f"device    {json.dumps(document['limit']['device'])}",
        f"versions  {json.dumps(versions)}",
        f"workload  {json.dumps(document['workload'])}",
    ]
    return f"<details><summary>where this comes from</summary><pre>{_text(chr(10).join(facts))}</pre></details>"


def _bar_charts(document: Document) -> list[str]:
    charts = []
    found = figures(document)
    for cell in dict.fromkeys(figure.cell for figure in found):
        chosen = [figure for figure in found if figure.cell == cell]
        if cell.kind == COLD_START:
            rows = [_seconds_bar(figure) for figure in chosen]
            charts.append(bars("From the start of the process to the first token, seconds", "s", rows))
        elif cell.context == 520:
            limit = None if fits_in_cache(document) else limit_of(document, cell)
            what = (
                f"Prefill of {cell.context} tokens" if cell.kind == PREFILL else f"Decode after {cell.context} tokens"
            )
            charts.append(bars(f"{what}, tokens per second", "tok/s", [_rate_bar(figure) for figure in chosen], limit))
            measured = [figure for figure in chosen if figure.joules_per_token]
            if measured:
                rows = [_joule_bar(figure) for figure in measured]
                charts.append(bars(f"{what}, tokens per joule", "tok/J", rows))
    return charts


def _rate_bar(figure: Figure) -> Bar:
    assert figure.rate is not None
    rate = figure.rate
    mark = f"{100 * figure.share:.0f} %" if figure.share is not None else ""
    return Bar(figure.title, rate.median, rate.low, rate.high, _mark(figure, mark), _wrong(figure))


def _joule_bar(figure: Figure) -> Bar:
    assert figure.joules_per_token is not None
    value = 1 / figure.joules_per_token
    return Bar(figure.title, value, value, value, _mark(figure, f"{figure.watts:.0f} W"), _wrong(figure))


def _seconds_bar(figure: Figure) -> Bar:
    seconds = figure.seconds
    title = f"{figure.title}{', compiling' if figure.kernel_cache == 'empty' else ''}"
    return Bar(title, seconds.median, seconds.low, seconds.high, "", _wrong(figure))


def _mark(figure: Figure, text: str) -> str:
    verdict = figure.agreement.get("verdict")
    return text if verdict == gate.AGREES else f"{text} {str(verdict).upper() if verdict == gate.WRONG else verdict}"


def _wrong(figure: Figure) -> bool:
    return figure.agreement.get("verdict") == gate.WRONG


def _line_charts(document: Document) -> list[str]:
    charts = []
    for kind, title, x_title in (
        (DECODE, "Decode speed over context, tokens per second", "tokens of context"),
        (PREFILL, "Prefill speed over the length of the prompt, tokens per second", "tokens of the prompt"),
    ):
        chosen = [figure for figure in figures(document) if figure.cell.kind == kind and figure.rate is not None]
        contexts = sorted({figure.cell.context for figure in chosen})
        if len(contexts) < 3:
            continue
        series = []
        for engine in dict.fromkeys(figure.title for figure in chosen):
            points = sorted((f.cell.context, f.rate.median) for f in chosen if f.title == engine and f.rate is not None)
            series.append(Line(engine, points))
        if not fits_in_cache(document):
            count = chosen[0].cell.count
            limits = [(context, limit_of(document, Cell(kind, context, count))) for context in contexts]
            series.append(Line("limit", [(x, y) for x, y in limits if y is not None], dashed=True))
        charts.append(lines(title, x_title, "tok/s", series, logarithmic=True))
    return charts


def _sweep_charts(document: Document) -> list[str]:
    found = power.points(document)
    if not found:
        return []
    rates = [Line(title, [(w, rate) for w, rate, _ in steps]) for title, steps in found.items()]
    energies = [Line(title, [(w, per_joule) for w, _, per_joule in steps]) for title, steps in found.items()]
    return [
        lines("Decode speed over the power limit, tokens per second", "watts", "tok/s", rates),
        lines("Tokens per joule over the power limit", "watts", "tok/J", energies),
        "".join(f"<p>{_text(line)}</p>" for line in power.describe(document).splitlines()),
    ]


def _table(document: Document) -> str:
    header, rows = rows_of(document)
    head = "".join(f"<th>{_text(name)}</th>" for name in header)
    lines_of_table = []
    for row in rows:
        kind = "limit-row" if row[0] == "limit" else "wrong" if row[-1].startswith("WRONG") else ""
        cells = "".join(f"<td>{_text(cell)}</td>" for cell in row)
        lines_of_table.append(f'<tr class="{kind}">{cells}</tr>')
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines_of_table)}</tbody></table></div>'
    )


def _text(text: str) -> str:
    return html.escape(str(text), quote=True)
