"""What the host and the decode kernel must agree on: compile-time constants and the kernel's argument struct.

Declared once here; the C++ text is generated from it (`DecodeArguments.source`, `Layout.constants`).
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

from onekernel.checkpoint.shape import FULL, Shape
from onekernel.errors import NotEnoughMemory, UnsupportedModel
from onekernel.gpu import sampling
from onekernel.gpu.sampling import SamplingArguments
from onekernel.gpu.structure import ctypes_fields, source_of

CONSUMER_WARPS = 8
ROW_GROUP = 8  # rows of a weight matrix that are multiplied together
TILE_COLUMNS = 32
TILE_BYTES = ROW_GROUP * TILE_COLUMNS * 2
TILES_PER_STAGE = 4  # of each warp
STAGE_BYTES = CONSUMER_WARPS * TILES_PER_STAGE * TILE_BYTES
BATCH_GROUPS = (16, 8)  # row groups summed behind one barrier; fewer where shared memory is scarce
LEAST_STAGES, COMFORTABLE_STAGES, MOST_STAGES = 2, 4, 12
MOST_TILES_IN_REGISTERS = 8  # of a warp's slice of the input vector; longer ones are read from shared memory
OUTPUT_RING = 1024  # tokens that one launch may make
FAILURE_SHIFT = 28  # of a word of the output ring: above the token, why none could be chosen (head.cuh)
MOST_STOP_TOKENS = 8
MOST_SPLITS = 64  # parts of the context that attention is split into
SHARED_RESERVED = 1024  # bytes of a block's shared memory that the system takes, and alignment


@dataclass(frozen=True)
class Layout:
    """One model on one chip: how many blocks run, and how much of the weights waits in shared memory."""

    shape: Shape
    vocabulary_size: int  # tokens that the tokenizer defines; rows from there on are never chosen
    blocks: int
    shared_memory: int  # bytes that one block may use
    ring_stages: int
    batch_groups: int = BATCH_GROUPS[0]
    layer_stages_in_flight: int = 2
    head_stages_in_flight: int = 4
    poll_after: int = 800  # clocks between a block's part of an exchange and its first look for the others'
    poll_after_publishing: int = 500  # the same for the warps that published it
    producer_doze: int = 0  # nanoseconds between two looks for a free stage
    timeline: bool = False  # the kernel records when each block passes each phase
    dead_block: int = -1  # for tests of the watchdog: this block falls silent at layer `dead_layer`
    dead_layer: int = 0

    @classmethod
    def plan(cls, shape: Shape, vocabulary_size: int, sm_count: int, shared_memory: int) -> Layout:
        """One block an SM, as far as the rows divide well.

        Raises:
            UnsupportedModel: a dimension that the kernel's tiles do not divide.
            NotEnoughMemory: the chip's shared memory is too small for this shape.
        """
        step = CONSUMER_WARPS * TILE_COLUMNS
        for name in ("hidden", "intermediate", "query_dim", "value_dim"):
            if (size := getattr(shape, name)) % step:
                raise UnsupportedModel(f"the GPU kernel needs {name} = {size} to be a multiple of {step}")
        if (shape.head_dim, shape.key_head_dim, shape.value_head_dim) != (256, 128, 128):
            raise UnsupportedModel("the GPU kernel is written for head_dim 256 and linear head dims of 128")
        if shape.rotary_dim != 64 or shape.conv_kernel != 4 or shape.heads // shape.kv_heads > CONSUMER_WARPS - 2:
            raise UnsupportedModel("the GPU kernel is written for 64 rotary dims, a convolution of 4, and GQA up to 6")
        blocks, usable = _blocks(shape, sm_count), shared_memory - SHARED_RESERVED
        for batch_groups in BATCH_GROUPS:
            scratch = _scratch_bytes(shape, blocks, batch_groups)
            stages = min(MOST_STAGES, (usable - scratch) // STAGE_BYTES)
            if stages >= COMFORTABLE_STAGES:
                break
        if stages < LEAST_STAGES:
            raise NotEnoughMemory(
                f"the decode kernel needs {scratch + LEAST_STAGES * STAGE_BYTES} bytes of shared memory a block for "
                f"this model, and the chip has {usable}: choose a smaller model, or the backend cpu"
            )
        return cls(shape, vocabulary_size, blocks, shared_memory, stages, batch_groups)

    @property
    def splits(self) -> int:
        return min(MOST_SPLITS, self.blocks // self.shape.kv_heads)

    def constants(self) -> dict[str, int | float | bool | tuple[float, ...]]:
        """Names and values as the kernel sources use them."""
        s = self.shape
        return {
            "HIDDEN": s.hidden,
            "INTERMEDIATE": s.intermediate,
            "LAYERS": s.layers,
            "LINEAR_LAYERS": s.linear_layers,
            "FULL_LAYER_MASK": sum(1 << i for i, kind in enumerate(s.layer_types) if kind == FULL),
            "VOCAB": s.vocab,
            "VOCABULARY_SIZE": self.vocabulary_size,
            "TIED": s.tied,
            "NORM_EPS": s.norm_eps,
            "HEADS": s.heads,
            "KV_HEADS": s.kv_heads,
            "HEAD_DIM": s.head_dim,
            "ROTARY_DIM": s.rotary_dim,
            "QUERY_DIM": s.query_dim,
            "KV_DIM": s.kv_dim,
            "KEY_HEADS": s.key_heads,
            "VALUE_HEADS": s.value_heads,
            "KEY_HEAD_DIM": s.key_head_dim,
            "VALUE_HEAD_DIM": s.value_head_dim,
            "KEY_DIM": s.key_dim,
            "VALUE_DIM": s.value_dim,
            "CONV_DIM": s.conv_dim,
            "CONSUMER_WARPS": CONSUMER_WARPS,
            "TILES_PER_STAGE": TILES_PER_STAGE,
            "BATCH_GROUPS": self.batch_groups,
            "MOST_TILES_IN_REGISTERS": MOST_TILES_IN_REGISTERS,
            "RING_STAGES": self.ring_stages,
            "SHARED_MEMORY": self.shared_memory,
            "COPIES_IN_FLIGHT": min(3, self.ring_stages - 2),  # see ring.cuh
            "LAYER_STAGES_IN_FLIGHT": min(self.layer_stages_in_flight, self.ring_stages),
            "HEAD_STAGES_IN_FLIGHT": min(self.head_stages_in_flight, self.ring_stages),
            "POLL_AFTER": self.poll_after,
            "POLL_AFTER_PUBLISHING": self.poll_after_publishing,
            "PRODUCER_DOZE": self.producer_doze,
            "ACTIVATION_COLUMNS": activation_columns(s),
            "RESIDUAL_ROWS": residual_rows(s, self.blocks),
            "BLOCKS": self.blocks,
            "MAX_SPLITS": self.splits,
            "OUTPUT_RING": OUTPUT_RING,
            "FAILURE_SHIFT": FAILURE_SHIFT,
            **sampling.CONSTANTS,
            "TIMELINE": self.timeline,
            "MARKS_OF_A_BLOCK": MARKS_OF_A_BLOCK,
            "DEAD_BLOCK": self.dead_block,
            "DEAD_LAYER": self.dead_layer,
        }

    @property
    def channel_words(self) -> int:
        """32-bit words of one buffer of the vectors that blocks exchange (`Channels` in state.cuh)."""
        s = self.shape
        twice = 2 * s.hidden + max(s.value_dim * 3 // 2, s.query_dim) + s.intermediate
        once = max(projected_linear(s), projected_full(s)), s.heads * self.splits * (s.head_dim + 4)
        return 2 * twice + sum(-(-words // 8) * 8 for words in once)


def projected_linear(shape: Shape) -> int:
    """Rows of a delta-net layer's input projections: q, k, v, z, b, a."""
    return shape.conv_dim + shape.value_dim + 2 * shape.value_heads


