"""Collector: the tokens of one request become text, stop strings are found, log-probabilities are kept."""

import queue
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from flexjax.engine.prefix import Prefix
from flexjax.request import FinishReason, Request, RequestOutput
from flexjax.tokenizer import StopMatcher, Tokenizer


@dataclass
class Collector:
    """Grows one `RequestOutput`, token by token, on the engine's thread.

    Args:
        tokenizer: None gives no text.
        listener: receives a snapshot after every change; the last one has a finish reason. Until then its token ids
            are a `Prefix` of the growing list, and its log-probabilities are the growing lists themselves.
    """

    request: Request
    index: int
    tokenizer: Tokenizer | None
    listener: queue.SimpleQueue
    output: RequestOutput = field(init=False)

    def __post_init__(self):
        params = self.request.sampling
        self.output = RequestOutput(
            index=self.index,
            prompt_token_ids=list(self.request.prompt),
            logprobs=None if params.logprobs is None else [],
            prompt_logprobs=None if params.prompt_logprobs is None else [None],
        )
        self._detokenizer = None
        if self.tokenizer is not None and params.detokenize:
            self._detokenizer = self.tokenizer.detokenizer(self.request.prompt[-8:], params.skip_special_tokens)
        self._matcher = StopMatcher(params.stop, params.include_stop_str_in_output)

    def push(self, token: int, finish: FinishReason | None, logprobs: dict[int, float] | None) -> bool:
        """Take one token; True if it completed a stop string, so that the request ends here."""
        output = self.output
        output.token_ids.append(token)
        if output.logprobs is not None:
            output.logprobs.append(logprobs)
        shown = finish is not FinishReason.STOP or self.request.sampling.include_stop_str_in_output
        if shown and self._detokenizer is not None and (text := self._detokenizer.push(token)):
            output.text += self._matcher.push(text)
        stopped = self._matcher.matched is not None
        if finish is not None or stopped:
            self.finish(FinishReason.STOP if stopped else finish)
        else:
            self._tell()
        return stopped

    def begin(self, start: int, moment: float) -> None:
        """Prompt tokens are computed from this position on; only the first time tells what was cached, and when."""
        if self.output.cached_tokens is None:
            self.output.cached_tokens, self.output.seated = start, moment

    def push_prompt_logprobs(self, entries: list[dict[int, float]]) -> None:
        """Log-probabilities of the next prompt tokens."""
        if self.output.prompt_logprobs is not None:
            self.output.prompt_logprobs.extend(entries)

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        """End the output; what was held back for a stop string or an incomplete character is shown."""
        if self._detokenizer is not None and self._matcher.matched is None:
            self.output.text += self._matcher.push(self._detokenizer.flush()) + self._matcher.flush()
        self.output.finish_reason, self.output.error = str(reason), error
        self.listener.put(self.output)

    def _tell(self) -> None:
        its, ids = self.output, self.output.token_ids
        snapshot = RequestOutput(its.index, its.prompt_token_ids, Prefix(ids, len(ids)), its.text)
        snapshot.logprobs, snapshot.prompt_logprobs = its.logprobs, its.prompt_logprobs
        snapshot.cached_tokens, snapshot.seated = its.cached_tokens, its.seated
        self.listener.put(snapshot)


def logprob_entry(own: float, ids: np.ndarray, values: np.ndarray, token: int, count: int) -> dict[int, float]:
    """The ``count`` most likely tokens and the token itself, each with its log-probability, most likely first."""
    return dict(zip(ids[:count].tolist(), values[:count].tolist(), strict=True)) | {token: float(own)}


def latency_summary(arrival: float, times: list[float]) -> Mapping[str, float | None]:
    """Seconds: ``ttft`` (arrival to first token), ``tpot`` (mean time per later token), ``largest_gap``."""
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    return {
        "ttft": times[0] - arrival if times else None,
        "tpot": sum(gaps) / len(gaps) if gaps else None,
        "largest_gap": max(gaps, default=None),
    }
