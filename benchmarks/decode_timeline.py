"""Where the time of one decoded token goes, block by block: record it on a GPU, and draw it.

    python benchmarks/decode_timeline.py record benchmarks/decode/timeline.json
    python benchmarks/decode_timeline.py draw benchmarks/decode/timeline.json docs/decode-timeline.svg

`record` compiles the decode kernel with `Layout.timeline`: one warp of each block notes its SM's clock at every mark
(primitive/timeline.cuh). Clocks of different SMs do not agree: a row begins at its block's own start of the token.
"""

from __future__ import annotations

import argparse
import dataclasses
import html
import itertools
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]


from onekernel.bench import document as documents  # noqa: E402
from onekernel.bench import machine  # noqa: E402
from onekernel.checkpoint.shape import FULL  # noqa: E402
from onekernel.checkpoint.sizes import SIZES, VOCABULARY_SIZE  # noqa: E402
from onekernel.gpu.layout import MARKS, MARKS_OF_A_BLOCK  # noqa: E402

FORMAT, VERSION = "onekernel-timeline", 1
CONTEXT, TOKENS = 520, 256
KEPT = 33  # blocks in the document, evenly spread
# What a block did before it came to a mark, and its colour.
BEFORE = {
    "RECEIVED": ("waiting for other blocks' results, and taking them in", "#c9ced6"),
    "MULTIPLIED": ("multiplying weights as they arrive", "#2f6fde"),
    "SUMMED": ("waiting for the block's other warps", "#e2b13c"),
    "PUBLISHED": ("summing, publishing", "#2e9e6b"),
    "ATTENDED": ("delta rule, attention", "#b04fc0"),
    "HEAD": ("before the LM head", "#8d6e63"),
    "TOKEN": ("choosing the token", "#c0392b"),
}
OTHER = ("other", "#000000")


def record(size: str) -> dict[str, Any]:
    """The marks of the last of TOKENS tokens: of some blocks each, of all blocks the mean time between them."""
    from random_decoder import plan, random_decoder, state_at

    from onekernel.backend.cuda import CudaBackend
    from onekernel.gpu.device import find_gpu
    from onekernel.gpu.probe import identify
    from onekernel.sampling.params import SamplingParams

    described, gpu = identify(), find_gpu()
    decoder = random_decoder(gpu, dataclasses.replace(plan(gpu, SIZES[size]), timeline=True))
    backend = CudaBackend(decoder, VOCABULARY_SIZE)
    state = state_at(decoder, CONTEXT, 4 * TOKENS)
    for _ in range(3):
        state.position, before = CONTEXT, backend.device_seconds
        made = len(list(backend.generate(state, [1], [], SamplingParams(), TOKENS, frozenset())))
        token_s = (backend.device_seconds - before) / made
    blocks = decoder.layout.blocks
    words = decoder.timeline.read("uint64", blocks * MARKS_OF_A_BLOCK).reshape(blocks, MARKS_OF_A_BLOCK)
    rows = [marks_of(row) for row in words.tolist()]
    backend.close()
    length = sum(row[-1][0] for row in rows) / len(rows)
    kept = sorted({round(i * (blocks - 1) / (KEPT - 1)) for i in range(KEPT)})
    return {
        "format": FORMAT,
        "version": VERSION,
        "created": machine.now(),
        "command": ["python", *sys.argv],
        "commit": machine.commit(),
        "device": described,
        "size": size,
        "context": CONTEXT + TOKENS,
        "token_s": token_s,
        "clocks_per_us": length / (token_s * 1e6),
        "blocks": blocks,
        "mean_clocks": means(rows, size),
        "rows": [{"block": block, "marks": rows[block]} for block in kept],
    }


def marks_of(words: list[int]) -> list[tuple[int, int, int]]:
    """(clock since the start of the token, layer, index in MARKS) of one block's words, up to the token's end."""
    found: list[tuple[int, int, int]] = []
    for word in words:
        clock, layer, kind = word >> 16, word >> 8 & 255, word & 255
        if not word or kind >= len(MARKS):
            break
        found.append((clock - found[0][0] if found else clock, layer, kind))
        if len(found) > 1 and MARKS[kind] == "TOKEN":
            break
    if len(found) < 2:
        raise SystemExit("a block left no marks: was the kernel compiled with the timeline?")
    found[0] = (0, *found[0][1:])
    return found


def means(rows: list[list[tuple[int, int, int]]], size: str) -> dict[str, dict[str, float]]:
    """Clocks of one layer (or of the head) spent before each kind of mark: the mean of all blocks and layers."""
    kinds = SIZES[size].layer_types
    total: dict[str, dict[str, float]] = {"delta-net layer": {}, "attention layer": {}, "head": {}}
    for row in rows:
        for (start, _, _), (end, layer, kind) in itertools.pairwise(row):
            part = "head" if layer >= len(kinds) else "attention layer" if kinds[layer] == FULL else "delta-net layer"
            total[part][MARKS[kind]] = total[part].get(MARKS[kind], 0) + end - start
    full = sum(kind == FULL for kind in kinds)
    count = {"delta-net layer": len(kinds) - full, "attention layer": full, "head": 1}
    return {
        part: {mark: round(clocks / len(rows) / count[part], 1) for mark, clocks in found.items()}
        for part, found in total.items()
    }


