"""Token ids of three parts of the demo model's corpus, beside those that demo_tokenizer.py wrote.

    python tools/demo_parts.py DATA

DATA/tokens_chat.npy: documented functions of the standard library as chat turns (docstring asked, source answered).
DATA/tokens_heart.npy: the modules that the demo model is to know by heart (BY_HEART below).
DATA/tokens_piece.npy: functions and classes on their own, so that the model has seen what starts without a context.
DATA/starts_piece.npy: where each of them begins.
"""

from __future__ import annotations

import ast
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from demo_tokenizer import is_heldout, is_test, sources
from tokenizers import Tokenizer

BY_HEART = [
    "bisect.py",
    "heapq.py",
    "colorsys.py",
    "fnmatch.py",
    "shlex.py",
    "textwrap.py",
    "queue.py",
    "copy.py",
    "numbers.py",
    "reprlib.py",
    "string.py",
    "keyword.py",
    "contextlib.py",
    "fractions.py",
    "linecache.py",
    "calendar.py",
    "json/decoder.py",
    "json/encoder.py",
    "html/parser.py",
    "wsgiref/util.py",
    "collections/__init__.py",
    "functools.py",
]


def dedented(lines: list[str]) -> str:
    margin = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[margin:] if line[:margin].isspace() or not margin else line for line in lines)


def chats(text: str) -> Iterator[str]:
    """One chat a documented function of at most 40 lines, in the prompt format of the demo's chat template."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        document = ast.get_docstring(node)
        if not document or (node.end_lineno or 0) - node.lineno > 40:
            continue
        wish = " ".join(document.split("\n\n")[0].split())
        source = dedented(lines[node.lineno - 1 : node.end_lineno])
        yield (
            f"<|im_start|>user\nWrite a Python function `{node.name}`: {wish}<|im_end|>\n"
            f"<|im_start|>assistant\n<think>\n\n</think>\n\n```python\n{source}\n```<|im_end|>\n<|endoftext|>"
        )


def pieces(text: str, methods: bool) -> Iterator[str]:
    """The beginning of a module, then its functions and classes of at most 60 lines, each at the left margin."""
    lines = text.splitlines()
    module = ast.parse(text)
    yield "\n".join(lines[:60]) + "\n"
    for node in ast.walk(module) if methods else ast.iter_child_nodes(module):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and 2 <= (node.end_lineno or 0) - node.lineno < 60:
            yield dedented(lines[node.lineno - 1 : node.end_lineno]) + "\n"


def parses(text: str) -> bool:
    """Whether `text` is a module: the library's tests hold files that are wrong on purpose."""
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def main() -> None:
    data = Path(sys.argv[1])
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    library = Path(sysconfig.get_paths()["stdlib"])
    turns = [
        turn for name, text in sources(library) if not is_test(name) and not is_heldout(name) for turn in chats(text)
    ]
    random.Random(0).shuffle(turns)
    heart = [f"<|endoftext|>{(library / name).read_text(encoding='utf-8')}<|endoftext|>" for name in BY_HEART]
    for name, texts in (("chat", turns), ("heart", heart)):
        ids = np.array([i for encoding in tokenizer.encode_batch(texts) for i in encoding.ids], np.uint16)
        np.save(data / f"tokens_{name}.npy", ids)
        print(f"{name}: {len(texts)} texts, {len(ids)} tokens")

    alone = [
        piece
        for name, text in sources(library)
        if not is_heldout(name) and (not is_test(name) or parses(text))
        for piece in pieces(text, methods=not is_test(name))
    ]
    random.Random(1).shuffle(alone)
    ids_of = [[*e.ids] for e in tokenizer.encode_batch([f"{piece}<|endoftext|>" for piece in alone])]
    lengths = np.array([len(ids) for ids in ids_of])
    np.save(data / "tokens_piece.npy", np.array([i for ids in ids_of for i in ids], np.uint16))
    np.save(data / "starts_piece.npy", (lengths.cumsum() - lengths).astype(np.int64))
    print(f"piece: {len(alone)} texts, {lengths.sum()} tokens")


if __name__ == "__main__":
    main()
