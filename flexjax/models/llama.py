"""Llama 2 and 3: no biases, optional Llama 3.1 rotary scaling, tied or untied embeddings."""

from flexjax.models.config import ModelConfig
from flexjax.models.decoder import Decoder


class Llama(Decoder):
    def __init__(self, config: ModelConfig, dtype, tp: int, rngs):
        if config.attention_bias:
            raise ValueError("attention_bias is True; Llama models with attention biases are not supported")
        super().__init__(config, dtype, tp, rngs)
