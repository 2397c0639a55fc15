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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_view_shares_its_memory(dtype):
    """A layer here is a multiple of 64 bytes, which a CPU asks for."""
    whole = stacked(dtype)
    layer_bytes = whole.nbytes // 3
    for index in range(3):
        pointer = view_of(whole, index).unsafe_buffer_pointer()
        assert pointer == whole.unsafe_buffer_pointer() + index * layer_bytes
