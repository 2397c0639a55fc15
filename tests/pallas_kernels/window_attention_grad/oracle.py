"""The window's attention gradient by its formula, in float64."""

import numpy as np

PAGE = 64


def oracle(q, out, lse, d_out, pool, layer, tables, block_starts, first_block, d_k, d_v, *, kv_heads, scale):
    """The chain rule of one softmax per query and head, in float64."""
    q, out, lse, d_out, pool = (np.asarray(x).astype(np.float64) for x in (q, out, lse, d_out, pool))
    d_q, d_k, d_v = np.zeros(q.shape), np.array(d_k, np.float64), np.array(d_v, np.float64)
    rows = pool[layer, tables].reshape(len(tables) * PAGE, 2, kv_heads, -1)
    for query in range(len(q)):
        slot = first_block * PAGE + query
        keys = slice(block_starts[slot // PAGE] * PAGE, slot + 1)
        for head in range(q.shape[1]):
            if not d_out[query, head].any():
                continue
            kv_head = head * kv_heads // q.shape[1]
            k, v = rows[keys, 0, kv_head], rows[keys, 1, kv_head]
            weights = np.exp(k @ q[query, head] * scale - lse[query, head])
            d_scores = weights * (v @ d_out[query, head] - out[query, head] @ d_out[query, head])
            d_q[query, head] = d_scores @ k * scale
            d_k[keys, kv_head] += np.outer(d_scores, q[query, head]) * scale
            d_v[keys, kv_head] += np.outer(weights, d_out[query, head])
    return d_q, d_k, d_v
