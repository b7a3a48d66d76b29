"""A checkpoint is loaded whole or not at all. The files have the true size, names and dtypes of Qwen3.5-0.8B."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import (
    SMALLEST_CONFIG,
    Entry,
    ends,
    header_of,
    nbytes_of,
    released_config,
    released_tensors,
    write_safetensors,
    write_sharded,
)

from onekernel.backend.cpu import memory_needed
from onekernel.backend.memory import available_memory
from onekernel.checkpoint.hub import demo_folder
from onekernel.checkpoint.shape import Shape
from onekernel.checkpoint.weights import canonical, expected_tensors, load_weights, weight_files
from onekernel.errors import CheckpointError, UnsupportedModel
from onekernel.reference.parameters import parameter_count

SHAPE = Shape.from_config(SMALLEST_CONFIG)
TENSORS = released_tensors()
NAME = "model.safetensors"


def spell(tensors: dict[str, Entry], spelling: str) -> dict[str, Entry]:
    """The same tensors under the names that a text-only checkpoint has."""
    return {name.replace("model.language_model.", spelling): entry for name, entry in tensors.items()}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    (folder / "config.json").write_text(json.dumps(SMALLEST_CONFIG), encoding="utf-8")
    write_safetensors(folder / NAME, TENSORS)
    return folder


def test_the_checkpoint_of_these_tests_has_the_published_size() -> None:
    """488 tensors and 1,746,882,752 bytes, as the index of the released model says."""
    assert len(TENSORS) == 488
    assert sum(nbytes_of(*entry) for entry in TENSORS.values()) == 1_746_882_752


def check_all_values(folder: Path, tensors: dict[str, Entry]) -> None:
    weights = load_weights(folder, SHAPE)
    assert set(weights) == set(expected_tensors(SHAPE))
    assert weights.has_mtp
    wanted = {canonical(name): (name, *entry) for name, entry in tensors.items() if "visual" not in name}
    assert set(weights) == set(wanted) - {"lm_head.weight"}
    assert weights.nbytes == 1_504_791_232 + 40_905_728  # text and MTP, as published
    for short, tensor in weights.items():
        name, dtype, shape = wanted[short]
        assert (tensor.dtype, tensor.shape) == (dtype, shape)
        first, last = ends(name, dtype, shape)
        flat = tensor.data.reshape(-1)
        np.testing.assert_array_equal(flat[: len(first)], first)
        np.testing.assert_array_equal(flat[len(flat) - len(last) :], last)


def test_one_file_loads(single: Path) -> None:
    check_all_values(single, TENSORS)


@pytest.mark.parametrize("shards", [1, 3])
def test_sharded_files_load(tmp_path: Path, shards: int) -> None:
    write_sharded(tmp_path, TENSORS, shards)
    assert [path.name for path in weight_files(tmp_path)] == [
        f"model.safetensors-{number:05}-of-{shards:05}.safetensors" for number in range(1, shards + 1)
    ]
    check_all_values(tmp_path, TENSORS)


@pytest.mark.parametrize("spelling", ["model.", ""])
def test_names_without_the_language_model_component_load(tmp_path: Path, spelling: str) -> None:
    tensors = {name: entry for name, entry in spell(TENSORS, spelling).items() if "visual" not in name}
    write_safetensors(tmp_path / NAME, tensors)
    check_all_values(tmp_path, tensors)


def test_a_tied_checkpoint_may_carry_a_copy_of_the_head(tmp_path: Path) -> None:
    tensors = {**TENSORS, "lm_head.weight": TENSORS["model.language_model.embed_tokens.weight"]}
    write_safetensors(tmp_path / NAME, tensors)
    check_all_values(tmp_path, tensors)


def test_a_checkpoint_without_its_mtp_head_loads(tmp_path: Path) -> None:
    write_safetensors(tmp_path / NAME, {name: entry for name, entry in TENSORS.items() if not name.startswith("mtp.")})
    weights = load_weights(tmp_path, SHAPE)
    assert not weights.has_mtp
    assert weights.nbytes == 1_504_791_232


def test_the_small_tensors_may_be_bf16_or_f32(tmp_path: Path) -> None:
    """Quantised re-exports and fine-tunes store A_log and the gated norm in BF16, or everything in F32."""
    small = ("A_log", "linear_attn.norm.weight", "dt_bias", "conv1d.weight")
    for dtype in ("BF16", "F32", "F16"):
        tensors = {n: (dtype, shape) if n.endswith(small) else (was, shape) for n, (was, shape) in TENSORS.items()}
        write_safetensors(tmp_path / NAME, tensors)
        assert load_weights(tmp_path, SHAPE)["layers.0.linear_attn.A_log"].dtype == dtype


def test_mapping_the_files_takes_no_memory(single: Path) -> None:
    tracemalloc.start()
    try:
        weights = load_weights(single, SHAPE)
        assert tracemalloc.get_traced_memory()[1] < 2**22  # 1.5 GB of weights
        assert weights["embed_tokens.weight"].data.shape == (248320, 1024)
    finally:
        tracemalloc.stop()


# Loads all of it on the CPU backend, in a process of its own whose memory says what was ever taken at once.
LOAD = """
import json, sys, tracemalloc
from pathlib import Path
from onekernel.backend.cpu import CpuBackend
from onekernel.checkpoint.shape import Shape

