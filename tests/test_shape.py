"""Every dimension comes from config.json, in each of its forms, and a wrong field is named."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import RELEASED_SIZES, SMALLEST_CONFIG, released_config
from transformers import Qwen3_5Config, Qwen3_5TextConfig

from onekernel.checkpoint.hub import demo_folder
from onekernel.checkpoint.shape import FULL, LINEAR, Shape
from onekernel.errors import CheckpointError, UnsupportedModel


def changed(**fields: Any) -> dict[str, Any]:
    """The released config with fields of its text_config replaced, or removed by ...."""
    config = copy.deepcopy(SMALLEST_CONFIG)
    text = {**config["text_config"], **fields}
    config["text_config"] = {name: value for name, value in text.items() if value is not ...}
    return config


@pytest.mark.parametrize("size", RELEASED_SIZES)
def test_the_released_sizes(size: str) -> None:
    hidden, intermediate, layers, heads, kv_heads, value_heads, tied = RELEASED_SIZES[size]
    shape = Shape.from_config(released_config(size))
    assert shape == Shape(
        hidden=hidden,
        intermediate=intermediate,
        layer_types=(LINEAR, LINEAR, LINEAR, FULL) * (layers // 4),
        vocab=248320,
        tied=tied,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=256,
        rotary_dim=64,
        rope_theta=1e7,
        key_heads=16,
        value_heads=value_heads,
        key_head_dim=128,
        value_head_dim=128,
        conv_kernel=4,
        norm_eps=1e-6,
        max_context=262144,
        mtp_layers=1,
        eos_token_ids=(248044,),
    )
    assert shape.value_heads_per_key_head == value_heads // 16
    assert (shape.layers, shape.full_layers, shape.linear_layers) == (layers, layers // 4, layers * 3 // 4)
    assert (shape.key_dim, shape.value_dim) == (2048, 128 * value_heads)
    assert shape.conv_dim == 4096 + 128 * value_heads
    assert (shape.query_dim, shape.kv_dim) == (256 * heads, 256 * kv_heads)


def test_a_text_only_config_says_the_same() -> None:
    assert Shape.from_config(SMALLEST_CONFIG["text_config"]) == Shape.from_config(SMALLEST_CONFIG)


@pytest.mark.parametrize("tied", [True, False])
def test_configs_that_transformers_writes(tmp_path: Path, tied: bool) -> None:
    """It leaves out what it does not know (MTP) and fills in what was left out."""
    text = {**SMALLEST_CONFIG["text_config"], "tie_word_embeddings": tied}
    for config in (Qwen3_5TextConfig(**text), Qwen3_5Config(text_config=text, tie_word_embeddings=tied)):
        config.save_pretrained(tmp_path)
        expected = Shape.from_config({**SMALLEST_CONFIG, "tie_word_embeddings": tied})
        assert Shape.load(tmp_path) == expected


def test_the_demo_model_has_a_shape_that_kernels_take() -> None:
    shape = Shape.load(demo_folder())
    assert (shape.head_dim, shape.key_head_dim, shape.value_head_dim, shape.rotary_dim) == (256, 128, 128, 64)
    assert shape.layer_types == (LINEAR, LINEAR, LINEAR, FULL) * (shape.layers // 4)
    assert shape.layers >= 8
    assert shape.mtp_layers == 1


def test_the_pattern_of_layers_follows_from_the_interval_if_it_is_not_spelled_out() -> None:
    shape = Shape.from_config(changed(layer_types=..., full_attention_interval=3, num_hidden_layers=7))
    assert shape.layer_types == (LINEAR, LINEAR, FULL, LINEAR, LINEAR, FULL, LINEAR)


def test_rope_fields_may_stand_outside_of_rope_parameters() -> None:
    assert Shape.from_config(changed(rope_parameters=..., rope_theta=5e5, partial_rotary_factor=0.5)).rotary_dim == 128
    assert Shape.from_config(changed(rope_parameters=..., rope_theta=5e5)).rotary_dim == 64


def test_end_tokens_may_be_one_or_several_or_in_the_wrapper() -> None:
    assert Shape.from_config(changed(eos_token_id=[7, 8])).eos_token_ids == (7, 8)
    config = changed(eos_token_id=...)
    assert Shape.from_config(config).eos_token_ids == ()
    assert Shape.from_config({**config, "eos_token_id": 9}).eos_token_ids == (9,)


@pytest.mark.parametrize(
    "field",
    [
        "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_attention_heads",
        "num_key_value_heads", "head_dim", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
        "linear_value_head_dim", "linear_conv_kernel_dim", "max_position_embeddings",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [..., 0, -3, 2.5, "many", None, True, [1]])
def test_a_dimension_that_is_missing_or_no_number_is_named(field: str, value: Any) -> None:
    with pytest.raises(
        CheckpointError, match=rf"config\.json: text_config\.{field} (is missing|= .* is not an integer)"
    ):
        Shape.from_config(changed(**{field: value}))
    text_only = changed(**{field: value})["text_config"]
    with pytest.raises(CheckpointError, match=rf"config\.json: {field} "):
        Shape.from_config(text_only)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_key_value_heads": 3}, r"num_attention_heads = 8 is not a multiple of num_key_value_heads = 3"),
        ({"linear_num_value_heads": 24}, r"linear_num_value_heads = 24 is not a multiple of linear_num_key_heads = 16"),
        ({"rms_norm_eps": 0}, r"rms_norm_eps = 0 is not a positive number"),
        ({"rms_norm_eps": float("nan")}, r"rms_norm_eps = nan is not a positive number"),
        ({"rms_norm_eps": ...}, r"rms_norm_eps is missing"),
        (
            {"layer_types": ["linear_attention", "sliding_attention"]},
            r"layer_types may hold only .*'sliding_attention'",
        ),
        ({"layer_types": ["linear_attention"]}, r"layer_types has 1 entries but num_hidden_layers = 24"),
        ({"rope_parameters": {"rope_theta": -1}}, r"rope_parameters\.rope_theta = -1 is not a positive number"),
        ({"rope_parameters": {}}, r"rope_parameters\.rope_theta is missing"),
        ({"rope_parameters": [1]}, r"rope_parameters = \[1\] is not an object"),
        (
            {"rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.3}},
            r"rope_parameters\.partial_rotary_factor = 0\.3 gives 76\.8 of head_dim = 256 rotary dims",
        ),
        ({"rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 2}}, r".* gives 512\.0 of head_dim = 256"),
        ({"eos_token_id": "<|im_end|>"}, r"eos_token_id = '<\|im_end\|>' is not a token id or a list of them"),
        ({"eos_token_id": [1, -1]}, r"eos_token_id = \[1, -1\] is not a token id"),
        ({"mtp_num_hidden_layers": -1}, r"mtp_num_hidden_layers = -1 is not an integer of at least 0"),
    ],
)
def test_impossible_values_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=r"^config\.json: text_config\." + message):
        Shape.from_config(changed(**fields))


@pytest.mark.parametrize("tied", [None, "yes", 1])
def test_a_head_that_is_neither_tied_nor_untied_is_named(tied: Any) -> None:
    with pytest.raises(CheckpointError, match=f"tie_word_embeddings = {tied!r} is not true or false"):
        Shape.from_config({**SMALLEST_CONFIG, "tie_word_embeddings": tied})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "qwen3_next"}, "model_type 'qwen3_next' is not supported"),
        ({"num_experts": 256}, "num_experts = 256: mixture of experts is not supported"),
        ({"hidden_act": "gelu"}, "text_config.hidden_act = 'gelu' is not supported .only silu is"),
        ({"linear_conv_kernel_dim": 3}, "linear_conv_kernel_dim = 3 is not supported .only 4 is"),
        ({"mtp_num_hidden_layers": 2}, "mtp_num_hidden_layers = 2 is not supported .only 0 and 1 are"),
        ({"attention_bias": True}, "attention_bias = True is not supported .only false is"),
        ({"mtp_use_dedicated_embeddings": True}, "mtp_use_dedicated_embeddings = True is not supported"),
        ({"attn_output_gate": False}, "attn_output_gate = False is not supported .only true is"),
        ({"rope_parameters": {"rope_theta": 1e7, "rope_type": "yarn"}}, "rope_type = 'yarn' is not supported"),
    ],
)
def test_another_architecture_is_told_what_runs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"{message}.*onekernel runs the dense Qwen3.5 family.*0.8B.*27B"):
        Shape.from_config(changed(**fields))


@pytest.mark.parametrize("config", [{"model_type": "llama"}, {}, {"model_type": ["qwen3_5"]}])
def test_any_other_config_is_told_what_runs(config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match=r"onekernel runs the dense Qwen3\.5 family"):
        Shape.from_config(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b"[1, 2]", "holds a list, not a JSON object"),
        (b"null", "holds a NoneType, not a JSON object"),
        (b'{"text_config": 3}', "text_config is a int, not an object"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=rf"config\.json.* {message}|config\.json: {message}"):
        Shape.load(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json: is this the folder of a model\?"):
        Shape.load(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        Shape.load(tmp_path)


def test_load_reads_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALLEST_CONFIG), encoding="utf-8")
    assert Shape.load(tmp_path) == Shape.from_config(SMALLEST_CONFIG)
