"""Times and memory of prefill, 0.8B size, random bf16 weights; run it alone on the GPU. JSON on standard output.

    python tests/gpu/time_prefill.py [output.json]

Device time is that of the launches, each between two events; with `phases`, the microseconds of each phase, all layers.
`crossover` compares a prompt of few tokens with as many steps of the decode kernel; `first_token` is what a session of
the Python API takes, warm, from a prompt of 520 tokens to the first token; `long_prompt` has the memory of the longest.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from random_model import SIZES, VOCABULARY_SIZE, random_weights  # noqa: E402

from onekernel.backend.cuda import CudaBackend  # noqa: E402
from onekernel.checkpoint.shape import FULL  # noqa: E402
from onekernel.engine import Engine  # noqa: E402
from onekernel.gpu.decoder import Decoder, State  # noqa: E402
from onekernel.gpu.device import find_gpu  # noqa: E402
from onekernel.gpu.layout import Layout  # noqa: E402
from onekernel.gpu.prefill_layout import MOST_CHUNK_TOKENS, PrefillLayout  # noqa: E402
from onekernel.gpu.prefiller import Prefiller  # noqa: E402

CASES = ((16, 0), (64, 0), (520, 0), (1904, 0), (8192, 0), (16, 8192))  # tokens, position of the first
FEW = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)
LONG = 131072
REPEATS = 9
LINEAR_PHASES = ("in_proj", "delta_chunks", "delta_scan", "gated_norm", "out_proj", "norm", "gate_up", "down", "norm")
FULL_PHASES = ("qkv", "rotate", "attend", "merge", "o_proj", "norm", "gate_up", "down", "norm")


def median_ms(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Wall time; `run` ends when its work is done."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return round(float(np.median(times)) * 1e3, 4)


class Timer:
    def __init__(self, prefiller: Prefiller) -> None:
        self.prefiller = prefiller
        self.random = np.random.default_rng(0)

    def tokens(self, count: int) -> list[int]:
        return self.random.integers(0, VOCABULARY_SIZE, count).tolist()

    def device_ms(self, state: State, tokens: list[int], position: int, repeats: int = REPEATS) -> float:
        """Of the launches alone, by the GPU's clock."""
        times = []
        for _ in range(repeats):
            state.position = position
            before = self.prefiller.decoder.clock.seconds
            self.prefiller.prefill(state, tokens)
            times.append(self.prefiller.decoder.clock.seconds - before)
        return round(float(np.median(times)) * 1e3, 4)

    def phases_us(self, state: State, tokens: list[int], position: int) -> dict[str, float]:
        """Of one launch: microseconds of each phase, all layers together."""
        prefiller, layers = self.prefiller, self.prefiller.shape.layer_types
        state.position = position
        prefiller.launch(state, tokens[:MOST_CHUNK_TOKENS], 0, prefiller.layout.phases, timed=True)
        prefiller.wait()
        ends = prefiller.times.read(np.uint64, prefiller.layout.phases).astype(np.int64)
        phases: dict[str, float] = {}
        for layer, kind in enumerate(layers):
            before = ends[9 * layer]
            for i, name in enumerate(FULL_PHASES if kind == FULL else LINEAR_PHASES):
                after = ends[1 + 9 * layer + i]
                if after < before:  # left out, and the time is of a launch before
                    continue
                phases[name] = round(phases.get(name, 0) + float(after - before) / 1e3, 1)
                before = after
        return phases


def main() -> int:
    gpu, shape = find_gpu(), SIZES["0.8b"]
    gpu.make_current()
    free = gpu.memory_free()
    layout = Layout.plan(shape, VOCABULARY_SIZE, gpu.sm_count, gpu.shared_memory)
    plan = PrefillLayout.plan(layout, gpu.sm_count, gpu.shared_memory, gpu.arch)
    assert plan is not None
    decoder = Decoder(gpu, layout, random_weights(shape))
    prefiller = Prefiller(decoder, plan)
    timer, state = Timer(prefiller), decoder.new_state()
    report: dict[str, Any] = {"gpu": gpu.name, "cases": [], "crossover": []}

    def step(position: int) -> None:
        state.position = position
        decoder.consume(state, [1])

    for count, position in CASES:
        tokens = timer.tokens(count)
        device = timer.device_ms(state, tokens, position)
        case = {"tokens": count, "position": position, "device_ms": device, "tokens_per_s": round(count / device * 1e3)}
        print(case, timer.phases_us(state, tokens, position), file=sys.stderr, flush=True)
        report["cases"].append(case | {"phases": timer.phases_us(state, tokens, position)})

    for count in FEW:
        tokens = timer.tokens(count)

        def prefill(tokens: list[int] = tokens) -> None:
            state.position = 520
            prefiller.prefill(state, tokens)

        def steps(tokens: list[int] = tokens) -> None:
            state.position = 520
            decoder.consume(state, tokens)

        one = {"tokens": count, "prefill_ms": median_ms(prefill), "decode_ms": median_ms(steps)}
        print(one, file=sys.stderr, flush=True)
        report["crossover"].append(one)
    faster = [one["tokens"] for one in report["crossover"] if one["prefill_ms"] < one["decode_ms"]]
    report["least_prefill"] = min(faster, default=None)
    report["decode_step_at_8192_ms"] = median_ms(lambda: step(8192))

    engine = Engine(CudaBackend(decoder, VOCABULARY_SIZE, None, prefiller))

    def first_token() -> None:
        session = engine.new_session()
        session.extend(timer.tokens(520))
        session.generate(max_tokens=1)

    first_token()
    report["first_token"] = {"tokens": 520, "wall_ms": median_ms(first_token)}
    print(report["first_token"], file=sys.stderr, flush=True)

    long = decoder.new_state()
    tokens = timer.tokens(LONG)
    prefiller.prefill(long, tokens)
    used = free - gpu.memory_free()
    device = timer.device_ms(long, tokens, 0, repeats=1)
    report["long_prompt"] = {"tokens": LONG, "device_ms": device, "memory_bytes": used}
    report["scratch_bytes"] = sum(buffer.nbytes for buffer in prefiller.scratch.values())
    print(report["long_prompt"], file=sys.stderr, flush=True)
    assert used < 8 * 10**9, f"{used:,} bytes for a prompt of {LONG} tokens"
    text = json.dumps(report, indent=1)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
