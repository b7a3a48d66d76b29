"""Every phase of the prefill kernel against the float32 reference, then whole prompts, then times. Prints; needs a GPU.

python tests/gpu/check_prefill.py phases|prompts|transformers|times [size] [lengths ...]
"""

from __future__ import annotations

import dataclasses
import sys
import time
import traceback
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from random_model import SIZES, random_weights, shortened

from onekernel.checkpoint.shape import FULL, Shape
from onekernel.checkpoint.weights import Weights
from onekernel.gpu import decoder as decoder_module
from onekernel.gpu import prefiller as module
from onekernel.gpu.compile import compile_cached
from onekernel.gpu.decoder import Decoder, State, recurrent_bytes
from onekernel.gpu.device import Gpu, find_gpu
from onekernel.gpu.driver import check
from onekernel.gpu.layout import Layout
from onekernel.gpu.prefill_layout import CHUNK, ITEM_BYTES, PrefillLayout
from onekernel.gpu.prefiller import Prefiller
from onekernel.gpu.tape import bf16_bits
from onekernel.reference import attention, delta_rule, linear_attention, mlp, model, norm
from onekernel.reference.parameters import LinearAttention, Parameters
from onekernel.reference.state import State as ReferenceState

PHASE_NAMES = {
    False: (
        "in_proj",
        "delta_chunks",
        "delta_scan",
        "gated_norm",
        "out_proj",
        "add_norm",
        "gate_up",
        "down",
        "add_norm",
    ),
    True: ("qkv", "rotate", "attend", "", "o_proj", "add_norm", "gate_up", "down", "add_norm"),
}


OVERRIDES: dict[str, int] = {}  # of fields of PrefillLayout


def plan_for(layout: Layout, gpu: Gpu) -> PrefillLayout:
    plan = PrefillLayout.plan(layout, gpu.sm_count, gpu.shared_memory)
    assert plan is not None
    return dataclasses.replace(plan, **OVERRIDES)


class NoKernel:
    """In place of the decode kernel, which is not needed here and slow to compile."""

    def __init__(self, *_: object) -> None: ...
    def unload(self) -> None: ...


def widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def error(ours: np.ndarray, theirs: np.ndarray) -> str:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        return f"shapes {ours.shape} {theirs.shape}"
    difference = np.abs(ours - theirs)
    bad = "" if np.isfinite(ours).all() else f" NOT FINITE {np.count_nonzero(~np.isfinite(ours))}"
    relative = np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-30)
    where = np.unravel_index(int(np.nanargmax(difference)), difference.shape) if difference.size else ()
    worst = f" worst {difference.max():.2e} at {tuple(int(i) for i in where)}"
    return f"{relative:.2e}{worst}{'   <<<<<<' if not relative < 2e-2 else ''}{bad}"


def make(shape: Shape, weights: Weights) -> Prefiller:
    gpu = find_gpu()
    layout = Layout.plan(shape, min(shape.vocab, 248077), gpu.sm_count, gpu.shared_memory)
    start = time.time()
    decoder = Decoder(gpu, layout, weights)
    print(f"{gpu.name}: weights on the GPU after {time.time() - start:.1f} s", flush=True)
    plan = plan_for(layout, gpu)
    print({k: v for k, v in vars(plan).items() if k != "decode"})
    return Prefiller(decoder, plan)


def upload(prefiller: Prefiller, reference: ReferenceState) -> State:
    decoder, shape = prefiller.decoder, prefiller.shape
    state = decoder.new_state()
    decoder.reserve(state, reference.position + 1)
    state.position = reference.position
    at = 0
    for linear in reference.linear.values():
        window = np.concatenate([np.zeros((shape.conv_dim, 1), np.float32), linear.conv_window], 1)
        for part in (window, linear.recurrent.swapaxes(1, 2)):
            state.buffer.write(np.ascontiguousarray(part, np.float32), at)
            at += part.size * 4
    for cache in reference.full.values():
        for part in (cache.keys, cache.values):
            padded = np.zeros((shape.kv_heads, state.capacity, shape.head_dim), np.float32)
            padded[:, : reference.position] = part[:, : reference.position]
            state.buffer.write(bf16_bits(padded), at)
            at += padded.size * 2
    return state


