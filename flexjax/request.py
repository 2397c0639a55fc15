"""What a user asks of the engine and what comes back: plain values, no jax, no tokenizer."""

import enum
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

MAX_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 8
"""Stop ids that ``min_tokens`` can hold back on the device (all stop ids are honoured on the host)."""

LARGEST = 2**31 - 1
"""What a whole number on the device can be."""


class Range(NamedTuple):
    """Attributes:
    high: None is no limit; open_low: ``low`` itself is outside.
    """

    low: float
    high: float | None
    open_low: bool = False


RANGES = MappingProxyType(
    {
        "n": Range(1, 128),
        "temperature": Range(0.0, 100.0),
        "top_p": Range(0.0, 1.0, open_low=True),
        "top_k": Range(-1, LARGEST),
        "min_p": Range(0.0, 1.0),
        "presence_penalty": Range(-2.0, 2.0),
        "frequency_penalty": Range(-2.0, 2.0),
        "repetition_penalty": Range(0.001, 1000.0),  # beyond them a logit may leave float32
        "max_tokens": Range(1, None),
        "min_tokens": Range(0, None),
        "logprobs": Range(0, MAX_LOGPROBS),
        "prompt_logprobs": Range(0, MAX_LOGPROBS),
    }
)
"""Of the numbers in `SamplingParams`."""


class SamplingError(ValueError):
    """A value outside its range.

    Attributes:
        field: of `SamplingParams`; fault: what is wrong with it. The message is both.
    """

    def __init__(self, field: str, fault: str):
        super().__init__(f"{field} {fault}")
        self.field, self.fault = field, fault


class SamplingLevel(enum.IntEnum):
    """How much work drawing a token takes; a level can do what the lower ones can."""

    GREEDY = 0
    RANDOM = 1  # temperature and min-p
    FILTERED = 2  # top-k and top-p
    PENALISED = 3  # penalties and held-back stop ids


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt; names and meanings are vLLM's.

    ``top_k`` 0 or -1 keeps every token. ``seed`` None draws one per request. ``logprobs`` and ``prompt_logprobs``
    count the alternatives to report besides the token itself (at most 20). ``max_tokens`` None means up to the
    model's context length.

    Raises:
        SamplingError: a value is outside its range; the message names the field, the value and the range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self):
        """Every number must fit the device: the engine's thread meets it in the middle of everybody's iteration."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        for name, limits in RANGES.items():
            within(self, name, *limits)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            fault = f"is {self.min_tokens}; it must be at most max_tokens ({self.max_tokens})"
            raise SamplingError("min_tokens", fault)
        wrong = next((each for each in self.stop_token_ids if not 0 <= each <= LARGEST), None)
        if wrong is not None:
            raise SamplingError("stop_token_ids", f"holds {wrong}; token ids are 0 to {LARGEST}")
        if any(not text for text in self.stop):
            raise SamplingError("stop", "holds an empty string; a stop string needs at least one character")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)

    @property
    def level(self) -> SamplingLevel:
        """The least level that can sample so."""
        if self.penalised or self.min_tokens:
            return SamplingLevel.PENALISED
        if self.greedy:
            return SamplingLevel.GREEDY
        return SamplingLevel.FILTERED if self.top_k > 0 or self.top_p < 1 else SamplingLevel.RANDOM


def within(params: SamplingParams, name: str, low, high, open_low: bool) -> None:
    value = getattr(params, name)
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SamplingError(name, f"is {value!r}; it must be a number")
    if value != value or value < low or (open_low and value == low) or (high is not None and value > high):
        bracket = "(" if open_low else "["
        raise SamplingError(name, f"is {value}; it must be in {bracket}{low}, {'∞)' if high is None else f'{high}]'}")


@dataclass(frozen=True)
class Request:
    """One sequence to continue, as the scheduler sees it. Sampling with n > 1 makes n of these.

    Attributes:
        id: unique in the life of the engine.
        prompt: token ids, at least one.
        max_new_tokens: resolved from ``max_tokens`` and the context length; at least 1.
        adapter_version: unique number of the pinned adapter version, 0 for the base model; never reused.
        priority: smaller is served first (vLLM's meaning); ties go to the earlier arrival.
        arrival: seconds on the engine's clock.
        cache_salt: requests reuse cached prefixes only of requests with the same one.
    """

    id: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    max_new_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    adapter_version: int = 0
    priority: int = 0
    arrival: float = 0.0
    cache_salt: str = ""


@dataclass
class RequestOutput:
    """What one sequence has become so far.

    Attributes:
        index: 0 .. n-1 among the outputs of its prompt.
        finish_reason: None while it grows, then "stop", "length", "abort" or "error".
        logprobs: one entry per generated token, each mapping token ids to log-probabilities and containing the
            token itself; None unless asked for.
        prompt_logprobs: the same per prompt token; the first entry is None.
        cached_tokens: of the prompt, that were found in the cache when the request was seated first; None before. They
            change nothing in what is generated.
        seated: seconds on the engine's clock, when that was; None before.
    """

    index: int
    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[dict[int, float]] | None = None
    prompt_logprobs: list[dict[int, float] | None] | None = None
    error: str | None = None
    cached_tokens: int | None = field(default=None, compare=False)
    seated: float | None = field(default=None, compare=False)
