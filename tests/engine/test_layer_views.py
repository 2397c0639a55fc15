"""Views of single layers hold what the stack holds, shard by shard, and are the same memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flexjax.engine.layer_views import layer_views, view_of
from flexjax.models.bits import from_bits


def stacked(dtype) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (3, 64, 8)).astype(dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("spec", [P(), P(None, "tp"), P(None, None, "tp")], ids=str)
@pytest.mark.parametrize("tp", [1, 2])
def test_every_layer_on_every_shard(tp, spec, dtype):
    if tp > len(jax.devices()):
        pytest.skip(f"{tp} shards need as many devices; there are {len(jax.devices())}")
    whole, mesh = stacked(dtype), Mesh(np.array(jax.devices()[:tp]), ("tp",))
    views = layer_views(whole, NamedSharding(mesh, spec))
    assert len(views) == 3
    for index, view in enumerate(views):
        assert view.sharding == NamedSharding(mesh, P(*spec[1:]))
        np.testing.assert_array_equal(np.asarray(from_bits(view, dtype)), np.asarray(whole[index]))


@pytest.mark.parametrize("spec", [P(), P(None, "tp"), P(None, None, "tp")], ids=str)
@pytest.mark.parametrize("tp", [1, 2])
def test_leading_rows_of_every_layer_on_every_shard(tp, spec):
    """Of 64 rows, 40 are wanted: the leading 20 of each half where shards divide rows."""
    if tp > len(jax.devices()):
        pytest.skip(f"{tp} shards need as many devices; there are {len(jax.devices())}")
    whole, mesh = stacked(jnp.bfloat16), Mesh(np.array(jax.devices()[:tp]), ("tp",))
    halves = spec == P(None, "tp") and tp == 2
    rows = np.r_[0:20, 32:52] if halves else np.r_[0:40]
    for index, view in enumerate(layer_views(whole, NamedSharding(mesh, spec), rows=40)):
        np.testing.assert_array_equal(np.asarray(from_bits(view, jnp.bfloat16)), np.asarray(whole[index, rows]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_view_shares_its_memory(dtype):
    whole = stacked(dtype)
    layer_bytes = whole.nbytes // 3
    for index in range(3):
        pointer = view_of(whole, index, rows=40).unsafe_buffer_pointer()
        assert pointer == whole.unsafe_buffer_pointer() + index * layer_bytes
