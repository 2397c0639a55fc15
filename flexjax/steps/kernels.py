"""Which implementation of each kernel the steps call: chosen by name, once, by whoever compiles the steps."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kernels:
    """Implementation names of `pallas_kernels`; an unknown name is refused there."""

    paged_attention: str = "reference"
    page_write: str = "reference"
    window_attention_grad: str = "reference"
    grouped_lora: str = "reference"
    linear_cross_entropy: str = "reference"
