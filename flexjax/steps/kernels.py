"""Which implementation of each kernel the steps call: chosen by name, once, by whoever compiles the steps."""

from dataclasses import dataclass


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
    grouped_lora: str = "reference"
    linear_cross_entropy: str = "reference"
    head_chunk: int = 2048

    @classmethod
    def for_platform(cls, platform: str) -> "Kernels":
        """What is fastest on "cpu" or "gpu", as measured."""
        return cls(head_chunk=32768 if platform == "gpu" else 2048)
