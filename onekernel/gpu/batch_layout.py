"""What the host and the batch kernel must agree on: columns, shared and scratch memory, and the argument structs."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from onekernel.checkpoint.shape import Shape
from onekernel.errors import NotEnoughMemory, UnsupportedModel
from onekernel.gpu.layout import (
    COMFORTABLE_STAGES,
    CONSUMER_WARPS,
    LEAST_STAGES,
    MOST_STAGES,
    MOST_STOP_TOKENS,
    ROW_GROUP,
    SHARED_RESERVED,
    STAGE_BYTES,
    Layout,
    enums,
    projected_full,
    projected_linear,
    residual_rows,
)
from onekernel.gpu.sampling import SamplingArguments
from onekernel.gpu.structure import ctypes_fields, source_of

BUCKETS = (8, 16, 32, 64, 128, 256)  # rows that a compiled kernel has columns for
ROOMY = 200 << 10  # bytes of shared memory: chips with more also let warps give each other registers
LEAST_SPLIT, MOST_SPLITS = 32, 256  # positions of a split of the context at least; splits at most (batch/attention.cuh)
SHARING = 4  # blocks that deal the columns of some products (batch/gemm_split.cuh)
HISTOGRAMS_BYTES = CONSUMER_WARPS * 3 * 256 * 4  # of shared memory, for sampling
ROW_BYTES = 8 + 5 * 4 + 2 + 40 + 8 + 2 * 4  # of shared memory: Rows, Cut, Candidate, inverse, first_item


def bucket_of(rows: int) -> int:
    """The columns of the kernel for so many rows.

    Raises:
        UnsupportedModel: more rows than any kernel has.
    """
    for bucket in BUCKETS:
        if rows <= bucket:
            return bucket
    raise UnsupportedModel(f"the batch kernel takes up to {BUCKETS[-1]} sequences a step, not {rows}: use fewer slots")


@dataclass(frozen=True)
class BatchLayout:
    """The batch kernel of one bucket, on the chip and for the weights of a decode kernel's layout."""

    decode: Layout
    columns: int
    column_groups: int
    ring_stages: int
    layer_stages_in_flight: int = 2
    state_stages_in_flight: int = 4
    head_stages_in_flight: int = 3
    hushes: bool = True  # the producer, ahead of barriers

    @classmethod
    def plan(cls, decode: Layout, columns: int) -> BatchLayout:
        """As many columns a pass as the chip's shared memory allows with a comfortable ring.

        Raises:
            NotEnoughMemory: not even 8 columns a pass fit.
        """
        assert columns in BUCKETS
        usable = decode.shared_memory - SHARED_RESERVED
        groups = min(8 if decode.shared_memory >= ROOMY else 4, columns // 8)
        while True:
            stages = min(MOST_STAGES, (usable - _scratch_bytes(decode, columns, groups)) // STAGE_BYTES)
            if stages >= COMFORTABLE_STAGES or groups == 1:
                break
            groups //= 2
        if stages < LEAST_STAGES:
            raise NotEnoughMemory(
                f"the batch kernel for {columns} sequences does not fit into the {usable} bytes of shared memory of "
                "this chip: use fewer slots"
            )
        return cls(decode, columns, groups, stages)

    @property
    def shape(self) -> Shape:
        return self.decode.shape

    def constants(self) -> dict[str, int | float | bool | tuple[float, ...]]:
        layout = self.decode
        return layout.constants() | {
            "RING_STAGES": self.ring_stages,
            "COPIES_IN_FLIGHT": min(3, self.ring_stages - 2),
            "LAYER_STAGES_IN_FLIGHT": min(self.layer_stages_in_flight, self.ring_stages),
            "STATE_STAGES_IN_FLIGHT": min(self.state_stages_in_flight, self.ring_stages),
            "HEAD_STAGES_IN_FLIGHT": min(self.head_stages_in_flight, self.ring_stages),
            "HUSHES": self.hushes,
            "COLUMN_GROUPS": self.column_groups,
            "PASSES": self.columns // (8 * self.column_groups),
        }

    @property
    def _shared_rows(self) -> int:
        """Rows of the residual stream that SHARING blocks own, at most."""
        return ROW_GROUP * -(-SHARING * (self.shape.hidden // ROW_GROUP) // self.decode.blocks)

    def declarations(self) -> str:
        return f"{enums()}\n{BatchArguments.source()}"

    def scratch(self, most_splits: int) -> dict[str, int]:
        """Bytes of each scratch array; `most_splits`: of any row's context (see `splits`)."""
        s, n = self.shape, self.columns
        projected = -(-max(projected_linear(s), projected_full(s)) // 4) * 4
        return {
            "input": 2 * n * s.hidden,
            "squares": 4 * n * (-(-self.decode.blocks // 4) * 4),
            "projected": 4 * n * projected,
            "mixed": 2 * n * max(s.value_dim, s.query_dim),
            "activated": 2 * n * s.intermediate,
            "partial": 4 * n * s.heads * most_splits * (s.head_dim + 4),
            "candidates": 3 * 8 * n * self.decode.blocks,
            "slices": 8 * n * CONSUMER_WARPS * -(-self.decode.blocks // SHARING) * self._shared_rows,
        }


def splits(position: int) -> int:
    """In how many parts attention cuts the context of a token at `position` (batch_splits in batch/attention.cuh)."""
    tokens = position + 1
    length = -(-tokens // MOST_SPLITS)
    length = -(-length // LEAST_SPLIT) * LEAST_SPLIT
    return -(-tokens // length)


def most_splits(position: int) -> int:
    """The most splits of any token up to `position`: longer contexts may have fewer."""
    return min(MOST_SPLITS, position // LEAST_SPLIT + 1)


def _scratch_bytes(decode: Layout, columns: int, groups: int) -> int:
    """Shared memory of a block beside the weight ring (`Shared` in batch.cu, which checks the sum)."""
    shape = decode.shape
    sums = 2 * CONSUMER_WARPS * 16 * (8 * groups + 1) * 4 * (4 // groups if groups < 4 else 1)
    if groups >= 8 and decode.shared_memory >= ROOMY and decode.blocks % SHARING == 0:
        sums = 32768  # no sums of slices meet in shared memory
    attention = CONSUMER_WARPS * (shape.heads // shape.kv_heads) * 512
    rows = residual_rows(shape, decode.blocks)
    residual = 4 * (rows + -(-rows // 16)) * columns
    taps = 16 * ROW_GROUP * -(-projected_linear(shape) // (ROW_GROUP * decode.blocks))
    return max(sums, HISTOGRAMS_BYTES, attention) + residual + taps + ROW_BYTES * columns + 8 * MOST_STAGES + 512


class BatchRow(ctypes.Structure):
    """One row of a launch. Pointers are device addresses."""

    _FIELDS_IN_C = (
        ("unsigned char*", "state"),  # see state.cuh
        ("float*", "logits"),  # [VOCAB], or null: nobody needs them
        ("int", "max_context"),  # positions that its KV cache has room for
        ("int", "position"),  # of its token
        ("int", "token"),  # to consume first
        ("int", "max_tokens"),  # to sample
        ("int", "stop_count"),
        ("int", f"stop_tokens[{MOST_STOP_TOKENS}]"),
        ("int", "unused"),
        ("SamplingArguments", "sampling"),
    )
    _fields_ = ctypes_fields(_FIELDS_IN_C, SamplingArguments)


class BatchArguments(ctypes.Structure):
    """The arguments of the batch kernel. Pointers are device addresses; those marked host are of mapped memory."""

    _FIELDS_IN_C = (
        ("const unsigned char*", "tape"),  # see DecodeArguments
        ("const long long*", "tape_offsets"),  # [BLOCKS]
        ("const long long*", "head_offsets"),  # [BLOCKS]
        ("const unsigned short*", "embedding"),  # [VOCAB, HIDDEN], if the head is not tied
        ("const float*", "parameters"),  # see parameters.py
        ("const float2*", "rope"),  # [positions, ROTARY_DIM / 2]: cos, sin
        ("const BatchRow*", "row_table"),  # [rows]
        ("unsigned char*", "input"),  # [columns, HIDDEN], 16 bit, as operand_place says
        ("float*", "squares"),  # [columns, BLOCKS rounded up to 4]: sums of squares of the residual stream
        ("float*", "projected"),  # [columns, PROJECTED_STRIDE]
        ("unsigned char*", "mixed"),  # [columns, VALUE_DIM or QUERY_DIM], as operand_place says
        ("unsigned char*", "activated"),  # [columns, INTERMEDIATE], as operand_place says
        ("float*", "partial"),  # [columns, HEADS, most_splits, HEAD_DIM + 4]
        ("unsigned long long*", "candidates"),  # [columns, up to 2 BLOCKS], then [columns, BLOCKS]
        ("unsigned long long*", "slices"),  # see slice_sums in batch/gemm_split.cuh
        ("unsigned int*", "barrier"),  # zero before the launch
        ("unsigned int*", "stop"),  # the block that looks at `cancel` tells the others
        ("unsigned long long*", "output"),  # host [steps, rows]: made << 32 | last << 31 | failure << 28 | token
        ("unsigned long long*", "report"),  # host: where a wait ran out
        ("const unsigned int*", "cancel"),  # host: not 0 to stop after the current step
        ("unsigned long long*", "times"),  # of the last step: its start and the end of each phase, nanoseconds; or null
        ("unsigned long long", "spin_limit"),  # nanoseconds that one wait may last
        ("int", "rows"),
        ("int", "steps"),
        ("int", "most_splits"),
        ("int", "draws"),  # some row samples at a temperature
        ("int", "logprobs"),  # some row wants them
        ("int", "first_product"),  # of those that blocks share: one less than the number of the launch's first
    )
    _fields_ = ctypes_fields(_FIELDS_IN_C)

    @classmethod
    def source(cls) -> str:
        return f"{source_of(SamplingArguments)}\n{source_of(BatchRow)}\n{source_of(cls)}"
