"""Progress: a line now and then about how a replay stands. It waits for nothing and judges nothing."""

from collections.abc import Callable

from flexjax.bench.replay import Replay

SHOWN_EVERY = 20.0
"""Seconds between two lines."""


class Progress:
    """Args:
    total: requests that there will be.
    finetuned: how many tokens have been finetuned on so far.
    show: takes a line.
    """

    def __init__(self, replay: Replay, total: int, finetuned: Callable[[], int], show: Callable[[str], None]):
        self._replay, self._total, self._finetuned, self._show = replay, total, finetuned, show
        self._shown = 0.0

    def tell(self, elapsed: float) -> None:
        """Show a line if it is time for one, ``elapsed`` seconds after the replay began."""
        if elapsed - self._shown < SHOWN_EVERY:
            return
        self._shown, replay = elapsed, self._replay
        counts = f"{replay.waiting} wait, {replay.running} run, {replay.done} of {self._total} done"
        self._show(f"  {elapsed:.0f} s: {counts}; {self._finetuned():,} finetuning tokens so far")
