"""The loss step: one window of a finished forward pass through the final norm and the head, chunk by chunk.

    (weights, pool, gradients, packed batch) -> (gradients, loss)
"""

import jax
import jax.numpy as jnp
from flax import nnx

from flexjax.state import Dimensions, Gradients
from flexjax.step_batch import loss_fields, unpack
from flexjax.steps import tape
from flexjax.steps.forward import read_final
from flexjax.steps.kernels import Kernels
from pallas_kernels import linear_cross_entropy


def loss_window(
    definition: nnx.GraphDef,
    dims: Dimensions,
    kernels: Kernels,
    weights: nnx.State,
    pool: jax.Array,
    gradients: Gradients,
    packed: jax.Array,
) -> tuple[Gradients, jax.Array]:
    """Cross entropy of one window, summed over its targets and divided by the group's number of targets.

    The cotangent of the last layer's output goes into ``gradients.hidden``; the window's d_k and d_v begin as zero,
    whatever a microbatch before that was given up has left there. The loss is a float32 scalar.
    """
    batch = unpack(packed, loss_fields(dims))
    model = nnx.merge(definition, weights)
    local = read_final(pool, dims, batch.final_place, dims.model.hidden_size // dims.tp)
    x = tape.whole(local, "x", dims.tp)
    normed, pull_back = jax.vjp(model.final_norm, x)
    losses, d_normed = linear_cross_entropy(
        normed,
        model.head_weight,
        batch.targets,
        chunk=min(kernels.head_chunk, dims.model.vocab_size),
        transposed=True,
        implementation=kernels.linear_cross_entropy,
    )
    (d_x,) = pull_back((d_normed * batch.normaliser).astype(x.dtype))
    write = lambda whole, rows: jax.lax.dynamic_update_slice_in_dim(whole, rows, batch.start, axis=0)
    d_k, d_v = (write(d, jnp.zeros((dims.window, *d.shape[1:]), d.dtype)) for d in (gradients.d_k, gradients.d_v))
    loss = jnp.sum(losses) * batch.normaliser
    return Gradients(gradients.a, gradients.b, write(gradients.hidden, d_x), d_k, d_v), loss
