"""Stop strings: end the text before the first of them, also where one spans several tokens."""

from __future__ import annotations

from collections.abc import Sequence

from onekernel.errors import InvalidRequest


class StopStrings:
    """Feeds on text and gives what may be shown: all that cannot be the beginning of a stop string.

    Raises:
        InvalidRequest: a stop string is empty or not a string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        for i, stop in enumerate(stops):
            if not isinstance(stop, str) or not stop:
                raise InvalidRequest(f"stop[{i}] = {stop!r} must be a string that is not empty")
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None
        """The stop string that was found."""

    def push(self, text: str) -> tuple[str, bool]:
        """(text to show, whether a stop string was found); the stop string and what follows it are dropped."""
        text = self._held + text
        # The match that is complete first wins, as if the text had come character by character.
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            first_end = min(found)[0]
            begin = min(at for end, at in found if end == first_end)
            self.found = text[begin:first_end]
            return text[:begin], True
        keep = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """The text held back, once no more will come."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that is a beginning of `stop`."""
        longest = min(len(text), len(stop) - 1)
        return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
