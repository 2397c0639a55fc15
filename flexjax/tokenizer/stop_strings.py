"""StopMatcher: finds stop strings in text that arrives in pieces. It knows no tokens."""


class StopMatcher:
    """Passes text on until a stop string is complete.

    Text that may be the beginning of a stop string is held back, so nothing passed on is ever taken back. The stop
    string that is complete first wins; of those complete at the same character, the longest. What comes out does not
    depend on how the text was cut into pieces.

    Args:
        stop: non-empty stop strings.
        include_stop: pass the stop string itself on too.

    Attributes:
        matched: the stop string that was found, or None.
    """

    def __init__(self, stop: tuple[str, ...] = (), include_stop: bool = False):
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Takes new text and returns what may be shown; nothing more once a stop string was found."""
        if self.matched is not None:
            return ""
        if not self._stop:
            return text
        text = self._held + text
        found = [(position + len(stop), position, stop) for stop in self._stop if (position := text.find(stop)) >= 0]
        if found:
            end, start, self.matched = min(found)
            self._held = ""
            return text[: end if self._include_stop else start]
        kept = self._undecided(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def flush(self) -> str:
        """Ends the text: returns what was held back."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a stop string begins."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
