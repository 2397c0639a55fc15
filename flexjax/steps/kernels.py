"""Which implementation of each kernel the steps call: chosen by name, once, by whoever compiles the steps."""

from dataclasses import dataclass, fields, replace

import jax.numpy as jnp

from flexjax.models.config import ModelConfig
from flexjax.models.lora import PRODUCTS, module_widths
from pallas_kernels.grouped_lora.grad_tiling import takes
from pallas_kernels.lora_expand.tiling import MAX_RANK

HEAD_SIZES = (64, 128)
GROUP = 8
"""What the Mosaic GPU attention kernels take: head sizes, and query heads per K/V head at most."""

WIDTH_STEP = 64
"""What the Mosaic GPU kernels for LoRA take: widths of modules that are multiples of it."""


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
    gated_expand: str = "reference"
    grouped_lora_grad: str = "reference"
    linear_cross_entropy: str = "reference"
    head_chunk: int = 2048

    @classmethod
    def for_model(cls, platform: str, model: ModelConfig, dtype, rank_capacity: int = 0, tp: int = 1) -> "Kernels":
        """What serves this model best on "cpu" or "gpu", as measured, among what takes its shapes.

        Args:
            rank_capacity: of the resident adapters; tp: shards that divide widths.
        """
        if platform != "gpu":
            return cls()
        half = jnp.dtype(dtype).itemsize == 2
        group = model.num_heads // model.num_kv_heads
        attention = "mosaic_gpu" if half and model.head_dim in HEAD_SIZES and group <= GROUP else "reference"
        widths = {width for module in module_widths(model).values() for width in module}
        lora = "mosaic_gpu" if half and all(width % (WIDTH_STEP * tp) == 0 for width in widths) else "reference"
        expand = lora if rank_capacity <= MAX_RANK else "reference"
        return cls(attention, attention, attention, expand, expand, lora, head_chunk=32768)

    def for_job(self, rank: int, window: int) -> "Kernels":
        """Those of a job whose adapter has this rank: the reference for gradients that do not fit the kernel."""
        most = max(len(modules) for modules in PRODUCTS.values())
        fits = self.grouped_lora_grad == "reference" or takes(window, most, rank)
        return self if fits else replace(self, grouped_lora_grad="reference")

    def __str__(self) -> str:
        """One line for people: "paged_attention mosaic_gpu, ..."."""
        names = [field.name for field in fields(self) if field.name != "head_chunk"]
        return ", ".join(f"{name} {getattr(self, name)}" for name in names)