def anonymous():  # bytes of this process that are not pages of a file
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

folder = Path(sys.argv[1])
shape = Shape.load(folder)
before = anonymous()
tracemalloc.start()
backend = CpuBackend.load(folder, shape, 248077)
peak = tracemalloc.get_traced_memory()[1]
tracemalloc.stop()
loaded = anonymous() - before
state = backend.new_state()
logits = backend.logits(state, [1, 2, 3])
print(json.dumps({"peak": peak, "loaded": loaded, "finite": bool((abs(logits) < 1e9).all()), "rows": logits.shape}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_the_whole_model_loads_and_runs_without_a_second_copy(single: Path) -> None:
    available = available_memory()
    if available is not None and available < memory_needed(SHAPE) + 2**29:
        pytest.skip(f"needs {memory_needed(SHAPE) / 2**30:.1f} GiB of memory, {available / 2**30:.1f} are available")
    result = subprocess.run([sys.executable, "-c", LOAD, str(single)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    float32 = 4 * parameter_count(SHAPE, mtp=False)
    assert found["finite"]
    assert found["rows"] == [3, 248320]
    assert float32 <= found["peak"] < 1.03 * float32
    assert float32 <= found["loaded"] + 2**24 < 1.05 * float32


Change = Callable[[dict[str, Entry]], dict[str, Entry]]
DOWN = "model.language_model.layers.7.mlp.down_proj.weight"


def without(*names: str) -> Change:
    return lambda tensors: {name: entry for name, entry in tensors.items() if name not in names}


def with_(**entries: Entry) -> Change:
    return lambda tensors: {**tensors, **entries}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(DOWN), r"1 missing: layers\.7\.mlp\.down_proj\.weight \(1024, 3584\)$"),
        (with_(**{DOWN: ("BF16", (3584, 1024))}), r"1 of the wrong shape: layers\.7\.mlp\.down_proj\.weight is "
         r"\(3584, 1024\), config\.json asks for \(1024, 3584\)$"),
        (with_(**{"model.language_model.layers.24.mlp.up_proj.weight": ("BF16", (3584, 1024))}),
         r"1 unexpected: layers\.24\.mlp\.up_proj\.weight \(3584, 1024\)$"),
        (without("mtp.norm.weight"), r"1 missing: mtp\.norm\.weight \(1024,\)$"),
        (lambda tensors: with_(extra=("F32", (2,)))(without(DOWN, "mtp.fc.weight")(tensors)),
         r"2 missing: layers\.7\S+ \(1024, 3584\); mtp\.fc\.weight \(1024, 2048\)\. 1 unexpected: extra \(2,\)$"),
        (lambda tensors: {n: e for n, e in tensors.items() if ".layers.5." not in n},
         r"14 missing: layers\.5\.input_layernorm\.weight \(1024,\); .* \.\.\.$"),
        (lambda tensors: {n: e for n, e in tensors.items() if "visual" in n}, r"320 missing: embed_tokens\.weight"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("shards", [0, 2])
def test_wrong_tensors_are_listed(tmp_path: Path, change: Change, message: str, shards: int) -> None:
    if shards:
        write_sharded(tmp_path, change(TENSORS), shards)
    else:
        write_safetensors(tmp_path / NAME, change(TENSORS))
    with pytest.raises(CheckpointError, match=r"^the tensors in \S+ are not those of its config\.json: " + message):
        load_weights(tmp_path, SHAPE)


def test_the_wrong_config_is_noticed(single: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"missing: .* of the wrong shape: embed_tokens\.weight is \(248320, 1024\)"
    ):
        load_weights(single, Shape.from_config(released_config("4B")))
    untied = Shape.from_config({**SMALLEST_CONFIG, "tie_word_embeddings": False})
    with pytest.raises(CheckpointError, match=r"1 missing: lm_head\.weight \(248320, 1024\)"):
        load_weights(single, untied)


def damage(folder: Path, edit: Callable[[bytearray], None], beginning: int) -> None:
    """Edit the first bytes of the second shard."""
    path = folder / "model.safetensors-00002-of-00002.safetensors"
    with path.open("r+b") as file:
        content = bytearray(file.read(beginning))
        edit(content)
        file.seek(0)
        file.write(content)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda head: head.__setitem__(slice(8, 40), b"\x00" * 32), "has a header that is not JSON"),
        (
            lambda head: head.__setitem__(slice(0, 8), b"\xff" * 8),
            "says that its header has 18446744073709551615 bytes",
        ),
        (
            lambda head: head.__setitem__(slice(0, 8), (2**31).to_bytes(8, "little")),
            "says that its header has 2147483648",
        ),
    ],
)
def test_a_damaged_header_names_the_file(tmp_path: Path, edit: Callable[[bytearray], None], message: str) -> None:
    write_sharded(tmp_path, TENSORS, 2)
    damage(tmp_path, edit, 40)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors-00002-of-00002\.safetensors {message}"):
        load_weights(tmp_path, SHAPE)


def test_a_truncated_file_is_named_with_its_true_size(tmp_path: Path) -> None:
    write_safetensors(tmp_path / NAME, TENSORS)
    size = 8 + len(header_of(TENSORS)) + 1_746_882_752
    assert (tmp_path / NAME).stat().st_size == size
    with (tmp_path / NAME).open("r+b") as file:
        file.truncate(size - 1000)
    with pytest.raises(
        CheckpointError, match=f"is truncated: {size} bytes expected, {size - 1000} found; delete the file"
    ):
        load_weights(tmp_path, SHAPE)


def test_quantised_checkpoints_are_refused(tmp_path: Path) -> None:
    scale = DOWN.replace(".weight", ".weight_scale_inv")
    write_safetensors(tmp_path / NAME, {**TENSORS, scale: ("BF16", (8, 28))})
    with pytest.raises(UnsupportedModel, match=r"weight_scale_inv belongs to a quantised checkpoint"):
        load_weights(tmp_path, SHAPE)
    write_safetensors(tmp_path / NAME, {**TENSORS, DOWN: ("F8_E4M3", (1024, 3584))})
    with pytest.raises(UnsupportedModel, match=r"down_proj\.weight is stored as F8_E4M3"):
        load_weights(tmp_path, SHAPE)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path, TENSORS, 2)
    first, second = weight_files(tmp_path)
    second.unlink()
    second.hardlink_to(first)
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight stands in more than one file"):
        load_weights(tmp_path, SHAPE)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path, {name: TENSORS[name] for name in list(TENSORS)[-20:]}, 3)
    gone = weight_files(tmp_path)[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks {gone.name}, which its index names"):
        load_weights(tmp_path, SHAPE)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not a valid index"),
        ("[" * 100_000, "is not a valid index"),
        ("[]", "is not a valid index"),
        ('{"weight_map": 3}', "is not a valid index"),
        ('{"weight_map": {"a": [1]}}', "is not a valid index"),
        ('{"weight_map": {"a": "../../secret"}}', r"names files outside its folder \('../../secret'\)"),
        ('{"weight_map": {"a": 3}}', r"names files outside its folder \(3\)"),
    ],
)
def test_a_damaged_index_is_named(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"index\.json {message}"):
        weight_files(tmp_path)


def test_folders_without_weights_or_with_too_many_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no \*\.safetensors file"):
        weight_files(tmp_path)
    (tmp_path / "a.safetensors").touch()
    (tmp_path / "b.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"has 2 \*\.safetensors files but no model\.safetensors\.index\.json"):
        weight_files(tmp_path)


def test_the_demo_model_loads_with_its_mtp_head() -> None:
    weights = load_weights(demo_folder(), Shape.load(demo_folder()))
    assert weights.has_mtp
    assert {tensor.dtype for name, tensor in weights.items() if name.endswith("A_log")} == {"F32"}
    assert weights["embed_tokens.weight"].dtype == "BF16"
