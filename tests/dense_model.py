"""A decoder with LoRA in float64 over whole sequences, written from the formulas of transformers and PEFT.

No pages, no windows, no stacked or fused weights, and no code of `flexjax.models`: what the paged forward and the
windowed backward pass are compared with. Weights are taken by their Hugging Face names.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

PADDED_TOKENS = 128
"""Sequences are padded at their end to a multiple of this, which a causal model does not notice."""

QUICK = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
"""Compiler options that halve the time to compile what runs only a few times."""


class DenseModel:
    """A model and its loss in float64.

    Args:
        config: its sizes (`flexjax.models.config.ModelConfig`, read as plain numbers).
        tensors: Hugging Face name -> array, matrices [out, in].
    """

    def __init__(self, config, tensors: dict[str, np.ndarray]):
        self.config = config
        self.tensors = {name: np.asarray(array, np.float64) for name, array in tensors.items()}
        compiled = lambda function: jax.jit(functools.partial(function, config), compiler_options=QUICK)
        self._states, self._logits = compiled(sequence_states), compiled(sequence_logits)
        self._gradients = compiled(lambda *arguments: jax.value_and_grad(mean_loss, argnums=1)(*arguments))

    def logits(self, tokens, adapter: dict | None = None, scale: float = 1.0) -> np.ndarray:
        """tokens [T] -> logits [T, vocab].

        Args:
            adapter: {"a": module -> [layers, in, r], "b": module -> [layers, r, out]}; None for the base model.
        """
        return self._run(self._logits, tokens, adapter, scale)

    def final_states(self, tokens, adapter: dict | None = None, scale: float = 1.0) -> np.ndarray:
        """tokens [T] -> output of the last layer, before the final norm, [T, d]."""
        return self._run(self._states, tokens, adapter, scale)

    def logprobs(self, tokens, adapter: dict | None = None, scale: float = 1.0) -> np.ndarray:
        logits = self.logits(tokens, adapter, scale)
        shifted = logits - logits.max(axis=-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))

    def loss_and_gradients(self, sequences, trained, adapter: dict, scale: float, multipliers=()) -> tuple[float, dict]:
        """Mean loss over the trained tokens of all sequences, and its gradient by the adapter, shaped like it.

        Args:
            sequences: token ids each; trained: bool each, whether the token is a target.
            multipliers: per sequence, module -> [layers, T, in] that LoRA inputs are multiplied by (dropout);
                none: by one.
        """
        length = max(map(len, sequences))
        length += -length % PADDED_TOKENS
        pad = lambda row: np.pad(row, (0, length - len(row)))
        stretch = lambda m: np.pad(m, ((0, 0), (0, length - m.shape[1]), (0, 0)))
        tokens, targets = np.stack([pad(s) for s in sequences]), np.stack([pad(t) for t in trained])
        ones = {name: np.ones((len(a), length, a.shape[1])) for name, a in adapter["a"].items()}
        multipliers = multipliers or [ones] * len(sequences)
        masks = {name: np.stack([stretch(m[name]) for m in multipliers]) for name in ones}
        with jax.enable_x64(True):
            loss, gradients = self._gradients(doubled(adapter), self.tensors, tokens, targets, scale, doubled(masks))
            return float(loss), jax.tree.map(np.asarray, gradients)

    def _run(self, function, tokens, adapter, scale) -> np.ndarray:
        padded = np.pad(tokens, (0, -len(tokens) % PADDED_TOKENS))
        with jax.enable_x64(True):
            return np.asarray(function(doubled(adapter or NO_ADAPTER), self.tensors, padded, scale, {}))[: len(tokens)]


NO_ADAPTER = {"a": {}, "b": {}}


def doubled(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def mean_loss(config, adapter, tensors, tokens, trained, scale, multipliers):
    """tokens [B, T], trained [B, T] bool -> cross entropy of the next token, mean over trained targets."""
    of_one = lambda row, masks: sequence_logits(config, adapter, tensors, row, scale, masks)
    logits = jax.vmap(of_one)(tokens, multipliers)
    logprobs = jax.nn.log_softmax(logits[:, :-1])
    picked = jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(trained[:, 1:], picked, 0)) / jnp.sum(trained[:, 1:])


def sequence_states(config, adapter, tensors, tokens, scale, multipliers):
    x = tensors["model.embed_tokens.weight"][tokens]
    for layer in range(config.num_layers):
        x = decoder_layer(config, adapter, tensors, x, layer, scale, multipliers)
    return x


def sequence_logits(config, adapter, tensors, tokens, scale, multipliers):
    x = sequence_states(config, adapter, tensors, tokens, scale, multipliers)
    head = tensors["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return normed(x, tensors["model.norm.weight"], config.rms_norm_eps) @ head.T


def decoder_layer(config, adapter, tensors, x, layer, scale, multipliers):
    weight = lambda name: tensors[f"model.layers.{layer}.{name}"]

    def linear(group, module, h):
        y = h @ weight(f"{group}.{module}.weight").T + tensors.get(f"model.layers.{layer}.{group}.{module}.bias", 0)
        if module not in adapter["a"]:
            return y
        kept = h * multipliers[module][layer] if module in multipliers else h
        return y + kept @ adapter["a"][module][layer] @ adapter["b"][module][layer] * scale

    h = normed(x, weight("input_layernorm.weight"), config.rms_norm_eps)
    heads = lambda y: y.reshape(len(x), -1, config.head_dim)
    q, k, v = (heads(linear("self_attn", f"{name}_proj", h)) for name in "qkv")
    x = x + linear("self_attn", "o_proj", attention(config, rotated(config, q), rotated(config, k), v))
    h = normed(x, weight("post_attention_layernorm.weight"), config.rms_norm_eps)
    return x + linear("mlp", "down_proj", jax.nn.silu(linear("mlp", "gate_proj", h)) * linear("mlp", "up_proj", h))


def normed(x, weight, eps):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def rotated(config, x):
    """x [T, heads, D]: x cos + rotate_half(x) sin, as transformers' ``apply_rotary_pos_emb``."""
    angles = np.arange(len(x))[:, None] * np.tile(frequencies(config), 2)
    first, second = jnp.split(x, 2, axis=-1)
    half = jnp.concatenate([-second, first], axis=-1)
    return x * np.cos(angles)[:, None] + half * np.sin(angles)[:, None]


def frequencies(config) -> np.ndarray:
    """One per pair, case by case as the Llama 3.1 report has it."""
    plain = [config.rope_theta ** (-pair / config.head_dim) for pair in range(0, config.head_dim, 2)]
    return np.array([f if config.rope_scaling is None else scaled(f, config.rope_scaling) for f in plain])


def scaled(frequency: float, scaling) -> float:
    turns = scaling.original_max_position_embeddings * frequency / (2 * np.pi)
    if turns < scaling.low_freq_factor:
        return frequency / scaling.factor
    if turns > scaling.high_freq_factor:
        return frequency
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def attention(config, q, k, v):
    repeats = config.num_heads // config.num_kv_heads
    k, v = jnp.repeat(k, repeats, axis=1), jnp.repeat(v, repeats, axis=1)
    scores = jnp.einsum("qhd,khd->hqk", q, k) / np.sqrt(config.head_dim)
    weights = jax.nn.softmax(jnp.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf), axis=-1)
    return jnp.einsum("hqk,khd->qhd", weights, v).reshape(len(q), -1)
