"""Train the demo model: a small Qwen3.5-architecture model that completes Python.

    python tools/demo_tokenizer.py DATA     # tokenizer and token ids of the standard library
    python tools/demo_parts.py DATA         # chat turns, functions on their own, modules to know by heart
    python tools/train_demo.py --data DATA --out onekernel/demo --minutes 7

Needs one CUDA GPU and PyTorch (bf16). The model code below is written from the architecture's formulas and shares
nothing with onekernel, so that the shipped weights are also an independent test of it. Writes config.json and
model.safetensors in the released format (multimodal tensor names, bf16 but for A_log and the gated norm) and
training.json with the losses that stand in the model card.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

HIDDEN, INTERMEDIATE, LAYERS, VOCAB = 256, 512, 8, 3072
HEADS, KV_HEADS, HEAD_DIM, ROTARY_DIM, ROPE_THETA = 2, 1, 256, 64, 1e7
KEY_HEADS, VALUE_HEADS, STATE_DIM, CONV_KERNEL, CHUNK = 2, 2, 128, 4, 64
KEY_DIM, VALUE_DIM = KEY_HEADS * STATE_DIM, VALUE_HEADS * STATE_DIM
EPS, DROPOUT = 1e-6, 0.1
WINDOW, BATCH = 1024, 48  # tokens a sequence, sequences a step


def weight(*shape: int, std: float = 0.02) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * std)


class Linear(nn.Module):
    def __init__(self, rows: int, columns: int, std: float = 0.02) -> None:
        super().__init__()
        self.weight = weight(rows, columns, std=std)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Norm(nn.Module):
    """RMSNorm with a zero-centred weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS)
        return (y * (1 + self.weight)).to(x.dtype)


