"""AnswerParser: the tokens of an answer in; thinking, text and tool calls out, as far as they are certain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onekernel.sampling.params import SampledToken
from onekernel.text.detokenizer import IncrementalDetokenizer
from onekernel.text.stop import StopStrings
from onekernel.text.thinking import ThinkingSplitter
from onekernel.text.tokenizer import Tokenizer
from onekernel.text.tool_calls import CallArguments, CallEnd, CallStart, Text, ToolCallParser


@dataclass(frozen=True, slots=True)
class Thinking:
    """More of the thinking."""

    text: str


Event = Thinking | Text | CallStart | CallArguments | CallEnd


class AnswerParser:
    """Feeds on the sampled tokens of one answer.

    Attributes:
        stopped: a stop string was found, or the only call is complete; what comes after that is not looked at.
        tokens: how many tokens were looked at.
        thinking_tokens: how many of them belong to the thinking.
        calls: tool calls that were begun.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        end_tokens: frozenset[int] = frozenset(),
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        several_calls: bool = True,
    ) -> None:
        """Args:
            stop: stop strings; they count in the text, not in thinking or calls.
            end_tokens: tokens that end an answer and have no text.
            thinking: whether the prompt has opened the thinking; None: text is not searched for thinking.
            tools: those that may be called; None: text is not searched for calls.
            several_calls: whether there may be more than one; otherwise the answer ends with the first.

        Raises:
            InvalidRequest: see StopStrings.
        """
        self.stopped = False
        self.tokens = 0
        self.thinking_tokens = 0
        self.calls = 0
        self._several_calls = several_calls
        self._end_tokens = end_tokens
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._splitter = None if thinking is None else ThinkingSplitter(thinking, calls=tools is not None)
        self._calls = None if tools is None else ToolCallParser(tools)
        self._stop = StopStrings(stop) if stop else None

    @property
    def stop_string(self) -> str | None:
        """The stop string that was found."""
        return None if self._stop is None else self._stop.found

    def push(self, tokens: Iterable[SampledToken]) -> list[Event]:
        """What the tokens add."""
        events: list[Event] = []
        pieces: list[str] = []
        splitter = self._splitter
        for token in tokens:
            if self.stopped:
                break
            self.tokens += 1
            text = "" if token.id in self._end_tokens else self._detokenizer.push(token.id)
            if splitter is not None and splitter.inside:
                self.thinking_tokens += 1
            if self._stop is None and (splitter is None or splitter.over):
                pieces.append(text)
            else:
                # One by one: which tokens are thinking, and which come after a stop string, counts.
                self._text(text, events)
        if pieces:
            self._text("".join(pieces), events)
        return events

    def flush(self) -> list[Event]:
        """What was held back, once no more will come."""
        events: list[Event] = []
        if self.stopped:
            return events
        self._text(self._detokenizer.flush(), events)
        if self._splitter is not None:
            thinking, answer = self._splitter.flush()
            self._thinking(thinking, events)
            self._answer(answer, events)
        if self._calls is not None and not self.stopped:
            self._sort(self._calls.flush(), events)
        if self._stop is not None and not self.stopped:
            self._give(self._stop.flush(), events)
        return events

    def _text(self, text: str, events: list[Event]) -> None:
        if not text:
            return
        if self._splitter is None:
            self._answer(text, events)
            return
        thinking, answer = self._splitter.push(text)
        self._thinking(thinking, events)
        self._answer(answer, events)

    def _thinking(self, text: str, events: list[Event]) -> None:
        if text:
            events.append(Thinking(text))

    def _answer(self, text: str, events: list[Event]) -> None:
        if not text:
            return
        if self._calls is None:
            self._plain(text, events)
        else:
            self._sort(self._calls.push(text), events)

    def _sort(self, found: Iterable[Text | CallStart | CallArguments | CallEnd], events: list[Event]) -> None:
        for event in found:
            if self.stopped:
                return
            if isinstance(event, Text):
                self._plain(event.text, events)
                continue
            if isinstance(event, CallStart):
                self.calls += 1
                if self._stop is not None:
                    self._give(self._stop.flush(), events)
            events.append(event)
            if isinstance(event, CallEnd) and not self._several_calls:
                self.stopped = True

    def _plain(self, text: str, events: list[Event]) -> None:
        if self._stop is not None:
            text, self.stopped = self._stop.push(text)
        self._give(text, events)

    def _give(self, text: str, events: list[Event]) -> None:
        if not text:
            return
        if events and isinstance(last := events[-1], Text):
            events[-1] = Text(last.text + text)
        else:
            events.append(Text(text))
