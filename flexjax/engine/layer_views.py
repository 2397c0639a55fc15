"""Layer views: the weights of one layer as arrays of their own, in the memory of the stacked ones.

One backward program serves every layer. What it would take out of a stacked array by an index that is data, XLA copies
(435 MB a unit at the size of Llama-3.1-8B); an argument is read where it lies.
"""

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flexjax.models.bits import bits_dtype


class DeviceMemory:
    """A part of an array's memory on a GPU, by the interface through which CUDA libraries share arrays."""

    def __init__(self, stacked: jax.Array, index: int):
        self.stacked = stacked  # its memory must outlive the view
        shape, dtype = stacked.shape[1:], np.dtype(bits_dtype(stacked.dtype))
        offset = index * int(np.prod(shape)) * dtype.itemsize
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": dtype.str,
            "data": (stacked.unsafe_buffer_pointer() + offset, False),
            "strides": None,
            "version": 3,
        }


def layer_views(stacked: jax.Array, sharding: NamedSharding) -> list[jax.Array]:
    """One array for every entry of the first axis, which no shard divides.

    Args:
        stacked: [layers, ...], sharded as ``sharding`` says or not yet placed.

    Returns:
        Arrays [...] of ``bits_dtype(stacked.dtype)``. On a GPU they share the memory of ``stacked``, which must not be
        donated while they are in use; on a CPU they do where its alignment allows.
    """
    stacked = jax.device_put(stacked, sharding)
    of_layer = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    shards = [shard.data for shard in stacked.addressable_shards]
    join = jax.make_array_from_single_device_arrays
    return [
        join(stacked.shape[1:], of_layer, [view_of(shard, index) for shard in shards]) for index in range(len(stacked))
    ]


def view_of(shard: jax.Array, index: int) -> jax.Array:
    """One entry of the first axis of an array that lies on one device."""
    if shard.device.platform == "gpu":
        return jax.numpy.asarray(DeviceMemory(shard, index), copy=False)
    return jax.device_put(np.asarray(shard)[index].view(bits_dtype(shard.dtype)), shard.device)
