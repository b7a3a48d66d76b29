"""Times of prefill on this GPU, 0.8B size, random bf16 weights; run it alone on the GPU. JSON on standard output.

    python tests/gpu/time_prefill.py [output.json]

Device time is that of whole launches between two events; with `phases`, the microseconds of each phase, all layers.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from random_model import SIZES, VOCABULARY_SIZE, random_weights  # noqa: E402

from onekernel.checkpoint.shape import FULL  # noqa: E402
from onekernel.gpu.decoder import Decoder  # noqa: E402
from onekernel.gpu.device import find_gpu  # noqa: E402
from onekernel.gpu.driver import check  # noqa: E402
from onekernel.gpu.layout import Layout  # noqa: E402
from onekernel.gpu.prefill_layout import MOST_CHUNK_TOKENS, PrefillLayout  # noqa: E402
from onekernel.gpu.prefiller import Prefiller  # noqa: E402

CASES = ((520, 0), (64, 0), (1904, 0), (8192, 0), (16, 8192))  # tokens, position of the first
REPEATS = 9
LINEAR_PHASES = ("in_proj", "delta_chunks", "delta_scan", "gated_norm", "out_proj", "norm", "gate_up", "down", "norm")
FULL_PHASES = ("qkv", "rotate", "attend", "", "o_proj", "norm", "gate_up", "down", "norm")


def main() -> int:
    from cuda.bindings import driver

    gpu, shape = find_gpu(), SIZES["0.8b"]
    layout = Layout.plan(shape, VOCABULARY_SIZE, gpu.sm_count, gpu.shared_memory)
    plan = PrefillLayout.plan(layout, gpu.sm_count, gpu.shared_memory, gpu.arch)
    assert plan is not None
    prefiller = Prefiller(Decoder(gpu, layout, random_weights(shape)), plan)
    stream = prefiller.decoder.stream
    begin, end = (check(driver.cuEventCreate(0)) for _ in range(2))
    state, random = prefiller.decoder.new_state(), np.random.default_rng(0)
    report: dict[str, Any] = {"gpu": gpu.name, "cases": []}
    for count, position in CASES:
        tokens = random.integers(0, VOCABULARY_SIZE, count).tolist()
        walls, devices = [], []
        for _ in range(REPEATS):
            state.position = position
            check(driver.cuEventRecord(begin, stream))
            start = time.perf_counter()
            prefiller.prefill(state, tokens)
            walls.append(time.perf_counter() - start)
            check(driver.cuEventRecord(end, stream))
            check(driver.cuStreamSynchronize(stream))
            devices.append(float(check(driver.cuEventElapsedTime(begin, end))) / 1e3)
        state.position = position
        prefiller.launch(state, tokens[:MOST_CHUNK_TOKENS], 0, plan.phases, timed=True)
        prefiller.wait()
        ends = prefiller.times.read(np.uint64, plan.phases).astype(np.int64)
        phases: dict[str, float] = {}
        for layer, kind in enumerate(shape.layer_types):
            before = ends[9 * layer]
            for i, name in enumerate(FULL_PHASES if kind == FULL else LINEAR_PHASES):
                if name:
                    after = ends[1 + 9 * layer + i]
                    phases[name] = round(phases.get(name, 0) + float(after - before) / 1e3, 1)
                    before = after
        device = float(np.median(devices))
        case = {"tokens": count, "position": position, "device_ms": round(device * 1e3, 3)}
        case |= {"wall_ms": round(float(np.median(walls)) * 1e3, 3), "tokens_per_s": round(count / device)}
        report["cases"].append(case | {"phases": phases})
        print(case, phases, file=sys.stderr, flush=True)
    report["scratch_bytes"] = sum(buffer.nbytes for buffer in prefiller.scratch.values())
    text = json.dumps(report, indent=1)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
