"""The engines that can be measured: our own, and the adapters in benchmarks/peers of a clone of the repository."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onekernel.errors import InvalidRequest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "peers"
OWN = "onekernel"


@dataclass(frozen=True)
class Engine:
    """One row of the table.

    Attributes:
        name: on the command line and in the document.
        script: the worker; a module of this package ("onekernel...."), or a file in benchmarks/peers.
        options: given to Adapter.load.
    """

    name: str
    script: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def command(self, python: str | None = None) -> list[str]:
        """The worker's command line. `-P` keeps the script's folder from hiding the libraries it imports."""
        interpreter = python or sys.executable
        if self.script.startswith("onekernel."):
            return [interpreter, "-m", self.script]
        return [interpreter, "-P", str(FOLDER / self.script)]

    @property
    def missing(self) -> str:
        """Why it cannot be started, or nothing."""
        if not self.script.startswith("onekernel.") and not (FOLDER / self.script).is_file():
            return "its adapter is not here: run from a clone of the repository"
        return ""


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(OWN, "onekernel.bench.own"),
        Engine("transformers", "transformers_peer.py"),
        Engine("transformers-fla", "transformers_peer.py", {"fla": True}),
        Engine("torch-compiled", "torch_peer.py"),
        Engine("llama.cpp", "llama_cpp_peer.py"),
        Engine("llama-bench", "llama_bench_peer.py"),
        Engine("vllm", "vllm_peer.py"),
        Engine("url", "url_peer.py"),
    )
}


def choose_engines(names: Sequence[str], settings: Mapping[str, Mapping[str, Any]]) -> list[Engine]:
    """The engines of these names, with settings of the command line over their options.

    Raises:
        InvalidRequest: no such engine.
    """
    chosen = []
    for name in names:
        if name not in ENGINES:
            raise InvalidRequest(f"engine = {name!r} is unknown: choose from {', '.join(ENGINES)}")
        engine = ENGINES[name]
        chosen.append(Engine(name, engine.script, {**engine.options, **settings.get(name, {})}))
    return chosen
