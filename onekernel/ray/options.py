"""Options: what is said of a replica, on the command line (name=value) or in the arguments of a configuration."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from onekernel.api import Model, load
from onekernel.errors import InvalidRequest
from onekernel.server.security import read_keys
from onekernel.server.settings import Settings


@dataclass(frozen=True)
class Options:
    """Attributes:
    model: as in `onekernel.load`: demo, a folder (on every machine), or a name on the hub.
    name: what the APIs call the model; empty: the last part of `model`.
    backend: cpu, cuda, or auto for the fastest that runs where the replica is.
    replicas: how many; 0: one a GPU of the cluster, or one where there is none.
    gpus: that each replica takes; -1: one, or none if the backend is cpu or the cluster has no GPU.
    cpus: that each replica takes.
    max_context: tokens that one conversation can hold; 0: what the model was made for.
    max_running: requests that share a replica; 0: as many as one step serves, at least 32.
    max_waiting: that wait at a replica; more are refused with the status 429.
    cache_mib: for prefixes that a replica has read.
    keys: a file with keys, one a line (on every machine); empty: everybody may ask.
    hosts: names, besides the loopback ones, under which the server may be addressed, with commas between.
    """

    model: str = "demo"
    name: str = ""
    backend: str = "auto"
    replicas: int = 0
    gpus: float = -1
    cpus: float = 1
    max_context: int = 0
    max_running: int = 0
    max_waiting: int = Settings.most_waiting
    cache_mib: int = Settings.cache_bytes // 2**20
    keys: str = ""
    hosts: str = ""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Raises InvalidRequest: an unknown name, or a value of the wrong kind."""
        defaults: dict[str, Any] = {one.name: one.default for one in fields(cls)}
        values: dict[str, Any] = {}
        for name, value in given.items():
            if name not in defaults:
                close = difflib.get_close_matches(name, defaults, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(defaults)}"
                raise InvalidRequest(f"there is no option {name!r}: {hint}")
            kind = type(defaults[name])
            kind = float if name in ("gpus", "cpus") else kind
            try:
                values[name] = kind(value)
            except (TypeError, ValueError):
                raise InvalidRequest(
                    f"{name} = {value!r} must be {'a number' if kind is not str else 'text'}"
                ) from None
        return cls(**values)

    def load(self) -> Model:
        """The model, in the process that is to run it."""
        return load(self.model, backend=self.backend, max_context=self.max_context or None)

    def settings(self) -> Settings:
        """Of the server in a replica. Raises InvalidRequest: the file of keys cannot be read."""
        return Settings(
            model_name=self.name or self.model.rstrip("/").split("/")[-1],
            keys=read_keys(Path(self.keys), "keys =") if self.keys else (),
            hosts=tuple(host for host in self.hosts.split(",") if host),
            most_running=self.max_running or None,
            most_waiting=self.max_waiting,
            cache_bytes=self.cache_mib * 2**20,
        )

    def replicas_and_gpus(self, cluster_gpus: int) -> tuple[int, float]:
        """(replicas, GPUs of each) on a cluster with so many GPUs."""
        gpus = self.gpus
        if gpus < 0:
            gpus = 0.0 if self.backend == "cpu" or not cluster_gpus else 1.0
        return self.replicas or (max(1, int(cluster_gpus / gpus)) if gpus else 1), gpus
