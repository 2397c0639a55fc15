"""Shapes of real models, from which the cases of every operation take their sizes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one decoder.

    Attributes:
        hidden: width of the residual stream.
        query_heads, kv_heads, head_size: attention; query head h reads K/V head h // (query_heads // kv_heads).
        feed_forward: width between the gate/up and down products.
        vocabulary: columns of the head.
        tied: the head is the embedding matrix, [vocabulary, hidden].
    """

    name: str
    layers: int
    hidden: int
    query_heads: int
    kv_heads: int
    head_size: int
    feed_forward: int
    vocabulary: int
    tied: bool

    @property
    def row_width(self) -> int:
        """Values in one row of a page: K then V of every K/V head."""
        return 2 * self.kv_heads * self.head_size


LLAMA_3_1_8B = ModelShape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256, tied=False)
QWEN_2_5_7B = ModelShape("qwen2.5-7b", 28, 3584, 28, 4, 128, 18944, 152064, tied=False)
SMOLLM2_135M = ModelShape("smollm2-135m", 30, 576, 9, 3, 64, 1536, 49152, tied=True)
STORIES_260K = ModelShape("stories-260k", 5, 64, 8, 4, 8, 172, 512, tied=True)
