"""The machine under an engine: which devices, how many bytes, where compiled programs are kept."""

from pathlib import Path

import jax

from flexjax.config import EngineConfig
from flexjax.fields import ConfigError


def device_mesh(tp: int) -> jax.sharding.Mesh:
    """The first ``tp`` devices on one axis."""
    devices = jax.devices()
    if tp > len(devices):
        raise ConfigError(f"tp is {tp}; this machine has {len(devices)} {devices[0].platform} devices")
    return jax.make_mesh((tp,), ("tp",), devices=devices[:tp])


def memory_limit(config: EngineConfig) -> int:
    """Bytes the engine may use on one device."""
    if config.memory_bytes is not None:
        return config.memory_bytes
    stats = jax.devices()[0].memory_stats() or {}
    return int(config.memory_fraction * (stats.get("bytes_limit") or host_memory()))


def host_memory() -> int:
    """Bytes of main memory, or of the control group that this process may use if that is less."""
    physical = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")]
    total = int(physical[0].split()[1]) * 1024
    group = Path("/sys/fs/cgroup/memory.max")
    text = group.read_text().strip() if group.is_file() else "max"
    return total if text == "max" else min(total, int(text))


def use_compilation_cache(directory: str | None) -> None:
    """Keep compiled programs between runs."""
    path = Path(directory or "~/.cache/flexjax/compiled").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
