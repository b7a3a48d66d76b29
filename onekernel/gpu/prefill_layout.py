"""What the host and the prefill kernel must agree on: how work is cut, scratch memory, and the argument struct."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from onekernel.checkpoint.shape import Shape
from onekernel.gpu import tape
from onekernel.gpu.layout import Layout, enums

ROW_TILE = 192  # rows of a weight matrix that a block multiplies at a time
STEP_COLUMNS = 64
CHUNK = 64  # tokens of the delta rule that are solved together
MOST_CHUNK_TOKENS = 2048  # tokens of one launch: bounds the scratch memory
MOST_SPLITS = 8
SPLIT_ROWS = 6400  # tokens times parts of the keys: bounds the scratch memory of attention
NARROW_TOKENS = 128  # up to so many, tiles of fewer rows and tokens make work for all blocks
BARRIER_BYTES = 16 + 13 * 8 + 8 + 14 * 8 + 16  # beside those of the tokens: BARRIER_BYTES in prefill.cu
SHARED_RESERVED = 1024  # bytes of a block's shared memory lost to alignment
HEAD_ROW = 256  # bytes of one token's row of one delta-net head
CHUNK_ROWS = 3 * CHUNK * HEAD_ROW
CHUNK_SCRATCH = CHUNK * (CHUNK + 4) * 4 + 4 * CHUNK * 4  # of ChunkScratch in delta_chunks.cuh, beside the rows
SCAN_STAGE = 3 * CHUNK * HEAD_ROW + CHUNK * CHUNK * 2
ITEM_BYTES = 4 * CHUNK * HEAD_ROW + CHUNK * CHUNK * 2
ITEM_STATE = 128 * HEAD_ROW  # on sm_90a, beside that
QUERY_BYTES = 64 * 512
KEY_STAGE = 2 * 32 * 512


@dataclass(frozen=True)
class PrefillLayout:
    """How the prefill kernel uses one chip."""

    decode: Layout  # of the kernel that the weights on the GPU are laid out for
    blocks: int
    token_tile: int
    narrow: bool  # for few tokens: see gemm.cuh
    gemm_stages: int  # steps whose tokens have a place in shared memory
    chunk_buffers: int  # items of delta_chunks whose rows have a place in shared memory
    scan_columns: int
    scan_stages: int
    attention_groups: int
    attention_stages: int
    item_bytes: int  # that delta_chunks leaves of a chunk and a value head

    @classmethod
    def plan(
        cls, decode: Layout, sm_count: int, shared_memory: int, arch: str, narrow: bool = False
    ) -> PrefillLayout | None:
        """One block an SM, with rings as deep as its shared memory allows; None if that is too small (sm_75).

        Args:
            narrow: for up to NARROW_TOKENS tokens, on sm_90a.
        """
        room = shared_memory - SHARED_RESERVED
        wgmma = arch == "sm_90a"
        tiles = (64,) if narrow else (192,) if wgmma else (176, 128, 64, 32)
        choices = ((tile, stages) for tile in tiles for stages in ((6 if narrow else 4, 3) if wgmma else (4, 3)))
        token_tile, gemm_stages = next((c for c in choices if _gemm_bytes(*c, wgmma, narrow) <= room), (0, 0))
        columns = next(n for n in (32, 64) if decode.shape.value_dim // n <= sm_count or n == 64)
        scan_stages = min(3, (room - (128 + CHUNK) * (2 * columns + 16)) // SCAN_STAGE)
        groups, stages = next(
            ((g, s) for g, s in ((3, 2), (2, 2), (1, 2)) if QUERY_BYTES + g * (s * KEY_STAGE + 512) <= room),
            (0, 0),
        )
        if not token_tile or scan_stages < 1 or not groups or room < CHUNK_ROWS + CHUNK_SCRATCH:
            return None
        return cls(
            decode,
            blocks=sm_count,
            token_tile=token_tile,
            narrow=narrow,
            gemm_stages=gemm_stages,
            chunk_buffers=min(2, (room - CHUNK_SCRATCH) // CHUNK_ROWS),
            scan_columns=columns,
            scan_stages=scan_stages,
            attention_groups=groups,
            attention_stages=stages,
            item_bytes=ITEM_BYTES + ITEM_STATE * wgmma,
        )

    @classmethod
    def plans(cls, decode: Layout, sm_count: int, shared_memory: int, arch: str) -> list[PrefillLayout]:
        """All that a Prefiller compiles: for many tokens, and on sm_90a for few; none if shared memory is too small."""
        kinds = (False, True) if arch == "sm_90a" else (False,)
        plans = [cls.plan(decode, sm_count, shared_memory, arch, narrow) for narrow in kinds]
        return [plan for plan in plans if plan is not None] if plans[0] is not None else []

    @property
    def shape(self) -> Shape:
        return self.decode.shape

    @property
    def phases(self) -> int:
        """Of a launch without the LM head (`run_phase` in prefill.cu)."""
        return 1 + 9 * self.shape.layers

    def constants(self) -> dict[str, int | float | bool | tuple[float, ...]]:
        return self.decode.constants() | {
            "TOKEN_TILE": self.token_tile,
            "NARROW_TILES": self.narrow,
            "GEMM_STAGES": self.gemm_stages,
            "CHUNK_BUFFERS": self.chunk_buffers,
            "SCAN_COLUMNS": self.scan_columns,
            "SCAN_STAGES": self.scan_stages,
            "ATTENTION_GROUPS": self.attention_groups,
            "ATTENTION_STAGES": self.attention_stages,
        }

    def declarations(self) -> str:
        """C++ that is generated: the argument struct, and the wgmma instruction for this tile of tokens."""
        return f"{enums()}\n{PrefillArguments.source()}\n{wgmma_source(self.token_tile, self.scan_columns)}"

    def splits(self, tokens: int, columns: int) -> int:
        """In how many parts the columns of a projection back to the hidden size are dealt, so that all blocks work."""
        row_tile = ROW_TILE // 3 if self.narrow else ROW_TILE
        tiles = -(-self.shape.hidden // row_tile) * -(-tokens // self.token_tile)
        steps = columns // STEP_COLUMNS

        def cost(splits: int) -> float:
            """In steps of one tile; writing and reading back one split of a tile counts like 3 of them."""
            waves = -(-tiles * splits // self.blocks)
            return waves * (-(-steps // splits) + 3.0)

        return min(range(1, MOST_SPLITS + 1), key=cost)

    def plan_launch(self, tokens: int, position: int) -> dict[str, int]:
        """How a chunk of `tokens` tokens behind `position` is cut: fields of PrefillArguments."""
        s = self.shape
        return {
            "mixer_splits": self.splits(tokens, max(s.value_dim, s.query_dim)),
            "mlp_splits": self.splits(tokens, s.intermediate),
            "attention_splits": self.attention_splits(tokens, position),
        }

    def attention_splits(self, tokens: int, position: int) -> int:
        """In how many parts the keys are dealt, so that all blocks have work (attention_wgmma.cuh)."""
        s = self.shape
        rows = 64 // (s.heads // s.kv_heads)
        items = -(-tokens // (2 * rows)) * s.kv_heads
        key_tiles = -(-(position + tokens) // 64)

        def cost(splits: int) -> float:
            """In tiles of keys; a part costs as much as three of them, and what is written and read back its bytes."""
            waves = -(-items * splits // self.blocks)
            return waves * (-(-key_tiles // splits) + 3.0) + (splits > 1) * (3.0 + tokens * splits * s.heads / 8000)

        most = max(1, min(self.blocks // s.kv_heads, SPLIT_ROWS // tokens))
        return min(range(1, most + 1), key=cost)

    def scratch(self, tokens: int) -> dict[str, int]:
        """Bytes of each scratch array for chunks of up to `tokens` tokens."""
        s = self.shape
        chunks = -(-tokens // CHUNK)
        padded = -(-tokens // self.token_tile) * self.token_tile  # inputs of products stand in whole tiles
        partial_rows = max(
            t * max(self.splits(t, s.intermediate), self.splits(t, s.value_dim), self.splits(t, s.query_dim))
            for t in range(1, tokens + 1)
        )
        return {
            "residual": 4 * tokens * s.hidden,
            "input": 2 * padded * s.hidden,
            "projected": 2 * tokens * max(s.conv_dim + s.value_dim, 2 * s.query_dim + 2 * s.kv_dim),
            "gates": 4 * tokens * -(-2 * s.value_heads // 16) * 16,
            "items": chunks * s.value_heads * self.item_bytes,
            "fades": 4 * chunks * s.value_heads,
            "output": 2 * tokens * s.value_dim,
            "mixed": 2 * padded * max(s.value_dim, s.query_dim),
            "activated": 2 * padded * s.intermediate,
            "partials": 2 * partial_rows * s.hidden,
            "attention": 4 * min(SPLIT_ROWS, tokens * (self.blocks // s.kv_heads)) * s.heads * (s.head_dim + 4),
        }


def matrix_offsets(shape: Shape, blocks: int) -> np.ndarray:
    """int64 [matrices, blocks]: where on the tape each block's part of each matrix begins."""
    at = tape.plan(shape, blocks).offsets.copy()
    rows = []
    for matrix in tape.matrices(shape):
        rows.append(at.copy())
        at += tape.share_bytes(matrix, blocks)
    return np.stack(rows)


