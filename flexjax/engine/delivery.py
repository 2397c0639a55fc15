"""Delivery: what an iteration computed for requests, handed to each request's collector. It ends no request."""

from collections.abc import Iterator

from flexjax.engine.outputs import Collector, logprob_entry
from flexjax.engine.runner import InFlight
from flexjax.scheduler.output import PromptSegment


class Delivery:
    """Attributes:
    collectors: of requests that have not ended, by id.
    """

    def __init__(self):
        self.collectors: dict[int, Collector] = {}

    def deliver(self, flight: InFlight) -> Iterator[tuple[int, bool]]:
        """Hand over what a flight has sampled, after its tokens were read; yields requests that end with it, and
        whether the scheduler knows: it does not find stop strings."""
        for part in flight.iteration.prompts:
            if part.request_id in self.collectors:
                self.collectors[part.request_id].begin(part.start, flight.started)
        if flight.output is not None and flight.output.prompt_logprobs is not None:
            for part in flight.iteration.prompts:
                self._hand_over_prompt(part, flight.output.prompt_logprobs)
        rows = rows_with_logprobs(flight)
        for request_id, token, finish in flight.completion.tokens:
            collector = self.collectors[request_id]
            count = collector.request.sampling.logprobs
            entry = None if count is None else logprob_entry(*rows[request_id], token, count)
            if collector.push(token, finish, entry) or finish is not None:
                yield request_id, finish is not None

    def _hand_over_prompt(self, part: PromptSegment, logprobs: tuple) -> None:
        collector = self.collectors.get(part.request_id)
        if collector is None or collector.request.sampling.prompt_logprobs is None:
            return
        prompt, count = collector.request.prompt, collector.request.sampling.prompt_logprobs
        own, ids, values = logprobs
        known = len(collector.output.prompt_logprobs)
        positions = range(max(part.start + 1, known), min(part.start + part.length + 1, len(prompt)))
        slots = [part.slot + position - 1 - part.start for position in positions]
        pairs = zip(slots, positions, strict=True)
        collector.push_prompt_logprobs([logprob_entry(own[s], ids[s], values[s], prompt[p], count) for s, p in pairs])


def rows_with_logprobs(flight: InFlight) -> dict[int, tuple]:
    """Request id -> (log-probability of its token, [20] likeliest ids, [20] their log-probabilities)."""
    if flight.output is None or flight.output.logprobs is None:
        return {}
    own, ids, values = flight.output.logprobs
    return {request_id: (own[row], ids[row], values[row]) for row, request_id, _ in flight.iteration.sampled_rows}