def compare_states(prefiller: Prefiller, state: State, reference: ReferenceState) -> dict[str, str]:
    shape, at, result = prefiller.shape, 0, {}
    for i, linear in reference.linear.items():
        window = state.buffer.read(np.float32, 4 * shape.conv_dim, at).reshape(-1, 4)
        at += window.nbytes
        count = shape.value_heads * 128 * 128
        recurrent = state.buffer.read(np.float32, count, at).reshape(shape.value_heads, 128, 128).swapaxes(1, 2)
        at += 4 * count
        result[f"{i} window"] = error(window[:, 1:], linear.conv_window)
        result[f"{i} recurrent"] = error(recurrent, linear.recurrent)
    for i, cache in reference.full.items():
        for name, part in (("keys", cache.keys), ("values", cache.values)):
            count = shape.kv_heads * state.capacity * shape.head_dim
            ours = widen(state.buffer.read(np.uint16, count, at)).reshape(shape.kv_heads, state.capacity, -1)
            at += 2 * count
            result[f"{i} {name}"] = error(ours[:, : reference.position], part[:, : reference.position])
    return result


def dump(prefiller: Prefiller, name: str, dtype: type, *dims: int) -> np.ndarray:
    data = prefiller.scratch[name].read(dtype, int(np.prod(dims))).reshape(dims)
    return widen(data) if dtype is np.uint16 else data.astype(np.float32)


