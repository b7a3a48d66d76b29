"""The demo model under compute-sanitizer, decode and prefill of few tokens: memcheck, racecheck, initcheck, synccheck.

    python tests/gpu/sanitize.py [tool ...]

The tools slow a kernel down by orders of magnitude, so that there are few tokens and a long limit for waits.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
LIMIT = 500  # seconds for one tool

TOKENS = """
import sys
from onekernel.checkpoint import hub
from onekernel.checkpoint.shape import Shape
from onekernel.checkpoint.weights import load_weights
from onekernel.gpu.decoder import Decoder
from onekernel.gpu.device import find_gpu
from onekernel.gpu.layout import Layout
from onekernel.gpu.prefill_layout import PrefillLayout
from onekernel.gpu.prefiller import Prefiller
from onekernel.sampling.params import SamplingParams
from onekernel.sampling.sampler import Sampler

folder = hub.resolve("demo")
shape = Shape.load(folder)
gpu = find_gpu()
decoder = Decoder(gpu, Layout.plan(shape, shape.vocab, gpu.sm_count, gpu.shared_memory), load_weights(folder, shape),
                  spin_limit=200_000_000_000)
state = decoder.new_state()
sampler = Sampler(SamplingParams(), shape.vocab)
made = [token.id for token in decoder.generate(state, [5, 80, 200] * 20, sampler, 20, frozenset())]
again = decoder.restore(decoder.snapshot(state))
decoder.logits(again, made[-3:])
plan = PrefillLayout.plan(decoder.layout, gpu.sm_count, gpu.shared_memory, gpu.arch)
if plan is not None:  # few tokens, then many behind them
    prefiller = Prefiller(decoder, plan)
    prefiller.prefill(again, [5, 80, 200] * 7)
    prefiller.prefill(again, [80, 5, 200] * 60)
    prefiller.close()
decoder.close()
print("made", made)
"""


def run_tool(tool: str) -> dict[str, Any]:
    """What one tool found: {clean, seconds, says}."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", TOKENS]
    start = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"clean": False, "seconds": LIMIT, "says": f"did not end within {LIMIT} s"}
    output = done.stdout + done.stderr
    summary = [line.lstrip("= ") for line in output.splitlines() if "SUMMARY" in line] or output.splitlines()[-3:]
    clean = done.returncode == 0 and "made [" in output and len(summary) == 1 and re.search(r": 0 ", summary[0])
    result = {"clean": bool(clean), "seconds": round(time.monotonic() - start, 1), "says": " ".join(summary)}
    if not clean:
        result["details"] = output[:4000]
    return result


def main() -> int:
    clean = True
    for tool in sys.argv[1:] or TOOLS:
        result = run_tool(tool)
        clean &= result["clean"]
        print(tool, *(f"{name}: {value}" for name, value in result.items()), sep="\n  ", flush=True)
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
