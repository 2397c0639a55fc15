"""flexjax serves a language model and finetunes LoRA adapters of it from one copy of the weights.

Public names are resolved when first asked for: importing the package, its configuration or its scheduler loads no jax.
"""

import importlib

HOMES = {
    "Engine": "flexjax.engine.engine",
    "EngineConfig": "flexjax.config",
    "FinetuneJob": "flexjax.finetuning.job",
    "RequestOutput": "flexjax.request",
    "SamplingParams": "flexjax.request",
    "__version__": "flexjax.version",
}

__all__ = ["Engine", "EngineConfig", "FinetuneJob", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str):
    if name not in HOMES:
        raise AttributeError(f"module 'flexjax' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
