"""Policy: the interface by which an objective decides how long an iteration may take and who gets how much of it."""

import abc
from dataclasses import dataclass

from flexjax.layout import SlotLayout


@dataclass(frozen=True)
class View:
    """What a policy may look at.

    Attributes:
        now: seconds on the engine's clock.
        decoding: rows that have a token to decode.
        prompt_tokens: tokens that seated and waiting requests still have to compute from the host.
        waiting: requests without a row.
        rows_full: every row is taken.
        oldest_arrival: of the requests whose prompt is not computed yet, the earliest seated one or the next to be
            seated; None if there is none.
        arrivals: requests added so far.
        finetuning: some job has work that could run now.
        serving_seconds: predicted seconds of the iteration with the requests alone, once they are planned; 0 before,
            and if there is none in it.
        surge: what requests ask for now, as a share of the most that iterations within their limit could serve, if it
            is clearly more than lately; else 0. Known once the requests are planned.
        pages_short: a request lacks pages. Known once the requests are planned.
        carried_seconds: predicted seconds of the units since the last forward step: they stand between the tokens of
            that step and those of the next.
    """

    now: float
    decoding: int
    prompt_tokens: int
    waiting: int
    rows_full: bool
    oldest_arrival: float | None
    arrivals: int
    finetuning: bool
    serving_seconds: float = 0.0
    carried_seconds: float = 0.0
    surge: float = 0.0
    pages_short: bool = False

    @property
    def serving(self) -> bool:
        """Some request has something to compute."""
        return bool(self.decoding or self.prompt_tokens)


@dataclass(frozen=True)
class Share:
    """What requests, or finetuning, may have of an iteration.

    Attributes:
        allowed: False: nothing at all.
        limit: predicted seconds of the whole iteration; None: not bounded.
        tiles: at most, in the chunk part; None: what the layouts offer.
        units: at most; None: what ``limit`` allows. Requests have none.
        forward: predicted seconds of the forward step; work: of all units together. None: not bounded.
        late_before: requests that arrived earlier have missed their first token's deadline and let others go first;
            None: there is no deadline. lost_before: those that arrived even earlier have waited enough.
    """

    allowed: bool = True
    limit: float | None = None
    tiles: int | None = None
    units: int | None = None
    forward: float | None = None
    work: float | None = None
    late_before: float | None = None
    lost_before: float | None = None


NOTHING = Share(allowed=False)


class Policy(abc.ABC):
    """Asked twice in each iteration: for the requests, then, when these are planned, for finetuning.

    Whatever the limits, requests that may have something get all decode rows and at least the cheapest chunk of
    prompt tokens, and an iteration without requests in which finetuning may have something gets at least
    one chunk of windows or one unit.
    """

    @property
    def layout(self) -> SlotLayout | None:
        """The only layout to be used, or None for all."""
        return None

    @abc.abstractmethod
    def serve(self, view: View) -> Share:
        """The requests' share of the next iteration."""

    @abc.abstractmethod
    def finetune(self, view: View) -> Share:
        """Finetuning's share of the same iteration; ``view`` now tells the requests' predicted seconds."""

    def charge(self, seconds: float) -> None:  # noqa: B027  most policies keep no account
        """The iteration was planned; its predicted seconds beyond those of the requests alone."""


def positive(name: str, value: float) -> float:
    """``value``, or a ValueError naming it unless it is a number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{name} is {value!r}; it must be a number above 0")
    return value


def whole(name: str, value: int, low: int) -> int:
    """``value``, or a ValueError naming it unless it is a whole number of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {low}")
    return value
