"""jax_settings: those of jax that decide what a program is, whichever process makes it."""

from typing import Any

import jax

UNDECIDING = ("platform", "device", "cache", "dump")
"""Parts of names of settings that do not. Which devices a program is for is said beside them, and a process that only
lowers has others; what is kept or written down on the way changes nothing in it."""


def jax_settings() -> dict[str, Any]:
    """Values by name."""
    values = jax.config.values.items()
    return {name: value for name, value in values if not any(part in name for part in UNDECIDING)}
