"""Timeline: the moments of one HTTP request's sequences, measured for the service's metrics."""

from flexjax.request import RequestOutput
from flexjax.server.histogram import Histogram
from flexjax.server.recent import Seconds, Served

TTFT_BOUNDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
ITL_BOUNDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
E2E_BOUNDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
"""Seconds; vLLM's, so that one dashboard reads both."""


class ServingTotals:
    """Sums over all requests since the service began.

    Attributes:
        ended: sequences by finish reason.
        recent: what was served in each of the newest seconds, on the clock of `Bridge`.
    """

    def __init__(self):
        self.prompt_tokens = self.generation_tokens = 0
        self.ended: dict[str, int] = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        self.ttft, self.itl, self.e2e = Histogram(TTFT_BOUNDS), Histogram(ITL_BOUNDS), Histogram(E2E_BOUNDS)
        self.recent = Seconds(Served)


class Timeline:
    """Args:
    arrival: of the request, in seconds on the clock of `Bridge`.
    count: sequences.
    """

    def __init__(self, totals: ServingTotals, arrival: float, count: int):
        self._totals, self._arrival = totals, arrival
        self._first, self._last = [arrival] * count, [arrival] * count
        self._tokens = [0] * count

    def take(self, index: int, output: RequestOutput, now: float) -> None:
        new = len(output.token_ids) - self._tokens[index]
        if new:
            self._take_tokens(index, output, new, now)
        if output.finish_reason is not None:
            self._totals.ended[output.finish_reason] += 1
            self._totals.e2e.observe(now - self._arrival)
            self._take_end(index, now)

    def _take_tokens(self, index: int, output: RequestOutput, new: int, now: float) -> None:
        totals, recent = self._totals, self._totals.recent.at(now)
        if self._tokens[index]:
            gap = (now - self._last[index]) / new
            totals.itl.observe(gap, new)
            recent.itl.observe(gap, new)
        else:
            totals.ttft.observe(now - self._arrival)
            recent.ttft.observe(now - self._arrival)
            self._first[index] = now
            totals.prompt_tokens += len(output.prompt_token_ids)
        totals.generation_tokens += new
        recent.tokens += new
        self._tokens[index] += new
        self._last[index] = now

    def _take_end(self, index: int, now: float) -> None:
        later = self._tokens[index] - 1
        if later > 0:
            self._totals.recent.at(now).tpot.observe((self._last[index] - self._first[index]) / later)
