"""Settings: everything about the server that its user decides."""

from __future__ import annotations

from dataclasses import dataclass

from onekernel.scheduler import scheduler


@dataclass(frozen=True)
class Settings:
    """Attributes:
    model_name: the name that the APIs give the model.
    host, port: where to listen.
    keys: one of them must come with each request; none: everybody may ask.
    hosts: names, besides the loopback ones and `host`, under which the server may be addressed.
    origins: web pages ("http://host:port") that may ask besides the server's own; "*" for all.
    allow_public: listen on a public address without keys.
    most_running, most_waiting, cache_bytes, deterministic, patient: see Scheduler.
    max_tokens: most tokens of one answer; None: what the context holds.
    most_choices: most answers that one request may ask for.
    body_bytes: largest body of a request.
    most_connections: open at a time.
    header_bytes: largest head of a request.
    header_s: seconds for the head of a request to arrive, and for a client to send the next one.
    body_s: seconds for the body to arrive.
    stall_s: seconds that a client may leave the answer unread before it is cut off.
    heartbeat_s: seconds of silence after which a stream shows that it is alive.
    grace_s: seconds that running answers have to end after SIGTERM.
    log_prompts: write prompts and answers into the log.
    """

    model_name: str = "onekernel"
    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    allow_public: bool = False
    most_running: int | None = None
    most_waiting: int = scheduler.MOST_WAITING
    cache_bytes: int = scheduler.CACHE_BYTES
    deterministic: bool = False
    patient: bool = False
    max_tokens: int | None = None
    most_choices: int = 16
    body_bytes: int = 32 * 2**20
    most_connections: int = 4096
    header_bytes: int = 64 * 2**10
    header_s: float = 30.0
    body_s: float = 60.0
    stall_s: float = 60.0
    heartbeat_s: float = 10.0
    grace_s: float = 5.0
    log_prompts: bool = False
