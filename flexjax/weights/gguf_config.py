"""ModelConfig from the metadata of a GGUF file. It reads no files."""

import numpy as np

from flexjax.models.config import Llama3RopeScaling, ModelConfig

ARCHITECTURES = ("llama", "qwen2")

LLAMA3_SCALINGS = tuple(Llama3RopeScaling(factor, 1.0, 4.0, 8192) for factor in (8.0, 32.0))
"""Scalings of the released Llama 3.1/3.3 (8) and 3.2 (32) models. GGUF files store what they amount to, a divisor per
frequency, and not the parameters; a file whose divisors match none of these is refused."""

NOT_SUPPORTED = ("expert_count", "attention.sliding_window", "attention.clamp_kqv", "attention.max_alibi_bias")


def config_from_metadata(values: dict, has_head: bool, rope_divisors: np.ndarray | None) -> ModelConfig:
    """The configuration that a GGUF file describes.

    Args:
        values: metadata keys and values.
        has_head: the file holds a head apart from the embedding.
        rope_divisors: divisors of the rotary frequencies, [head_dim / 2], or None.

    Raises:
        ValueError: a key is missing or asks for what is not implemented; the message names it.
    """
    architecture = values.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"general.architecture is {architecture!r}; supported are {', '.join(ARCHITECTURES)}")
    refuse_unsupported(values, architecture)
    get = lambda key: value_of(values, f"{architecture}.{key}")
    heads, width = get("attention.head_count"), get("embedding_length")
    head_dim = values.get(f"{architecture}.attention.key_length") or width // heads
    theta = decimal(values.get(f"{architecture}.rope.freq_base", 10000.0))
    check_rotated_width(values, architecture, head_dim)
    return ModelConfig(
        model_type=architecture,
        vocab_size=vocabulary_size(values, architecture),
        hidden_size=width,
        intermediate_size=get("feed_forward_length"),
        num_layers=get("block_count"),
        num_heads=heads,
        num_kv_heads=values.get(f"{architecture}.attention.head_count_kv") or heads,
        head_dim=head_dim,
        rms_norm_eps=decimal(get("attention.layer_norm_rms_epsilon")),
        rope_theta=theta,
        rope_scaling=None if rope_divisors is None else scaling_behind(rope_divisors, theta, head_dim),
        tie_word_embeddings=not has_head,
        attention_bias=architecture == "qwen2",
        max_position_embeddings=get("context_length"),
        bos_token_id=values.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=end_tokens(values),
    )


def value_of(values: dict, key: str) -> int | float:
    value = values.get(key)
    if value is None or isinstance(value, list):
        raise ValueError(f"{key} is {value!r}; one number for all layers is needed")
    return value


def refuse_unsupported(values: dict, architecture: str) -> None:
    faults = [f"{key} is {values[key]}" for name in NOT_SUPPORTED if values.get(key := f"{architecture}.{name}")]
    scaling = values.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        faults.append(f"{architecture}.rope.scaling.type is {scaling!r}")
    if values.get(f"{architecture}.rope.scale_linear", 1) != 1:
        faults.append(f"{architecture}.rope.scale_linear is {values[f'{architecture}.rope.scale_linear']}")
    if faults:
        raise ValueError("the model needs what is not implemented: " + "; ".join(faults))


def check_rotated_width(values: dict, architecture: str, head_dim: int) -> None:
    for key in ("rope.dimension_count", "attention.value_length"):
        width = values.get(f"{architecture}.{key}", head_dim)
        if width != head_dim:
            raise ValueError(f"{architecture}.{key} is {width}; only the head size ({head_dim}) is supported")


def vocabulary_size(values: dict, architecture: str) -> int:
    tokens = values.get("tokenizer.ggml.tokens")
    size = len(tokens) if tokens else values.get(f"{architecture}.vocab_size")
    if not size:
        raise ValueError(f"neither tokenizer.ggml.tokens nor {architecture}.vocab_size says the size of the vocabulary")
    return size


def end_tokens(values: dict) -> tuple[int, ...]:
    """Ids that end a sequence or a turn."""
    named = (values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(index for index in named if index is not None))


def decimal(value: float) -> float:
    """The decimal number that was stored as a float32: 9.99999974e-06 -> 1e-05."""
    return float(str(np.float32(value)))


def scaling_behind(divisors: np.ndarray, theta: float, head_dim: int) -> Llama3RopeScaling:
    """The known scaling whose divisors these are."""
    for scaling in LLAMA3_SCALINGS:
        if len(divisors) == head_dim // 2 and np.allclose(divisors, divisors_of(scaling, theta, head_dim), rtol=1e-4):
            return scaling
    raise ValueError(
        f"rope_freqs.weight {np.asarray(divisors).round(4).tolist()} is no known rotary scaling; known are those of "
        "Llama 3.1, 3.2 and 3.3 (use the model's safetensors files instead)"
    )


def divisors_of(scaling: Llama3RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    """Divisors of the rotary frequencies under a scaling, [head_dim / 2] (Llama 3.1's published code)."""
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low = scaling.original_max_position_embeddings / scaling.low_freq_factor
    high = scaling.original_max_position_embeddings / scaling.high_freq_factor
    smooth = (scaling.original_max_position_embeddings / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = 1 / ((1 - smooth) / scaling.factor + smooth)
    return np.where(wavelengths < high, 1.0, np.where(wavelengths > low, scaling.factor, between))
