"""Thinking apart from the answer: splits text at `<think>` and `</think>` as it comes."""

from __future__ import annotations

THINK, THINK_END = "<think>", "</think>"
# A call may begin while the model has not closed its thinking: what it calls must not be lost.
CALL_IN_THINKING = "<tool_call>\n<function="


class ThinkingSplitter:
    """Feeds on text and gives (thinking, answer) parts that are final.

    White space next to the tags belongs to the format, not to the text, and is dropped.
    """

    def __init__(self, inside: bool, *, calls: bool = False) -> None:
        """Args:
        inside: whether the prompt has opened the thinking already.
        calls: whether a tool call ends the thinking.
        """
        self.inside = inside
        self._ends = (THINK_END, CALL_IN_THINKING) if calls else (THINK_END,)
        self._held = ""
        self._begun = False  # some of the present part has been given out

    @property
    def over(self) -> bool:
        """Whether all text to come belongs to the answer."""
        return self._begun and not self.inside

    def push(self, text: str) -> tuple[str, str]:
        """(new text of the thinking, new text of the answer); either may be empty."""
        self._held += text
        thinking = answer = ""
        if not self.inside and not self._begun:
            self._open()
        if self.inside:
            thinking = self._think()
        if not self.inside:
            if not self._begun:
                self._held = self._held.lstrip()
            if self._begun or not THINK.startswith(self._held):
                answer, self._held = self._held, ""
                self._begun = self._begun or bool(answer)
        return thinking, answer

    def flush(self) -> tuple[str, str]:
        """What was held back, once no more will come."""
        held, self._held = self._held, ""
        return (held.rstrip(), "") if self.inside else ("", held)

    def _open(self) -> None:
        """Enter the thinking if the answer begins with it."""
        begin = self._held.lstrip()
        if begin.startswith(THINK):
            self._held = begin.removeprefix(THINK)
            self.inside = True

    def _think(self) -> str:
        if not self._begun:
            self._held = self._held.lstrip()
        found = [at for end in self._ends if (at := self._held.find(end)) >= 0]
        if found:
            at = min(found)
            thinking = self._held[:at].rstrip()
            self._held = self._held[at:].removeprefix(THINK_END)
            self.inside, self._begun = False, False
            return thinking
        # Back with what may be the beginning of a tag, and with the white space that would go before it.
        final = self._held[: len(self._held) - max(overlap(self._held, end) for end in self._ends)].rstrip()
        self._held = self._held[len(final) :]
        self._begun = self._begun or bool(final)
        return final


def overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that is a beginning of `tag`, but not all of it."""
    at = text.rfind(tag[0], max(0, len(text) - len(tag) + 1))
    best = 0
    while at >= 0:
        if tag.startswith(text[at:]):
            best = len(text) - at
        at = text.rfind(tag[0], max(0, len(text) - len(tag) + 1), at)
    return best