def wgmma_source(tokens: int, columns: int) -> str:
    """The wgmma instructions that the kernel uses.

    Weights times `tokens` tokens; queries times 64 keys and their weights times 128 dims; for `columns` columns of the
    delta rule's state, what a chunk takes from them and adds to them; its output of 128 columns.
    """
    return f"""
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
{_wgmma("wgmma_tokens", tokens, from_registers=True, transposed=False)}
{_wgmma("wgmma_scores", 64, from_registers=False, transposed=False, adds=False)}
{_wgmma("wgmma_values", 128, from_registers=False, transposed=True)}
{_wgmma("wgmma_delta", columns, from_registers=True, transposed=False, half=True)}
{_wgmma("wgmma_update", columns, from_registers=False, transposed=False, half=True, across=True)}
{_wgmma("wgmma_output", 128, from_registers=False, transposed=False, half=True)}
{_wgmma("wgmma_scored", 128, from_registers=True, transposed=False, half=True)}
#endif
"""


def _wgmma(
    name: str,
    columns: int,
    from_registers: bool,
    transposed: bool,
    adds: bool = True,
    half: bool = False,
    across: bool = False,
) -> str:
    """A function around the instruction for 64 rows, 16 deep, of bf16 or fp16: acc += a b, with b in shared memory.

    adds: always; otherwise where the last parameter says so, and acc = a b where not.
    across: the rows of a are columns in shared memory.
    """
    count = columns // 2  # accumulators of a thread
    words = ("a", "b", "c", "d") if from_registers else ("a",)
    outputs = ", ".join(f"%{i}" for i in range(count))
    first = ", ".join(f"%{count + i}" for i in range(len(words)))
    first = f"{{{first}}}" if from_registers else first
    modes = ", ".join(["1", "1"] + [str(int(across))] * (not from_registers) + [str(int(transposed))])
    number = "f16" if half else "bf16"
    operands = ", ".join(f'"+f"(acc[{i // 4}][{i % 4}])' for i in range(count))
    kind, constraint = ("unsigned", "r") if from_registers else ("unsigned long long", "l")
    parameters = ", ".join(f"{kind} {word}" for word in words)
    inputs = ", ".join(f'"{constraint}"({word})' for word in words)
    flag, last, given = ("1", "", "") if adds else (f"%{count + len(words) + 1}", ", int add", ', "r"(add)')
    return f"""__device__ __forceinline__ void {name}(float (&acc)[{columns // 8}][4], {parameters},
                                             unsigned long long operand{last}) {{
    asm volatile("{{.reg .pred p; setp.ne.b32 p, {flag}, 0; "
                 "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{number}.{number} "
                 "{{{outputs}}}, {first}, %{count + len(words)}, p, {modes};}}"
                 : {operands}
                 : {inputs}, "l"(operand){given});
}}"""