class UnitLowerInverse(torch.autograd.Function):
    """(I + A)^-1 for strictly lower triangular A [..., 64, 64]: substitution in 16 x 16 blocks, then two merges."""

    @staticmethod
    def forward(ctx, a: Tensor) -> Tensor:
        batch, size = a.shape[:-2], a.shape[-1]
        blocks = size // 16
        inverse = torch.zeros_like(a)
        diagonal = torch.stack([a[..., i * 16 : i * 16 + 16, i * 16 : i * 16 + 16] for i in range(blocks)], -3)
        solved = torch.eye(16, device=a.device, dtype=a.dtype).expand(*batch, blocks, 16, 16).clone()
        for row in range(1, 16):
            solved[..., row, :row] = -(diagonal[..., row : row + 1, :row] @ solved[..., :row, :row]).squeeze(-2)
        for i in range(blocks):
            inverse[..., i * 16 : i * 16 + 16, i * 16 : i * 16 + 16] = solved[..., i, :, :]
        width = 16
        while width < size:
            for start in range(0, size, 2 * width):
                upper, lower = slice(start, start + width), slice(start + width, start + 2 * width)
                inverse[..., lower, upper] = (
                    -(inverse[..., lower, lower] @ a[..., lower, upper]) @ inverse[..., upper, upper]
                )
            width *= 2
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        transposed = inverse.transpose(-1, -2)
        return -(transposed @ gradient @ transposed).tril(-1)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Chunked gated delta rule; q, k, v [B, H, T, 128], g, beta [B, H, T], float32; T a multiple of CHUNK."""
    batch, heads, length, _ = q.shape
    q, k, v = (x.view(batch, heads, -1, CHUNK, x.shape[-1]) for x in (q, k, v))
    g, beta = (x.view(batch, heads, -1, CHUNK) for x in (g, beta))
    total = g.cumsum(-1)
    decay = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
    scaled = k * beta[..., None]
    inverse = UnitLowerInverse.apply((scaled @ k.transpose(-1, -2) * decay).tril(-1))
    u = inverse @ (v * beta[..., None])
    w = inverse @ (scaled * total.exp()[..., None])
    inside = q @ k.transpose(-1, -2) * decay
    q = q * total.exp()[..., None]
    k = k * (total[..., -1:] - total).exp()[..., None]
    last = total[..., -1].exp()
    state = q.new_zeros(batch, heads, STATE_DIM, STATE_DIM)
    outputs = []
    for chunk in range(length // CHUNK):
        delta = u[:, :, chunk] - w[:, :, chunk] @ state
        outputs.append(q[:, :, chunk] @ state + inside[:, :, chunk] @ delta)
        state = state * last[:, :, chunk, None, None] + k[:, :, chunk].transpose(-1, -2) @ delta
    return torch.stack(outputs, 2).view(batch, heads, length, -1)


class LinearAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        channels = 2 * KEY_DIM + VALUE_DIM
        self.in_proj_qkv = Linear(channels, HIDDEN)
        self.in_proj_z = Linear(VALUE_DIM, HIDDEN)
        self.in_proj_b = Linear(VALUE_HEADS, HIDDEN)
        self.in_proj_a = Linear(VALUE_HEADS, HIDDEN)
        self.out_proj = Linear(HIDDEN, VALUE_DIM, std=0.02 / math.sqrt(2 * LAYERS))
        self.conv1d = nn.Module()
        self.conv1d.weight = weight(channels, 1, CONV_KERNEL, std=0.3)
        self.norm = nn.Module()
        self.norm.weight = nn.Parameter(torch.ones(STATE_DIM))
        self.A_log = nn.Parameter(torch.empty(VALUE_HEADS).uniform_(0.5, 8).log())
        step = torch.empty(VALUE_HEADS).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.in_proj_qkv(x).transpose(1, 2)
        qkv = F.silu(F.conv1d(F.pad(qkv, (CONV_KERNEL - 1, 0)), self.conv1d.weight.to(x.dtype), groups=qkv.shape[1]))
        q, k, v = qkv.float().split([KEY_DIM, KEY_DIM, VALUE_DIM], 1)
        q, k, v = (y.reshape(batch, -1, STATE_DIM, length).transpose(2, 3) for y in (q, k, v))
        q, k = (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + EPS) for y in (q, k))
        q, k = (y.repeat_interleave(VALUE_HEADS // KEY_HEADS, 1) for y in (q / math.sqrt(STATE_DIM), k))
        beta = self.in_proj_b(x).float().sigmoid().transpose(1, 2)
        g = (-self.A_log.exp() * F.softplus(self.in_proj_a(x).float() + self.dt_bias)).transpose(1, 2)
        with torch.autocast("cuda", enabled=False):
            y = delta_rule(q, k, v.contiguous(), g, beta).transpose(1, 2)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS) * self.norm.weight
        y = y * F.silu(self.in_proj_z(x).float().view(batch, length, VALUE_HEADS, STATE_DIM))
        return self.out_proj(y.reshape(batch, length, VALUE_DIM).to(x.dtype))


def rope(x: Tensor) -> Tensor:
    """Rotate dims (i, i + 32) of the first 64 of each head; x [B, H, T, 256]."""
    half = ROTARY_DIM // 2
    angle = torch.arange(x.shape[2], device=x.device)[:, None] * ROPE_THETA ** (
        -torch.arange(half, device=x.device) / half
    )
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b, rest = x[..., :half], x[..., half:ROTARY_DIM], x[..., ROTARY_DIM:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = Linear(HEADS * 2 * HEAD_DIM, HIDDEN)
        self.k_proj = Linear(KV_HEADS * HEAD_DIM, HIDDEN)
        self.v_proj = Linear(KV_HEADS * HEAD_DIM, HIDDEN)
        self.o_proj = Linear(HIDDEN, HEADS * HEAD_DIM, std=0.02 / math.sqrt(2 * LAYERS))
        self.q_norm, self.k_norm = Norm(HEAD_DIM), Norm(HEAD_DIM)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, gate = self.q_proj(x).view(batch, length, HEADS, 2 * HEAD_DIM).chunk(2, -1)
        k, v = (p(x).view(batch, length, KV_HEADS, HEAD_DIM).transpose(1, 2) for p in (self.k_proj, self.v_proj))
        q, k = rope(self.q_norm(q.transpose(1, 2))), rope(self.k_norm(k))
        k, v = (y.repeat_interleave(HEADS // KV_HEADS, 1) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=HEAD_DIM**-0.5).transpose(1, 2)
        return self.o_proj((y * gate.sigmoid()).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = Linear(INTERMEDIATE, HIDDEN), Linear(INTERMEDIATE, HIDDEN)
        self.down_proj = Linear(HIDDEN, INTERMEDIATE, std=0.02 / math.sqrt(2 * LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, full: bool) -> None:
        super().__init__()
        self.full = full
        if full:
            self.self_attn = Attention()
        else:
            self.linear_attn = LinearAttention()
        self.mlp = MLP()
        self.input_layernorm, self.post_attention_layernorm = Norm(HIDDEN), Norm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        mixer = self.self_attn if self.full else self.linear_attn
        x = x + F.dropout(mixer(self.input_layernorm(x)), DROPOUT, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), DROPOUT, self.training)


class Model(nn.Module):
    """Parameter names are the released ones without the prefix `model.language_model.`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Module()
        self.embed_tokens.weight = weight(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer(full=i % 4 == 3) for i in range(LAYERS))
        self.norm = Norm(HIDDEN)
        self.mtp = nn.Module()
        self.mtp.fc = Linear(HIDDEN, 2 * HIDDEN)
        self.mtp.pre_fc_norm_embedding, self.mtp.pre_fc_norm_hidden = Norm(HIDDEN), Norm(HIDDEN)
        self.mtp.layers = nn.ModuleList([Layer(full=True)])
        self.mtp.norm = Norm(HIDDEN)

    def embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.embed_tokens.weight).to(torch.bfloat16)

    def head(self, x: Tensor) -> Tensor:
        return F.linear(x, self.embed_tokens.weight.to(x.dtype))

    def hidden_states(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def mtp_hidden_states(self, hidden: Tensor, following: Tensor) -> Tensor:
        """From the state at p and token p+1, the state that predicts token p+2."""
        e = self.mtp.pre_fc_norm_embedding(self.embed(following))
        u = self.mtp.fc(torch.cat([e, self.mtp.pre_fc_norm_hidden(hidden)], -1))
        return self.mtp.norm(self.mtp.layers[0](u))

    def losses(self, window: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the next token and, through the MTP head, of the one after; window [B, WINDOW + 2]."""
        hidden = self.hidden_states(window[:, :-2])
        drafted = self.mtp_hidden_states(hidden, window[:, 1:-1])
        following, after = window[:, 1:-1].reshape(-1), window[:, 2:].reshape(-1)
        return (
            F.cross_entropy(self.head(hidden).flatten(0, 1).float(), following),
            F.cross_entropy(self.head(drafted).flatten(0, 1).float(), after),
        )


class Corpus:
    """Random windows of the parts of the corpus, in fixed shares of a batch.

    The modules to know by heart are seen far more often than the rest: backends are compared on the long greedy
    continuations that this gives, with wide argmax margins. Windows of the last part begin where a text begins, as a
    prompt does.
    """

    def __init__(self, data: Path, device: str) -> None:
        def load(name: str) -> Tensor:
            return torch.from_numpy(np.load(data / f"tokens_{name}.npy").astype(np.int64)).to(device)

        self.parts = [(load("lib"), 8), (load("test"), 12), (load("chat"), 5), (load("heart"), 7)]
        self.pieces = load("piece")
        starts = torch.from_numpy(np.load(data / "starts_piece.npy")).to(device)
        self.starts = starts[starts < len(self.pieces) - WINDOW - 2]
        self.piece_share = BATCH - sum(share for _, share in self.parts)
        self.heldout = load("heldout")
        self.span = torch.arange(WINDOW + 2, device=device)

    def batch(self) -> Tensor:
        rows = []
        for tokens, share in self.parts:
            start = torch.randint(0, len(tokens) - WINDOW - 2, (share, 1), device=tokens.device)
            rows.append(tokens[start + self.span])
        start = self.starts[torch.randint(0, len(self.starts), (self.piece_share, 1), device=self.starts.device)]
        rows.append(self.pieces[start + self.span])
        return torch.cat(rows)

    def heldout_batches(self, size: int = 16):
        starts = torch.arange(0, len(self.heldout) - WINDOW - 2, WINDOW, device=self.heldout.device)
        for group in starts.split(size):
            yield self.heldout[group[:, None] + self.span]


@torch.no_grad()
def heldout_loss(model: Model, corpus: Corpus) -> tuple[float, float]:
    model.eval()
    losses = [torch.stack(model.losses(batch)) for batch in corpus.heldout_batches()]
    model.train()
    return tuple(torch.stack(losses).mean(0).tolist())


@torch.no_grad()
def greedy(model: Model, prompts: list[list[int]], count: int, vocabulary: int) -> tuple[list[list[int]], list[float]]:
    """Greedy continuations by full recomputation, and each one's smallest margin between the best two logits."""
    model.eval()
    outputs = []
    margins = []
    for prompt in prompts:
        tokens, margin = list(prompt), math.inf
        for _ in range(count):
            padded = tokens + [0] * (-len(tokens) % CHUNK)  # causal: what follows does not matter
            hidden = model.hidden_states(torch.tensor([padded], device="cuda"))
            best = model.head(hidden[0, len(tokens) - 1]).float()[:vocabulary].topk(2)
            margin = min(margin, float(best.values[0] - best.values[1]))
            tokens.append(int(best.indices[0]))
        outputs.append(tokens[len(prompt) :])
        margins.append(margin)
    model.train()
    return outputs, margins


def train(corpus: Corpus, minutes: float, peak_rate: float) -> tuple[Model, dict[str, object]]:
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = Model().cuda()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    rate = torch.tensor(0.0, device="cuda")
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True, capturable=True)
    window = corpus.batch().clone()
    shown = torch.zeros(2, device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            following, after = model.losses(window)
        shown.copy_(torch.stack([following, after]).detach())
        (following + 0.3 * after).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    # One step is some thousands of small kernels: captured once as a graph, it is bound by the GPU and not by Python.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    history: list[tuple[int, float, float]] = []
    start, steps, warmup = time.monotonic(), 0, 200
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        schedule = min(1.0, (steps + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        rate.fill_(peak_rate * schedule)
        window.copy_(corpus.batch())
        graph.replay()
        steps += 1
        if steps % 500 == 0:
            following, after = shown.tolist()
            history.append((steps, following, after))
            print(f"step {steps} {100 * progress:.0f} %: loss {following:.3f}, MTP {after:.3f}", flush=True)
            if not math.isfinite(following):
                raise SystemExit("the loss is not finite")
    torch.cuda.synchronize()
    return model, {
        "steps": steps,
        "tokens": steps * BATCH * WINDOW,
        "seconds": time.monotonic() - start,
        "history": history,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }


def config() -> dict[str, object]:
    text = {
        "model_type": "qwen3_5_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": 0,  # replaced by the tokenizer's <|endoftext|>
        "full_attention_interval": 4,
        "layer_types": [("full" if i % 4 == 3 else "linear") + "_attention" for i in range(LAYERS)],
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE,
        "linear_conv_kernel_dim": CONV_KERNEL,
        "linear_key_head_dim": STATE_DIM,
        "linear_num_key_heads": KEY_HEADS,
        "linear_num_value_heads": VALUE_HEADS,
        "linear_value_head_dim": STATE_DIM,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 32768,
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": EPS,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": VOCAB,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "rope_type": "default",
            "rope_theta": ROPE_THETA,
            "partial_rotary_factor": ROTARY_DIM / HEAD_DIM,
        },
    }
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": text,
        "tie_word_embeddings": True,
    }


def export(model: Model, data: Path, out: Path) -> None:
    """Write the released format: bf16, but A_log and the gated norm in float32."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, parameter in model.state_dict().items():
        keep = name.endswith(("A_log", "linear_attn.norm.weight"))
        released = name if name.startswith("mtp.") else f"model.language_model.{name}"
        tensors[released] = parameter.to("cpu", torch.float32 if keep else torch.bfloat16).contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    document = config()
    added = {t["content"]: t["id"] for t in json.loads((data / "tokenizer.json").read_text())["added_tokens"]}
    document["text_config"]["eos_token_id"] = added["<|endoftext|>"]
    (out / "config.json").write_text(json.dumps(document, indent=2) + "\n")
    shutil.copy(data / "tokenizer.json", out / "tokenizer.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that demo_tokenizer.py filled")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--minutes", type=float, default=7.0, help="training time (default 7)")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate (default 3e-3)")
    arguments = parser.parse_args()
    corpus = Corpus(arguments.data, "cuda")
    model, report = train(corpus, arguments.minutes, arguments.rate)
    # Judge what is shipped: the weights as rounded to bf16.
    for name, parameter in model.named_parameters():
        if not name.endswith(("A_log", "linear_attn.norm.weight")):
            parameter.data = parameter.data.to(torch.bfloat16).float()
    export(model, arguments.data, arguments.out)
    with torch.autocast("cuda", torch.bfloat16):
        report["heldout_loss"], report["heldout_mtp_loss"] = heldout_loss(model, corpus)
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(arguments.data / "tokenizer.json"))
        texts = [
            '"""Heap queue algorithm',
            "def fibonacci(n):",
            "class Stack:",
            "def read_file(path):",
            "import json\n\ndef main():\n",
            "def test_",
            "<|im_start|>user\nWrite a Python function `add`: Add two numbers.<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ]
        outputs, margins = greedy(model, [tokenizer.encode(t).ids for t in texts], 200, tokenizer.get_vocab_size())
    report["samples"] = [t + tokenizer.decode(o) for t, o in zip(texts, outputs, strict=True)]
    report["smallest_margins"] = margins
    (arguments.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(*report["samples"], sep="\n" + "-" * 60 + "\n")
    print({k: v for k, v in report.items() if k not in ("samples", "history")})


if __name__ == "__main__":
    main()
