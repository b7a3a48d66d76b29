"""Two documents side by side: what changed by more than noise."""

from __future__ import annotations

from onekernel.bench.document import Document, Figure, figures
from onekernel.bench.statistics import LEAST_CHANGE, decide
from onekernel.bench.tables import number
from onekernel.bench.workload import COLD_START


def compare(first: Document, second: Document, least_change: float = LEAST_CHANGE) -> list[str]:
    """One line for each engine and cell that both have, and one for each that only one has."""
    before, after = ({_key(figure): figure for figure in figures(one)} for one in (first, second))
    lines = []
    for key in [*before, *(key for key in after if key not in before)]:
        name = f"{key[0]:<18} {key[1]:<14}"
        if key not in after:
            lines.append(f"{name} only in the first")
        elif key not in before:
            lines.append(f"{name} only in the second")
        else:
            lines.append(f"{name} {_change(before[key], after[key], least_change)}")
    return lines


def _key(figure: Figure) -> tuple[str, str]:
    return figure.engine, figure.name


def _change(before: Figure, after: Figure, least_change: float) -> str:
    unit = "s" if before.cell.kind == COLD_START else "tok/s"
    verdict = decide(before.rates, after.rates, least_change)
    values = [before.seconds.median, after.seconds.median]
    if before.rate is not None and after.rate is not None:
        values = [before.rate.median, after.rate.median]
    better = verdict.change == ("lower" if unit == "s" else "higher")
    word = verdict.change if verdict.change == "within noise" else "FASTER" if better else "SLOWER"
    change = f"{100 * (verdict.ratio - 1):+.1f} %, p {verdict.p:.3f}"
    text = f"{number(values[0])} -> {number(values[1])} {unit} ({change}): {word}"
    wrong = [place for place, figure in (("first", before), ("second", after)) if not figure.believable]
    return f"{text}; not checked or wrong in the {' and the '.join(wrong)}" if wrong else text


def differences(first: Document, second: Document) -> list[str]:
    """What makes the two hard to compare."""
    found = []
    for name, values in {
        "device": [one["limit"]["device"]["name"] for one in (first, second)],
        "checkpoint": [one["checkpoint"]["fingerprint"] for one in (first, second)],
        "repetitions": [one["workload"]["repetitions"] for one in (first, second)],
        "prompts": [one["workload"]["prompts_sha256"] for one in (first, second)],
    }.items():
        if values[0] != values[1]:
            found.append(f"the two have another {name}: {values[0]} and {values[1]}")
    bandwidth = [one["limit"]["read_bandwidth"]["value"] for one in (first, second)]
    if abs(bandwidth[1] / bandwidth[0] - 1) > 0.03:
        found.append(
            f"the read bandwidth was {bandwidth[0] / 1e9:,.0f} and {bandwidth[1] / 1e9:,.0f} GB/s: the machines were "
            "not in the same state"
        )
    return found
