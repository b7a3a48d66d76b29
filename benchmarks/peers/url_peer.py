"""Any OpenAI-compatible server behind a URL (vLLM, SGLang, llama-server, `onekernel serve`), as its client sees it.

Speaks `POST {url}/completions` with token ids as the prompt, streaming. What is measured includes HTTP, the server's
scheduler and its detokenizer: prefill is the time to the first token; decoding is timed from the first token that
arrives to the last, so `count` tokens are those after the first. Every sample has a prompt of its own, so a cache of
prefixes does not help.

Option "url": such as http://localhost:8000/v1. Option "model": the name there; None takes the first that it lists.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from onekernel.bench.protocol import Decoded, Unavailable, serve
from onekernel.text.tokenizer import Tokenizer

TIMEOUT = 600  # seconds
ASKED = 3  # of so many positions one is checked: each costs a request with the whole prompt up to there


class UrlPeer:
    def load(self, folder: str, options: dict[str, Any]) -> dict[str, Any]:
        if not options.get("url"):
            raise Unavailable("no URL was given (--url http://localhost:8000/v1)")
        self.url = options["url"].rstrip("/")
        self.tokenizer = Tokenizer.load(Path(folder))
        try:
            self.model = options.get("model") or self._get("/models")["data"][0]["id"]
        except (urllib.error.URLError, OSError) as error:
            raise Unavailable(f"{self.url} does not answer ({error}): start the server first") from None
        # An end token must not end a sample. The first is the extension that most servers know, the second is
        # OpenAI's own; a server that refuses one is asked again without it.
        self.extras: dict[str, Any] = {
            "ignore_eos": True,
            "logit_bias": {str(token): -100 for token in sorted(self.tokenizer.stop_token_ids)},
        }
        self.dropped: list[str] = []
        self.prefill([0, 1, 2, 3])  # finds out what the server refuses, before anything is timed
        return {
            "title": f"{self.model} at {self.url}",
            "versions": {},
            "weights": options.get("weights", "bf16"),
            "device": "server",
            "notes": "as a client of the server sees it, HTTP included; the server chose its own settings"
            + (f"; it refuses {', '.join(self.dropped)}" if self.dropped else ""),
            "kinds": ["prefill", "decode"],
        }

    def prefill(self, tokens: Sequence[int]) -> Decoded:
        for _ in self._stream(tokens, 1):
            pass
        return Decoded(1)

    def prepare(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)

    def decode(self, count: int) -> Decoded:
        times, made = [], 0
        for moment, total in self._stream(self.tokens, count + 1):
            times.append(moment)
            made = total
        if len(times) < 2:
            raise RuntimeError(f"the server sent {made} tokens in {len(times)} pieces: it does not stream")
        return Decoded(made - 1, wall_s=times[-1] - times[0])

    def logits(self, tokens: Sequence[int]) -> list[int | None]:
        """The most probable token after every third of the tokens, one request for each: the server gives text, which
        names the token."""
        names: dict[str, int | None] = {}
        for token in range(self.tokenizer.size):
            text = self.tokenizer.decode([token])
            names[text] = None if text in names else token  # two tokens of one text cannot be told apart
        best: list[int | None] = []
        for end in range(1, len(tokens) + 1):
            if end % ASKED:
                best.append(None)
                continue
            answer = self._post(self._body(tokens[:end], 1, stream=False, extras={}))
            best.append(names.get(answer["choices"][0]["text"]))
        return best

    def close(self) -> None:
        pass

    def _body(self, tokens: Sequence[int], count: int, stream: bool, extras: dict[str, Any]) -> dict[str, Any]:
        body = {"model": self.model, "prompt": list(tokens), "max_tokens": count, "temperature": 0, **extras}
        return {**body, "stream": True, "stream_options": {"include_usage": True}} if stream else body

    def _stream(self, tokens: Sequence[int], count: int) -> Iterator[tuple[float, int]]:
        """When each piece with text came, and the tokens up to there (the last value is the server's own count)."""
        pieces, last = 0, 0.0
        usage: dict[str, Any] | None = None
        with self._open(self._body(tokens, count, True, self.extras), tokens, count) as lines:
            for raw in lines:
                line = raw.decode("utf-8").strip()
                if not line.startswith("data:") or line == "data: [DONE]":
                    continue
                event = json.loads(line[5:])
                if "error" in event:
                    raise RuntimeError(f"the server failed: {event['error']}")
                usage = event.get("usage") or usage
                if event.get("choices"):
                    choice = event["choices"][0]
                    if choice.get("text") or choice.get("finish_reason") is None:
                        pieces, last = pieces + 1, time.perf_counter()
                        yield last, pieces
        if pieces:
            yield last, int(usage["completion_tokens"]) if usage else pieces

    def _open(self, body: dict[str, Any], tokens: Sequence[int], count: int) -> Any:
        while True:
            try:
                return urllib.request.urlopen(self._request("/completions", body), timeout=TIMEOUT)
            except urllib.error.HTTPError as error:
                message = error.read().decode("utf-8", "replace")
                refused = next((name for name in self.extras if name in message), None)
                if error.code not in (400, 422) or refused is None:
                    raise RuntimeError(f"the server answers {error.code}: {message[:300]}") from None
                del self.extras[refused]
                self.dropped.append(refused)
                body = self._body(tokens, count, True, self.extras)

    def _post(self, body: dict[str, Any]) -> Any:
        try:
            with urllib.request.urlopen(self._request("/completions", body), timeout=TIMEOUT) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            message = error.read().decode("utf-8", "replace")
            raise RuntimeError(f"the server answers {error.code}: {message[:300]}") from None

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as answer:
            return json.load(answer)

    def _request(self, path: str, body: dict[str, Any]) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        return urllib.request.Request(f"{self.url}{path}", json.dumps(body).encode(), headers)


if __name__ == "__main__":
    serve(UrlPeer())
