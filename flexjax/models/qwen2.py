"""Qwen2 and Qwen2.5: a Llama whose query, key and value projections carry biases."""

from flexjax.models.config import ModelConfig
from flexjax.models.decoder import Decoder


class Qwen2(Decoder):
    def __init__(self, config: ModelConfig, dtype, tp: int, rngs):
        if not config.attention_bias:
            raise ValueError("attention_bias is False; Qwen2 models have query, key and value biases")
        super().__init__(config, dtype, tp, rngs)
