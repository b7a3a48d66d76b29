"""Token ids to text as they come, never half a UTF-8 character."""

from __future__ import annotations

import codecs

from onekernel.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Feeds on token ids and gives the text that is final.

    All pushes and the flush together are `tokenizer.decode` of all ids. A token may end within a character (an emoji
    can be four tokens): its bytes wait for the rest.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that `token` completes; may be empty."""
        return self._decoder.decode(self._tokenizer.token_bytes(token, skip_special=self._skip_special))

    def flush(self) -> str:
        """What remains at the end: bytes of an unfinished character, as U+FFFD."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
