"""Documents for tests of what is made of them: figures that nobody measured, named so."""

from __future__ import annotations

from typing import Any

from onekernel.checkpoint.random_weights import config
from onekernel.checkpoint.sizes import SIZES

CONTEXTS = (0, 520, 1904, 8192, 32_768)


def measurement(kind: str, context: int, rate: float, **more: Any) -> dict[str, Any]:
    """Five samples around `rate` tokens/s."""
    count = 128 if kind == "decode" else 1
    tokens = count if kind == "decode" else context
    seconds = [tokens / (rate * factor) for factor in (0.99, 0.995, 1.0, 1.005, 1.01)]
    samples = [{"wall_s": value, "device_s": value * 0.99} for value in seconds]
    return {"kind": kind, "context": context, "count": count, "samples": samples, **more}


def engine(name: str, prefill: float, decode: float, verdict: str = "agrees", joules: float = 1.0) -> dict[str, Any]:
    found = [measurement("prefill", 520, prefill)]
    for context in CONTEXTS:
        more: dict[str, Any] = {}
        if context == 520:
            more = {"energy": {"joules": 1000.0, "count": round(1000 / joules), "watts": 400.0}}
        found.append(measurement("decode", context, decode / (1 + context / 200_000), **more))
    agreement = {
        "verdict": verdict,
        "tokens": 192,
        "top1": 0.96,
        "top1_rounding": 0.97,
        "kl": 7e-4,
        "kl_rounding": 5e-4,
        "reason": "",
    }
    return {
        "name": name,
        "title": f"{name} <made up>",
        "status": "measured",
        "agreement": agreement,
        "measurements": found,
    }


def document(*engines: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": "onekernel-bench",
        "version": 1,
        "created": "2026-01-01T00:00:00+00:00",
        "command": ["onekernel", "bench"],
        "commit": {"hash": "0" * 40, "changed": False},
        "machine": {"system": "none", "device": "cuda"},
        "checkpoint": {"name": "random:0.8b", "fingerprint": "f", "config": config(SIZES["0.8b"])},
        "workload": {"repetitions": 5, "prompts_sha256": "p"},
        "limit": {
            "device": {"name": "Imaginary GPU", "cache": 50 << 20},
            "read_bandwidth": {"value": 4.5e12, "samples": [4.5e12], "kernel": "none"},
            "matrix_throughput": {"value": 8e14, "samples": [8e14], "kernel": "none"},
        },
        "engines": list(engines),
    }
