"""Hugging Face transformers, eager, with or without flash-linear-attention: what `from_pretrained` gives a user.

The greedy loop is our own and leaner than `generate`: no stopping criteria, no logits processors, the token stays on
the device. One forward pass a token with the model's cache.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from onekernel.bench.protocol import Decoded, Unavailable, serve


class TransformersPeer:
    def load(self, folder: str, options: dict[str, Any]) -> dict[str, Any]:
        use_fla = bool(options.get("fla"))
        if not use_fla:
            sys.modules["fla"] = None  # type: ignore[assignment]  # importing it fails: transformers uses its own code
        elif importlib.util.find_spec("fla") is None:
            raise Unavailable("flash-linear-attention is not installed (pip install flash-linear-attention)")
        try:
            if use_fla:
                import fla  # transformers imports it too, and hides why it cannot
        except Exception as error:
            raise Unavailable(f"flash-linear-attention cannot be imported ({type(error).__name__}: {error})") from error
        try:
            import torch
            import transformers
            import transformers.models.qwen3_5
        except ImportError as error:
            raise Unavailable(f"transformers with Qwen3.5 is not installed ({error})") from None
        device = options["device"]
        if device == "cuda" and not torch.cuda.is_available():
            raise Unavailable("PyTorch finds no GPU")
        self.torch, self.device = torch, device
        dtype = torch.float32 if options.get("float32") else torch.bfloat16
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        torch.set_grad_enabled(False)
        self.versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        if use_fla:
            import fla

            self.versions["flash-linear-attention"] = getattr(fla, "__version__", "unknown")
            if not self._runs_code_of("fla"):
                raise Unavailable("transformers does not use the flash-linear-attention that is installed here")
        return {
            "title": f"transformers, eager{' + flash-linear-attention' if use_fla else ''}",
            "versions": self.versions,
            "weights": "float32" if options.get("float32") else "bf16",
            "device": device,
            "notes": "own greedy loop over model.forward, the token stays on the device",
        }

    def _runs_code_of(self, package: str) -> bool:
        """Whether a forward pass enters a package. Transformers falls back to code of its own without an error."""
        part, seen = f"{os.sep}{package}{os.sep}", False

        def look(frame: Any, event: str, _: Any) -> None:
            nonlocal seen
            if event == "call" and part in frame.f_code.co_filename:
                seen = True
                sys.setprofile(None)  # to look at every call takes time

        sys.setprofile(look)
        try:
            self.model(self._ids(range(1, 9)), use_cache=True)
        finally:
            sys.setprofile(None)
        return seen

    def _ids(self, tokens: Sequence[int]) -> Any:
        return self.torch.tensor([list(tokens)], device=self.device)

    def _wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def prefill(self, tokens: Sequence[int]) -> Decoded:
        result = self.model(self._ids(tokens), use_cache=True, logits_to_keep=1)
        return Decoded([int(result.logits[0, -1].argmax())])

    def prepare(self, tokens: Sequence[int]) -> None:
        self.cache = None
        if len(tokens) > 1:
            self.cache = self.model(self._ids(tokens[:-1]), use_cache=True, logits_to_keep=1).past_key_values
        self.last = self._ids(tokens[-1:])
        self._wait()

    def decode(self, count: int) -> Decoded:
        cache, token, made = copy.deepcopy(self.cache), self.last, []
        self._wait()
        start = time.perf_counter()
        for _ in range(count):
            result = self.model(token, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            token = result.logits[:, -1:].argmax(-1)
            made.append(token)
        tokens = self.torch.cat(made, 1)[0].tolist()  # waits for the device
        return Decoded(tokens, wall_s=time.perf_counter() - start)

    def logits(self, tokens: Sequence[int]) -> Any:
        """The first half in one pass, the rest token by token: both paths are judged."""
        half = len(tokens) // 2
        result = self.model(self._ids(tokens[:half]), use_cache=True)
        rows, cache = [result.logits[0].float()], result.past_key_values
        for token in tokens[half:]:
            result = self.model(self._ids([token]), past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            rows.append(result.logits[0].float())
        return self.torch.cat(rows).cpu().numpy()

    def close(self) -> None:
        pass


if __name__ == "__main__":
    serve(TransformersPeer())
