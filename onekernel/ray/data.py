"""Batch jobs on Ray Data: a dataset of lines in, a dataset of answers out, on all GPUs of a cluster."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import ray
from ray.data import Dataset
from ray.data.block import BlockAccessor
from ray.data.datasource import BlockBasedFileDatasink

from onekernel.batch.answers import Answers
from onekernel.batch.lines import Line, parse_line
from onekernel.batch.output import is_failure
from onekernel.many import concurrency
from onekernel.ray.options import Options
from onekernel.ray.serve import cluster_gpus
from onekernel.server.service import Service

LINES = 16  # that go to a worker together


class Worker:
    """A model in a process of its own. Several batches are in it at a time, so that it is never idle."""

    def __init__(self, options: Options, fields: Mapping[str, Any]) -> None:
        self._model = options.load()
        most = concurrency(self._model.engine, options.max_running or None)
        settings = options.settings()
        waiting = 2 * most * settings.most_choices
        self._service = Service(
            self._model, replace(settings, most_running=most, most_waiting=waiting, deterministic=True, patient=True)
        )
        self._answers = Answers(self._service)
        self._free = asyncio.Semaphore(2 * most)
        self._fields = fields

    async def __call__(self, batch: dict[str, np.ndarray]) -> AsyncIterator[dict[str, np.ndarray]]:
        results = await asyncio.gather(*(self._answer(str(text)) for text in batch["text"]))
        yield {
            "custom_id": np.array([result["custom_id"] for result in results], dtype=object),
            "answer": np.array([json.dumps(result) for result in results], dtype=object),
            "failed": np.array([is_failure(result) for result in results]),
        }

    async def _answer(self, text: str) -> dict[str, Any]:
        async with self._free:
            result = await self._answers.result(line_of(text, self._fields))
        if result["response"] is None:  # no number is known
            result["error"]["message"] = result["error"]["message"].removeprefix("line 0: ")
        return result


def line_of(text: str, fields: Mapping[str, Any]) -> Line:
    """A line by itself: Ray Data knows no numbers of lines, so a prompt without a custom_id is named by its hash."""
    content = text.strip().encode()
    line = parse_line(0, content, fields, {})
    if line.custom_id == "line-0":
        line = replace(line, custom_id=f"prompt-{hashlib.sha256(content).hexdigest()[:16]}")
    return line


def answer(lines: Dataset, fields: Mapping[str, Any] | None = None, **options: Any) -> Dataset:
    """Answer a dataset of requests or prompts, for example `ray.data.read_text("requests.jsonl")`.

    Args:
        lines: with a column `text`: lines as `onekernel batch` takes them.
        fields: of /v1/completions, for plain prompts; their line comes first.
        options: see Options; `replicas` is the number of workers.

    Returns:
        A row for each line, in any order: `custom_id`, `answer` (a line as `onekernel batch` writes it, without its
        field `onekernel`), `failed`. A prompt without a custom_id is called prompt-HASH, the first 16 digits of the
        SHA-256 of its line.

    Raises:
        InvalidRequest: an option that there is not, or a value of the wrong kind.
    """
    chosen = Options.of(options)
    if not ray.is_initialized():
        ray.init()
    workers, gpus = chosen.replicas_and_gpus(cluster_gpus())
    return lines.map_batches(
        Worker,
        fn_constructor_args=(chosen, dict(fields or {})),
        batch_size=LINES,
        batch_format="numpy",
        num_cpus=chosen.cpus,
        num_gpus=gpus,
        compute=ray.data.ActorPoolStrategy(size=workers),
    )


class JsonLines(BlockBasedFileDatasink):
    """Writes the column `answer`, one line a row: `answer(...).write_datasink(JsonLines("folder"))`."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder, file_format="jsonl")

    def write_block_to_file(self, block: BlockAccessor, file: Any) -> None:
        for row in block.iter_rows(public_row_format=True):
            file.write(row["answer"].encode() + b"\n")
