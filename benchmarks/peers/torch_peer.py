"""A plain PyTorch decode step under torch.compile and a CUDA graph: the best that a PyTorch user reaches at batch 1.

Written for speed within PyTorch: projections that read the same input are one matrix, buffers are static, the choice
of the token happens on the device, and one graph replay is one token. No step waits for the host. The products go to
cuBLAS or into reductions that the compiler fuses and tunes; the faster of the two on this GPU is measured. The prompt
goes through the same step token by token, so there is no prefill figure.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onekernel.bench.protocol import Decoded, Unavailable, serve
from onekernel.checkpoint.shape import LINEAR, Shape
from onekernel.checkpoint.weights import load_weights

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
except ImportError:
    torch = None  # type: ignore[assignment]

CACHE_STEP = 1024  # the KV cache has a multiple of so many positions; another size compiles again
ROOM = 256  # positions behind a prompt
TRIAL_TOKENS = 100  # to find the faster way of the products


class Step:
    """One token through the model. All state is in static tensors, changed in place."""

    def __init__(self, folder: Path, device: str, dtype: Any) -> None:
        self.shape = shape = Shape.load(folder)
        self.device, self.dtype = device, dtype
        self.fused = False  # products as reductions of the compiler's own
        weights = load_weights(folder, shape)

        def get(name: str, keep: bool = False) -> Tensor:
            tensor = weights[name]
            if tensor.dtype == "BF16":
                value = torch.from_numpy(np.array(tensor.data).view(np.int16)).view(torch.bfloat16)
            else:
                value = torch.from_numpy(np.array(tensor.data))
            return value.to(device, torch.float32 if keep else dtype)

        def join(*names: str) -> Tensor:
            return torch.cat([get(name) for name in names])

        self.embedding = get("embed_tokens.weight")
        self.head = self.embedding if shape.tied else get("lm_head.weight")
        self.norm = get("norm.weight", keep=True)
        self.layers: list[dict[str, Tensor]] = []
        for i, kind in enumerate(shape.layer_types):
            name = f"layers.{i}."
            layer = {
                "norm": get(f"{name}input_layernorm.weight", keep=True),
                "mlp_norm": get(f"{name}post_attention_layernorm.weight", keep=True),
                "gate_up": join(f"{name}mlp.gate_proj.weight", f"{name}mlp.up_proj.weight"),
                "down": get(f"{name}mlp.down_proj.weight"),
            }
            if kind == LINEAR:
                name += "linear_attn."
                layer |= {
                    "in": join(*(f"{name}in_proj_{part}.weight" for part in ("qkv", "z", "b", "a"))),
                    "conv": get(f"{name}conv1d.weight")[:, 0].contiguous(),
                    "decay": -get(f"{name}A_log", keep=True).exp(),
                    "dt_bias": get(f"{name}dt_bias", keep=True),
                    "gated_norm": get(f"{name}norm.weight", keep=True),
                    "out": get(f"{name}out_proj.weight"),
                }
            else:
                name += "self_attn."
                layer |= {
                    "in": join(*(f"{name}{part}_proj.weight" for part in "qkv")),
                    "q_norm": get(f"{name}q_norm.weight", keep=True),
                    "k_norm": get(f"{name}k_norm.weight", keep=True),
                    "out": get(f"{name}o_proj.weight"),
                }
            self.layers.append(layer)
        half = shape.rotary_dim // 2
        self.frequency = shape.rope_theta ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
        self.token = torch.zeros(1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.logits = torch.zeros(shape.vocab, dtype=torch.float32, device=device)
        self.made = torch.zeros(1, dtype=torch.long, device=device)
        self.states: list[tuple[Tensor, Tensor]] = []

    def reset(self, positions: int) -> None:
        """Empty states with a KV cache of so many positions."""
        shape = self.shape
        self.states = []
        for kind in shape.layer_types:
            if kind == LINEAR:
                window = torch.zeros(shape.conv_dim, 4, device=self.device, dtype=self.dtype)
                memory = torch.zeros(
                    shape.value_heads, shape.key_head_dim, shape.value_head_dim, device=self.device, dtype=torch.float32
                )
                self.states.append((window, memory))
            else:
                dims = (1, shape.kv_heads, positions, shape.head_dim)
                self.states.append(tuple(torch.zeros(dims, device=self.device, dtype=self.dtype) for _ in "kv"))
        self.slots = torch.arange(positions, device=self.device)
        self.made = torch.zeros(positions + 1, dtype=torch.long, device=self.device)
        self.position.zero_()

    def forward(self) -> None:
        """Consume `token` at `position`; leaves logits, the next token, and a trace of tokens in `made`."""
        x = F.embedding(self.token, self.embedding)[0]  # indexing with the token itself would wait for the GPU
        for layer, state, kind in zip(self.layers, self.states, self.shape.layer_types, strict=True):
            normed = self._norm(x, layer["norm"])
            mixed = (self._linear if kind == LINEAR else self._attention)(normed, layer, state)
            x = x + mixed
            gate, up = self._product(self._norm(x, layer["mlp_norm"]), layer["gate_up"]).chunk(2)
            x = x + self._product(F.silu(gate) * up, layer["down"])
        logits = self._product(self._norm(x, self.norm), self.head).float()
        self.logits.copy_(logits)
        self.token.copy_(logits.argmax(-1, keepdim=True))
        self.position.add_(1)
        self.made.index_copy_(0, self.position, self.token)

    def _product(self, x: Tensor, matrix: Tensor) -> Tensor:
        if self.fused:
            return (matrix.float() * x.float()).sum(-1).to(x.dtype)
        return F.linear(x, matrix)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, True) + self.shape.norm_eps) * (1 + weight)).to(x.dtype)

    def _linear(self, x: Tensor, layer: dict[str, Tensor], state: tuple[Tensor, Tensor]) -> Tensor:
        shape = self.shape
        window, memory = state
        sizes = [shape.conv_dim, shape.value_dim, shape.value_heads, shape.value_heads]
        qkv, z, b, a = self._product(x, layer["in"]).split(sizes)
        inputs = torch.cat([window[:, 1:], qkv[:, None]], 1)
        window.copy_(inputs)
        qkv = F.silu((inputs.float() * layer["conv"].float()).sum(-1))
        q, k, v = qkv.split([shape.key_dim, shape.key_dim, shape.value_dim])
        q, k = (y.view(shape.key_heads, 1, shape.key_head_dim) for y in (q, k))
        q, k = (y * torch.rsqrt(y.square().sum(-1, True) + 1e-6) for y in (q, k))
        ratio = shape.value_heads_per_key_head
        q, k = (y.expand(-1, ratio, -1).reshape(shape.value_heads, -1) for y in (q * shape.key_head_dim**-0.5, k))
        v = v.view(shape.value_heads, shape.value_head_dim)
        faded = memory * (layer["decay"] * F.softplus(a.float() + layer["dt_bias"])).exp()[:, None, None]
        delta = b.float().sigmoid()[:, None] * (v - (faded * k[:, :, None]).sum(1))
        new = faded + k[:, :, None] * delta[:, None, :]
        memory.copy_(new)
        out = (new * q[:, :, None]).sum(1)
        out = out * torch.rsqrt(out.square().mean(-1, True) + shape.norm_eps) * layer["gated_norm"]
        out = out * F.silu(z.float()).view(shape.value_heads, -1)
        return self._product(out.reshape(-1).to(x.dtype), layer["out"])

    def _attention(self, x: Tensor, layer: dict[str, Tensor], state: tuple[Tensor, Tensor]) -> Tensor:
        shape = self.shape
        q, k, v = self._product(x, layer["in"]).split([2 * shape.query_dim, shape.kv_dim, shape.kv_dim])
        q, gate = q.view(shape.heads, 2 * shape.head_dim).chunk(2, -1)
        q = self._rope(self._norm(q, layer["q_norm"]))
        k = self._rope(self._norm(k.view(shape.kv_heads, -1), layer["k_norm"]))
        keys, values = state
        keys.index_copy_(2, self.position, k[None, :, None])
        values.index_copy_(2, self.position, v.view(1, shape.kv_heads, 1, -1))
        mask = (self.slots <= self.position)[None, None, None]
        # The query heads of one kv head are rows of one product: each key is read once.
        rows = q.view(1, shape.kv_heads, -1, shape.head_dim)
        mask = mask.expand(1, 1, rows.shape[2], -1)
        out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=shape.head_dim**-0.5)
        return self._product(out.reshape(-1) * gate.reshape(-1).sigmoid(), layer["out"])

    def _rope(self, x: Tensor) -> Tensor:
        half = self.shape.rotary_dim // 2
        angle = self.position.float() * self.frequency
        cos, sin = angle.cos(), angle.sin()
        wide = x.float()
        first, second, rest = wide[:, :half], wide[:, half : 2 * half], wide[:, 2 * half :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1).to(x.dtype)

    def save(self) -> list[Tensor]:
        return [tensor.clone() for pair in self.states for tensor in pair] + [self.token.clone(), self.position.clone()]

    def restore(self, saved: list[Tensor]) -> None:
        live = [tensor for pair in self.states for tensor in pair] + [self.token, self.position]
        for target, source in zip(live, saved, strict=True):
            target.copy_(source)


class TorchPeer:
    def load(self, folder: str, options: dict[str, Any]) -> dict[str, Any]:
        if torch is None:
            raise Unavailable("PyTorch is not installed")
        self.device = options["device"]
        if self.device == "cuda" and not torch.cuda.is_available():
            raise Unavailable("PyTorch finds no GPU")
        torch.set_grad_enabled(False)
        # Several candidates for each kernel, compiled side by side. Coordinate descent over their parameters is left
        # out: for this graph it takes minutes.
        torch._inductor.config.max_autotune_pointwise = True
        self.step = Step(Path(folder), self.device, torch.bfloat16 if self.device == "cuda" else torch.float32)
        self.positions = 0
        self.compiled = options.get("compile", True)
        notes = "one graph replay a token; decode only: the prompt goes through the same step token by token"
        if self.device == "cuda":
            notes += f"; {self._choose(CACHE_STEP)}"
        return {
            "title": "PyTorch step, torch.compile + CUDA graph"
            if self.device == "cuda"
            else "PyTorch step, torch.compile",
            "versions": {"torch": torch.__version__},
            "weights": "bf16" if self.device == "cuda" else "float32",
            "device": self.device,
            "notes": notes,
            "kinds": ["decode"],
        }

    def _room(self, positions: int) -> None:
        """Make the step ready for so many positions: states, compiled code, graph."""
        capacity = -(-(positions + 1) // CACHE_STEP) * CACHE_STEP
        if capacity != self.positions:
            self._build(capacity)
        for tensor in (tensor for pair in self.step.states for tensor in pair):
            tensor.zero_()
        self.step.position.zero_()

    def _build(self, capacity: int) -> None:
        """States of this capacity, compiled code for them, and its graph."""
        self.positions = capacity
        self.step.reset(capacity)
        torch._dynamo.reset()
        run = torch.compile(self.step.forward, dynamic=False, fullgraph=True) if self.compiled else self.step.forward
        self.run = self._graph(run) if self.device == "cuda" else run

    def _choose(self, capacity: int) -> str:
        """Build the step with both kinds of products and keep the faster one. Returns what was found, in words."""
        found: list[tuple[float, bool, Any]] = []
        step = self.step
        for step.fused in (False, True):
            self._build(capacity)
            self._wait()
            start = time.perf_counter()
            for _ in range(TRIAL_TOKENS):
                self.run()
            self._wait()
            seconds = (time.perf_counter() - start) / TRIAL_TOKENS
            found.append((seconds, step.fused, (self.run, step.states, step.slots, step.made)))
        cublas, fused = (seconds for seconds, _, _ in found)
        _, step.fused, built = min(found, key=lambda one: one[0])
        self.run, step.states, step.slots, step.made = built
        chosen = "the compiler's reductions" if step.fused else "cuBLAS"
        return f"products by {chosen} ({1e6 * cublas:.0f} us a token by cuBLAS, {1e6 * fused:.0f} by reductions)"

    def _graph(self, run: Any) -> Any:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def _consume(self, tokens: Sequence[int]) -> None:
        given = torch.tensor(list(tokens), device=self.device)
        for i in range(len(tokens)):
            self.step.token.copy_(given[i : i + 1])
            self.run()

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def prefill(self, tokens: Sequence[int]) -> Decoded:
        raise Unavailable("this peer only decodes")

    def prepare(self, tokens: Sequence[int]) -> None:
        self._room(len(tokens) + ROOM)
        self._consume(tokens[:-1])
        self.step.token.fill_(tokens[-1])
        self.start, self.length = self.step.save(), len(tokens)
        self._wait()

    def decode(self, count: int) -> Decoded:
        if self.length + count > self.positions:
            raise Unavailable(f"prepared for {self.positions} positions, and {self.length + count} are needed")
        self.step.restore(self.start)
        self._wait()
        start = time.perf_counter()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self.device == "cuda" else None
        if events:
            events[0].record()
        for _ in range(count):
            self.run()
        if events:
            events[1].record()
        tokens = self.step.made[self.length : self.length + count].tolist()
        wall = time.perf_counter() - start
        return Decoded(tokens, device_s=events[0].elapsed_time(events[1]) / 1e3 if events else None, wall_s=wall)

    def logits(self, tokens: Sequence[int]) -> Any:
        self._room(len(tokens))
        rows = []
        for token in tokens:
            self.step.token.fill_(token)
            self.run()
            rows.append(self.step.logits.cpu().clone())
        return torch.stack(rows).numpy()

    def close(self) -> None:
        pass


if __name__ == "__main__":
    serve(TorchPeer())