# ---- drawing ----

WIDTH, LEFT, ROW, GAP = 1180, 64, 7, 2


def draw(document: dict[str, Any]) -> str:
    """An SVG: the whole token, then four layers of it larger, then the legend."""
    per_us, rows = document["clocks_per_us"], document["rows"]
    layers = [layer for layer, kind in enumerate(SIZES[document["size"]].layer_types) if kind == FULL]
    first, last = layers[len(layers) // 2 - 1] + 1, layers[len(layers) // 2]
    title = (
        f"One token of the {document['size'].upper()} shape on {document['device']['name']}: "
        f"{document['token_s'] * 1e6:,.0f} µs at context {document['context']}, commit "
        f"{(document['commit'].get('hash') or 'unknown')[:12]}"
    )
    parts, y = [f'<text x="0" y="18" class="title">{html.escape(title)}</text>'], 44
    whole = [[(start / per_us, end / per_us, kind) for start, end, _, kind in spans(row["marks"])] for row in rows]
    y = panel(parts, y, f"the whole token, {len(rows)} of {document['blocks']} blocks", rows, whole)
    zoom = []
    for row in rows:
        inside = [(start, end, kind) for start, end, layer, kind in spans(row["marks"]) if first <= layer <= last]
        begin = inside[0][0] if inside else 0
        zoom.append([((start - begin) / per_us, (end - begin) / per_us, kind) for start, end, kind in inside])
    y = panel(parts, y + 14, f"layers {first} to {last}: three delta nets and one attention", rows, zoom)
    used = {kind for row in whole for _, _, kind in row}
    for i, kind in enumerate(kind for kind in (*BEFORE, "") if kind in used or kind == ""):
        if kind == "" and used <= set(BEFORE):
            continue
        text, colour = BEFORE.get(kind, OTHER)
        x, line = i % 3 * 390, y + 8 + i // 3 * 20
        parts.append(f'<rect x="{x}" y="{line}" width="22" height="11" fill="{colour}"/>')
        parts.append(f'<text x="{x + 28}" y="{line + 10}" class="tick">{html.escape(text)}</text>')
    height = y + 76
    style = (
        "text{font:12px system-ui,sans-serif;fill:#333}.title{font-weight:600;font-size:14px}.tick{font-size:11px}"
        ".grid{stroke:#0003;stroke-width:.5}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{html.escape(title)}"><style>{style}</style><rect width="100%" height="100%" fill="#fff"/>'
        f"{''.join(parts)}</svg>\n"
    )


def spans(marks: list[list[int]]) -> list[tuple[int, int, int, str]]:
    """(start, end, layer, mark at the end) between the marks of a block, in clocks."""
    return [(start, end, layer, MARKS[kind]) for (start, _, _), (end, layer, kind) in itertools.pairwise(marks)]


def panel(
    parts: list[str], y: int, title: str, rows: list[dict[str, Any]], lines: list[list[tuple[float, float, str]]]
) -> int:
    """One row a block, microseconds to the right. Returns where the next thing may be drawn."""
    most = max((end for line in lines for _, end, _ in line), default=1.0)
    scale = (WIDTH - LEFT - 10) / most
    parts.append(f'<text x="0" y="{y}">{html.escape(title)}</text>')
    top = y + 10
    bottom = top + len(lines) * ROW
    paths: dict[str, list[str]] = {}
    for i, line in enumerate(lines):
        middle = top + i * ROW + ROW / 2
        if i % 8 == 0:
            number = rows[i]["block"]
            parts.append(f'<text x="{LEFT - 6}" y="{middle + 4}" class="tick" text-anchor="end">block {number}</text>')
        for start, end, kind in line:
            path = f"M{LEFT + start * scale:.1f} {middle:g}h{(end - start) * scale:.2f}"
            paths.setdefault(BEFORE.get(kind, OTHER)[1], []).append(path)
    for colour, found in paths.items():
        parts.append(f'<path d="{"".join(found)}" stroke="{colour}" stroke-width="{ROW - GAP}" fill="none"/>')
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10_000) if most / step <= 12)
    for tick in range(0, int(most) + 1, step):
        x = LEFT + tick * scale
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" class="grid"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 13}" class="tick" text-anchor="middle">{tick} µs</text>')
    return bottom + 30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    recording = verbs.add_parser("record", help="needs a GPU, and nothing else on it")
    recording.add_argument("file", type=Path)
    recording.add_argument("--size", default="0.8b", choices=SIZES)
    drawing = verbs.add_parser("draw")
    drawing.add_argument("file", type=Path)
    drawing.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    if arguments.verb == "record":
        document = record(arguments.size)
        documents.write(document, arguments.file)
        for part, found in document["mean_clocks"].items():
            times = {mark: round(clocks / document["clocks_per_us"], 2) for mark, clocks in found.items()}
            print(f"{part}: {sum(times.values()):.2f} us, before each mark {times}")
    else:
        document = json.loads(arguments.file.read_text(encoding="utf-8"))
        arguments.picture.write_text(draw(document), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
