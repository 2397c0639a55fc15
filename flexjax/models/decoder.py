"""The decoder: a stack of layers, each a few pure stages whose inputs have names.

It knows tokens, positions, adapters and what attention returned; not pages, windows, requests or phases. The same
stages serve requests and are pulled back, one by one, in a backward unit:

    x --qkv--> q, k, v   [attention between stages]   x, attention --output--> mid
    mid --mlp_input--> gate, up                       mid, gate, up --mlp_output--> x of the next layer

A forward step, which pulls nothing back, takes the last two as mid --gated--> h and mid, h --down--> x of the next one.

Weights of all layers are stacked on a leading axis, so the layer index can be data. Under tensor parallelism
(``tp`` > 1) the stages run inside `jax.shard_map` over the axis ``tp`` and see their shard of the weights.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from flexjax.models.config import ModelConfig
from flexjax.models.layers import Rotation, product, rms_norm, rotate, swiglu
from flexjax.models.sharding import enter_shards, leave_shards


class DecoderLayer(nnx.Module):
    """One pre-norm transformer layer with grouped-query attention and SwiGLU.

    Parameters (one layer, whole model): input_norm [d], qkv [(Hq + 2 Hkv) D, d], qkv_bias (optional), o [d, Hq D],
    post_norm [d], gate_up [2 ff, d], down [d, ff]. Fused rows are grouped by shard: [q_0|k_0|v_0|q_1|...].
    """

    def __init__(self, config: ModelConfig, dtype, tp: int, rngs: nnx.Rngs):
        self.config, self.tp = config, tp
        d, ff, heads = config.hidden_size, config.intermediate_size, config.num_heads + 2 * config.num_kv_heads
        normal = lambda shape: nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * shape[1] ** -0.5)
        self.input_norm = nnx.Param(jnp.ones(d, dtype))
        self.qkv = normal((heads * config.head_dim, d))
        if config.attention_bias:
            self.qkv_bias = nnx.Param(jnp.zeros(heads * config.head_dim, dtype))
        self.o = normal((d, config.num_heads * config.head_dim))
        self.post_norm = nnx.Param(jnp.ones(d, dtype))
        self.gate_up = normal((2 * ff, d))
        self.down = normal((d, ff))

    def qkv_stage(self, x: jax.Array, rotation: Rotation, adapter) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [T, d] -> q [T, Hq, D] and k [T, Hkv, D], rotated, v [T, Hkv, D]; local heads."""
        width, kv_width = self.config.head_dim, self.kv_heads * self.config.head_dim
        modules = adapter("qkv", *self._qkv(x), (self.query_heads * width, kv_width, kv_width))
        q, k, v = (y.reshape(len(x), -1, width) for y in modules)
        return rotate(q, rotation), rotate(k, rotation), v

    def q_stage(self, x: jax.Array, rotation: Rotation, adapter) -> jax.Array:
        """The q of `qkv_stage`, without the products of k and v."""
        q_width = self.query_heads * self.config.head_dim
        q, _, _ = adapter("qkv", *self._qkv(x, q_width), (q_width, 0, 0))
        return rotate(q.reshape(len(x), -1, self.config.head_dim), rotation)

    def _qkv(self, x: jax.Array, leading: int | None = None) -> tuple[jax.Array, jax.Array]:
        """The input of q, k and v, and what the frozen product makes of it, or its leading columns."""
        h = self._replicated(rms_norm(x, self.input_norm[...], self.config.rms_norm_eps))
        fused = product(h, self.qkv[...][:leading])
        if self.config.attention_bias:
            bias = self.qkv_bias[...][:leading]
            fused = fused + jnp.pad(bias, (0, fused.shape[1] - len(bias)))
        return h, fused

    def output_stage(self, x: jax.Array, attention: jax.Array, adapter) -> jax.Array:
        """x [T, d], attention [T, Hq, D] -> x plus the projected attention, [T, d]."""
        flat = attention.reshape(len(x), -1)
        return self._onto(x, "o", flat, product(flat, self.o[...]), adapter)

    def mlp_input_stage(self, mid: jax.Array, adapter, only: str | None = None) -> tuple[jax.Array, jax.Array]:
        """mid [T, d] -> gate and up, each [T, ff] (local columns). With ``only`` "gate" or "up", at half the cost, that
        one; the other has no columns."""
        gate, up = adapter("gate_up", *self._gate_up(mid, only))
        return gate, up

    def gated_stage(self, mid: jax.Array, adapter) -> tuple[jax.Array, jax.Array]:
        """mid [T, d] -> h = silu(gate) * up, [T, ff] (local columns), and an array in whose leading columns gate and up
        lie side by side where the adapter keeps them."""
        return adapter.gated("gate_up", *self._gate_up(mid, None))

    def _gate_up(self, mid: jax.Array, only: str | None) -> tuple[jax.Array, jax.Array, tuple[int, int]]:
        """The input of gate and up, both without an adapter, and their widths."""
        h = self._replicated(rms_norm(mid, self.post_norm[...], self.config.rms_norm_eps))
        width = self.config.intermediate_size // self.tp
        if only is None:
            return h, product(h, self.gate_up[...]), (width, width)
        gate, up = jnp.split(self.gate_up[...], 2)
        return (h, product(h, gate), (width, 0)) if only == "gate" else (h, product(h, up), (0, width))

    def mlp_output_stage(self, mid: jax.Array, gate: jax.Array, up: jax.Array, adapter) -> jax.Array:
        """mid [T, d], gate and up [T, ff] -> the layer's output, [T, d]."""
        return self.down_stage(mid, swiglu(gate, up), adapter)

    def down_stage(self, mid: jax.Array, h: jax.Array, adapter) -> jax.Array:
        """mid [T, d], h [T, ff] -> the layer's output, [T, d]."""
        return self._onto(mid, "down", h, product(h, self.down[...]), adapter)

    def _onto(self, residual: jax.Array, name: str, h: jax.Array, y: jax.Array, adapter) -> jax.Array:
        """The residual plus y, a frozen product of h, with what the adapter adds to it."""
        if self.tp == 1:
            return adapter.onto(name, h, y, residual)
        return residual + leave_shards(adapter(name, h, y, residual.shape[1:])[0])

    @property
    def query_heads(self) -> int:
        return self.config.num_heads // self.tp

    @property
    def kv_heads(self) -> int:
        return self.config.num_kv_heads // self.tp

    def _replicated(self, h: jax.Array) -> jax.Array:
        return h if self.tp == 1 else enter_shards(h)


