"""Matrices: the frozen matrix of each product and, behind its rows, A of every resident adapter.

A product with all rows makes x A beside x W, without a launch of its own; one with the leading rows is the base
model's, and reads no more than those. Every shard has its own rows together:

    qkv   [ q_0 | k_0 | v_0 | A of q | A of k | A of v | q_1 | ... ]        R rows for each A, R the flat rank axis
"""

import jax
import jax.numpy as jnp
from flax import nnx

from flexjax.models.build import dotted
from flexjax.models.lora import PRODUCTS, ROW_PARALLEL


def row_shards(product: str, tp: int) -> int:
    """Shards that divide the rows of a product's matrix; of the others, they divide the columns."""
    return 1 if PRODUCTS[product][0] in ROW_PARALLEL else tp


def rows_behind(product: str, rank: int) -> int:
    """Rows behind those of the frozen matrix, per shard of rows."""
    return len(PRODUCTS[product]) * rank


def with_room(product: str, frozen: jax.Array, rank: int, tp: int) -> jax.Array:
    """The frozen matrices of all layers, [layers, out, in], with zeros where A will be."""
    layers, _, width = frozen.shape
    by_shard = frozen.reshape(layers, row_shards(product, tp), -1, width)
    room = (0, 0), (0, 0), (0, rows_behind(product, rank)), (0, 0)
    return jnp.pad(by_shard, room).reshape(layers, -1, width)


def matrices_of(weights: nnx.State) -> dict[str, jax.Array]:
    """Product -> its leaf of a decoder's state."""
    leaves = {dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(weights)}
    return {product: leaves[f"layers.{product}"] for product in PRODUCTS}


def with_matrices(weights: nnx.State, matrices: dict[str, jax.Array]) -> nnx.State:
    """The state with other leaves for the products."""
    other = {f"layers.{product}": matrix for product, matrix in matrices.items()}
    return jax.tree_util.tree_map_with_path(lambda path, leaf: other.get(dotted(path), leaf), weights)
