"""Spans: how large sequences were and how long they spent on what, counted once each has ended. Names are vLLM's."""

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.core import Metric

from flexjax.request import RequestOutput
from flexjax.server.histogram import Histogram

ITL_BOUNDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
E2E_BOUNDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
COUNT_BOUNDS = (1, 2, 5, 10, 20)
"""Seconds, and answers to a prompt; vLLM's, so that one dashboard reads both."""

SIZES = {
    "request_prompt_tokens": "Of a sequence's prompt.",
    "request_generation_tokens": "Generated for a sequence.",
    "request_max_num_generation_tokens": "Generated for the longest answer to a prompt.",
    "request_params_max_tokens": "That a sequence was allowed to generate.",
}
SECONDS = {
    "e2e": ("e2e_request_latency_seconds", "From arrival to the end."),
    "queue": ("request_queue_time_seconds", "From arrival to a row."),
    "prefill": ("request_prefill_time_seconds", "From a row to the first token."),
    "decode": ("request_decode_time_seconds", "From the first token to the last."),
    "inference": ("request_inference_time_seconds", "From a row to the last token."),
}


def size_bounds(longest: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... up to a length."""
    found = (digit * 10**power for power in range(len(str(longest))) for digit in (1, 2, 5))
    return tuple(each for each in found if each <= longest)


@dataclass(frozen=True)
class Moments:
    """Of one sequence, in seconds on one clock.

    Attributes:
        seated: when it got its row; None if it never did. first, last: tokens; None if there was none.
    """

    arrival: float
    seated: float | None
    first: float | None
    last: float | None
    end: float

    @property
    def seconds(self) -> dict[str, float]:
        """By the names of SECONDS; what a sequence did not reach is absent."""
        left = self.end if self.seated is None else self.seated
        found = {"e2e": self.end - self.arrival, "queue": left - self.arrival}
        if self.first is not None:
            found |= {"prefill": self.first - left, "decode": self.last - self.first, "inference": self.last - left}
        return found


class Spans:
    """Args:
    longest: sequence that the model takes, in tokens.
    """

    def __init__(self, longest: int):
        self.longest = longest
        self._sizes = {name: Histogram(size_bounds(longest)) for name in SIZES}
        self._seconds = {name: Histogram(E2E_BOUNDS) for name in SECONDS}
        self._tpot, self._answers = Histogram(ITL_BOUNDS), Histogram(COUNT_BOUNDS)

    def take(self, output: RequestOutput, moments: Moments, allowed: int | None) -> float | None:
        """A sequence has ended; mean seconds of its tokens after the first, None without any.

        Args:
            allowed: tokens that it was to generate at most; None is as many as there is room for.
        """
        prompt, generated = len(output.prompt_token_ids), len(output.token_ids)
        room = max(1, self.longest - prompt)
        self._sizes["request_prompt_tokens"].observe(prompt)
        self._sizes["request_generation_tokens"].observe(generated)
        self._sizes["request_params_max_tokens"].observe(min(allowed or room, room))
        seconds = moments.seconds
        for name, value in seconds.items():
            self._seconds[name].observe(value)
        if generated < 2:
            return None
        tpot = seconds["decode"] / (generated - 1)
        self._tpot.observe(tpot)
        return tpot

    def take_prompt(self, lengths: list[int]) -> None:
        """All answers to a prompt have ended, with so many tokens each."""
        self._answers.observe(len(lengths))
        self._sizes["request_max_num_generation_tokens"].observe(max(lengths))

    def families(self, labels: dict[str, str]) -> Iterator[Metric]:
        for name, text in SIZES.items():
            yield self._sizes[name].family(f"vllm:{name}", text, labels)
        for part, (name, text) in SECONDS.items():
            yield self._seconds[part].family(f"vllm:{name}", text, labels)
        text = "Mean time of a sequence's tokens after the first."
        yield self._tpot.family("vllm:request_time_per_output_token_seconds", text, labels)
        yield self._answers.family("vllm:request_params_n", "Answers to a prompt.", labels)
