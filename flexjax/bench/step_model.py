"""StepModel: the models that step benchmarks run, a configuration without weights, and what a token costs in them."""

from pathlib import Path

from flexjax.models.config import ModelConfig
from flexjax.models.lora import module_widths
from flexjax.weights.whole_files import write_json

SHAPES = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "llama-3.1-70b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
    },
}
"""As a Hugging Face ``config.json`` gives them; the weights are random ("dummy")."""


def write_model(folder: Path, shape: str, layers: int | None) -> Path:
    """A model directory with nothing but its configuration. Raises ValueError for an unknown shape."""
    if shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}; it must be one of {', '.join(SHAPES)}")
    values = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", values)
    return folder


def describe_model(model: ModelConfig, dtype: str) -> str:
    """Sizes in words."""
    outside = (1 if model.tie_word_embeddings else 2) * model.vocab_size * model.hidden_size
    return (
        f"{model.model_type}, {model.num_layers} layers of {model.hidden_size}, {model.num_heads}/"
        f"{model.num_kv_heads} heads of {model.head_dim}, vocabulary {model.vocab_size}, "
        f"{model.num_layers * layer_parameters(model) + outside:,} parameters, {dtype}"
    )


def layer_parameters(model: ModelConfig) -> int:
    """Values in the matrices of one layer."""
    return sum(inputs * outputs for inputs, outputs in module_widths(model).values())


def product_parameters(model: ModelConfig) -> int:
    """Values in all matrices that a token is multiplied by: the layers and the head, not the embedding."""
    return model.num_layers * layer_parameters(model) + model.vocab_size * model.hidden_size


def decode_bytes(model: ModelConfig, rows: int, context: float, itemsize: int) -> float:
    """Bytes that a decode step must read: every matrix once, and the keys and values of each row's context."""
    keys_and_values = 2 * model.num_layers * model.num_kv_heads * model.head_dim * rows * context
    return itemsize * (product_parameters(model) + keys_and_values)
