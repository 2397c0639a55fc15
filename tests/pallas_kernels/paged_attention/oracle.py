"""What both GPU kernels of paged attention are compared with: a dense softmax in float64."""

import numpy as np
import pytest

PAGE = 64

ON_BOTH = pytest.mark.parametrize(
    "implementation", ["mosaic_gpu_interpreted", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)]
)


def dense(q, pool, layer, tables, positions, lengths, *, kv_heads, scale):
    """out and lse in float64, one tile and head at a time, over all keys that the tile's last query sees."""
    tiles, queries, heads, head_size = q.shape
    out, lse = np.zeros(q.shape), np.zeros((tiles, queries, heads))
    for tile in np.flatnonzero(lengths):
        there = slice(lengths[tile])
        context = positions[tile] + lengths[tile]
        pages = pool[layer, tables[tile, : -(-context // PAGE)]].astype(np.float64)
        keys, values = pages.reshape(-1, 2, kv_heads, head_size)[:context].transpose(1, 2, 0, 3)
        behind = np.arange(context) > positions[tile] + np.arange(lengths[tile])[:, None]
        for head in range(heads):
            scores = q[tile, there, head].astype(np.float64) @ keys[head * kv_heads // heads].T * scale
            scores[behind] = -np.inf
            lse[tile, there, head] = np.logaddexp.reduce(scores, axis=1)
            weights = np.exp(scores - lse[tile, there, head, None])
            out[tile, there, head] = weights @ values[head * kv_heads // heads]
    return out, lse


def assert_close(got, expected):
    """Weights are rounded to bfloat16 (relative error 2**-9, both ways), and so is the result; values are near 1."""
    out, lse = got
    np.testing.assert_allclose(np.asarray(out, np.float64), expected[0], rtol=2.0**-7, atol=2.0**-7)
    np.testing.assert_allclose(lse, expected[1], rtol=1e-5, atol=1e-5)
