"""Operations for serving and finetuning a transformer from pages: arrays and numbers in, arrays out."""

from pallas_kernels.gated_expand.api import gated_expand
from pallas_kernels.grouped_lora.api import grouped_lora_grad
from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy
from pallas_kernels.lora_expand.api import lora_expand, plan_lora_expand
from pallas_kernels.page_write.api import page_write, write_pages, write_parts
from pallas_kernels.page_write.parts import Pages, Rows
from pallas_kernels.paged_attention.api import mixed_paged_attention, paged_attention, plan_paged_attention
from pallas_kernels.paged_attention.mixed import Sequences
from pallas_kernels.window_attention_grad.api import window_attention_grad

__all__ = [
    "Pages",
    "Rows",
    "Sequences",
    "gated_expand",
    "grouped_lora_grad",
    "linear_cross_entropy",
    "lora_expand",
    "mixed_paged_attention",
    "page_write",
    "paged_attention",
    "plan_lora_expand",
    "plan_paged_attention",
    "window_attention_grad",
    "write_pages",
    "write_parts",
]