def projected_full(shape: Shape) -> int:
    """Rows of an attention layer's input projections: query and gate, k, v."""
    return 2 * shape.query_dim + 2 * shape.kv_dim


def activation_columns(shape: Shape) -> int:
    return max(shape.hidden, shape.intermediate, shape.value_dim, shape.query_dim)


def residual_rows(shape: Shape, blocks: int) -> int:
    return ROW_GROUP * -(-shape.hidden // ROW_GROUP // blocks)


def first_group(groups: int, block: int, blocks: int) -> int:
    """The first row group of a matrix that `block` owns."""
    return groups * block // blocks


def _scratch_bytes(shape: Shape, blocks: int, batch_groups: int) -> int:
    """Shared memory of a block beside the weight ring, rounded up (`Shared` in decode.cu, which checks the sum)."""
    group = shape.heads // shape.kv_heads
    attention = group * shape.head_dim * 4 * (1 + CONSUMER_WARPS // 2) + 8 * CONSUMER_WARPS * group + 1024
    sums = 2 * CONSUMER_WARPS * (batch_groups * ROW_GROUP + 1) * 4 + 4 * 2 * shape.key_head_dim
    counters = 8 * MOST_STAGES + 4 * (CONSUMER_WARPS + 2)
    return max(2 * activation_columns(shape), attention) + sums + counters + 4 * residual_rows(shape, blocks) + 512


def _blocks(shape: Shape, sm_count: int) -> int:
    """As many blocks as SMs, or somewhat fewer where that makes no block's share of the rows larger."""
    rows = [  # (columns of such matrices in all layers, rows of each)
        (shape.linear_layers * shape.hidden, projected_linear(shape)),
        (shape.linear_layers * shape.value_dim, shape.hidden),
        (shape.full_layers * shape.hidden, projected_full(shape)),
        (shape.full_layers * shape.query_dim, shape.hidden),
        (shape.layers * shape.hidden, 2 * shape.intermediate),
        (shape.layers * shape.intermediate, shape.hidden),
        (shape.hidden, shape.vocab),
    ]

    def longest(blocks: int) -> int:
        return sum(weight * math.ceil(math.ceil(count / ROW_GROUP) / blocks) for weight, count in rows)

    # The block that owns the first rows of the residual stream needs at least one group.
    most = min(sm_count, shape.hidden // ROW_GROUP)
    return min(range(most, shape.kv_heads - 1, -1), key=longest)


# Where a thread can be; the report of a wait that ran out names it.
PHASES = {
    "NONE": "",
    "RING_EMPTY": "a free place for weights",
    "INPUT": "the input of a layer",
    "DELTA_RULE": "the delta rule",
    "ATTENTION": "attention",
    "MERGE": "the parts of attention",
    "TOKEN": "the token",
    "SAMPLING": "the choice among all tokens",
}
# Moments that the timeline records (primitive/timeline.cuh).
MARKS = ("TOKEN", "RECEIVED", "MULTIPLIED", "SUMMED", "PUBLISHED", "ATTENDED", "HEAD")
MARKS_OF_A_BLOCK = 4096


def enums() -> str:
    """The names above, for the kernel."""
    return "\n".join(
        f"enum {kind} : unsigned int {{ {', '.join(f'{kind.upper()}_{name}' for name in names)} }};"
        for kind, names in (("Phase", PHASES), ("Mark", MARKS))
    )


class DecodeArguments(ctypes.Structure):
    """The arguments of the decode kernel. Pointers are device addresses; those marked host are of mapped memory."""

    _FIELDS_IN_C = (
        ("const unsigned char*", "tape"),  # all matrices, in the order of use, block after block
        ("const long long*", "tape_offsets"),  # [BLOCKS]: where a block's part begins, bytes
        ("const long long*", "head_offsets"),  # [BLOCKS]: where in it the LM head begins
        ("const unsigned short*", "embedding"),  # [VOCAB, HIDDEN], if the head is not tied
        ("const float*", "parameters"),  # see parameters.py
        ("const float2*", "rope"),  # [positions, ROTARY_DIM / 2]: cos, sin
        ("unsigned char*", "state"),  # see state.cuh
        ("unsigned int*", "exchange"),  # two copies of the channels, zeroed before the launch
        ("unsigned long long*", "candidates"),  # [4, BLOCKS], zeroed before the launch
        ("float*", "logits"),  # [VOCAB], or [steps, VOCAB] with all_logits, or null; [VOCAB] when sampling is active
        ("const int*", "tokens"),  # [given]
        ("unsigned long long*", "output"),  # host [OUTPUT_RING]: count << 32 | last << 31 | failure << 28 | token
        ("unsigned long long*", "consumed"),  # host: 1 << 63 | steps that ran, at the end
        ("unsigned long long*", "report"),  # host: where a wait ran out
        ("const unsigned int*", "cancel"),  # host: not 0 to stop after the current token
        ("unsigned long long*", "timeline"),  # [BLOCKS, MARKS_OF_A_BLOCK], if TIMELINE
        ("unsigned long long", "spin_limit"),  # nanoseconds that one wait may last
        ("int", "steps"),  # tokens to consume at most
        ("int", "given"),  # of them from `tokens`; the others are sampled
        ("int", "max_tokens"),  # to sample
        ("int", "position"),  # of the first token
        ("int", "max_context"),  # positions that the KV cache has room for
        ("int", "all_logits"),
        ("int", "no_head"),  # 1: nothing is sampled after the last given token
        ("int", "stop_count"),
        ("int", f"stop_tokens[{MOST_STOP_TOKENS}]"),
        ("SamplingArguments", "sampling"),
    )
    _fields_ = ctypes_fields(_FIELDS_IN_C, SamplingArguments)

    @classmethod
    def source(cls) -> str:
        return f"{source_of(SamplingArguments)}\n{source_of(cls)}"
