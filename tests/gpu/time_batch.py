"""Times of batched decode on this GPU, 0.8B size, random bf16 weights; run it alone on the GPU. JSON on stdout.

    python tests/gpu/time_batch.py [output.json]

Each sequence has a prompt of 128 tokens (of 8 different ones); tok/s are those of the 256 tokens that follow, wall time
of the launches, host included. With `phases`, the microseconds of each phase of the last step, all layers.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from batch_rows import ENDLESS, Row  # noqa: E402
from measures import random_tokens  # noqa: E402
from random_model import SIZES, VOCABULARY_SIZE, random_weights  # noqa: E402

from onekernel.checkpoint.shape import FULL, Shape  # noqa: E402
from onekernel.gpu.batch_decoder import BatchDecoder  # noqa: E402
from onekernel.gpu.decoder import Decoder  # noqa: E402
from onekernel.gpu.device import find_gpu  # noqa: E402
from onekernel.gpu.layout import Layout  # noqa: E402
from onekernel.sampling.params import SamplingParams  # noqa: E402
from onekernel.sampling.sampler import Sampler  # noqa: E402

PROMPT, MADE, STEPS = 128, 256, 64
PROMPTS = 8
BATCHES = tuple(map(int, os.environ.get("BATCHES", "1,8,32,64,256").split(",")))
LINEAR_PHASES = ("in_proj", "delta", "out_proj", "gate_up", "down")
FULL_PHASES = ("qkv", "attend", "merge", "o_proj", "gate_up", "down")


def phase_names(shape: Shape) -> list[str]:
    """Of each end that the kernel notes, the first being the embedding's."""
    layers = (FULL_PHASES if kind == FULL else LINEAR_PHASES for kind in shape.layer_types)
    return ["embed", *itertools.chain(*layers), "head"]


def new_rows(decoder: Decoder, count: int, params: SamplingParams) -> list[Row]:
    """Rows behind PROMPTS different prompts: the others are copies."""
    rows: list[Row] = []
    for i in range(count):
        tokens = random_tokens(decoder.shape, PROMPT, seed=i % PROMPTS)
        if i < PROMPTS:
            state = decoder.new_state()
            decoder.consume(state, tokens[:-1])
        else:
            state = decoder.restore(decoder.snapshot(rows[i % PROMPTS].state))
        decoder.reserve(state, PROMPT + MADE + 2 * STEPS)
        rows.append(Row(state, tokens[-1:], Sampler(params, VOCABULARY_SIZE, tokens), ENDLESS))
    return rows


def advance(batch: BatchDecoder, rows: list[Row], steps: int, timed: bool = False) -> None:
    for made in batch.run(rows, steps, timed=timed):
        for place, token in made:
            rows[place].tokens = [token.id]


def measure(batch: BatchDecoder, count: int, params: SamplingParams) -> dict[str, Any]:
    rows = new_rows(batch.decoder, count, params)
    advance(batch, rows, 2)
    start = time.perf_counter()
    for _ in range(MADE // STEPS):
        advance(batch, rows, STEPS)
    wall = time.perf_counter() - start
    advance(batch, rows, 4, timed=True)
    names = phase_names(batch.decoder.shape)
    ends = batch.times.read(np.uint64, 1 + len(names)).astype(np.int64)
    phases: dict[str, float] = {}
    for name, duration in zip(names, np.diff(ends).tolist(), strict=True):
        phases[name] = round(phases.get(name, 0) + duration / 1e3, 1)
    for row in rows:
        row.state.buffer.free()
    step = wall / MADE
    return {"rows": count, "step_us": round(step * 1e6, 1), "tokens_per_s": round(count / step), "phases": phases}


def main() -> int:
    gpu, shape = find_gpu(), SIZES["0.8b"]
    layout = Layout.plan(shape, VOCABULARY_SIZE, gpu.sm_count, gpu.shared_memory)
    decoder = Decoder(gpu, layout, random_weights(shape))
    batch = BatchDecoder(decoder, max(BATCHES))
    report: dict[str, Any] = {"gpu": gpu.name, "cases": []}
    greedy = SamplingParams()
    drawn = SamplingParams(temperature=0.8, top_k=50, top_p=0.95, seed=1)
    for count, params in [*((n, greedy) for n in BATCHES), *((n, drawn) for n in BATCHES[1:4])]:
        case = measure(batch, count, params) | {"sampling": "greedy" if params.greedy else "top_k 50, top_p 0.95"}
        report["cases"].append(case)
        print(case, file=sys.stderr, flush=True)
    text = json.dumps(report, indent=1)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
