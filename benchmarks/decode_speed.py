"""How fast the decode kernel is on this GPU: over contexts, and over the sizes of the family. Random weights.

    python benchmarks/decode_speed.py --output benchmarks/decode/nvidia-h200.json

Contexts are reached by setting the position of a state whose keys and values are random, not by decoding up to there;
then the backend's `generate` is read token by token, as a Python caller does. Written are raw samples, of wall time and
of time by the GPU's own clock; shares and medians are made of them by decode_tables.py. Run it alone on the GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from random_decoder import plan, random_decoder, state_at  # noqa: E402

from onekernel.backend.cuda import CudaBackend  # noqa: E402
from onekernel.bench import document as documents  # noqa: E402
from onekernel.bench import machine  # noqa: E402
from onekernel.bench.telemetry import Meter, Watch, joules  # noqa: E402
from onekernel.checkpoint.sizes import SIZES, VOCABULARY_SIZE  # noqa: E402
from onekernel.errors import BackendError, NotEnoughMemory  # noqa: E402
from onekernel.gpu.compile import compile_cached  # noqa: E402
from onekernel.gpu.decoder import State  # noqa: E402
from onekernel.gpu.device import Gpu, find_gpu  # noqa: E402
from onekernel.gpu.kernel import decode_source  # noqa: E402
from onekernel.gpu.nvml import Nvml  # noqa: E402
from onekernel.gpu.probe import Probe, bus_id, identify  # noqa: E402
from onekernel.sampling.params import SamplingParams  # noqa: E402

FORMAT, VERSION = "onekernel-decode", 1
CONTEXTS = (0, 520, 1904, 8192, 32_768, 131_072)
CONTEXT = 520  # at which sizes are compared and energy is measured
REPETITIONS, WARM_UPS = 5, 2
SAMPLE_S = 0.25  # seconds that one sample takes, roughly
COUNTS = (32, 512)  # least and most tokens of one sample


class Speed:
    """One model on the GPU, timed."""

    def __init__(self, gpu: Gpu, size: str) -> None:
        self.size = size
        self.decoder = random_decoder(gpu, plan(gpu, SIZES[size]))
        self.backend = CudaBackend(self.decoder, VOCABULARY_SIZE)

    def at(self, context: int, meter: Meter | None, energy_s: float) -> dict[str, Any]:
        """Samples at one context; with joules over a window of `energy_s` seconds, if that is not 0."""
        state = state_at(self.decoder, context, COUNTS[1] + 1)
        self._decode(state, context, COUNTS[0])
        token_s = self._decode(state, context, COUNTS[0])["wall_s"] / COUNTS[0]
        count = min(max(round(SAMPLE_S / token_s), COUNTS[0]), COUNTS[1])
        entry: dict[str, Any] = {"size": self.size, "context": context, "count": count, "samples": []}
        with Watch(meter) as watch:
            for i in range(-WARM_UPS, REPETITIONS):
                sample = self._decode(state, context, count)
                if i >= 0:
                    entry["samples"].append(sample)
        entry["telemetry"] = watch.summary()
        if meter is not None and energy_s:
            with Watch(meter) as watch:
                entry["energy"] = joules(meter, lambda: self._steady(state, context, count, energy_s))
            entry["energy"]["telemetry"] = watch.summary()
        state.buffer.free()
        return entry

    def _decode(self, state: State, context: int, count: int) -> dict[str, Any]:
        """`count` tokens behind `context`, as a Python caller of the backend gets them."""
        state.position = context
        before, launches = self.backend.device_seconds, self.decoder.clock.launches
        start, made = time.perf_counter(), 0
        for _ in self.backend.generate(state, [1], [], SamplingParams(), count, frozenset()):
            made += 1
        wall = time.perf_counter() - start
        if made != count:
            raise BackendError(f"{made} tokens came in place of {count}")
        device = self.backend.device_seconds - before
        return {"wall_s": wall, "device_s": device, "launches": self.decoder.clock.launches - launches}

    def _steady(self, state: State, context: int, count: int, seconds: float) -> dict[str, Any]:
        end, made = time.perf_counter() + seconds, 0
        while time.perf_counter() < end:
            self._decode(state, context, count)
            made += count
        return {"count": made}

    def close(self) -> None:
        self.backend.close()


def measure(sizes: Sequence[str], contexts: Sequence[int], energy_s: float) -> dict[str, Any]:
    """The whole document. The first size is measured over all contexts, the others at CONTEXT."""
    described = identify()
    gpu = find_gpu()
    say(f"compiling for {', '.join(sizes)}")
    with ThreadPoolExecutor(len(sizes)) as pool:
        list(pool.map(lambda size: compile_cached(decode_source(plan(gpu, SIZES[size])), gpu.arch, size), sizes))
    gpu.make_current()
    try:
        meter: Meter | None = Nvml(bus_id())
    except BackendError as error:
        say(f"no energy and no clocks: {error}")
        meter = None
    say("reading all of the memory, for the limit")
    with Probe(gpu) as probe:
        bandwidth = probe.read_bandwidth()
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "created": machine.now(),
        "command": ["python", "benchmarks/decode_speed.py", *sys.argv[1:]],
        "commit": machine.commit(),
        "machine": machine.system(),
        "limit": {"device": described, "read_bandwidth": bandwidth},
        "repetitions": REPETITIONS,
        "warm_ups": WARM_UPS,
        "energy_s": energy_s,
        "entries": [],
        "problems": [],
    }
    for i, size in enumerate(sizes):
        try:
            speed = Speed(gpu, size)
        except (BackendError, NotEnoughMemory) as error:
            document["problems"].append({"size": size, "why": str(error)})
            say(f"{size}: {error}")
            continue
        for context in contexts if i == 0 else (CONTEXT,):
            entry = speed.at(context, meter, energy_s if i == 0 and context == CONTEXT else 0)
            document["entries"].append(entry)
            best = min(sample["wall_s"] for sample in entry["samples"])
            say(f"{size} at {context:,}: {entry['count'] / best:,.0f} tokens/s in the best of {REPETITIONS} samples")
        speed.close()
    return document


def say(line: str) -> None:
    print(f"{time.perf_counter() - BEGAN:6.1f} s  {line}", file=sys.stderr, flush=True)


BEGAN = time.perf_counter()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(SIZES), metavar="A,B", help="the first one over all contexts")
    parser.add_argument("--contexts", default=",".join(map(str, CONTEXTS)), metavar="N,N")
    parser.add_argument("--energy", type=float, default=10.0, metavar="S", help="seconds of the energy window; 0: none")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the JSON document goes")
    arguments = parser.parse_args()
    sizes = arguments.sizes.split(",")
    if unknown := [size for size in sizes if size not in SIZES]:
        parser.error(f"unknown size {unknown[0]!r}: choose from {', '.join(SIZES)}")
    document = measure(sizes, [int(context) for context in arguments.contexts.split(",")], arguments.energy)
    if arguments.output:
        documents.write(document, arguments.output)
        say(f"written: {arguments.output}")
    from decode_tables import tables

    print(tables(document))
    return 1 if document["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
