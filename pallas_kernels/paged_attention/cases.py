"""Named cases of paged attention: real shapes for benchmarks and tuning, small ones for tests."""

from dataclasses import dataclass, replace

import numpy as np

from pallas_kernels.model_shapes import LLAMA_3_1_8B, QWEN_2_5_7B, SMOLLM2_135M, STORIES_260K, ModelShape
from pallas_kernels.paged_attention.mixed import Sequences
from pallas_kernels.random_values import normal

PAGE = 64


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        queries: queries a tile has room for.
        positions: position of the first query, per tile.
        lengths: queries that are there, per tile; 0 makes the tile inactive.
        pages_per_sequence: width of the page tables.
        layers: layers of the pool; the last one is read.
        one_sequence: the tiles are parts of one sequence and share its pages, as the tiles of a prompt chunk do.
    """

    name: str
    query_heads: int
    kv_heads: int
    head_size: int
    queries: int
    positions: tuple[int, ...]
    lengths: tuple[int, ...]
    pages_per_sequence: int
    layers: int = 2
    dtype: str = "bfloat16"
    one_sequence: bool = False

    def make(self, seed: int, unused: float = float("nan")) -> dict:
        """Keyword arguments of ``paged_attention``.

        Sequences get disjoint pages in random order, table entries beyond a context are random page ids or negative,
        and every row of the pool that no context owns is ``unused``.
        """
        random = np.random.default_rng(seed)
        tables, owned = self._allocate(random)
        tiles, pages = len(self.positions), len(owned)
        shape = (self.layers, pages, PAGE, 2 * self.kv_heads * self.head_size)
        pool = normal(random, shape, self.dtype)
        pool[:, ~owned] = unused
        return {
            "q": normal(random, (tiles, self.queries, self.query_heads, self.head_size), self.dtype),
            "pool": pool,
            "layer": np.int32(self.layers - 1),
            "tables": tables.astype(np.int32),
            "positions": np.array(self.positions, np.int32),
            "lengths": np.array(self.lengths, np.int32),
            "kv_heads": self.kv_heads,
            "scale": self.head_size**-0.5,
        }

    def _allocate(self, random) -> tuple[np.ndarray, np.ndarray]:
        """Page tables [tiles, pages_per_sequence] and which rows of the pool a context owns, [pages, page] bool."""
        contexts = np.where(np.array(self.lengths) > 0, np.add(self.positions, self.lengths), 0)
        if self.one_sequence:
            contexts = contexts.max(keepdims=True)
        counts = -(-contexts // PAGE)
        pages = int(counts.sum()) + 2
        order = random.permutation(pages)
        tables = random.integers(-2, pages, (len(contexts), self.pages_per_sequence))
        owned = np.zeros((pages, PAGE), bool)
        for sequence, (end, count) in enumerate(zip(np.cumsum(counts), counts, strict=True)):
            tables[sequence, :count] = order[end - count : end]
            owned[tables[sequence, :count]] = (np.arange(count * PAGE) < contexts[sequence]).reshape(count, PAGE)
        return np.broadcast_to(tables, (len(self.positions), self.pages_per_sequence)), owned


@dataclass(frozen=True)
class MixedCase:
    """Rows and tiles of one call, with the same heads and dtype."""

    rows: Case
    tiles: Case

    @property
    def name(self) -> str:
        return f"{self.rows.name} with {self.tiles.name}"

    def make_apart(self, seed: int) -> tuple[dict, dict]:
        """Keyword arguments of ``paged_attention`` for the rows and for the tiles, with one pool."""
        rows, tiles = self.rows.make(seed), self.tiles.make(seed + 1)
        tiles["tables"] = tiles["tables"] + rows["pool"].shape[1]
        rows["pool"] = tiles["pool"] = np.concatenate([rows["pool"], tiles["pool"]], axis=1)
        return rows, tiles

    def make(self, seed: int) -> dict:
        """Keyword arguments of ``mixed_paged_attention``."""
        return joined(*self.make_apart(seed))


def joined(rows: dict, tiles: dict) -> dict:
    """Of two calls of ``paged_attention`` with one pool, the keyword arguments of a mixed one."""
    q = np.concatenate([each["q"].reshape(-1, *each["q"].shape[2:]) for each in (rows, tiles)])
    sequences = (Sequences(each["tables"], each["positions"], each["lengths"]) for each in (rows, tiles))
    shared = {name: rows[name] for name in ("pool", "layer", "kv_heads", "scale")}
    return {"q": q, **dict(zip(("rows", "tiles"), sequences, strict=True)), **shared}


def decode(model: ModelShape, rows: int, context: int, **options) -> Case:
    """``rows`` sequences of ``context`` tokens, each computing its last token."""
    name = f"decode {model.name} {rows} x {context}"
    positions, pages = (context - 1,) * rows, -(-context // PAGE)
    heads = (model.query_heads, model.kv_heads, model.head_size)
    return Case(name, *heads, 1, positions, (1,) * rows, pages, layers=1, **options)


def chunk(model: ModelShape, tokens: int, context: int, **options) -> Case:
    """The last ``tokens`` tokens of one sequence of ``context`` tokens, in tiles of 64."""
    name = f"chunk {model.name} {tokens} of {context}"
    positions, pages = tuple(range(context - tokens, context, PAGE)), -(-context // PAGE)
    heads = (model.query_heads, model.kv_heads, model.head_size)
    lengths = (PAGE,) * len(positions)
    return Case(name, *heads, PAGE, positions, lengths, pages, layers=1, one_sequence=True, **options)


LARGE = (
    decode(LLAMA_3_1_8B, 64, 2048),
    decode(LLAMA_3_1_8B, 256, 1024),
    decode(LLAMA_3_1_8B, 4, 8192),
    decode(QWEN_2_5_7B, 64, 2048),
    decode(SMOLLM2_135M, 8, 100),
    chunk(LLAMA_3_1_8B, 512, 4096),
    chunk(LLAMA_3_1_8B, 2048, 2048),
    chunk(QWEN_2_5_7B, 512, 4096),
    chunk(SMOLLM2_135M, 256, 512),
)
"""Shapes worth timing."""

LARGE_MIXED = (MixedCase(decode(LLAMA_3_1_8B, 64, 2048), chunk(LLAMA_3_1_8B, 2048, 2048)),)

EDGES = (0, 62, 63, 64, 127, 128, 255)
"""Positions around the borders of pages."""

ALONE = (1,) * 6 + (0,)
"""One query in every tile but the last."""

SMALL = (
    decode(STORIES_260K, 3, 70),
    chunk(STORIES_260K, 128, 192, dtype="float32"),
    Case("decode at edges, group of 1", 2, 2, 8, 1, EDGES, ALONE, 4),
    Case("decode at edges, group of 3", 9, 3, 64, 1, EDGES, ALONE, 4, layers=3),
    Case("decode, group of 7", 14, 2, 16, 1, (5, 200), (1, 1), 8, dtype="float32"),
    Case("tiles of edge lengths, group of 4", 8, 2, 16, 64, (0, 0, 64, 128, 192, 64, 0), (1, 63, 64, 1, 64, 0, 0), 5),
    Case("tiles, group of 1", 2, 2, 8, 64, (0, 64, 320), (64, 63, 2), 7, dtype="float32"),
    Case("every tile inactive", 4, 2, 8, 64, (0, 64), (0, 0), 3),
    Case("one page in the table", 4, 4, 8, 1, (0, 63), (1, 1), 1, dtype="float32"),
)
"""Edges of the specification, cheap on a CPU."""

SMALL_MIXED = (MixedCase(SMALL[0], replace(SMALL[1], dtype="bfloat16")),)
