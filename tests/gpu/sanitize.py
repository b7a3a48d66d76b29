"""A few tokens of the demo model under compute-sanitizer: memcheck, racecheck, initcheck, synccheck.

    python tests/gpu/sanitize.py [tool ...]

The tools slow a kernel down by orders of magnitude, so that there are few tokens and a long limit for waits; racecheck,
which follows every access to shared memory, gets the fewest.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
STEPS = {"racecheck": (2, 2)}  # tokens of the prompt, and made behind it
USUAL_STEPS = (60, 20)
LIMIT = float(os.environ.get("ONEKERNEL_SANITIZER_LIMIT", "500"))  # seconds for one tool

TOKENS = """
import sys
from onekernel.checkpoint import hub
from onekernel.checkpoint.shape import Shape
from onekernel.checkpoint.weights import load_weights
from onekernel.gpu.decoder import Decoder
from onekernel.gpu.device import find_gpu
from onekernel.gpu.layout import Layout
from onekernel.sampling.params import SamplingParams
from onekernel.sampling.sampler import Sampler

folder = hub.resolve("demo")
shape = Shape.load(folder)
gpu = find_gpu()
decoder = Decoder(gpu, Layout.plan(shape, shape.vocab, gpu.sm_count, gpu.shared_memory), load_weights(folder, shape),
                  spin_limit=200_000_000_000)
state = decoder.new_state()
sampler = Sampler(SamplingParams(), shape.vocab)
print("loaded", flush=True)
given, count = map(int, sys.argv[1:])
made = [token.id for token in decoder.generate(state, ([5, 80, 200] * given)[:given], sampler, count, frozenset())]
again = decoder.restore(decoder.snapshot(state))
decoder.logits(again, made[-3:])
decoder.close()
print("made", made)
"""


def run_tool(tool: str) -> dict[str, Any]:
    """What one tool found: {clean, seconds, says, tokens}."""
    given, count = STEPS.get(tool, USUAL_STEPS)
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", TOKENS]
    command += [str(given), str(count)]
    start = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # In a session of its own: the tool starts Python as a child, which has to end with it.
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes) as done:
        try:
            output, _ = done.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(done.pid, signal.SIGKILL)
            output, _ = done.communicate()
            says = f"did not end within {LIMIT:g} s"
            return {"clean": False, "seconds": LIMIT, "says": says, "details": output[-4000:]}
    summary = [line.lstrip("= ") for line in output.splitlines() if "SUMMARY" in line] or output.splitlines()[-3:]
    clean = done.returncode == 0 and "made [" in output and len(summary) == 1 and re.search(r": 0 ", summary[0])
    result = {"clean": bool(clean), "seconds": round(time.monotonic() - start, 1), "says": " ".join(summary)}
    result["tokens"] = given + count
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
