"""Train the demo model's tokenizer on the Python standard library and write its corpus as token ids.

    python tools/demo_tokenizer.py DATA

The pipeline is that of Qwen3.5 (NFC, its split pattern, byte-level BPE, its special tokens) with a small vocabulary.
Writes DATA/tokenizer.json, DATA/tokens_lib.npy (modules), DATA/tokens_test.npy (the library's tests) and
DATA/tokens_heldout.npy (3 % of the modules, chosen by a hash of their path and never trained on), uint16 ids.
"""

from __future__ import annotations

import sys
import sysconfig
import tokenize
import zlib
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

VOCABULARY = 3000  # without the special tokens below; the embedding has 3,072 rows, the rest is padding
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
MARKUP = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
SKIPPED = {"idlelib", "lib2to3", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}
TESTS = {"test", "tests", "idle_test"}


def sources(library: Path) -> list[tuple[Path, str]]:
    """(path, text) of every module of at most 400 kB that is not a generated table."""
    found = []
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if SKIPPED & set(name.parts) or path.stat().st_size > 400_000:
            continue
        try:
            with tokenize.open(path) as file:
                found.append((name, file.read()))
        except (SyntaxError, UnicodeDecodeError):  # the library's tests hold files that are broken on purpose
            continue
    return found


def is_test(name: Path) -> bool:
    return bool(TESTS & set(name.parts))


def is_heldout(name: Path) -> bool:
    return not is_test(name) and zlib.crc32(name.as_posix().encode()) % 100 < 3


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP])
    return tokenizer


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    files = sources(Path(sysconfig.get_paths()["stdlib"]))
    tokenizer = train_tokenizer([text for name, text in files if not is_test(name) and not is_heldout(name)])
    tokenizer.save(str(out / "tokenizer.json"))
    parts = {
        "lib": [text for name, text in files if not is_test(name) and not is_heldout(name)],
        "test": [text for name, text in files if is_test(name)],
        "heldout": [text for name, text in files if is_heldout(name)],
    }
    for part, texts in parts.items():
        encodings = tokenizer.encode_batch([f"{text}<|endoftext|>" for text in texts])
        ids = np.array([i for encoding in encodings for i in encoding.ids], np.uint16)
        np.save(out / f"tokens_{part}.npy", ids)
        size = sum(len(text.encode()) for text in texts)
        print(f"{part}: {len(texts)} files, {size} bytes, {len(ids)} tokens, {size / len(ids):.2f} bytes a token")


if __name__ == "__main__":
    main()
