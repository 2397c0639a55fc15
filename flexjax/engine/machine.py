"""The machine under an engine: which devices, how many bytes, where compiled programs are kept."""

import os
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from flexjax.config import EngineConfig
from flexjax.fields import ConfigError
from flexjax.models.sharding import TP_AXIS

MEMORY_VARIABLE = "XLA_CLIENT_MEM_FRACTION"
"""Share of a GPU's memory that the runtime takes when it starts."""

FORMER_VARIABLE = "XLA_PYTHON_CLIENT_MEM_FRACTION"
"""Its name before. With both set jax starts without the GPU."""


def device_mesh(tp: int) -> Mesh:
    """The first ``tp`` devices on one axis."""
    devices = jax.devices()
    if tp > len(devices):
        raise ConfigError(f"tp is {tp}; this machine has {len(devices)} {devices[0].platform} devices")
    return Mesh(np.array(devices[:tp]), (TP_AXIS,))


def claim_memory(fraction: float) -> None:
    """Let the runtime take this share of a GPU's memory; before the first use of a device, and unless the user has
    decided it in the environment.

    Raises:
        ConfigError: the environment has both names of the share, with different values.
    """
    former = os.environ.pop(FORMER_VARIABLE, None)
    chosen = os.environ.setdefault(MEMORY_VARIABLE, former or str(fraction))
    if former is not None and former != chosen:
        raise ConfigError(f"{FORMER_VARIABLE} is {former} and {MEMORY_VARIABLE} is {chosen}; set only the second")


def platform_of(config: EngineConfig) -> str:
    """What jax calls the devices of this machine, "cpu" or "gpu"; starts the runtime."""
    claim_memory(config.memory_fraction)
    return jax.default_backend()


def memory_limit(config: EngineConfig) -> int:
    """Bytes the engine may use on one device."""
    if config.memory_bytes is not None:
        return config.memory_bytes
    available = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if available is None:
        return int(config.memory_fraction * host_memory())
    share = config.memory_fraction / float(os.environ.get(MEMORY_VARIABLE, config.memory_fraction))
    return int(available * min(1.0, share))


def host_memory() -> int:
    """Bytes of main memory, or of the control group that this process may use if that is less."""
    physical = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")]
    total = int(physical[0].split()[1]) * 1024
    group = Path("/sys/fs/cgroup/memory.max")
    text = group.read_text().strip() if group.is_file() else "max"
    return total if text == "max" else min(total, int(text))


def program_folder(config: EngineConfig) -> Path:
    """Where compiled programs are kept between runs."""
    return Path(config.compilation_cache or "~/.cache/flexjax/programs").expanduser()
