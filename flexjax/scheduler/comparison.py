"""The policies to compare with: one side only, taking turns, and a fixed budget."""

from flexjax.layout import PAGE_TOKENS, SlotLayout
from flexjax.scheduler.policy import NOTHING, Policy, Share, View, positive, whole

ARRIVAL_RATE_SMOOTHING = 0.1
"""Weight of the newest turn in the running mean of the arrival rate."""


class InferenceOnly(Policy):
    """Finetuning waits for ever."""

    def serve(self, view: View) -> Share:
        return Share()

    def finetune(self, view: View) -> Share:
        return NOTHING


class FinetuneOnly(Policy):
    """Requests wait for ever; finetuning gets the largest window and up to ``units`` units in every iteration."""

    def __init__(self, units: int = 32):
        self.units = whole("units", units, 1)

    def serve(self, view: View) -> Share:
        return NOTHING

    def finetune(self, view: View) -> Share:
        return Share(units=self.units)


class TemporalSharing(Policy):
    """``n`` iterations that only serve, then one that only finetunes for ``stretch`` seconds; and again.

    Whoever is alone gets every turn, and a turn that requests cannot use.

    Args:
        n: serving iterations for each finetuning one.
        stretch: predicted seconds of a finetuning iteration.
    """

    def __init__(self, n: int = 8, stretch: float = 0.5):
        self.n = whole("n", n, 1)
        self.stretch = positive("stretch", stretch)
        self._served = 0

    def serve(self, view: View) -> Share:
        if view.finetuning and (self._served >= self.turns(view) or not view.serving):
            self._served = 0
            return NOTHING
        self._served += view.serving
        return Share()

    def finetune(self, view: View) -> Share:
        return Share(limit=self.stretch) if self._served == 0 or not view.serving_seconds else NOTHING

    def turns(self, view: View) -> int:
        """Serving iterations before the next finetuning one."""
        return self.n


class DynamicTemporalSharing(TemporalSharing):
    """Temporal sharing whose n follows the load, after the dynamic form in arXiv 2402.18789, section 8.

    ``n = smallest * (1 + waiting + rate * stretch)``, at most ``largest``: every request that waits now, and every one
    expected to arrive during a stretch, buys another ``smallest`` serving iterations. ``rate`` is the smoothed
    number of arrivals per second.
    """

    def __init__(self, smallest: int = 1, largest: int = 64, stretch: float = 0.5):
        super().__init__(smallest, stretch)
        self.largest = whole("largest", largest, smallest)
        self._rate = 0.0
        self._seen: tuple[float, int] | None = None

    def serve(self, view: View) -> Share:
        if self._seen is not None and view.now > self._seen[0]:
            rate = (view.arrivals - self._seen[1]) / (view.now - self._seen[0])
            self._rate += ARRIVAL_RATE_SMOOTHING * (rate - self._rate)
        if self._seen is None or view.now > self._seen[0]:
            self._seen = (view.now, view.arrivals)
        return super().serve(view)

    def turns(self, view: View) -> int:
        return min(self.largest, round(self.n * (1 + view.waiting + self._rate * self.stretch)))


class FixedBudget(Policy):
    """The same amount of finetuning in every iteration, whatever the clock says; repeats to the bit.

    Args:
        finetune_tokens: slots of finetuning windows, a multiple of 64. While a job has work, prompts leave
            them free in a pinned layout, but take one tile at least.
        backward_units: units (loss windows and updates count too).
        layout: the only layout used, so that the shape of every sum is the same; None: any.
    """

    def __init__(self, finetune_tokens: int, backward_units: int, layout: SlotLayout | None = None):
        self.finetune_tiles, rest = divmod(whole("finetune_tokens", finetune_tokens, PAGE_TOKENS), PAGE_TOKENS)
        if rest:
            raise ValueError(f"finetune_tokens is {finetune_tokens}; it must be a multiple of {PAGE_TOKENS}")
        self.backward_units = whole("backward_units", backward_units, 1)
        if layout is not None and layout.tiles < self.finetune_tiles:
            raise ValueError(
                f"finetune_tokens is {finetune_tokens}, but the layout's chunk has {layout.chunk} slots; "
                "lower finetune_tokens or choose a layout with a larger chunk"
            )
        self._layout = layout

    @property
    def layout(self) -> SlotLayout | None:
        return self._layout

    def serve(self, view: View) -> Share:
        if self._layout is None or not view.finetuning:
            return Share()
        return Share(tiles=max(1, self._layout.tiles - self.finetune_tiles))

    def finetune(self, view: View) -> Share:
        return Share(tiles=self.finetune_tiles, units=self.backward_units)
