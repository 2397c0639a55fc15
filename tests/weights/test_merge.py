"""Merged weights give the logits PEFT gives, computed by a plain float64 forward pass over the merged tree."""

from pathlib import Path

import numpy as np
import pytest

from flexjax.models.config import ModelConfig
from flexjax.weights.huggingface import load_directory
from flexjax.weights.merge import merge
from flexjax.weights.peft import read_adapter
from flexjax.weights.stacking import StackedWeights, parts_of

GOLDENS = Path(__file__).parents[1] / "goldens"


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def frequencies(config: ModelConfig) -> np.ndarray:
    """Rotary frequencies, [D/2]; scaled by wavelength as Llama 3.1 does."""
    plain = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    turns = scaling.original_max_position_embeddings * plain / (2 * np.pi)
    weight = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    return plain * (weight + (1 - weight) / scaling.factor)


def rotated(x: np.ndarray, config: ModelConfig) -> np.ndarray:
    """x [T, heads, D] as complex pairs (i, i + D/2) turned by position times frequency."""
    first, second = np.split(x, 2, axis=-1)
    turned = (first + 1j * second) * np.exp(1j * np.outer(np.arange(len(x)), frequencies(config)))[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attended(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal attention; q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq · D]."""
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), v).reshape(len(q), -1)


def logits(config: ModelConfig, tree: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    tree = {name: array.astype(np.float64) for name, array in tree.items()}
    x, eps = tree["embed"][tokens], config.rms_norm_eps
    for layer in range(config.num_layers):
        of = {name.removeprefix("layers."): array[layer] for name, array in tree.items() if name.startswith("layers.")}
        fused = rms_norm(x, of["input_norm"], eps) @ of["qkv"].T + of.get("qkv_bias", 0)
        heads = fused.reshape(len(x), -1, config.head_dim)
        q, k, v = np.split(heads, [config.num_heads, config.num_heads + config.num_kv_heads], axis=1)
        x = x + attended(rotated(q, config), rotated(k, config), v) @ of["o"].T
        gate, up = np.split(rms_norm(x, of["post_norm"], eps) @ of["gate_up"].T, 2, axis=1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ of["down"].T
    x = rms_norm(x, tree["norm"], eps)
    return x @ (tree["embed"] if config.tie_word_embeddings else tree["head"]).T


CASES = [
    ("llama", None, "logits_0"),
    ("llama", "adapter", "adapter_logits_1"),
    ("llama", "mixed_adapter", "mixed_logits_0"),
    ("qwen2", None, "logits_1"),
    ("qwen2", "adapter", "adapter_logits_0"),
]


@pytest.mark.parametrize(("model", "adapter", "name"), CASES)
def test_logits_equal_those_of_transformers_and_peft(model, adapter, name):
    config, golden = ModelConfig.from_directory(GOLDENS / model), np.load(GOLDENS / model / "golden.npz")
    tree = load_directory(GOLDENS / model, config, np.float32)
    if adapter:
        tree = merge(tree, read_adapter(GOLDENS / model / adapter, config), config)
    ours = logits(config, tree, golden[f"tokens_{name[-1]}"])
    # torch computes in float32: values up to 30, through two layers; the smallest adapter moves logits by far more
    np.testing.assert_allclose(ours, golden[name], atol=2e-4)
    if adapter:
        assert np.abs(ours - golden[f"logits_{name[-1]}"]).max() > 0.1


def test_shards_merge_alike():
    config = ModelConfig.from_directory(GOLDENS / "llama")
    adapter = read_adapter(GOLDENS / "llama" / "adapter", config)
    whole = StackedWeights(config, merge(load_directory(GOLDENS / "llama", config, np.float32), adapter, config))
    sharded = load_directory(GOLDENS / "llama", config, np.float32, tp=2)
    before = sharded["layers.qkv"].copy()
    cut = StackedWeights(config, merge(sharded, adapter, config, tp=2), tp=2)
    for part in parts_of(config):
        np.testing.assert_array_equal(cut.take(part), whole.take(part))
    np.testing.assert_array_equal(sharded["layers.qkv"], before)
