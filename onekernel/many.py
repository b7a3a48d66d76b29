"""Many plain prompts at once: what `Model.generate_many` does, over a scheduler of its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from queue import SimpleQueue

from onekernel.engine import Engine
from onekernel.errors import InvalidRequest
from onekernel.sampling.params import SampledToken, SamplingParams
from onekernel.scheduler import Request, Scheduler, Ticket
from onekernel.stream import Completion, Usage
from onekernel.text.answer import AnswerParser
from onekernel.text.tokenizer import Tokenizer
from onekernel.text.tool_calls import Text

LEAST_CONCURRENT = 4  # enough that an engine never waits for text or a disk. Each prompt holds a state while it runs


def concurrency(engine: Engine, wanted: int | None) -> int:
    """How many prompts to work on at a time: as many as one step of the engine serves, unless told otherwise.

    Raises:
        InvalidRequest: fewer than one.
    """
    if wanted is not None and wanted < 1:
        raise InvalidRequest(f"max_concurrent = {wanted} must be at least 1")
    return wanted or max(LEAST_CONCURRENT, engine.most_slots)


class Growing:
    """One answer on its way."""

    def __init__(self, ticket: Ticket, parser: AnswerParser) -> None:
        self._ticket = ticket
        self._parser = parser
        self._tokens: list[SampledToken] = []
        self._text: list[str] = []

    def take(self) -> bool:
        """Fetch what is new. Returns whether the answer is complete; raises the error that ended it."""
        ended = self._ticket.finish_reason is not None  # before `take`: nothing can come after it
        tokens = self._ticket.take()
        events = self._parser.push(tokens)
        self._tokens += tokens
        if ended and self._ticket.error is not None:
            raise self._ticket.error
        if ended:
            events += self._parser.flush()
        elif self._parser.stopped:
            self._ticket.cancel()
        self._text += [event.text for event in events if isinstance(event, Text)]
        return ended

    @property
    def completion(self) -> Completion:
        ticket, count = self._ticket, self._parser.tokens
        tokens = tuple(self._tokens[:count])  # a stop string is found a little after the engine went on
        first_s = None if ticket.first_at is None else ticket.first_at - ticket.submitted_at
        decode_s = (ticket.ended_at or 0.0) - (ticket.first_at or 0.0)
        return Completion(
            text="".join(self._text),
            tokens=tuple(token.id for token in tokens),
            finish_reason="stop" if self._parser.stopped else ticket.finish_reason or "cancelled",
            usage=Usage(len(ticket.request.prompt), count),
            ttft_s=first_s,
            decode_tokens_per_s=(count - 1) / decode_s if count > 1 and decode_s > 0 else None,
            logprobs=tokens if ticket.request.sampling.logprobs is not None else None,
        )


def generate_many(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    max_tokens: int | None,
    stop: tuple[str, ...],
    stop_tokens: frozenset[int],
    max_concurrent: int | None,
) -> list[Completion]:
    """One completion a prompt, in their order. See Model.generate_many."""
    news: SimpleQueue[int] = SimpleQueue()  # answers that have something new, by their place
    growing: list[Growing] = []
    most = concurrency(engine, max_concurrent)
    scheduler = Scheduler(engine, most_running=most, most_waiting=len(prompts), deterministic=True, patient=True)
    try:
        for i, prompt in enumerate(prompts):
            parser = AnswerParser(tokenizer, stop=stop, end_tokens=stop_tokens)
            request = Request(tuple(prompt), sampling, max_tokens, stop_tokens)
            try:
                ticket = scheduler.submit(request, partial(news.put, i))
            except InvalidRequest as error:
                raise InvalidRequest(f"prompts[{i}]: {error}") from None
            growing.append(Growing(ticket, parser))
        unfinished = set(range(len(prompts)))
        while unfinished:
            i = news.get()
            if i in unfinished and growing[i].take():
                unfinished.remove(i)
    finally:
        scheduler.close()
    return [one.completion for one in growing]
