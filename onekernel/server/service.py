"""Service: what all APIs share. They turn their requests into an `Ask`, and what an `Answer` brings into their form."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from onekernel.api import Model
from onekernel.errors import OnekernelError
from onekernel.sampling.params import SampledToken, SamplingParams
from onekernel.scheduler import Interruption, Request, Scheduler, ShuttingDown, Ticket
from onekernel.server.device import device_name, find_meter
from onekernel.server.errors import ContextOverflow
from onekernel.server.metrics import Metrics
from onekernel.server.settings import Settings
from onekernel.text.answer import AnswerParser, Event
from onekernel.text.grammar import Compiled, Grammars
from onekernel.text.thinking import THINK, THINK_END

log = logging.getLogger("onekernel.server")
TURN_START = "<|im_start|>"
LONG_TEXT = 10_000  # characters: from here on tokenizing leaves the event loop alone


@dataclass(frozen=True)
class Ask:
    """One answer to make, in the terms of the model.

    Attributes:
        prompt: token ids.
        thinking: whether the prompt has opened the thinking; None: a plain text, without thinking.
        thinking_tokens: most tokens of the thinking; None: no limit.
        tools: those that may be called; None: none, and what looks like a call is text.
        several_calls: whether the answer may hold more than one call.
        grammar: what the answer (after the thinking) is held to.
        ignore_eos: end tokens do not end the answer.
        priority: see scheduler.Request.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    thinking: bool | None = None
    thinking_tokens: int | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    several_calls: bool = True
    grammar: Compiled | None = None
    ignore_eos: bool = False
    priority: int = 0


@dataclass(slots=True)
class Batch:
    """What came since the last one. Without events and tokens it is a heartbeat."""

    events: list[Event]
    tokens: list[SampledToken] = field(default_factory=list)

    @property
    def heartbeat(self) -> bool:
        return not self.events and not self.tokens


class Answer:
    """One answer on its way: iterate over its batches, once."""

    def __init__(self, service: Service, ask: Ask) -> None:
        """Raises what Scheduler.submit and AnswerParser raise. From here on the answer is being made."""
        end_tokens = service.end_tokens
        self.ask = ask
        self._service = service
        self._parser = AnswerParser(
            service.model.tokenizer,
            stop=ask.stop,
            end_tokens=end_tokens,
            thinking=ask.thinking,
            tools=ask.tools,
            several_calls=ask.several_calls,
        )
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._beat_due = False
        request = Request(
            prompt=ask.prompt,
            sampling=ask.sampling,
            max_tokens=ask.max_tokens,
            stop_tokens=frozenset() if ask.ignore_eos else end_tokens,
            constraint=service.constraint(ask),
            boundaries=service.boundaries(ask.prompt),
            interruption=service.interruption(ask),
            priority=ask.priority,
        )
        self.ticket: Ticket = service.scheduler.submit(request, self._notify)
        self._logged: list[int] | None = None
        if service.settings.log_prompts:
            self._logged = []
            log.info("prompt: %r", service.model.tokenizer.decode(ask.prompt, skip_special=False))

    @property
    def prompt_tokens(self) -> int:
        return len(self.ask.prompt)

    @property
    def cached_tokens(self) -> int:
        return self.ticket.cached_tokens

    @property
    def completion_tokens(self) -> int:
        return self._parser.tokens

    @property
    def thinking_tokens(self) -> int:
        return self._parser.thinking_tokens

    @property
    def finish_reason(self) -> str:
        """After the end: "stop" (an end token), "stop_string", "tool_calls", "length" or "cancelled"."""
        if self._parser.stop_string is not None:
            return "stop_string"
        if self._parser.calls and (self._parser.stopped or self.ticket.finish_reason == "stop"):
            return "tool_calls"
        return self.ticket.finish_reason or "cancelled"

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the answer, if one did."""
        return self._parser.stop_string

    def cancel(self) -> None:
        """Nobody reads this answer any more. Of no effect once it has ended."""
        self.ticket.cancel()

    async def batches(self) -> AsyncGenerator[Batch, None]:
        """Raises the error that ended the answer, if one did. Closing the generator ends the answer."""
        ticket, parser, news = self.ticket, self._parser, self._news
        beat = self._loop.call_later(self._service.settings.heartbeat_s, self._beat)
        self._beat_timer = beat
        try:
            while not parser.stopped:
                await news.wait()
                news.clear()
                ended = ticket.finish_reason is not None  # before `take`: nothing can come after it
                tokens = ticket.take()
                if tokens or ended:
                    self._beat_due = False
                    events = parser.push(tokens)
                    if self._logged is not None:
                        self._logged += [token.id for token in tokens]
                    if ended and ticket.error is None:
                        events += parser.flush()
                    yield Batch(events, tokens)
                elif self._beat_due:
                    self._beat_due = False
                    yield Batch([])
                if ended:
                    break
            if ticket.error is not None:
                raise ticket.error
            if ticket.finish_reason == "cancelled" and not ticket.cancelled:
                raise ShuttingDown("the server is shutting down: this answer is not complete")
        finally:
            self._beat_timer.cancel()
            ticket.cancel()
            self._service.metrics.observe(self)
            if self._logged is not None:
                log.info("answer: %r", self._service.model.tokenizer.decode(self._logged, skip_special=False))

    def _notify(self) -> None:
        """Called from the scheduler's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._news.set)

    def _beat(self) -> None:
        self._beat_due = True
        self._news.set()
        self._beat_timer = self._loop.call_later(self._service.settings.heartbeat_s, self._beat)


