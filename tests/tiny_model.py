"""A whole model directory made from nothing: random Llama weights, a byte-level tokenizer and a chat template."""

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from flexjax.models.config import ModelConfig
from flexjax.weights.huggingface import save_directory
from tests.ladder import LLAMA, Model

SPECIAL = ("<end>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CONFIG: ModelConfig = replace(LLAMA, vocab_size=256 + len(SPECIAL), eos_token_ids=(256,))


def write_tiny_model(directory: Path) -> Path:
    """A directory as Hugging Face has it; token ids 0 .. 255 are bytes, 256 ends a turn."""
    save_directory(directory, CONFIG, Model.random(CONFIG).tree(jnp.float32, tp=1))
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    settings = {"eos_token": "<end>", "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def byte_tokenizer() -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


ENGINE = dict(
    dtype="float32",
    max_model_len=256,
    max_rows=4,
    row_sizes=(4,),
    chunk_sizes=(128,),
    pages=120,
    microbatch_tokens=256,
    backward_window=128,
    max_adapters=12,
    adapter_rank_capacity=96,
)
"""Fields of `EngineConfig` for such a model: sequences of the tests take several pages, their groups several
microbatches, and those several windows."""
