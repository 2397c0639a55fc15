"""Named cases of the page write: real shapes for benchmarks and tuning, small ones for tests."""

from dataclasses import dataclass

import numpy as np

from pallas_kernels.model_shapes import LLAMA_3_1_8B, QWEN_2_5_7B, SMOLLM2_135M, STORIES_260K, ModelShape
from pallas_kernels.page_write.parts import Pages, Rows
from pallas_kernels.random_values import normal

PAGE = 64


@dataclass(frozen=True)
class Case:
    """``rows`` rows of ``width`` values into a pool of ``pages`` pages, ``dropped`` of them with a negative slot."""

    name: str
    width: int
    rows: int
    dropped: int
    pages: int
    layers: int = 2
    dtype: str = "bfloat16"

    def make(self, seed: int) -> dict:
        """Keyword arguments of ``page_write``; slots are distinct and in random order."""
        random = np.random.default_rng(seed)
        slots = random.permutation(self.pages * PAGE)[: self.rows]
        slots[random.permutation(self.rows)[: self.dropped]] = -1 - random.integers(0, 100, self.dropped)
        return {
            "pool": normal(random, (self.layers, self.pages, PAGE, self.width), self.dtype),
            "layer": np.int32(self.layers - 1),
            "rows": normal(random, (self.rows, self.width), self.dtype),
            "slots": slots.astype(np.int32),
        }


