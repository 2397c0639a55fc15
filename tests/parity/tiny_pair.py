"""Two random tiny models that between them have what Llama and Qwen2 differ in, and the adapters that PEFT writes."""

from pathlib import Path

import jax.numpy as jnp

from flexjax.models.config import Llama3RopeScaling, ModelConfig
from flexjax.weights.huggingface import save_directory
from tests.ladder import Model
from tests.tiny_model import byte_tokenizer

VOCABULARY = 259

LLAMA = ModelConfig(
    **dict(model_type="llama", vocab_size=VOCABULARY, hidden_size=48, intermediate_size=80, num_layers=3, num_heads=4),
    **dict(num_kv_heads=2, head_dim=16, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False),
    **dict(attention_bias=False, max_position_embeddings=512, rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 64)),
)
"""Of its eight rotary frequencies "llama3" keeps one, interpolates two and divides five."""

QWEN2 = ModelConfig(
    **dict(model_type="qwen2", vocab_size=VOCABULARY, hidden_size=40, intermediate_size=72, num_layers=3, num_heads=5),
    **dict(num_kv_heads=1, head_dim=8, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True),
    **dict(attention_bias=True, max_position_embeddings=512, rope_scaling=None),
)

MODELS = {"llama": LLAMA, "qwen2": QWEN2}

ALL_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

ADAPTERS = {
    "patterns": dict(
        r=4,
        lora_alpha=8,
        target_modules=ALL_MODULES,
        rank_pattern={"k_proj": 2, "layers.1.mlp.down_proj": 6},
        alpha_pattern={"v_proj": 3, r"layers\.[02]\.self_attn\.q_proj": 20},
    ),
    "rslora": dict(r=5, lora_alpha=3, use_rslora=True, target_modules="all-linear", rank_pattern={"o_proj": 8}),
    "expression": dict(r=3, lora_alpha=6, target_modules=r".*\.[12]\.(self_attn\.[qo]|mlp\.down)_proj"),
    "layers": dict(
        r=2,
        lora_alpha=7,
        target_modules=["q_proj", "v_proj", "gate_proj"],
        layers_to_transform=[0, 2],
        layers_pattern="layers",
        exclude_modules=["layers.2.mlp.gate_proj"],
    ),
    "one_layer": dict(r=8, lora_alpha=8, target_modules=["k_proj", "up_proj"], layers_to_transform=1),
}
"""Arguments of PEFT's LoraConfig."""


def write_model(directory: Path, config: ModelConfig) -> Path:
    """A directory as Hugging Face has it; the token ids below 256 are bytes."""
    save_directory(directory, config, Model.random(config).tree(jnp.float32, tp=1))
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    return directory
