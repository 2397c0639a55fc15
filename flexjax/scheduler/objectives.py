"""The policies that co-serve: within a latency objective, at a price, or without either."""

from flexjax.scheduler.policy import NOTHING, Policy, Share, View, positive, whole

PATIENCE = 4.0
"""Times its objective that a request without a first token waits behind others that can still be in time."""

SURGE = 0.5, 0.7
"""Finetuning fades while rising demand goes from the first of these shares of what could be served to the second.
Filled up to their limit, iterations are as long as they may be, requests stay longer, and their rows are full before a
burst is at its height. Demand that is high for long leaves finetuning what the limit leaves."""

FADING = 0.98
"""Share of what a forward step of requests has needed that the next one is expected to need."""


class CoServe(Policy):
    """Requests first, finetuning in what the objective leaves: each iteration is planned below ``limit`` seconds.

    While requests queue for want of rows alone and the first of them has used half its time to first token,
    finetuning gets nothing: shorter iterations free rows sooner. While a request lacks pages, no tape grows, and the
    one whose backward pass has begun gets all the room there is: its pages come back when it ends. Otherwise
    finetuning gets eventual progress only where there is room: an objective that decoding alone exceeds leaves none
    until the load falls.

    TPOT is a mean over a request's tokens: tokens come when a forward step has ended, so that a gap between two of
    them holds the units of one iteration and the forward step of the next, and only the mean of the gaps is that of
    the iterations. With ``itl`` each gap counts: a forward step takes what the units before it left, and units leave
    room for the forward steps that requests have needed lately.

    Args:
        objective: seconds per output token.
        margin: fraction of the objective kept free for mispredictions.
        ttft: objective for the time to first token, seconds.
        itl: objective for single gaps between tokens, seconds.
    """

    def __init__(self, objective: float, margin: float = 0.1, ttft: float = 5.0, itl: float | None = None):
        self.objective = positive("objective", objective)
        self.ttft = positive("ttft", ttft)
        self.itl = None if itl is None else positive("itl", itl)
        if not 0 <= margin < 1:
            raise ValueError(f"margin is {margin}; it must be in [0, 1)")
        self.margin = margin
        self._lately = 0.0

    @property
    def limit(self) -> float:
        """Predicted seconds that an iteration may take."""
        return (self.objective if self.itl is None else min(self.objective, self.itl)) * (1 - self.margin)

    def serve(self, view: View) -> Share:
        late = view.now - max(self.ttft - 2 * self.objective, self.ttft / 2)
        limit = self.limit if self.itl is None or not view.decoding else self.limit - view.carried_seconds
        return Share(limit=limit, late_before=late, lost_before=view.now - PATIENCE * self.ttft)

    def finetune(self, view: View) -> Share:
        late = view.oldest_arrival is not None and view.now - view.oldest_arrival > self.ttft / 2
        if view.serving_seconds and view.waiting and view.rows_full and late and not view.pages_short:
            return Share(limit=self.limit, tiles=0, units=0)
        tiles = 0 if view.pages_short else None
        fades = view.serving_seconds and not view.pages_short
        limit = faded(self.limit, view.serving_seconds, view.surge) if fades else self.limit
        if self.itl is None or not view.decoding:
            return Share(limit=limit, tiles=tiles)
        self._lately = min(max(view.serving_seconds, self._lately * FADING), self.limit / 2)
        forward, work = self.limit - view.carried_seconds, self.limit - self._lately
        return Share(limit=limit, tiles=tiles, forward=forward, work=work)


def faded(limit: float, serving: float, surge: float) -> float:
    """The limit, or less of what it leaves beside the requests."""
    low, high = SURGE
    gone = min(max((surge - low) / (high - low), 0.0), 1.0)
    return serving + (1.0 - gone) * (limit - serving) if serving < limit else limit


class Price(Policy):
    """Finetuning may make requests slower by at most ``percent`` of what they take alone, on average.

    Time that was granted but not used is saved up to ``burst`` seconds, so that a unit longer than one
    iteration's grant still comes through.

    Args:
        percent: finetuning seconds per hundred seconds of serving.
        burst: most seconds saved, and the longest iteration while nobody is served.
    """

    def __init__(self, percent: float, burst: float = 0.1):
        self.percent = positive("percent", percent)
        self.burst = positive("burst", burst)
        self._saved = 0.0

    def serve(self, view: View) -> Share:
        return Share()

    def finetune(self, view: View) -> Share:
        if not view.serving_seconds:
            return Share(limit=self.burst)
        granted = view.serving_seconds * self.percent / 100
        self._saved = min(self._saved + granted, max(self.burst, granted))
        return Share(limit=view.serving_seconds + self._saved)

    def charge(self, seconds: float) -> None:
        self._saved = max(0.0, self._saved - seconds)


class FlatOut(Policy):
    """No objective: requests first, then the largest window and up to ``units`` units in every iteration."""

    def __init__(self, units: int = 32):
        self.units = whole("units", units, 1)

    def serve(self, view: View) -> Share:
        return Share()

    def finetune(self, view: View) -> Share:
        return Share(units=self.units) if view.finetuning else NOTHING
