"""The collectives of tensor parallelism and their derivatives, on two virtual devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from flexjax.models.dropout import Dropout
from flexjax.models.sharding import enter_shards, gathered_columns, leave_shards, own_columns

pytestmark = pytest.mark.skipif(jax.device_count() < 2, reason="needs 2 devices: jax_num_cpu_devices")


def on_two(body, in_specs, out_specs):
    mesh = Mesh(np.array(jax.devices()[:2]), ("tp",))
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False))


def test_a_sharded_block_has_the_gradients_of_the_whole():
    """x + (tanh(x W)) V with W cut by columns and V by rows: output and the cotangents of x, W and V."""
    draw = np.random.default_rng(0).standard_normal
    x, w, v, d_y = (jnp.float32(draw(shape)) for shape in ((5, 4), (4, 6), (6, 4), (5, 4)))

    def block(enter, leave, x, w, v, d_y):
        y, pull_back = jax.vjp(lambda x, w, v: x + leave(jnp.tanh(enter(x) @ w) @ v), x, w, v)
        return y, *pull_back(d_y)

    specs = (P(), P(None, "tp"), P("tp"))
    sharded = functools.partial(block, enter_shards, leave_shards)
    got = on_two(sharded, (*specs, P()), (P(), *specs))(x, w, v, d_y)
    same = lambda value: value
    for g, e in zip(got, block(same, same, x, w, v, d_y), strict=True):
        np.testing.assert_allclose(g, e, atol=1e-5)


def test_own_columns_are_a_share_and_gather_again():
    x = jnp.arange(24.0).reshape(3, 8)
    shares = on_two(lambda x: own_columns(x, 2), (P(),), P("tp"))(x)
    np.testing.assert_array_equal(shares, np.concatenate([x[:, :4], x[:, 4:]]))
    again = on_two(lambda x: gathered_columns(own_columns(x, 2)), (P(),), P())(x)
    np.testing.assert_array_equal(again, x)


@pytest.mark.parametrize("name, spec", [("q_proj", P()), ("down_proj", P(None, "tp"))])
def test_dropout_masks_do_not_depend_on_the_shards(name, spec):
    """The input of a row-parallel module is cut: each shard must drop the columns that it would drop in the whole."""
    seeds, rate, layer = jnp.arange(10, dtype=jnp.uint32), jnp.full(10, 0.5), jnp.int32(1)
    x = jnp.ones((10, 8))
    got = on_two(lambda x: Dropout(seeds, rate, layer, tp=2)(name, x), (spec,), spec)(x)
    np.testing.assert_array_equal(got, Dropout(seeds, rate, layer)(name, x))
