"""PrefixCache: snapshots of sessions, found again by the tokens that a new prompt begins with."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from onekernel.checkpoint.shape import Shape
from onekernel.engine import Snapshot

MOST_ENTRIES = 256  # a search looks at all of them
WORTH_SHARING = 128  # tokens: from here on, a prefix that two prompts turned out to share gets a snapshot of its own


class PrefixCache:
    """Keeps the snapshots that were used last, in a bounded number of bytes.

    The recurrent state of a delta-net layer cannot be cut back to fewer tokens, unlike a KV cache. So a snapshot serves
    only prompts that begin with *all* its tokens, and it matters where snapshots are taken: see `Request.boundaries`.
    """

    def __init__(self, shape: Shape, budget: int) -> None:
        """Args:
        budget: bytes that all snapshots together may take, reckoned in float32. 0 keeps none.
        """
        self._shape = shape
        self._budget = budget
        self._entries: OrderedDict[bytes, Snapshot] = OrderedDict()  # by their tokens, least recently used first
        self.used = 0
        """Bytes that the snapshots take."""

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, prompt: Sequence[int]) -> tuple[Snapshot | None, int]:
        """(the longest snapshot that `prompt` begins with, the length of a prefix to take a new snapshot of, or 0).

        The latter is where `prompt` parts from something that was read before, if that is far behind the snapshot: a
        third prompt with this prefix is likely to come.
        """
        key = _key(prompt)
        found = max((known for known in self._entries if key.startswith(known)), key=len, default=None)
        usable = 0
        snapshot = None
        if found is not None:
            self._entries.move_to_end(found)
            snapshot = self._entries[found]
            usable = len(snapshot.tokens)
        shared = max((_common(key, known) for known in self._entries), default=0)
        # Not the whole prompt: of it, at least one token must remain to be read.
        shared = min(shared, len(prompt) - 1)
        return snapshot, shared if shared - usable >= WORTH_SHARING else 0

    def add(self, snapshot: Snapshot) -> None:
        """Keep `snapshot`; those not used for longest make room."""
        size = self.size(len(snapshot.tokens))
        if size > self._budget:
            return
        key = _key(snapshot.tokens)
        if key in self._entries:
            self._entries.move_to_end(key)
            return
        self._entries[key] = snapshot
        self.used += size
        while self.used > self._budget or len(self._entries) > MOST_ENTRIES:
            self.drop_oldest()

    def drop_oldest(self) -> bool:
        """Forget the snapshot not used for longest. Returns whether there was one."""
        if not self._entries:
            return False
        _, snapshot = self._entries.popitem(last=False)
        self.used -= self.size(len(snapshot.tokens))
        return True

    def size(self, tokens: int) -> int:
        """Bytes of a snapshot of so many tokens."""
        return self._shape.state_bytes(tokens) + 4 * tokens


def _key(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, np.int32).tobytes()


def _common(first: bytes, second: bytes) -> int:
    """Tokens that two keys have in common at their start."""
    head = 4 * WORTH_SHARING
    if first[:head] != second[:head]:  # most pairs of unrelated ones end here
        return 0
    length = min(len(first), len(second)) // 4
    differs = np.frombuffer(first, np.int32, length) != np.frombuffer(second, np.int32, length)
    return int(differs.argmax()) if differs.any() else length
