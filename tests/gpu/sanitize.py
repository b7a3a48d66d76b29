"""The demo model under compute-sanitizer, decode and prefill of few tokens: memcheck, racecheck, initcheck, synccheck.

    python tests/gpu/sanitize.py [tool ...]

The tools slow a kernel down by orders of magnitude, so that there are few tokens and a long limit for waits; racecheck,
which follows every access to shared memory, gets the fewest. What it says of the weight ring is read by races.py.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent)]

import races  # noqa: E402

ROOT = Path(__file__).parents[2]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
STEPS = {"racecheck": (2, 2)}  # tokens of the prompt, and made behind it
USUAL_STEPS = (60, 20)
LIMIT = float(os.environ.get("ONEKERNEL_SANITIZER_LIMIT", "500"))  # seconds for one tool

TOKENS = """
import sys
import cuda.core
options = cuda.core.ProgramOptions
cuda.core.ProgramOptions = lambda **more: options(lineinfo=True, **more)
from onekernel.backend.batch import Row
from onekernel.checkpoint import hub
from onekernel.checkpoint.shape import Shape
from onekernel.checkpoint.weights import load_weights
from onekernel.gpu.batch_decoder import BatchDecoder
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
print("loaded", flush=True)
given, count = map(int, sys.argv[1:3])
made = [token.id for token in decoder.generate(state, ([5, 80, 200] * given)[:given], sampler, count, frozenset())]
again = decoder.restore(decoder.snapshot(state))
decoder.logits(again, made[-3:])
plan = PrefillLayout.plan(decoder.layout, gpu.sm_count, gpu.shared_memory, gpu.arch)
if plan is not None:  # few tokens, then many behind them
    prefiller = Prefiller(decoder, plan)
    prefiller.prefill(again, [5, 80, 200] * 7)
    prefiller.prefill(again, [80, 5, 200] * 60)
    prefiller.close()
if sys.argv[3] != "racecheck":  # what reads its report knows the rings of one kernel
    batch = BatchDecoder(decoder, 8, buckets=(8,))
    drawn = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=1, logprobs=2)
    rows = [Row(decoder.new_state(), [5], Sampler(params, shape.vocab), count) for params in (drawn, SamplingParams())]
    for step in batch.run(rows, count):
        pass
    batch.close()
decoder.close()
print("made", made)
"""


def run_tool(tool: str) -> dict[str, Any]:
    """What one tool found: {clean, seconds, says, tokens}."""
    given, count = STEPS.get(tool, USUAL_STEPS)
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", TOKENS]
    command += [str(given), str(count), tool]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as cache:  # this kernel has line information: it is not the user's
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "ONEKERNEL_CACHE": cache}
        output, code = _run(command, environment)
        listing = _listing(Path(cache)) if tool == "racecheck" and code not in (0, None) else ""
    seconds = round(time.monotonic() - start, 1)
    if code is None:
        says = f"did not end within {LIMIT:g} s"
        return {"clean": False, "seconds": seconds, "says": says, "details": output[-4000:]}
    summary = [line.lstrip("= ") for line in output.splitlines() if "SUMMARY" in line] or output.splitlines()[-3:]
    ended = "made [" in output and len(summary) == 1
    clean = ended and code == 0 and bool(re.search(r": 0 ", summary[0]))
    result = {"clean": clean, "seconds": seconds, "says": " ".join(summary), "tokens": given + count}
    if tool == "racecheck" and code not in (0, None) and ended:
        found = races.races(output, listing)
        strange = [race for race in found if not race.is_handshake]
        result["handshakes"] = sorted({str(race) for race in found if race.is_handshake})
        result["clean"] = bool(found) and not strange
        result["says"] += f"; of {len(found)} pairs, {len(found) - len(strange)} are the ring's handshake"
        result["races"] = [f"{race}: {race.first} and {race.second}" for race in strange[:20]]
    if not result["clean"]:
        result["details"] = output[:4000]
    return result


def _run(command: list[str], environment: dict[str, str]) -> tuple[str, int | None]:
    """(what it wrote, its exit status; None if it took too long)."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # In a session of its own: the tool starts Python as a child, which has to end with it.
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes) as done:
        try:
            output, _ = done.communicate(timeout=LIMIT)
            return output, done.returncode
        except subprocess.TimeoutExpired:
            os.killpg(done.pid, signal.SIGKILL)
            output, _ = done.communicate()
            return output, None


def _listing(cache: Path) -> str:
    """The machine code of the decode kernel in a cache, with its lines; nothing where the toolkit has no nvdisasm."""
    cubins = [entry.read_bytes()[32:] for entry in cache.rglob("*.cubin")]  # behind the hash of the content
    [decode] = [cubin for cubin in cubins if b".text.decode" in cubin]
    cubin = cache / "kernel"
    cubin.write_bytes(decode)
    try:
        done = subprocess.run(["nvdisasm", "-c", "-gi", str(cubin)], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"what racecheck reports cannot be traced to the sources: {error}", file=sys.stderr)
        return ""
    return done.stdout


def main() -> int:
    clean = True
    for tool in sys.argv[1:] or TOOLS:
        result = run_tool(tool)
        clean &= result["clean"]
        print(tool, *(f"{name}: {value}" for name, value in result.items()), sep="\n  ", flush=True)
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