def dump_input(prefiller: Prefiller, name: str, count: int, columns: int) -> np.ndarray:
    """[count, columns] of an array that stands in tiles (input_place in prefill/model.cuh)."""
    tile = prefiller.layout.token_tile
    tiles = -(-count // tile)
    data = prefiller.scratch[name].read(np.uint16, tiles * tile * columns).reshape(tiles, columns // 64, tile, 8, 8)
    rows, chunks = np.arange(tile)[:, None], np.arange(8)
    straight = data[:, :, rows, chunks ^ (rows & 7)]
    return widen(straight.transpose(0, 2, 1, 3, 4).reshape(tiles * tile, columns)[:count])


def run(
    prefiller: Prefiller, reference: ReferenceState, tokens: list[int], end: int, one_by_one: bool = False
) -> State:
    state = upload(prefiller, reference)
    prefiller._prepare(state, len(tokens))
    for first in range(end) if one_by_one else (0,):
        prefiller.launch(state, tokens, first, first + 1 if one_by_one else end)
        prefiller.wait()
    return state


def check_layer(
    prefiller: Prefiller, parameters: Parameters, before: ReferenceState, tokens: list[int], layer: int, x: np.ndarray
) -> np.ndarray:
    """Compare all phases of one layer; x is its input by the reference. Returns its output."""
    shape, count = prefiller.shape, len(tokens)
    weights, base = parameters.layers[layer], 1 + 9 * layer
    normed = norm.rms_norm(x, weights.input_layernorm, shape.norm_eps)

    def phase(k: int) -> State:
        return run(prefiller, before, tokens, base + k + 1)

    def say(k: int, what: str, ours: np.ndarray, theirs: np.ndarray) -> None:
        print(f"  layer {layer} phase {k} {what:12} {error(ours, theirs)}", flush=True)

    def partials(splits: int) -> np.ndarray:
        return dump(prefiller, "partials", np.float32, splits, count, shape.hidden).sum(0)

    mixer_splits = prefiller.layout.splits(count, max(shape.value_dim, shape.query_dim))
    mlp_splits = prefiller.layout.splits(count, shape.intermediate)
    mixer = weights.mixer
    if isinstance(mixer, LinearAttention):
        qkv, z, a, b = linear_attention.project(mixer, normed)
        phase(0)
        projected = dump(prefiller, "projected", np.uint16, count, shape.conv_dim + shape.value_dim)
        gates = dump(prefiller, "gates", np.float32, count, -(-2 * shape.value_heads // 16) * 16)[:, : 2 * shape.value_heads]
        say(0, "qkv", projected[:, : shape.conv_dim], qkv)
        say(0, "z", projected[:, shape.conv_dim :], z)
        say(0, "b a", gates, np.concatenate([b, a], 1))
        conv, _ = linear_attention.causal_conv(qkv, mixer.conv1d, before.linear[layer].conv_window)
        query, key, value = linear_attention.split_heads(conv, shape)
        decay, beta = linear_attention.gates(a, b, mixer.A_log, mixer.dt_bias)
        phase(1)
        expected = chunk_items(query * 128**0.5, key, value, decay, beta)
        chunks = -(-count // CHUNK)
        raw = (
            prefiller.scratch["items"]
            .read(np.uint8, chunks * shape.value_heads * ITEM_BYTES)
            .reshape(chunks, shape.value_heads, ITEM_BYTES)
        )
        at = 0
        for name, columns in (("-W", 128), ("q faded", 128), ("k faded", 128), ("scores", 64), ("U", 128)):
            nbytes = CHUNK * columns * 2
            part = (
                np.ascontiguousarray(raw[:, :, at : at + nbytes])
                .view(np.float16)
                .reshape(chunks, shape.value_heads, CHUNK, columns)
            )
            say(1, name, part, expected[name])
            at += nbytes
        say(1, "fades", dump(prefiller, "fades", np.float32, chunks, shape.value_heads), expected["fades"])
        rule = delta_rule.chunked_delta_rule
        mixed, recurrent = rule(query, key, value, decay, beta, before.linear[layer].recurrent)
        phase(2)
        output = (
            prefiller.scratch["output"].read(np.float16, count * shape.value_dim).reshape(count, shape.value_heads, 128)
        )
        say(2, "output", output, mixed)
        mixed = norm.gated_rms_norm(mixed, z.reshape(mixed.shape), mixer.norm, shape.norm_eps).reshape(count, -1)
        phase(3)
        say(3, "mixed", dump_input(prefiller, "mixed", count, shape.value_dim), mixed)
        out = mixed @ mixer.out_proj.T
    else:
        query, gate, key, value = attention.project(mixer, shape, normed)
        phase(0)
        projected = dump(prefiller, "projected", np.uint16, count, 2 * shape.query_dim + 2 * shape.kv_dim)
        together = projected[:, : 2 * shape.query_dim].reshape(count, shape.heads, 2, 256)
        say(0, "query", together[:, :, 0], query)
        say(0, "gate", together[:, :, 1], gate)
        say(0, "k v", projected[:, 2 * shape.query_dim :], np.concatenate([key, value], 1).reshape(count, -1))
        query = attention.rope(norm.rms_norm(query, mixer.q_norm, shape.norm_eps), before.position, shape)
        key = attention.rope(norm.rms_norm(key, mixer.k_norm, shape.norm_eps), before.position, shape)
        keys, values = before.copy().full[layer].extend(before.position, key, value)
        phase(1)
        together = dump(prefiller, "projected", np.uint16, count, 2 * shape.query_dim + 2 * shape.kv_dim)
        say(1, "query", together[:, : 2 * shape.query_dim].reshape(count, shape.heads, 2, 256)[:, :, 0], query)
        mixed = (attention.causal_attention(query, keys, values) * norm.sigmoid(gate)).reshape(count, -1)
        phase(2)
        say(2, "mixed", dump_input(prefiller, "mixed", count, shape.query_dim), mixed)
        out = mixed @ mixer.o_proj.T
    phase(4)
    say(4, "out", partials(mixer_splits), out)
    x = x + out
    normed = norm.rms_norm(x, weights.post_attention_layernorm, shape.norm_eps)
    phase(5)
    say(5, "residual", dump(prefiller, "residual", np.float32, count, shape.hidden), x)
    say(5, "input", dump_input(prefiller, "input", count, shape.hidden), normed)
    activated = norm.silu(normed @ weights.mlp.gate_proj.T) * (normed @ weights.mlp.up_proj.T)
    phase(6)
    say(6, "activated", dump_input(prefiller, "activated", count, shape.intermediate), activated)
    phase(7)
    out = activated @ weights.mlp.down_proj.T
    say(7, "down", partials(mlp_splits), out)
    phase(8)
    say(8, "residual", dump(prefiller, "residual", np.float32, count, shape.hidden), x + out)
    return x + out


def chunk_items(query, key, value, decay, beta) -> dict[str, np.ndarray]:  # type: ignore[no-untyped-def]
    """The matrices that delta_chunks leaves, [chunks, heads, ...]."""
    query, key, value, decay, beta = (delta_rule._in_chunks(x) for x in (query, key, value, decay, beta))
    decay, beta = decay[..., None], beta[..., None]
    total = np.cumsum(decay, axis=2)
    lower = np.tri(CHUNK, dtype=bool)
    fade = np.exp(np.where(lower, total - total.swapaxes(2, 3), -np.inf))
    correlation = beta * np.matmul(key, key.swapaxes(2, 3)) * fade
    correlation[..., ~np.tri(CHUNK, k=-1, dtype=bool)] = 0
    inverse = np.linalg.inv((correlation + np.eye(CHUNK)).astype(np.float64))
    items = {
        "-W": -inverse @ (beta * np.exp(total) * key),
        "q faded": query * np.exp(total),
        "k faded": key * np.exp(total[:, :, -1:] - total),
        "scores": np.matmul(query, key.swapaxes(2, 3)) * fade,
        "U": inverse @ (beta * value),
        "fades": np.exp(total[:, :, -1, 0]),
    }
    return {name: np.swapaxes(x, 0, 1) for name, x in items.items()}


def advance(parameters: Parameters, state: ReferenceState, tokens: list[int]) -> np.ndarray:
    return np.concatenate(
        [model.final_hidden(parameters, state, tokens[i : i + 512]) for i in range(0, len(tokens), 512)]
    )


def phases(shape: Shape, weights: Weights, lengths: list[int]) -> None:
    prefiller, parameters = make(shape, weights), Parameters.load(weights, shape, mtp=False)
    random = np.random.default_rng(1)
    for prefix, count in ((0, lengths[0]), (61, 75)):
        print(f"== phases of {count} tokens after {prefix}")
        before = ReferenceState.empty(shape)
        if prefix:
            model.final_hidden(parameters, before, random.integers(0, shape.vocab, prefix).tolist())
        tokens = random.integers(0, shape.vocab, count).tolist()
        x = model.embed(parameters, tokens)
        run(prefiller, before, tokens, 1)
        print("  embed", error(dump(prefiller, "residual", np.float32, count, shape.hidden), x))
        print(
            "  input",
            error(
                dump_input(prefiller, "input", count, shape.hidden),
                norm.rms_norm(x, parameters.layers[0].input_layernorm, shape.norm_eps),
            ),
        )
        for layer in (0, 3):
            if layer == 3:
                for i in (1, 2):  # the layers between, by the reference
                    x = reference_layer(parameters, before, i, x)
            x = check_layer(prefiller, parameters, before, tokens, layer, x)
    prefiller.decoder.close()


def reference_layer(parameters: Parameters, before: ReferenceState, layer: int, x: np.ndarray) -> np.ndarray:
    weights, shape = parameters.layers[layer], parameters.shape
    normed = norm.rms_norm(x, weights.input_layernorm, shape.norm_eps)
    assert isinstance(weights.mixer, LinearAttention)
    x = x + linear_attention.linear_attention(weights.mixer, shape, before.linear[layer], normed)[0]
    return x + mlp.mlp(weights.mlp, norm.rms_norm(x, weights.post_attention_layernorm, shape.norm_eps))


def prompts(shape: Shape, weights: Weights, lengths: list[int]) -> None:
    prefiller, parameters = make(shape, weights), Parameters.load(weights, shape, mtp=False)
    random = np.random.default_rng(2)
    for count in lengths:
        tokens = random.integers(0, shape.vocab, count).tolist()
        reference = ReferenceState.empty(shape)
        hidden = advance(parameters, reference, tokens)
        for cuts in ((count,), (count // 3, count - count // 3), (count - 1, 1)) if count > 2 else ((count,),):
            state, start = prefiller.decoder.new_state(), 0
            for cut in cuts:
                prefiller.prefill(state, tokens[start : start + cut])
                start += cut
            last = (cuts[-1] - 1) % 2048 + 1
            ours = dump_input(prefiller, "input", last, shape.hidden)
            print(
                f"== {count} tokens in {cuts}: last hidden {error(ours[-1], hidden[-1])}; all {error(ours, hidden[-last:])}"
            )
            worst: dict[str, float] = {}
            for name, text in compare_states(prefiller, state, reference).items():
                kind, value = name.split()[1], float(text.split()[0])
                worst[kind] = max(worst.get(kind, 0), value if value == value else np.inf)
            print("     worst of all layers:", {k: f"{v:.2e}" for k, v in worst.items()}, flush=True)
        bits = prefiller.decoder.new_state(), prefiller.decoder.new_state()
        for state in bits:
            prefiller.prefill(state, tokens)
        same = [s.buffer.read(np.uint32, recurrent_bytes(shape) // 4) for s in bits]
        print("     same bits twice:", bool((same[0] == same[1]).all()), flush=True)
    state = prefiller.decoder.new_state()
    tokens = random.integers(0, shape.vocab, 300).tolist()
    ours = np.concatenate(list(prefiller.logits(state, tokens)))
    print(
        "== logits of 300 positions",
        error(ours, model.forward(parameters, ReferenceState.empty(shape), tokens, all_logits=True)),
    )
    prefiller.decoder.close()


def transformers(shape: Shape, weights: Weights, lengths: list[int]) -> None:
    """How far transformers' own bf16 forward pass is from the float32 reference, on the same weights."""
    import torch
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    config = Qwen3_5TextConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        layer_types=list(shape.layer_types), num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=256,
        linear_num_key_heads=shape.key_heads, linear_num_value_heads=shape.value_heads, max_position_embeddings=8192,
        tie_word_embeddings=shape.tied,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10]},
        attn_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        theirs = Qwen3_5ForCausalLM(config)
    tensors = {
        f"model.{name}" if not name.startswith("lm_head") else name: torch.from_numpy(weights.float32(name))
        for name in weights
    }
    if shape.tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    theirs = theirs.to_empty(device="cuda")
    print("load:", theirs.load_state_dict(tensors, strict=False))
    theirs.model.rotary_emb.__init__(config, device="cuda")
    theirs = theirs.to(torch.bfloat16).eval()
    theirs.model.rotary_emb.__init__(config, device="cuda")
    parameters = Parameters.load(weights, shape, mtp=False)
    random = np.random.default_rng(2)
    for count in lengths:
        tokens = random.integers(0, shape.vocab, count).tolist()
        reference = ReferenceState.empty(shape)
        hidden = advance(parameters, reference, tokens)
        with torch.no_grad():
            out = theirs.model(torch.tensor([tokens], device="cuda"), use_cache=True)
        ours = out.last_hidden_state[0].float().cpu().numpy()
        print(
            f"== transformers bf16, {count} tokens: last hidden {error(ours[-1], hidden[-1])}; all {error(ours, hidden)}"
        )
        for i, kind in enumerate(shape.layer_types):
            layer = out.past_key_values.layers[i]
            if kind == FULL:
                print("    ", i, "keys", error(layer.keys[0].float().cpu().numpy(), reference.full[i].keys[:, :count]),
                      "values", error(layer.values[0].float().cpu().numpy(), reference.full[i].values[:, :count]))  # fmt: skip
            else:
                print(
                    "    ",
                    i,
                    "recurrent",
                    error(layer.recurrent_states[0].float().cpu().numpy(), reference.linear[i].recurrent),
                    flush=True,
                )


def variants(shape: Shape, weights: Weights, lengths: list[int]) -> None:
    """Times of other layouts than the planned one, on the same weights."""
    first = make(shape, weights)
    for change in ({}, {"scan_columns": 32}, {"scan_columns": 64}, {"token_tile": 256}):
        print("######", change)
        layout = dataclasses.replace(first.layout, **change)
        time_all(Prefiller(first.decoder, layout), lengths)


def times(shape: Shape, weights: Weights, lengths: list[int]) -> None:
    prefiller = make(shape, weights)
    time_all(prefiller, lengths)
    prefiller.decoder.close()


def time_all(prefiller: Prefiller, lengths: list[int]) -> None:
    from cuda.bindings import driver

    shape = prefiller.shape
    random = np.random.default_rng(3)
    events = [check(driver.cuEventCreate(0)) for _ in range(2)]
    state = prefiller.decoder.new_state()
    for count, position in [(n, 0) for n in lengths] + [(16, 8192)]:
        tokens = random.integers(0, shape.vocab, count).tolist()
        state.position = position
        prefiller._prepare(state, count)
        walls, devices = [], []
        for _ in range(8):
            state.position = position
            start = time.perf_counter()
            prefiller.prefill(state, tokens)
            walls.append(time.perf_counter() - start)
        part = tokens[:2048]
        for _ in range(8):
            state.position = position
            check(driver.cuEventRecord(events[0], prefiller.decoder.stream))
            prefiller.launch(state, part, 0, prefiller.layout.phases, timed=True)
            check(driver.cuEventRecord(events[1], prefiller.decoder.stream))
            prefiller.wait()
            devices.append(check(driver.cuEventElapsedTime(*events)))
        wall, device = sorted(walls)[4], sorted(devices)[4]
        print(
            f"== {count} tokens after {position}: wall {wall * 1e3:.3f} ms = {count / wall:,.0f} tok/s; one launch of {len(part)}: {device:.3f} ms = {len(part) / device * 1e3:,.0f} tok/s (all {[round(d, 3) for d in devices]})"
        )
        ends = prefiller.times.read(np.uint64, prefiller.layout.phases).astype(np.int64)
        kinds: dict[str, list[float]] = {}
        for layer, kind in enumerate(shape.layer_types):
            previous = ends[9 * layer]
            for k, name in enumerate(PHASE_NAMES[kind == FULL]):
                if name:
                    now = ends[1 + 9 * layer + k]
                    kinds.setdefault(f"{name}{'(out)' if name == 'add_norm' and k == 5 else ''}", []).append(
                        (now - previous) / 1e3
                    )
                    previous = now
        for name, values in kinds.items():
            print(f"   {name:14} {np.median(values):8.2f} us x {len(values)} = {sum(values):9.1f} us")
    print("scratch bytes", {k: f"{v.nbytes:,}" for k, v in prefiller.scratch.items()}, flush=True)


def allow_plain_launches() -> None:
    from cuda.bindings import driver

    cooperative = driver.cuLaunchCooperativeKernel

    def launch(*arguments: object) -> tuple[object, ...]:
        result = cooperative(*arguments)
        if result[0] != driver.CUresult.CUDA_SUCCESS:
            print("COOPERATIVE LAUNCH REFUSED", result, flush=True)
            result = driver.cuLaunchKernel(*arguments, 0)
        return result

    driver.cuLaunchCooperativeKernel = launch


def main() -> None:
    allow_plain_launches()
    what, *rest = sys.argv[1:]
    for word, old, new in (("no-wgmma", "__CUDA_ARCH_FEAT_SM90_ALL", "NEVER"), ("no-prefetch", "24 << 20", "0")):
        if word in rest:
            rest.remove(word)
            original = module.prefill_source
            module.prefill_source = lambda layout, of=original, a=old, b=new: of(layout).replace(a, b)
    for word in [word for word in rest if "=" in word]:  # such as token_tile=128
        rest.remove(word)
        OVERRIDES[word.split("=")[0]] = int(word.split("=")[1])
    size = rest.pop(0) if rest and not rest[0].isdigit() else "0.8b"
    lengths = [int(x) for x in rest]
    decoder_module.DecodeKernel = NoKernel
    if size == "demo":
        shape = dataclasses.replace(Shape.load(Path(__file__).parents[2] / "onekernel" / "demo"), mtp_layers=0)
    else:
        shape = SIZES[size] if what in ("times", "variants", "compile") else shortened(size)
    print(f"#### {what} {size} {lengths}", flush=True)
    start = time.time()
    try:
        if what == "compile":
            gpu = find_gpu()
            layout = Layout.plan(shape, min(shape.vocab, 248077), gpu.sm_count, gpu.shared_memory)
            plan = plan_for(layout, gpu)
            compile_cached(module.prefill_source(plan), gpu.arch, "prefill")
            return
        {"phases": phases, "prompts": prompts, "transformers": transformers, "times": times, "variants": variants}[what](
            shape, random_weights(shape), lengths
        )
    except Exception:  # a script for people: show the failure, and let the next part run
        traceback.print_exc(file=sys.stdout)
    print(f"#### {what} took {time.time() - start:.1f} s", flush=True)


main()