class Decoder(nnx.Module):
    """Embedding, stacked layers, final norm and head (the embedding itself when tied).

    Attributes:
        layers: a `DecoderLayer` whose parameters carry a leading axis over layers.
    """

    def __init__(self, config: ModelConfig, dtype, tp: int, rngs: nnx.Rngs):
        self.config = config
        shape = (config.vocab_size, config.hidden_size)
        self.embed = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * 0.02)
        stack = nnx.vmap(lambda r: DecoderLayer(config, dtype, tp, r), in_axes=0)
        self.layers = stack(rngs.split(config.num_layers))
        self.norm = nnx.Param(jnp.ones(config.hidden_size, dtype))
        if not config.tie_word_embeddings:
            self.head = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * 0.02)

    def embedded(self, tokens: jax.Array) -> jax.Array:
        """tokens [T] int32 -> [T, d]."""
        return self.embed[...][tokens]

    def final_norm(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.norm[...], self.config.rms_norm_eps)

    @property
    def head_weight(self) -> jax.Array:
        """[vocab, d]; the embedding itself when tied. A range of the vocabulary lies in one piece."""
        return self.embed[...] if self.config.tie_word_embeddings else self.head[...]

    def logits(self, x: jax.Array) -> jax.Array:
        """Last hidden state [N, d], before the final norm -> logits [N, vocab] float32."""
        contraction = (((1,), (1,)), ((), ()))
        return jax.lax.dot_general(
            self.final_norm(x), self.head_weight, contraction, preferred_element_type=jnp.float32
        )

    def layer_stack(self) -> tuple[nnx.GraphDef, nnx.State]:
        """The definition of one layer and the state of all, each leaf with a leading axis over layers."""
        return nnx.split(self.layers)
