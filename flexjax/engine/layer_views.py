"""Layer views: the weights of one layer as arrays of their own, in the memory of the stacked ones.

One backward program serves every layer. What it would take out of a stacked array by an index that is data, XLA copies
(435 MB a unit at the size of Llama-3.1-8B); an argument is read where it lies.
"""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flexjax.models.bits import bits_dtype, to_bits


def places(stacked: Mapping[str, jax.Array]) -> dict[str, list[int]]:
    """Where every shard of these arrays lies."""
    of = lambda array: [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]
    return {name: of(array) for name, array in stacked.items()}


class DeviceMemory:
    """A part of an array's memory on a GPU, by the interface through which CUDA libraries share arrays."""

    def __init__(self, stacked: jax.Array, index: int, rows: int):
        self.stacked = stacked  # its memory must outlive the view
        shape, dtype = (rows, *stacked.shape[2:]), np.dtype(bits_dtype(stacked.dtype))
        offset = index * int(np.prod(stacked.shape[1:])) * dtype.itemsize
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": dtype.str,
            "data": (stacked.unsafe_buffer_pointer() + offset, False),
            "strides": None,
            "version": 3,
        }


def layer_views(stacked: jax.Array, sharding: NamedSharding, rows: int | None = None) -> list[jax.Array]:
    """One array for every entry of the first axis, which no shard divides.

    Args:
        stacked: [layers, rows, ...], sharded as ``sharding`` says or not yet placed.
        rows: how many of its rows each entry has, whole: the leading ones of every shard; None for all.

    Returns:
        Arrays [rows, ...] of ``bits_dtype(stacked.dtype)``. On a GPU they share the memory of ``stacked``, which may be
        donated only to what gives the same memory back with these rows as they were. On a CPU, which does not donate
        memory that others read, they are copies.
    """
    rows = stacked.shape[1] if rows is None else rows
    own_rows = sharding.shard_shape((len(stacked), rows, *stacked.shape[2:]))[1]
    stacked = jax.device_put(stacked, sharding)
    of_layer = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    shards = [shard.data for shard in stacked.addressable_shards]
    join = jax.make_array_from_single_device_arrays
    shape = rows, *stacked.shape[2:]
    views = lambda index: [view_of(shard, index, own_rows) for shard in shards]
    return [join(shape, of_layer, views(index)) for index in range(len(stacked))]


def view_of(shard: jax.Array, index: int, rows: int) -> jax.Array:
    """The leading rows of one entry of the first axis of an array that lies on one device."""
    if shard.device.platform == "gpu":
        return jax.numpy.asarray(DeviceMemory(shard, index, rows), copy=False)
    return to_bits(jax.lax.slice_in_dim(jax.lax.index_in_dim(shard, index, keepdims=False), 0, rows))
