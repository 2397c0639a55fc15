"""The specification of head product and loss, in plain jnp: one sweep over chunks of the vocabulary."""

import functools

import jax.numpy as jnp
from jax import lax

einsum = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)

LOWEST = -1e30
"""Below every logit; finite, so that differences are never NaN."""


def linear_cross_entropy(hidden, head, targets, *, chunk, transposed):
    """See ``api.linear_cross_entropy``.

    The head is frozen, so the gradient softmax(hidden head) head' - head[:, target] is an attention of the hidden
    states to the columns of the head: the online softmax of arXiv 1805.02867 gives it in the same sweep as the loss.
    """
    vocabulary_axis = 0 if transposed else 1
    vocabulary = head.shape[vocabulary_axis]
    logits_of, pull_back = ("td,vd->tv", "tv,vd->td") if transposed else ("td,dv->tv", "tv,dv->td")

    def sweep_chunk(first, size, carry):
        highest, total, target_logit, expected = carry
        columns = lax.dynamic_slice_in_dim(head, first, size, vocabulary_axis)
        logits = einsum(logits_of, hidden, columns)
        is_target = first + jnp.arange(size) == targets[:, None]
        target_logit += jnp.where(is_target, logits, 0.0).sum(axis=1)
        new_highest = jnp.maximum(highest, logits.max(axis=1))
        weights = jnp.exp(logits - new_highest[:, None])
        decay = jnp.exp(highest - new_highest)
        expected = expected * decay[:, None] + einsum(pull_back, weights.astype(hidden.dtype), columns)
        return new_highest, total * decay + weights.sum(axis=1), target_logit, expected

    # The zero takes over the mesh axes over which the operands vary, as the loop must inside shard_map.
    zero = jnp.zeros_like(hidden, jnp.float32) + jnp.zeros_like(head[0, 0], jnp.float32)
    carry = (zero[:, 0] + LOWEST, zero[:, 0], zero[:, 0], zero)
    chunk = min(chunk, vocabulary)
    whole, rest = divmod(vocabulary, chunk)
    carry = lax.fori_loop(0, whole, lambda index, carry: sweep_chunk(index * chunk, chunk, carry), carry)
    if rest:
        carry = sweep_chunk(whole * chunk, rest, carry)
    highest, total, target_logit, expected = carry
    counts = targets >= 0
    target_columns = jnp.take(head, targets, axis=vocabulary_axis, mode="clip")
    target_columns = target_columns if transposed else target_columns.T
    loss = jnp.where(counts, highest + jnp.log(total) - target_logit, 0.0)
    d_hidden = expected / total[:, None] - target_columns.astype(jnp.float32)
    return loss, jnp.where(counts[:, None], d_hidden, 0.0)
