"""VirtualDevice: how many seconds a GPU would take for an iteration, from a roofline. It decides nothing.

The real device is not described by the sum over programs that the scheduler's latency model assumes: bytes and FLOPs
overlap, attention of rows moves bytes while attention of tiles computes, and every call differs a little.
"""

import random
from dataclasses import dataclass

from flexjax.layout import PAGE_TOKENS, SlotLayout, tiles_for
from flexjax.scheduler import Iteration, Microbatch, Unit, UnitKind


@dataclass(frozen=True)
class Roofline:
    """Llama-3.1-8B in bfloat16 on one H200; the defaults are fitted to the iterations of two co-served traces, see
    docs/performance.md.

    Attributes:
        bandwidth: bytes a second that products reach: 4.1 TB/s of a copy, 0.85 of it; row_bandwidth: that attention of
            decode slots does at a few hundred positions each.
        flops: FLOPs a second of the large products; attention_flops: of attention in tiles and of its gradient.
        forward_launches, unit_launches, update_launches: seconds of small kernels in each program; tape_launches: of
            those that write the tape of a forward step.
        slot_seconds: elementwise work of one slot in all layers; row_seconds: sampling and logits of a row;
            loss_seconds: elementwise work of a slot in the loss.
        layer_parameters, head_parameters: values in the matrices of one layer, and of the head.
        attention_width: query heads times head size; kv_bytes: keys and values of one position in all layers.
        tape_bytes: written for one finetuning slot; tape_seconds: of a slot beside that, for adapters too.
        recompute: FLOPs of the backward pass besides the input gradient, as a share of it; the tape plan decides.
        adapter_parameters: values of the trained adapter.
    """

    bandwidth: float = 4.1e12 * 0.85
    row_bandwidth: float = 3.06e12
    flops: float = 7.4e14
    attention_flops: float = 3.6e14
    forward_launches: float = 0.8e-3
    unit_launches: float = 0.25e-3
    update_launches: float = 0.8e-3
    tape_launches: float = 0.0
    slot_seconds: float = 1.5e-6
    row_seconds: float = 4e-6
    loss_seconds: float = 0.5e-6
    layers: int = 32
    layer_parameters: int = 218_103_808
    head_parameters: int = 525_336_576
    attention_width: int = 4096
    kv_bytes: int = 131_072
    tape_bytes: int = 3_014_656
    tape_seconds: float = 2e-6
    recompute: float = 0.0
    adapter_parameters: int = 9_437_184

    def forward(self, layout: SlotLayout, row_context: int, tile_context: int, taped: int = 0) -> float:
        """Seconds of a forward step.

        Args:
            row_context: positions that decode slots attend to; tile_context: that tiles do, summed over tiles.
            taped: slots that write to a tape.
        """
        products = self.layers * self._product(layout.slots, self.layer_parameters)
        head = self._product(layout.rows, self.head_parameters)
        rows = row_context * self.kv_bytes / self.row_bandwidth
        tiles = tile_context * self._tile_flops * self.layers / self.attention_flops
        tape = self.tape_launches * layout.tape + taped * (self.tape_bytes / self.bandwidth + self.tape_seconds)
        rest = layout.slots * self.slot_seconds + layout.rows * self.row_seconds + tape
        return self.forward_launches + products + head + rows + tiles + rest

    def loss(self, slots: int) -> float:
        return self.unit_launches + 2 * self._product(slots, self.head_parameters) + slots * self.loss_seconds

    def backward(self, slots: int, tile_context: int) -> float:
        """Seconds of one unit: the input gradient, what is recomputed, and the gradient of attention."""
        products = (1 + self.recompute) * self._product(slots, self.layer_parameters)
        attention = 2.5 * tile_context * self._tile_flops / self.attention_flops
        rest = slots * 1.5 * self.slot_seconds / self.layers + slots * self.tape_bytes / self.layers / self.bandwidth
        return self.unit_launches + products + attention + rest

    @property
    def update(self) -> float:
        """Master, two moments and the gradient are read and written, in float32."""
        return self.update_launches + 32 * self.adapter_parameters / self.bandwidth

    @property
    def _tile_flops(self) -> float:
        """q k^T and p v of a tile's queries with one position, in one layer."""
        return 4.0 * PAGE_TOKENS * self.attention_width

    def _product(self, slots: int, parameters: int) -> float:
        """Bytes and FLOPs overlap, but not wholly where they are equal."""
        moved = 2 * parameters / self.bandwidth
        computed = 2 * parameters * slots / self.flops
        return (moved**4 + computed**4) ** 0.25


POWER_LIMITED = Roofline(
    forward_launches=3.0e-3,
    tape_launches=2.5e-3,
    row_seconds=0.0,
    tape_seconds=0.0,
    loss_seconds=0.2e-6,
    row_bandwidth=3.42e12,
    attention_flops=5.1e14,
)
"""The same GPU as finetuning keeps it: at 690 of 700 W and 1,650 of 1,980 MHz. Fitted to 15,000 iterations of set-up A:
of the 38 layouts that they used most, 32 take what they took within 6 %, all within 13."""


class VirtualDevice:
    """Seconds of real iterations, with noise.

    Args:
        noise: relative standard deviation of every call.
        hiccup: probability that a forward step takes ``hiccup_seconds`` longer.
    """

    def __init__(
        self,
        roofline: Roofline | None = None,
        seed: int = 0,
        noise: float = 0.015,
        hiccup: float = 0.001,
        hiccup_seconds: float = 0.004,
    ):
        self.roofline = roofline or Roofline()
        self._random = random.Random(seed)
        self._noise, self._hiccup, self._hiccup_seconds = noise, hiccup, hiccup_seconds

    def forward_seconds(self, iteration: Iteration) -> float:
        """Of the iteration's forward step; 0 without one."""
        if iteration.layout is None:
            return 0.0
        rows = sum(slot.position + 1 for slot in iteration.decode)
        segments = iteration.prompts + iteration.windows
        tiles = sum(tile_context(part.start, part.length) for part in segments)
        hiccup = self._hiccup_seconds if self._random.random() < self._hiccup else 0.0
        seconds = self.roofline.forward(iteration.layout, rows, tiles, iteration.finetuning_slots)
        return self._noisy(seconds) + hiccup

    def unit_seconds(self, unit: Unit, microbatch: Microbatch) -> float:
        """Of one finetuning unit."""
        if unit.kind is UnitKind.UPDATE:
            return self._noisy(self.roofline.update)
        if unit.kind is UnitKind.LOSS:
            return self._noisy(self.roofline.loss(unit.slots))
        return self._noisy(self.roofline.backward(unit.slots, window_context(microbatch, unit.window)))

    def _noisy(self, seconds: float) -> float:
        return seconds * max(0.5, self._random.gauss(1.0, self._noise))


def tile_context(start: int, length: int) -> int:
    """Positions that the tiles of a segment attend to; the last tile of 130 tokens from 64 on attends to 256::

    tile        64..127  128..191  192..193
    attends to      128       192       256
    """
    return sum(start + PAGE_TOKENS * (tile + 1) for tile in range(tiles_for(length)))


def window_context(microbatch: Microbatch, window: int) -> int:
    """The same of the window's tiles, each within its own sequence."""
    size = microbatch.window // PAGE_TOKENS
    total = 0
    for sequence, length in enumerate(microbatch.lengths):
        first = microbatch.block_of(sequence)
        blocks = range(max(first, window * size), min(first + tiles_for(length), (window + 1) * size))
        total += sum(PAGE_TOKENS * (block - first + 1) for block in blocks)
    return total
