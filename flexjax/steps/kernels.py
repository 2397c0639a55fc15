"""Which implementation of each kernel the steps call: chosen by name, once, by whoever compiles the steps."""

from dataclasses import dataclass, fields

import jax.numpy as jnp

from flexjax.models.config import ModelConfig

HEAD_SIZES = (64, 128)
GROUP = 8
"""What the Mosaic GPU attention kernels take: head sizes, and query heads per K/V head at most."""


@dataclass(frozen=True)
class Kernels:
    """Implementation names of `pallas_kernels`; an unknown name is refused there.

    Attributes:
        head_chunk: vocabulary entries that the loss handles at a time. Large on a GPU, whose products want many
            columns; on a CPU the float32 logits of a chunk should stay in the cache.
    """

    paged_attention: str = "reference"
    page_write: str = "reference"
    window_attention_grad: str = "reference"
    lora_expand: str = "reference"
    grouped_lora_grad: str = "reference"
    linear_cross_entropy: str = "reference"
    head_chunk: int = 2048

    @classmethod
    def for_model(cls, platform: str, model: ModelConfig, dtype) -> "Kernels":
        """What serves this model best on "cpu" or "gpu", as measured, among what takes its shapes.

        The LoRA kernels are not among them yet: as they stand, no GPU has shown them right (docs/performance.md).
        """
        if platform != "gpu":
            return cls()
        group = model.num_heads // model.num_kv_heads
        able = jnp.dtype(dtype).itemsize == 2 and model.head_dim in HEAD_SIZES and group <= GROUP
        attention = "mosaic_gpu" if able else "reference"
        return cls(attention, attention, attention, head_chunk=32768)

    def __str__(self) -> str:
        """One line for people: "paged_attention mosaic_gpu, ..."."""
        names = [field.name for field in fields(self) if field.name != "head_chunk"]
        return ", ".join(f"{name} {getattr(self, name)}" for name in names)
