"""LayoutCatalog: which layouts an engine has. It starts with what every engine needs and grows with what is asked."""

from collections.abc import Sequence
from dataclasses import replace

from flexjax.config import EngineConfig
from flexjax.layout import SlotLayout


class LayoutCatalog:
    """The layouts that are or will be compiled; only ever grows.

    At start there are layouts of the base model and, unless the policy serves requests only, those with a tape. Those
    whose slots may name an adapter come with the first adapter or job, those with log-probabilities or dropout with the
    first request or job that asks for them.

    Args:
        pinned: the one layout that a policy uses, if it does.

    Attributes:
        row_sizes: decode slots that layouts have, ascending.
    """

    def __init__(self, config: EngineConfig, pinned: SlotLayout | None = None):
        self.row_sizes, self._max_rows = config.row_sizes, config.max_rows
        self._plain = _plain_layouts(config)
        self._tapes = [replace(each, base_only=False, tape=True) for each in self._plain if each.chunk]
        self._adapters, self._tapes_wanted = False, config.policy != "inference_only"
        self._flags: list[dict[str, bool]] = []
        self._pinned = [] if pinned is None else [pinned]

    @property
    def layouts(self) -> list[SlotLayout]:
        """All of them."""
        sizes = self._plain + (self._tapes if self._tapes_wanted else [])
        if self._adapters:
            sizes = sizes + [replace(each, base_only=False) for each in self._plain]
        flagged = [layout for flags in self._flags for layout in _variants(sizes, self._max_rows, **flags)]
        return list(dict.fromkeys([*self._pinned, *sizes, *flagged]))

    @property
    def largest(self) -> SlotLayout:
        """The one that takes the most memory besides the state, whether it is there yet or not."""
        return max(self.layouts + self._tapes, key=lambda layout: (layout.slots, layout.tape, layout.rows))

    def add_jobs(self) -> None:
        """Steps may hold finetuning windows from now on, and serve what comes of them."""
        self._tapes_wanted = self._adapters = True

    def add_adapters(self) -> None:
        """Slots may name adapters from now on."""
        self._adapters = True

    def add_flags(self, **flags: bool) -> None:
        """Every mixture also with these flags set, in layouts of all rows."""
        if flags not in self._flags:
            self._flags.append(flags)


def _plain_layouts(config: EngineConfig) -> list[SlotLayout]:
    """Every row size decoding alone, and beside every chunk size, for the base model."""
    decode = [SlotLayout(rows, base_only=True) for rows in config.row_sizes]
    sizes = [(rows, chunk) for rows in config.row_sizes for chunk in config.chunks_beside(rows)]
    chunks = [SlotLayout(rows, chunk, base_only=True) for rows, chunk in sizes]
    return decode + chunks


def _variants(layouts: Sequence[SlotLayout], rows: int, **flags: bool) -> list[SlotLayout]:
    """The layouts of that many rows with further flags set, where they can have them."""
    needs_chunk = flags.get("prompt_logprobs") or flags.get("dropout")
    able = [each for each in layouts if (each.chunk or not needs_chunk) and (each.tape or not flags.get("dropout"))]
    return [replace(each, **flags) for each in able if each.rows == rows]
