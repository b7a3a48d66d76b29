"""Checks of what happens in time: whether a stream is one, and whether an answer that nobody reads goes on."""

from __future__ import annotations

import re
import statistics
import time

from onekernel.probe import chat
from onekernel.probe.findings import Findings, at, is_count
from onekernel.probe.target import EventStream, Target

REPEATS = 5
LONG_TASK = "Count from one to ten thousand, one number a line, and leave none out."
LATE = 0.9  # part of the whole time after which the first text of a stream is suspicious
SHORT_S = 0.3  # a stream that is over sooner tells nothing about buffering
PATIENCE_S = 2.0  # from the end of a connection to the end of its answer
LOOK_S = 0.4
LEFT_AT_ONCE = 4  # streams that are left when there are no metrics to look at
# Names that servers give to these in Prometheus' format.
RUNNING = re.compile(r"\w*(?:requests?_(?:running|processing|active|in_flight)|running_req(?:uest)?s?)\b")
TOKENS = re.compile(r"\w*(?:generat\w+|completion|output|predicted)_tokens(?:_total)?|\w*tokens_predicted_total\b")


def first_token(target: Target, findings: Findings) -> None:
    """TTFT and tokens per second, and that text comes as it is made."""
    firsts, rates = [], []
    for _ in range(REPEATS):
        stream = target.stream(chat.PATH, chat.request(target, stream_options={"include_usage": True}))
        times = [event.at for event in stream.events if _has_text(event.data)]
        if not findings.require(times, "a stream without text"):
            return
        firsts.append(times[0])
        counts = [at(event.data, "usage", "completion_tokens") for event in stream.events]
        made = max((count for count in counts if is_count(count)), default=0)
        if made > 1 and times[-1] > times[0]:
            rates.append((made - 1) / (times[-1] - times[0]))
        if stream.seconds > SHORT_S and times[0] > LATE * stream.seconds and len(times) > 4:
            findings.fault("the stream is buffered: its text comes all at once at the end")
    findings.note(f"TTFT {statistics.median(firsts) * 1000:.1f} ms")
    if rates:
        findings.note(f"{statistics.median(rates):.1f} tokens/s")


def cancellation(target: Target, findings: Findings) -> None:
    """A client that leaves ends its answer: otherwise the server works for nobody, and the next client waits."""
    before = _metrics(target)
    if before is None:
        _cancellation_unseen(target, findings)
        return
    if _is_long(_begin(target), findings):
        _watch(target, before[0], "a stream", findings)
    if target.leave(chat.PATH, chat.request(target, LONG_TASK, max_tokens=10_000), LOOK_S):
        _watch(target, before[0], "an answer that is not streamed", findings)
    findings.note("seen in /metrics")


def _watch(target: Target, before: float, what: str, findings: Findings) -> None:
    """Until no more requests run than before, and no more tokens are made."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        _, tokens = _metrics(target) or (0.0, 0.0)
        time.sleep(LOOK_S)
        later = _metrics(target) or (0.0, 0.0)
        if later[0] <= before and later[1] == tokens:
            return
    findings.fault(f"the server still generates {PATIENCE_S:g} s after the client of {what} has left")


def _cancellation_unseen(target: Target, findings: Findings) -> None:
    """Without metrics: whether answers that were left hold up one that is wanted."""
    short = chat.request(target, max_tokens=1)
    usual = min(_seconds(target, short) for _ in range(3))
    streams = [_begin(target) for _ in range(LEFT_AT_ONCE)]
    if not all(_is_long(stream, findings) for stream in streams):
        return
    limit = max(1.0, 5 * usual)
    seconds = _seconds(target, short)
    findings.note(f"no /metrics: judged by the next answer ({seconds:.2f} s, alone {usual:.2f} s)")
    if seconds > limit:
        findings.fault(f"the server still generates after its clients have left: the next one waits {seconds:.1f} s")


def _begin(target: Target) -> EventStream:
    """A long answer that is left after a few events."""
    body = chat.request(target, LONG_TASK, max_tokens=10_000)
    return target.stream(chat.PATH, body, most_events=4)


def _is_long(stream: EventStream, findings: Findings) -> bool:
    if len(stream.events) < 4 or any(event.text == "[DONE]" for event in stream.events):
        findings.note("not checked: the answer ended by itself")
        return False
    return True


def _seconds(target: Target, body: dict[str, object]) -> float:
    began = time.perf_counter()
    target.post(chat.PATH, body)
    return time.perf_counter() - began


def _has_text(data: object) -> bool:
    return bool(chat.stream_text([data]))


def _metrics(target: Target) -> tuple[float, float] | None:
    """(requests that run, tokens made so far), or None if the server does not tell."""
    answer = target.get("/metrics")
    if answer.status != 200:
        return None
    running = [float(line.split()[-1]) for line in answer.text.splitlines() if RUNNING.match(line)]
    tokens = [float(line.split()[-1]) for line in answer.text.splitlines() if TOKENS.match(line)]
    return (sum(running), sum(tokens)) if running or tokens else None
