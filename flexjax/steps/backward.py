"""The backward step: one layer, one window. One compiled program serves every layer and every window.

    (weights of the layer, master, pool, gradients, packed batch) -> (gradients, fence)

Each stage of the layer is pulled back with `jax.vjp` of the very function that served the requests, the attention
gradient kernel in between. Names that the tape does not hold are recomputed by the same stages; what nothing needs,
the compiler drops.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from flax import nnx

from flexjax.layout import PAGE_TOKENS
from flexjax.models.bits import from_bits
from flexjax.models.decoder import DecoderLayer
from flexjax.models.dropout import Dropout
from flexjax.models.layers import Rotation, rotary_frequencies, rotation_of
from flexjax.models.trained_adapter import TrainedAdapter
from flexjax.state import LSE, Dimensions, Gradients, Master
from flexjax.step_batch import backward_fields, unpack
from flexjax.steps import tape
from flexjax.steps.forward import read_final, tile_seeds
from flexjax.steps.kernels import Kernels
from pallas_kernels import paged_attention, window_attention_grad


def backward_window(
    definition: nnx.GraphDef,
    dims: Dimensions,
    kernels: Kernels,
    dropout: bool,
    layer_bits: nnx.State,
    master: Master,
    pool: jax.Array,
    gradients: Gradients,
    packed: jax.Array,
) -> tuple[Gradients, jax.Array]:
    """One unit. Reads the cotangent of the layer's output for this window from ``gradients.hidden`` and leaves there
    the cotangent of its input; adds the adapter's gradients; d_k and d_v carry what the window owes to earlier ones,
    and are zero where it has taken what was its own.

    Args:
        definition: of one layer; layer_bits: its weights, as `flexjax.models.bits` carries them.
    """
    batch = unpack(packed, backward_fields(dims))
    layer = nnx.merge(definition, jax.tree.map(lambda bits: from_bits(bits, dims.dtype), layer_bits))
    window = Window(layer, dims, kernels, pool, batch)
    adapter_of = lambda params: trained_adapter(params, dims, kernels, batch, dropout)
    params = {"a": layer_of(master.a, batch.layer), "b": layer_of(master.b, batch.layer)}
    values = window.recomputed(window.taped(), adapter_of(params))
    d_out = jax.lax.dynamic_slice_in_dim(gradients.hidden, batch.start, dims.window, axis=0)
    sums = gradients.d_k, gradients.d_v
    d_x, d_params, (d_k, d_v) = window.pull_back(values, params, adapter_of, d_out, sums)
    hidden = jax.lax.dynamic_update_slice_in_dim(gradients.hidden, d_x, batch.start, axis=0)
    return Gradients(
        a=accumulated(gradients.a, d_params["a"], batch.layer),
        b=accumulated(gradients.b, d_params["b"], batch.layer),
        **dict(hidden=hidden, d_k=d_k, d_v=d_v),
    ), batch.layer


@dataclass(frozen=True)
class Window:
    """One window of one layer: where its values lie and how they follow from each other."""

    layer: DecoderLayer
    dims: Dimensions
    kernels: Kernels
    pool: jax.Array
    batch: SimpleNamespace

    @property
    def rotation(self) -> Rotation:
        """Of every slot at its position in its sequence."""
        positions = self.batch.tile_position[:, None] + jnp.arange(PAGE_TOKENS, dtype=jnp.int32)
        return rotation_of(positions.reshape(-1), rotary_frequencies(self.dims.model))

    def taped(self) -> dict[str, jax.Array]:
        """What the tape holds, by name."""
        dims, batch = self.dims, self.batch
        values = tape.read_named(self.pool, batch.layer, dims.tape_layout, batch.tape_pages, tp=dims.tp)
        heads, width = self.layer.query_heads, dims.model.head_dim
        by_head = [name for name in ("q", "attention") if name in values]
        values |= {name: values[name].reshape(-1, heads, width) for name in by_head}
        if "attention" in values:
            lse = values.pop(LSE) if LSE in values else self.lse_behind_final()
            values["lse"] = tape.unpack_lse(lse, heads)
        return values

    def lse_behind_final(self) -> jax.Array:
        """The layer's part of what lies behind the final hidden state, [window, lse_width]."""
        dims, batch = self.dims, self.batch
        before, layers = dims.model.hidden_size // dims.tp, dims.model.num_layers
        final = read_final(self.pool, dims, batch.final_place, before + layers * dims.lse_width)
        first = before + batch.layer * dims.lse_width
        return jax.lax.dynamic_slice_in_dim(final, first, dims.lse_width, axis=1)

    def recomputed(self, values: dict[str, jax.Array], adapter) -> dict[str, jax.Array]:
        """The taped values and, through the layer's own stages, the missing ones."""
        values = dict(values)
        if "q" not in values:
            values["q"] = self.layer.q_stage(values["x"], self.rotation, adapter)
        if "attention" not in values:
            values["attention"], values["lse"] = self.attention(values["q"])
        if "mid" not in values:
            values["mid"] = self.layer.output_stage(values["x"], values["attention"], adapter)
        missing = [name for name in ("gate", "up") if name not in values]
        if missing:
            only = missing[0] if len(missing) == 1 else None
            gate, up = self.layer.mlp_input_stage(values["mid"], adapter, only)
            values = {"gate": gate, "up": up, **values}
        return values

    def attention(self, q: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Attention of the window's queries again, from the keys and values in pages."""
        batch, tiles = self.batch, self.dims.window // PAGE_TOKENS
        first = batch.start // PAGE_TOKENS
        blocks = jax.lax.dynamic_slice_in_dim(batch.block_start, first, tiles)
        reach = jnp.arange(min(self.dims.context_pages, len(batch.kv_page)), dtype=jnp.int32)
        tables = batch.kv_page[jnp.minimum(blocks[:, None] + reach, len(batch.kv_page) - 1)]
        lengths = jnp.where(batch.tape_pages[:, 0] < 0, 0, PAGE_TOKENS)
        out, lse = paged_attention(
            q.reshape(tiles, PAGE_TOKENS, *q.shape[1:]),
            *(self.pool, batch.layer, tables, batch.tile_position, lengths),
            **self.attention_options(self.kernels.paged_attention),
        )
        return out.reshape(q.shape), lse.reshape(q.shape[:2])

    def attention_options(self, implementation: str) -> dict:
        scale = self.dims.model.head_dim**-0.5
        return dict(kv_heads=self.layer.kv_heads, scale=scale, implementation=implementation)

    def pull_back(self, values, params, adapter_of: Callable, d_out, sums):
        """Cotangents from the layer's output to its input: (d_x, d_params, (d_k, d_v) over the microbatch)."""
        v, layer = SimpleNamespace(**values), self.layer
        stage = lambda mid, gate, up, p: layer.mlp_output_stage(mid, gate, up, adapter_of(p))
        d_mid, d_gate, d_up, d_down = jax.vjp(stage, v.mid, v.gate, v.up, params)[1](d_out)
        stage = lambda mid, p: layer.mlp_input_stage(mid, adapter_of(p))
        d_mid_mlp, d_gate_up = jax.vjp(stage, v.mid, params)[1]((d_gate, d_up))
        stage = lambda x, attention, p: layer.output_stage(x, attention, adapter_of(p))
        d_x, d_attention, d_o = jax.vjp(stage, v.x, v.attention, params)[1](d_mid + d_mid_mlp)
        d_q, d_k, d_v = self.attention_grad(v, d_attention, sums)
        stage = lambda x, p: layer.qkv_stage(x, self.rotation, adapter_of(p))
        (own_k, d_k), (own_v, d_v) = (self.own_rows_taken(d, d_out.dtype) for d in (d_k, d_v))
        d_x_attention, d_qkv = jax.vjp(stage, v.x, params)[1]((d_q, own_k, own_v))
        d_params = jax.tree.map(lambda *parts: sum(parts), d_down, d_gate_up, d_o, d_qkv)
        return d_x + d_x_attention, d_params, (d_k, d_v)

    def attention_grad(self, v: SimpleNamespace, d_attention, sums):
        batch = self.batch
        return window_attention_grad(
            *(v.q, v.attention, v.lse, d_attention, self.pool, batch.layer, batch.kv_page, batch.block_start),
            *(batch.start // PAGE_TOKENS, *sums),
            **self.attention_options(self.kernels.window_attention_grad),
        )

    def own_rows_taken(self, sums: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
        """The window's own rows of d_k or d_v: complete now, since every later window has been handled. And the sums
        without them: zero everywhere after the last window, as the next layer needs them."""
        own = jax.lax.dynamic_slice_in_dim(sums, self.batch.start, self.dims.window, axis=0)
        nothing = jnp.zeros_like(own)
        own, sums = jax.lax.optimization_barrier((own.astype(dtype), sums))  # read first, so that zeros go in place
        return own, jax.lax.dynamic_update_slice_in_dim(sums, nothing, self.batch.start, axis=0)


def layer_of(stacked, index: jax.Array):
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False), stacked)


def trained_adapter(params, dims: Dimensions, kernels: Kernels, batch, dropout: bool) -> TrainedAdapter:
    mask = None
    if dropout:
        rate = jnp.repeat(batch.dropout_rate, PAGE_TOKENS)
        mask = Dropout(tile_seeds(batch.dropout_seed), rate, batch.layer, dims.tp)
    implementations = dict(implementation=kernels.grouped_lora_grad, expansion=kernels.lora_expand)
    return TrainedAdapter(params["a"], params["b"], batch.scale, dropout=mask, **implementations)


def accumulated(totals: dict, parts: dict, layer: jax.Array) -> dict:
    """Add one layer's gradients into the running sums, in place where the sums are donated. Slices instead of
    `.at[].add`: the GPU's compiler makes one operation of each sum, of a scatter two."""

    def add(total, part):
        first = (*[0] * (total.ndim - 3), layer, 0, 0)
        part = part.reshape((1,) * (total.ndim - 2) + part.shape)
        sums = jax.lax.dynamic_slice(total, first, part.shape) + part
        return jax.lax.dynamic_update_slice(total, sums, first)

    return {name: add(totals[name], parts[name]) for name in totals}