class Service:
    """The model, the scheduler before it, and the settings."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self.model = model
        self.settings = settings
        self.scheduler = Scheduler(
            model.engine,
            most_running=settings.most_running,
            most_waiting=settings.most_waiting,
            cache_bytes=settings.cache_bytes,
            deterministic=settings.deterministic,
            patient=settings.patient,
        )
        self.grammars = Grammars(model.tokenizer)
        # Takes a second for a large vocabulary: meanwhile requests without a grammar are served.
        threading.Thread(target=self.grammars.load, name="onekernel-grammars", daemon=True).start()
        self.metrics = Metrics(self.scheduler, find_meter(model.engine.name))
        self.end_tokens = model.stop_tokens
        self.started_at = time.time()
        self.device = device_name(model.engine.name)
        try:  # the first request need not wait for the template to be compiled
            model.render([{"role": "user", "content": ""}])
        except OnekernelError as error:
            log.warning("conversations cannot be answered, only plain text: %s", error)
        self._turn_start = model.tokenizer.token_id(TURN_START)
        self._think_end = model.tokenizer.token_id(THINK_END)

    @property
    def max_context(self) -> int:
        return self.model.engine.max_context

    def close(self, grace_s: float = 0.0) -> None:
        """See Scheduler.close. The model stays loaded."""
        self.scheduler.close(grace_s)

    async def encode(self, text: str, *, parse_special: bool = True) -> tuple[int, ...]:
        """Token ids of a text."""
        tokenizer = self.model.tokenizer
        if len(text) < LONG_TEXT:
            return tuple(tokenizer.encode(text, parse_special=parse_special))
        return tuple(await asyncio.to_thread(tokenizer.encode, text, parse_special=parse_special))

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        thinking: bool | None,
        *,
        check: bool = True,
    ) -> tuple[tuple[int, ...], bool]:
        """(the prompt of a conversation, whether it opens the thinking).

        Raises InvalidRequest, and ContextOverflow if there is no room for an answer (unless it is not to be checked).
        """
        text = self.model.render(messages, tools=tools, thinking=thinking)
        prompt = await self.encode(text)
        if check:
            self.check_fits(prompt)
        return prompt, text.rstrip().endswith(THINK)

    def check_fits(self, prompt: Sequence[int]) -> None:
        """Raises ContextOverflow if there is no room for an answer."""
        if len(prompt) >= self.max_context:
            raise ContextOverflow(len(prompt), self.max_context)

    def answers(self, asks: Sequence[Ask]) -> list[Answer]:
        """Start to make answers: all of them or none. Raises what Scheduler.submit raises."""
        limit = self.settings.max_tokens
        answers: list[Answer] = []
        try:
            for ask in asks:
                most = limit if ask.max_tokens is None or limit is None else min(limit, ask.max_tokens)
                answers.append(Answer(self, ask if limit is None else replace(ask, max_tokens=most)))
        except OnekernelError:
            for answer in answers:
                answer.cancel()
            self.metrics.refused()
            raise
        return answers

    def constraint(self, ask: Ask) -> Any:
        if ask.grammar is None:
            return None
        return ask.grammar(self._think_end if ask.thinking else None)

    def interruption(self, ask: Ask) -> Interruption | None:
        """Ends the thinking at its limit."""
        if not ask.thinking or ask.thinking_tokens is None or self._think_end is None:
            return None
        text = f"\n{THINK_END}" if ask.grammar is not None else f"\n{THINK_END}\n\n"
        insert = tuple(self.model.tokenizer.encode(text))
        return Interruption(self._think_end, max(1, ask.thinking_tokens), insert)

    def boundaries(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """Where the turns begin that other prompts are likely to part at: the first after the system message (other
        conversations), the one before the last and the last (the next turn, or the same one asked again)."""
        starts = [i for i, token in enumerate(prompt) if token == self._turn_start and i > 0]
        return tuple(sorted({*starts[:1], *starts[-2:]}))