def _gemm_bytes(token_tile: int, stages: int, wgmma: bool, narrow: bool) -> int:
    """Of shared memory (GEMM_BYTES in gemm.cuh, and the barriers)."""
    weights = (4 if wgmma else stages - 1) * 12 * 2048
    sums = 2 * token_tile // 8 * 2048 if narrow else 0
    return (
        stages * (token_tile * STEP_COLUMNS * 2 + 16)
        + weights
        + 3 * (8192 if wgmma else 4096)
        + sums
        + 8 * 512
        + 128
        + BARRIER_BYTES
    )


class PrefillArguments(ctypes.Structure):
    """The arguments of the prefill kernel. Pointers are device addresses; `report` is mapped host memory."""

    _FIELDS_IN_C = (
        ("const unsigned char*", "tape"),
        ("const long long*", "matrix_offsets"),  # [matrices, BLOCKS]
        ("const unsigned short*", "embedding"),  # [VOCAB, HIDDEN], if the head is not tied
        ("const float*", "parameters"),  # see parameters.py
        ("const float2*", "rope"),  # [positions, ROTARY_DIM / 2]: cos, sin
        ("unsigned char*", "state"),  # see state.cuh
        ("const int*", "token_ids"),  # [tokens]
        ("float*", "residual"),  # [tokens, HIDDEN]
        ("unsigned short*", "input"),  # [tokens, HIDDEN]: the normed residual, 16 bit, as input_place says
        ("unsigned short*", "projected"),  # [tokens, LINEAR_STRIDE or FULL_STRIDE]
        ("float*", "gates"),  # [tokens, GATE_STRIDE]
        ("unsigned char*", "items"),  # [chunks, VALUE_HEADS, ITEM_BYTES]
        ("float*", "fades"),  # [chunks, VALUE_HEADS]: what a chunk leaves of the state that enters it
        ("unsigned short*", "output"),  # [tokens, VALUE_DIM] of the delta rule, fp16
        ("unsigned short*", "mixed"),  # [tokens, VALUE_DIM or QUERY_DIM], as input_place says
        ("unsigned short*", "activated"),  # [tokens, INTERMEDIATE], as input_place says
        ("unsigned short*", "partials"),  # [splits, tokens, HIDDEN]
        (
            "float*",
            "attention",
        ),  # [attention_splits, tokens, HEADS, HEAD_DIM + 4]: sums; their maximum, their weight, -, -
        ("float*", "logits"),  # [logits_count, VOCAB], or null
        ("unsigned int*", "barrier"),  # zero before the launch
        ("unsigned long long*", "times"),  # [phases + 1] end of each phase in nanoseconds, or null
        ("unsigned long long*", "report"),  # host: where a wait ran out
        ("unsigned long long", "spin_limit"),  # nanoseconds that one wait may last
        ("int", "tokens"),
        ("int", "position"),  # of the first token
        ("int", "max_context"),  # positions that the KV cache has room for
        ("int", "first_phase"),
        ("int", "end_phase"),
        ("int", "mixer_splits"),
        ("int", "mlp_splits"),
        ("int", "attention_splits"),
        ("int", "logits_first"),  # tokens whose logits phase PHASES makes
        ("int", "logits_count"),
    )
    _fields_ = [
        (name, ctypes.c_int if kind == "int" else ctypes.c_uint64)
        for kind, name in _FIELDS_IN_C
    ]  # fmt: skip

    @classmethod
    def source(cls) -> str:
        return "\n".join(
            ["struct PrefillArguments {", *(f"    {kind} {name};" for kind, name in cls._FIELDS_IN_C), "};"]
        )
