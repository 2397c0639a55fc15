"""Compiles for an H100 on a machine without one."""

import jax
from jax.experimental import topologies

TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  runtime_version: "13.0.0"
  driver_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def h100():
    """The device that programs are compiled for."""
    topology = topologies.get_topology_desc(
        topology_name="h100", platform="cuda", target_config=TARGET, topology="1x1x1"
    )
    return topology.devices[0]


def compile_for_h100(function, *arguments, donate=(), options=None):
    """``function`` compiled for arguments of these shapes and dtypes."""
    sharding = jax.sharding.SingleDeviceSharding(h100())
    shaped = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    traced = jax.jit(function, donate_argnums=donate).trace(*jax.tree.map(shaped, arguments))
    return traced.lower(lowering_platforms=("cuda",)).compile(compiler_options=options)
