"""Timeline: the moments of one HTTP request's sequences, measured for the service's metrics."""

from flexjax.request import RequestOutput, SamplingParams
from flexjax.server.histogram import Histogram
from flexjax.server.recent import Seconds, Served
from flexjax.server.spans import ITL_BOUNDS, Moments, Spans

TTFT_BOUNDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
TTFT_BOUNDS += (640, 2560)
"""Seconds; vLLM's, so that one dashboard reads both."""


class ServingTotals:
    """Sums over all requests since the service began.

    Args:
        longest: sequence that the model takes, in tokens.

    Attributes:
        cached_tokens: of the prompts, that were found in the cache.
        ended: sequences by finish reason.
        recent: what was served in each of the newest seconds, on the clock of `Bridge`.
    """

    def __init__(self, longest: int):
        self.prompt_tokens = self.cached_tokens = self.generation_tokens = 0
        self.ended: dict[str, int] = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        self.ttft, self.itl, self.spans = Histogram(TTFT_BOUNDS), Histogram(ITL_BOUNDS), Spans(longest)
        self.recent = Seconds(Served)


class Timeline:
    """Args:
    arrival: of the request, in seconds on the clock of `Bridge`, which is the engine's.
    sampling: of every prompt; count: sequences, those of a prompt side by side.
    """

    def __init__(self, totals: ServingTotals, arrival: float, sampling: SamplingParams, count: int):
        self._totals, self._arrival, self._sampling = totals, arrival, sampling
        self._first, self._last = [arrival] * count, [arrival] * count
        self._tokens = [0] * count
        self._growing = [sampling.n] * (count // sampling.n)

    def take(self, index: int, output: RequestOutput, now: float) -> None:
        new = len(output.token_ids) - self._tokens[index]
        if new:
            self._take_tokens(index, output, new, now)
        if output.finish_reason is not None:
            self._totals.ended[output.finish_reason] += 1
            self._take_end(index, output, now)

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
            totals.cached_tokens += output.cached_tokens or 0
        totals.generation_tokens += new
        recent.tokens += new
        self._tokens[index] += new
        self._last[index] = now

    def _take_end(self, index: int, output: RequestOutput, now: float) -> None:
        spans, n, prompt = self._totals.spans, self._sampling.n, index // self._sampling.n
        tokens = (self._first[index], self._last[index]) if self._tokens[index] else (None, None)
        tpot = spans.take(output, Moments(self._arrival, output.seated, *tokens, now), self._sampling.max_tokens)
        if tpot is not None:
            self._totals.recent.at(now).tpot.observe(tpot)
        self._growing[prompt] -= 1
        if not self._growing[prompt]:
            spans.take_prompt(self._tokens[prompt * n : (prompt + 1) * n])