@dataclass(frozen=True)
class PagesCase:
    """Tiles of 64 rows of ``columns`` values from row ``first_row`` into pages of rows of ``width``; one page of the
    first tile is dropped for being negative, one of the last for lying past the end."""

    name: str
    width: int
    columns: int
    tiles: int
    pages: int
    first_row: int = 0
    layers: int = 2
    dtype: str = "bfloat16"

    def make(self, seed: int) -> dict:
        """Keyword arguments of ``write_pages``; pages are distinct and in random order."""
        random = np.random.default_rng(seed)
        across = -(-self.columns // self.width)
        pages = random.permutation(self.pages)[: self.tiles * across].reshape(self.tiles, across)
        pages[0, 0], pages[-1, -1] = -1, self.pages
        return {
            "pool": normal(random, (self.layers, self.pages, PAGE, self.width), self.dtype),
            "layer": np.int32(self.layers - 1),
            "values": normal(random, (self.first_row + self.tiles * PAGE, self.columns), self.dtype),
            "pages": pages.astype(np.int32),
            "first_row": self.first_row,
        }


@dataclass(frozen=True)
class PartsCase:
    """What a layer of a step keeps: of ``rows`` decode rows and ``tiles`` tiles of 64 slots behind them, rows of
    ``width`` values each to its slot and each tile to its page; and of the tiles also values of each of ``columns``
    columns. Where it ``drops`` any, of every part the first row or page is dropped for being negative; the last, if it
    is another, for lying past the end."""

    name: str
    width: int
    rows: int
    tiles: int
    columns: tuple[int, ...]
    pages: int
    layers: int = 2
    dtype: str = "bfloat16"
    drops: bool = True

    def make(self, seed: int) -> dict:
        """Keyword arguments of ``write_parts``."""
        random = np.random.default_rng(seed)
        parts = self.parts(random)
        pool = normal(random, (self.layers, self.pages, PAGE, self.width), self.dtype)
        return {"pool": pool, "layer": np.int32(self.layers - 1), "parts": parts}

    def parts(self, random) -> list[Rows | Pages]:
        """Rows and tiles have distinct pages, in random order."""
        spread = -(-self.rows // PAGE)
        own, free = np.split(random.permutation(self.pages), [spread])
        slots = random.permutation((own[:, None] * PAGE + np.arange(PAGE)).reshape(-1))[: self.rows]
        if self.drops:
            slots[:1], slots[1:][-1:] = -1, self.pages * PAGE
        values = [self.values(random, columns) for columns in (self.width, *self.columns)]
        parts = [Rows(values[0], slots.astype(np.int32))] if self.rows else []
        for each in values:
            across = -(-each.shape[1] // self.width)
            pages, free = np.split(free, [self.tiles * across])
            if self.drops:
                pages[:1], pages[1:][-1:] = -1, self.pages
            parts.append(Pages(each, pages.reshape(self.tiles, across).astype(np.int32), first_row=self.rows))
        return parts

    def values(self, random, columns: int):
        return normal(random, (self.rows + self.tiles * PAGE, columns), self.dtype)


def write(model: ModelShape, rows: int, pages: int, **options) -> Case:
    """K/V rows of ``rows`` tokens, a sixteenth of them dropped."""
    return Case(f"write {model.name} {rows} rows", model.row_width, rows, rows // 16, pages, **options)


LARGE = (
    write(LLAMA_3_1_8B, 64, 1024),
    write(LLAMA_3_1_8B, 2048, 1024),
    write(QWEN_2_5_7B, 2048, 1024),
    write(SMOLLM2_135M, 256, 1024),
)
"""Shapes worth timing."""

SMALL = (
    write(STORIES_260K, 48, 5),
    Case("one row", 16, 1, 0, 1, dtype="float32"),
    Case("every row dropped", 16, 5, 5, 2),
    Case("every slot written", 8, 128, 0, 2, layers=3, dtype="float32"),
)
"""Edges of the specification, cheap on a CPU."""


def window(model: ModelShape, tokens: int, columns: int, first_row: int, what: str) -> PagesCase:
    """Values of ``columns`` columns of a window of ``tokens`` tokens, after ``first_row`` decode rows."""
    name = f"{what} of {model.name}, {tokens} tokens"
    return PagesCase(name, model.row_width, columns, tokens // PAGE, 1024, first_row)


LARGE_PAGES = (
    window(LLAMA_3_1_8B, 2048, LLAMA_3_1_8B.row_width, 256, "keys and values"),
    window(LLAMA_3_1_8B, 2048, LLAMA_3_1_8B.hidden, 0, "hidden"),
    window(LLAMA_3_1_8B, 2048, LLAMA_3_1_8B.feed_forward, 0, "gate"),
    window(QWEN_2_5_7B, 512, QWEN_2_5_7B.feed_forward, 64, "gate"),
    window(SMOLLM2_135M, 256, SMOLLM2_135M.hidden, 64, "hidden"),
)
"""Page writes worth timing."""

SMALL_PAGES = (
    PagesCase("one page a tile", 128, 128, 3, 5, first_row=8),
    PagesCase("two and a half pages a tile", 128, 320, 2, 9, layers=3),
    PagesCase("less than a page a tile", 64, 16, 2, 3, first_row=3),
    PagesCase("four bytes a value", 32, 40, 2, 6, dtype="float32"),
)
"""Edges of page writes, cheap on a CPU."""


def layer(model: ModelShape, rows: int, tokens: int, columns: tuple[int, ...], what: str) -> PartsCase:
    """What a layer writes at a time of ``rows`` decode rows and a window of ``tokens`` tokens."""
    return PartsCase(f"{what} of {model.name}, {rows} + {tokens}", model.row_width, rows, tokens // PAGE, columns, 1024)


LARGE_PARTS = (
    layer(LLAMA_3_1_8B, 64, 2048, (), "keys and values"),
    layer(LLAMA_3_1_8B, 64, 512, (LLAMA_3_1_8B.hidden,) * 2, "keys, values, x and q"),
    layer(LLAMA_3_1_8B, 64, 512, (*(LLAMA_3_1_8B.hidden,) * 2, 64, 2 * LLAMA_3_1_8B.feed_forward), "all that is kept"),
    layer(QWEN_2_5_7B, 64, 256, (QWEN_2_5_7B.hidden,) * 3, "keys, values, x, q and mid"),
    layer(SMOLLM2_135M, 64, 256, (SMOLLM2_135M.hidden,) * 2, "keys, values, x and q"),
)
"""Parts of one write worth timing."""

SMALL_PARTS = (
    PartsCase("a layer's parts", 128, 40, 2, (320, 256, 16), 24),
    PartsCase("pages beside more rows than a page has", 64, 70, 3, (), 9, layers=3),
    PartsCase("no rows", 32, 0, 2, (40, 32), 12, dtype="float32"),
    PartsCase("no tiles", 16, 5, 0, (24,), 3, dtype="float32"),
    PartsCase("more blocks than multiprocessors", 64, 3, 2, (4800,), 200, layers=1),
)
"""Edges of writes of several parts, cheap on a CPU."""
