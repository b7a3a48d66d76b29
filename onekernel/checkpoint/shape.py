"""Shape: every dimension of a Qwen3.5 model, read from `config.json` once and validated.

Nothing else in onekernel looks into `config.json`. The kernels receive these numbers as compile-time constants.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onekernel.errors import CheckpointError, UnsupportedModel

SUPPORTED = (
    "onekernel runs the dense Qwen3.5 family (model_type qwen3_5 or qwen3_5_text: "
    "Qwen3.5-0.8B, 2B, 4B, 9B, 27B and Qwen3.6-27B)"
)
LINEAR, FULL = "linear_attention", "full_attention"


@dataclass(frozen=True)
class Shape:
    """All dimensions of one model. Sizes are element counts; a linear layer `y = W x` has `W[out, in]`."""

    hidden: int
    intermediate: int
    layer_types: tuple[str, ...]  # LINEAR or FULL, one a layer
    vocab: int  # rows of the embedding; the tokenizer may define fewer tokens, the rest is padding
    tied: bool  # the LM head is the embedding

    # Gated attention (FULL layers and the MTP layer)
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int  # the first dims of a head that RoPE rotates
    rope_theta: float

    # Gated delta net (LINEAR layers)
    key_heads: int
    value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int

    norm_eps: float
    max_context: int  # tokens
    mtp_layers: int  # 0 or 1
    eos_token_ids: tuple[int, ...]  # those that config.json names; the tokenizer may add more

    @property
    def layers(self) -> int:
        return len(self.layer_types)

    @property
    def linear_layers(self) -> int:
        return self.layer_types.count(LINEAR)

    @property
    def full_layers(self) -> int:
        return self.layer_types.count(FULL)

    @property
    def key_dim(self) -> int:
        return self.key_heads * self.key_head_dim

    @property
    def value_dim(self) -> int:
        return self.value_heads * self.value_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels that pass the causal convolution: q, k and v of the delta net."""
        return 2 * self.key_dim + self.value_dim

    @property
    def value_heads_per_key_head(self) -> int:
        return self.value_heads // self.key_heads

    @property
    def query_dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.kv_heads * self.head_dim

    def state_bytes(self, tokens: int) -> int:
        """Bytes of the state of one timeline that has consumed so many tokens, all in float32."""
        recurrent = self.value_heads * self.key_head_dim * self.value_head_dim
        linear = self.linear_layers * (recurrent + self.conv_dim * (self.conv_kernel - 1))
        return 4 * (linear + self.full_layers * 2 * self.kv_dim * tokens)

    @classmethod
    def load(cls, folder: Path) -> Shape:
        """Read `folder/config.json`.

        Raises:
            CheckpointError: the file is missing, not JSON, or a field is missing or has an impossible value.
            UnsupportedModel: another architecture.
        """
        path = folder / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{folder} has no config.json: is this the folder of a model?") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from None
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, endless numbers or nesting
            raise CheckpointError(f"{path} is not valid JSON ({error}); download the file again") from None
        if not isinstance(config, dict):
            raise CheckpointError(f"{path} holds a {type(config).__name__}, not a JSON object; download the file again")
        return cls.from_config(config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Shape:
        """Read a parsed `config.json`: a released multimodal wrapper (nested `text_config`) or a text-only one."""
        return _Fields(config).shape()


class _Fields:
    """Typed access to the fields of config.json; every complaint names the field."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        nested = config.get("text_config")
        if nested is not None and not isinstance(nested, Mapping):
            raise CheckpointError(f"config.json: text_config is a {type(nested).__name__}, not an object")
        self.outer = config
        self.text: Mapping[str, Any] = config if nested is None else nested
        self.prefix = "" if nested is None else "text_config."
        model_type = self.text.get("model_type", config.get("model_type"))
        if model_type not in ("qwen3_5", "qwen3_5_text"):
            raise UnsupportedModel(f"model_type {model_type!r} is not supported: {SUPPORTED}")
        if self.text.get("num_experts"):
            raise UnsupportedModel(
                f"num_experts = {self.text['num_experts']}: mixture of experts is not supported: {SUPPORTED}"
            )

    def shape(self) -> Shape:
        shape = Shape(
            hidden=self.integer("hidden_size"),
            intermediate=self.integer("intermediate_size"),
            layer_types=self.layer_types(),
            vocab=self.integer("vocab_size"),
            tied=self.tied(),
            heads=self.integer("num_attention_heads"),
            kv_heads=self.integer("num_key_value_heads"),
            head_dim=self.integer("head_dim"),
            rotary_dim=self.rotary_dim(),
            rope_theta=self.rope_theta(),
            key_heads=self.integer("linear_num_key_heads"),
            value_heads=self.integer("linear_num_value_heads"),
            key_head_dim=self.integer("linear_key_head_dim"),
            value_head_dim=self.integer("linear_value_head_dim"),
            conv_kernel=self.integer("linear_conv_kernel_dim"),
            norm_eps=self.number("rms_norm_eps"),
            max_context=self.integer("max_position_embeddings"),
            mtp_layers=self.integer("mtp_num_hidden_layers", default=0, least=0),
            eos_token_ids=self.eos_token_ids(),
        )
        self.multiple("num_attention_heads", shape.heads, "num_key_value_heads", shape.kv_heads)
        self.multiple("linear_num_value_heads", shape.value_heads, "linear_num_key_heads", shape.key_heads)
        self.supported("linear_conv_kernel_dim", shape.conv_kernel, shape.conv_kernel == 4, "only 4 is")
        self.supported("mtp_num_hidden_layers", shape.mtp_layers, shape.mtp_layers <= 1, "only 0 and 1 are")
        self.supported("hidden_act", act := self.text.get("hidden_act", "silu"), act == "silu", "only silu is")
        for name in ("attention_bias", "mtp_use_dedicated_embeddings"):
            self.supported(name, value := self.text.get(name, False), not value, "only false is")
        self.supported("attn_output_gate", gate := self.text.get("attn_output_gate", True), bool(gate), "only true is")
        return shape

    def fail(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(f"config.json: {self.prefix}{name} {problem}")

    def supported(self, name: str, value: object, ok: bool, what_is: str) -> None:
        if not ok:
            raise UnsupportedModel(
                f"config.json: {self.prefix}{name} = {value!r} is not supported ({what_is}): {SUPPORTED}"
            )

    def multiple(self, name: str, value: int, of: str, unit: int) -> None:
        if value % unit:
            raise self.fail(name, f"= {value} is not a multiple of {of} = {unit}")

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self.text.get(name, default)
        if value is None:
            raise self.fail(name, "is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.fail(name, f"= {value!r} is not an integer of at least {least}")
        return value

    def number(self, name: str, value: Any = None) -> float:
        value = self.text.get(name) if value is None else value
        if value is None:
            raise self.fail(name, "is missing")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.fail(name, f"= {value!r} is not a positive number")
        return float(value)

    def layer_types(self) -> tuple[str, ...]:
        layers = self.integer("num_hidden_layers")
        types = self.text.get("layer_types")
        if types is None:
            interval = self.integer("full_attention_interval", default=4)
            return tuple(FULL if (i + 1) % interval == 0 else LINEAR for i in range(layers))
        if not isinstance(types, list) or any(kind not in (LINEAR, FULL) for kind in types):
            raise self.fail("layer_types", f"may hold only {LINEAR!r} and {FULL!r}, found {types!r}")
        if len(types) != layers:
            raise self.fail("layer_types", f"has {len(types)} entries but num_hidden_layers = {layers}")
        return tuple(types)

    def tied(self) -> bool:
        value = self.outer.get("tie_word_embeddings", self.text.get("tie_word_embeddings"))
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: tie_word_embeddings = {value!r} is not true or false")
        return value

    def rope(self, name: str) -> Any:
        rope = self.text.get("rope_parameters") or {}
        if not isinstance(rope, Mapping):
            raise self.fail("rope_parameters", f"= {rope!r} is not an object")
        kind = rope.get("rope_type", "default")
        self.supported("rope_parameters.rope_type", kind, kind == "default", "only 'default' is")
        return rope.get(name, self.text.get(name))

    def rope_theta(self) -> float:
        return self.number("rope_parameters.rope_theta", self.rope("rope_theta"))

    def rotary_dim(self) -> int:
        name = "rope_parameters.partial_rotary_factor"
        factor = self.number(name, self.rope("partial_rotary_factor") or 0.25)
        head_dim = self.integer("head_dim")
        dim = head_dim * factor
        if dim != int(dim) or int(dim) % 2 or dim > head_dim:
            raise self.fail(
                name,
                f"= {factor} gives {dim} of head_dim = {head_dim} rotary dims; an even number up to head_dim is needed",
            )
        return int(dim)

    def eos_token_ids(self) -> tuple[int, ...]:
        value = self.text.get("eos_token_id", self.outer.get("eos_token_id"))
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.fail("eos_token_id", f"= {value!r} is not a token id or a list of them")
        return tuple(ids)
