"""The batches of several answers to one request, in the order in which they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from onekernel.server.service import Answer, Batch


async def merged(answers: Sequence[Answer]) -> AsyncGenerator[tuple[int, Batch | None], None]:
    """(index of the answer, its next batch, or None at its end). The first error ends all of them."""
    if len(answers) == 1:  # nearly always: without the detour
        batches = answers[0].batches()
        try:
            async for batch in batches:
                yield 0, batch
        finally:
            await batches.aclose()
        yield 0, None
        return
    queue: asyncio.Queue[tuple[int, Batch | None]] = asyncio.Queue()

    async def pump(index: int, answer: Answer) -> None:
        try:
            async for batch in answer.batches():
                queue.put_nowait((index, batch))
        finally:
            queue.put_nowait((index, None))

    tasks = [asyncio.ensure_future(pump(i, answer)) for i, answer in enumerate(answers)]
    try:
        for _ in tasks:
            while (item := await queue.get())[1] is not None:
                yield item
            await tasks[item[0]]  # raises what ended it
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
