"""vLLM, in this process, one sequence at a time: its engine stepped by hand, so that each token can be timed.

Usually in an environment of its own: `--peer-python vllm=/path/to/python`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

from onekernel.bench.protocol import Decoded, Unavailable, serve


class VllmPeer:
    def load(self, folder: str, options: dict[str, Any]) -> dict[str, Any]:
        if options["device"] != "cuda":
            raise Unavailable("this adapter runs vLLM on NVIDIA GPUs only")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process, without pipes
        try:
            import vllm
        except ImportError as error:
            raise Unavailable(f"vLLM is not installed ({error})") from None
        self.params = vllm.SamplingParams
        self.engine = vllm.LLM(
            model=folder,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=int(options["max_context"]),
            enable_prefix_caching=False,
            max_num_seqs=1,
        ).llm_engine
        self.requests = 0
        return {
            "title": "vLLM",
            "versions": {"vllm": vllm.__version__},
            "weights": "bf16",
            "device": "cuda",
            "notes": "in process, one sequence, prefix caching off; decoding timed from the first token to the last",
        }

    def _steps(self, tokens: Sequence[int], **sampling: Any) -> Iterator[Any]:
        self.requests += 1
        params = self.params(temperature=0.0, ignore_eos=True, detokenize=False, **sampling)
        self.engine.add_request(str(self.requests), {"prompt_token_ids": list(tokens)}, params)
        while self.engine.has_unfinished_requests():
            yield from self.engine.step()

    def prefill(self, tokens: Sequence[int]) -> Decoded:
        for _ in self._steps(tokens, max_tokens=1):
            pass
        return Decoded(1)

    def prepare(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)

    def decode(self, count: int) -> Decoded:
        times, made = [], []
        for output in self._steps(self.tokens, max_tokens=count + 1):
            if len(output.outputs[0].token_ids) > len(made):
                made = list(output.outputs[0].token_ids)
                times.append(time.perf_counter())
        return Decoded(made[1:], wall_s=times[-1] - times[0])

    def logits(self, tokens: Sequence[int]) -> list[int]:
        """The most probable token after each of the prompt's; vLLM gives the best few, not whole rows."""
        last = None
        for output in self._steps(tokens, max_tokens=1, prompt_logprobs=1, logprobs=1):
            last = output
        if last is None:
            raise RuntimeError("vLLM gave no output")
        rows = [*last.prompt_logprobs[1:], last.outputs[0].logprobs[0]]
        return [min(row, key=lambda token: row[token].rank) for row in rows]

    def close(self) -> None:
        pass


if __name__ == "__main__":
    serve(VllmPeer())
